"""Shared parts of the evaluation page and the comparison page. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from mlm_plugin.evaluation.charts import Bar, bar_chart
from mlm_plugin.evaluation.rendering import ENVIRONMENT, letter
from mlm_plugin.evaluation.results import IMAGE_MEASURES, Measure, encoders_of

__all__ = ["TextEncoderMeasures", "axis_title", "position", "shown", "text_encoder_measures"]

MAIN_SCORES = ("prompt_fidelity", "identity", "clip_t", "clip_i", "dino")
ROLES = {"clip_t": " (prompt fidelity)", "dino": " (likeness)", "clip_i": " (likeness)"}
FILLERS = {"concept": "with the concept", "class": "with the class word",
           "random": "with a random word"}  # fmt: skip


class TextEncoderMeasures(NamedTuple):
    """Measures of one text encoder in the runs that have it.

    Attributes:
        name: its name in the results.
        texts: its results by run number.
        chart: chart of the masked words; None if no words were masked.
    """

    name: str
    texts: dict[int, Mapping[str, Any]]
    chart: Markup | None

    def cells(self, group: str, key: str) -> list[str]:
        """One number of every run as text; empty if no run has it."""
        values = [(text[group] or {}).get(key) for text in self.texts.values()]
        if all(value is None for value in values):
            return []
        number = Measure("", 0, "", digits=4)
        return [shown(value, number) for value in values]


def text_encoder_measures(runs: Sequence[Mapping[str, Any]]) -> list[TextEncoderMeasures]:
    """Every text encoder that any of the runs has."""
    groups = []
    for encoder in encoders_of(runs):
        texts = {i: run["text"][encoder] for i, run in enumerate(runs) if encoder in run["text"]}
        groups.append(TextEncoderMeasures(encoder, texts, _masked_words_chart(texts, len(runs))))
    return groups


def _masked_words_chart(texts: Mapping[int, Mapping[str, Any]], num_runs: int) -> Markup | None:
    """Accuracies by what is in the concept's place."""
    bars = []
    for key, label in FILLERS.items():
        for i, text in texts.items():
            if text["masked_words"]:
                words = text["masked_words"][key]
                values = f"{100 * words['accuracy']:.1f} %, {words['loss']:.2f} nats"
                name = label if num_runs == 1 else f"{letter(i)}, {label}"
                bars.append(Bar(name, words["accuracy"], values, series=i))
    return bar_chart(bars, title="hidden words named correctly") if bars else None


def position(row: Mapping[str, Any], axes: tuple[str, str]) -> tuple[float, float] | None:
    """Coordinates of a prompt for two measures; None if one is missing."""
    x, y = (row["scores"].get(name) for name in axes)
    return None if x is None or y is None else (x, y)


def axis_title(name: str) -> str:
    """Title of the axis for a measure."""
    return IMAGE_MEASURES[name].title + ROLES.get(name, "")


def shown(value: float | None, measure: Measure) -> str:
    """A formatted value; a dash if there is none."""
    if value is None:
        return "–"
    if measure.percent:
        return f"{100 * value:.{measure.digits}f} %"
    return f"{value:.{measure.digits}f}".replace("-", "−")


def _split_at_concept(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The prompt before the concept, the concept, and the rest."""
    before, _, after = row["template"].partition("{}")
    prompt = row["prompt"]
    concept = prompt[len(before) : len(prompt) - len(after)]
    if before + concept + after != prompt:  # an article was corrected
        return prompt, "", ""
    return before, concept, after


def _main_scores(scores: Mapping[str, float | None]) -> list[tuple[Measure, float]]:
    """The most informative measures of a prompt, as far as available."""
    return [(IMAGE_MEASURES[name], scores[name]) for name in MAIN_SCORES
            if scores.get(name) is not None]  # fmt: skip


ENVIRONMENT.filters |= {
    "shown": shown,
    "split_at_concept": _split_at_concept,
    "main_scores": _main_scores,
}
