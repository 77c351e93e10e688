"""The numbers of an evaluation on disk: ``results.json``, and ``results.csv`` by prompt.

Knows the shape of the files, and what each measure is called and means.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, read_text
from mlm_plugin.pocket.world import ATTRIBUTES

__all__ = [
    "AXES",
    "FORMAT",
    "IMAGE_MEASURES",
    "MEASURES",
    "RESULTS_FILE",
    "TEXT_MEASURES",
    "Measure",
    "axes_of",
    "read_results",
    "value_of",
    "write_results",
]

FORMAT = "mlm_plugin evaluation 1"
RESULTS_FILE = "results.json"
CSV_FILE = "results.csv"


class Measure(NamedTuple):
    """How to show a measure.

    Attributes:
        title: short name.
        better: 1 = higher, -1 = lower, 0 = neither.
        meaning: half a sentence.
        digits: behind the point.
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
"""By the oracle of a pocket model."""

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
MEASURES = IMAGE_MEASURES | TEXT_MEASURES
AXES = (("prompt_fidelity", "identity"), ("clip_t", "dino"), ("clip_t", "clip_i"))
"""Pairs of measures that pull against each other, the most telling first."""


def value_of(results: Mapping[str, Any], measure: str) -> float | None:
    """The one number of a measure; None where it was not taken."""
    if measure in IMAGE_MEASURES:
        return results["measures"].get(measure, {}).get("mean")
    return (results["text_headline"] or {}).get(measure)


def axes_of(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The first of ``AXES`` that all runs have."""
    found = (pair for pair in AXES if all(set(pair) <= run["measures"].keys() for run in runs))
    return next(found, None)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all."""
    with atomic_path(folder / RESULTS_FILE) as temporary:
        text = json.dumps({"format": FORMAT, **results}, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
    columns = _columns(results["prompts"])
    with atomic_path(folder / CSV_FILE) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["number", "prompt", "scored_text", *columns])
            for number, row in enumerate(results["prompts"], start=1):
                values = [row["scores"].get(name) for name in columns]
                shown = ["" if value is None else f"{value:.6f}" for value in values]
                writer.writerow([number, row["prompt"], row["text"], *shown])


def _columns(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in prompts for name in row["scores"]))


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results of a finished evaluation.

    Raises:
        UserError: there are none, or they are of another program or version.
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
        raise UserError(f"--compare: {path} is not of the format {FORMAT!r}; run it again")
    return results
