"""The numbers of an evaluation on disk: ``results.json``, and two tables.

``results.csv`` has a line for each prompt, ``text.csv`` one for each text encoder.

Knows the format of the files, and the name and meaning of each measure.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, read_text
from mlm_plugin.pocket.world import ATTRIBUTES

__all__ = [
    "AXES",
    "ENCODER_NAMES",
    "FORMAT",
    "IMAGE_MEASURES",
    "RESULTS_FILE",
    "TEXT_MEASURES",
    "Measure",
    "axes_of",
    "encoders_of",
    "measure_key",
    "measures_of",
    "read_results",
    "value_of",
    "write_results",
]

FORMAT = "mlm_plugin evaluation 2"
RESULTS_FILE = "results.json"
CSV_FILE = "results.csv"
TEXT_CSV_FILE = "text.csv"

ENCODER_NAMES: dict[int, tuple[str, ...]] = {1: ("text_encoder",), 2: ("clip_l", "clip_g")}
"""Names of a model's text encoders in results, by their number; SDXL has two."""


class Measure(NamedTuple):
    """How to show a measure.

    Attributes:
        title: short name.
        better: 1 = higher, -1 = lower, 0 = neither.
        meaning: a short explanation.
        digits: number of decimals.
        percent: whether it is a share.
    """

    title: str
    better: int
    meaning: str
    digits: int = 3
    percent: bool = False


ORACLE_MEASURES: dict[str, Measure] = {
    "prompt_fidelity": Measure(
        "Prompt fidelity", 1, "share of what a prompt asks, but the subject, that is seen", 1, True
    ),
    "identity": Measure("Identity", 1, "the concept is seen as it is drawn"),
    **{
        f"seen_{name}": Measure(f"{name.capitalize()} seen", 1, "as the prompt asks", 1, True)
        for name in ATTRIBUTES
    },
}
"""Measures by the oracle of a pocket model."""

IMAGE_MEASURES: dict[str, Measure] = ORACLE_MEASURES | {
    "clip_t": Measure("CLIP-T", 1, "prompt fidelity: picture and prompt without the placeholder"),
    "clip_i": Measure("CLIP-I", 1, "likeness: pictures and photos"),
    "dino": Measure("DINO", 1, "likeness, stricter: pictures and photos"),
    "dino_fg": Measure("DINO-FG", 1, "likeness of the foregrounds"),
    "dino_bg": Measure("DINO-BG", -1, "likeness of the backgrounds: what leaked from the photos"),
    "diversity_dino": Measure("Diversity", 1, "distance between pictures of a prompt, by DINO"),
    "diversity_clip": Measure(
        "Diversity, CLIP", 1, "distance between pictures of a prompt, by CLIP"
    ),
}
TEXT_MEASURES: dict[str, Measure] = {
    "masked_accuracy": Measure("Masked words", 1, "hidden words named beside the concept", 1, True),
    "masked_loss": Measure("Masked-word loss", -1, "nats per hidden token beside the concept", 2),
    "text_collapse": Measure(
        "Prompt collapse", -1, "0: prompts as varied as the class's; 1: all alike"
    ),
    "text_inter": Measure(
        "Distance to class", 0, "states of prompts with the concept and the class"
    ),
    "drift_everyday": Measure("Encoder drift", -1, "change of the states of everyday prompts", 4),
    "embedding_norm": Measure("Embedding norm", 0, "length of the concept's input vectors"),
    "embedding_cosine": Measure(
        "Embedding cosine", 0, "of the concept's and the class word's input"
    ),
}
AXES = (("prompt_fidelity", "identity"), ("clip_t", "dino"), ("clip_t", "clip_i"))
"""Pairs of measures that conflict, the most informative first."""


def measure_key(measure: str, encoder: str) -> str:
    """A text measure of one of the encoders: ``masked_accuracy``, ``masked_accuracy_clip_l``."""
    return measure if encoder in ENCODER_NAMES[1] else f"{measure}_{encoder}"


def encoders_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the text encoders that any of the runs has, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs for name in run["text"]))


def measures_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """Every measure that any of the runs may have, text measures once for each encoder."""
    encoders = encoders_of(runs)
    text = {}
    for name, measure in TEXT_MEASURES.items():
        for encoder in encoders:
            key = measure_key(name, encoder)
            title = measure.title if key == name else f"{measure.title}, {encoder}"
            text[key] = measure._replace(title=title)
    return IMAGE_MEASURES | text


def value_of(results: Mapping[str, Any], measure: str) -> float | None:
    """The value of a measure; None if it is missing."""
    if measure in IMAGE_MEASURES:
        return results["measures"].get(measure, {}).get("mean")
    return results["text_headline"].get(measure)


def axes_of(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The first of ``AXES`` that all runs have."""
    found = (pair for pair in AXES if all(set(pair) <= run["measures"].keys() for run in runs))
    return next(found, None)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the three files, each completely or not at all."""
    with atomic_path(folder / RESULTS_FILE) as temporary:
        text = json.dumps({"format": FORMAT, **results}, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
    _write_csv(folder / CSV_FILE, _prompt_lines(results))
    _write_csv(folder / TEXT_CSV_FILE, _text_lines(results["text"]))


def _prompt_lines(results: Mapping[str, Any]) -> list[list[Any]]:
    """Header and one line per prompt: scores of its pictures, distance to the class in text."""
    prompts = results["prompts"]
    columns = list(dict.fromkeys(name for row in prompts for name in row["scores"]))
    distances = {
        measure_key("text_inter", encoder): text["distance_per_prompt"]
        for encoder, text in results["text"].items()
    }
    lines = [["number", "prompt", "scored_text", *columns, *distances]]
    for i, row in enumerate(prompts):
        values = [row["scores"].get(name) for name in columns]
        values += [per_prompt[i] for per_prompt in distances.values()]
        lines.append([i + 1, row["prompt"], row["text"], *map(_cell, values)])
    return lines


def _text_lines(text: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Header and one line per text encoder: every number, named by its path in the JSON."""
    numbers = {encoder: dict(_numbers(groups)) for encoder, groups in text.items()}
    columns = list(dict.fromkeys(name for row in numbers.values() for name in row))
    lines = [["text_encoder", *columns]]
    for encoder, row in numbers.items():
        lines.append([encoder, *(_cell(row.get(name)) for name in columns)])
    return lines


def _numbers(groups: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in groups.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{path}{name}", value


def _cell(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:.6f}"


def _write_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results of a finished evaluation.

    Raises:
        UserError: there are none, or they are from another program or version.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise UserError(f"--compare: {folder} holds no {RESULTS_FILE}: no finished evaluation")
    try:
        results = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"--compare: {path} is not valid JSON; run that evaluation again"
        ) from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(
            f"--compare: {path} is not of the format {FORMAT!r}; run that evaluation again, its "
            "pictures stay"
        )
    return results
