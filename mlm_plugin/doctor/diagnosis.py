"""From numbers to one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from mlm_plugin.doctor.amplification import SUSPICIOUS, amplification
from mlm_plugin.doctor.examination import Patient, Prompts, Reading, encoders_keep, reading_of
from mlm_plugin.doctor.learned_file import Contents
from mlm_plugin.mlm.kept_context import KEPT

__all__ = ["Diagnosis", "Findings", "broken_verdict", "examine_embedding",
           "examine_network", "percent", "verdict_of"]  # fmt: skip

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NUM_BISECTIONS = 4


@dataclass(frozen=True)
class Findings:
    """What a file leaves of the context.

    Attributes:
        whole: of prompts with the trigger, both parts applied.
        text_part: the same with the text encoders' part alone.
        image_part: with the U-Net's part alone.
        leak: of prompts with an ordinary word in place of the trigger.
        curve: strength of the text encoders' part, and the least share that an encoder keeps.
        fit: largest strength, up to 1, at which it keeps ``KEPT``, and at which it is as large as
            its learning rate explains.
        amplified: how many times larger than that it is; ``None`` where it cannot be told.
        ordinary: for an embedding, what an ordinary word keeps; else ``None``.
    """

    whole: Reading
    text_part: Reading
    image_part: Reading
    leak: Reading
    curve: Sequence[tuple[float, float]] = ()
    fit: float = 1.0
    amplified: float | None = None
    ordinary: float | None = None


class Diagnosis(NamedTuple):
    """The verdict.

    Attributes:
        level: ``good``, ``strong`` or ``broken``.
        verdict: one sentence.
        advice: what to do; empty if nothing.
    """

    level: str
    verdict: str
    advice: str = ""


def examine_network(patient: Patient, prompts: Prompts, ordinary: Prompts) -> Findings:
    """Measure a network on its base model.

    Args:
        patient: the file on its model.
        prompts: contexts around the trigger.
        ordinary: the same around an ordinary word.
    """

    @cache
    def states_at(strength: float) -> list[Tensor]:
        return patient.states(prompts, strength=strength)

    def reading(text: float, image: float) -> Reading:
        return reading_of(patient, states_at(text), states_at(0), unet=image)

    def kept_at(strength: float) -> float:
        return min(encoders_keep(patient, states_at(strength), states_at(0)).values())

    amplified = amplification(patient.file)
    curve = [(s, kept_at(s)) for s in STRENGTHS] if patient.has_text_part else []
    return Findings(
        whole=reading(1, 1),
        text_part=reading(1, 0),
        image_part=reading(0, 1),
        leak=reading_of(patient, *(patient.states(ordinary, strength=s) for s in (1, 0))),
        curve=curve,
        fit=min(_fit(curve, kept_at), _as_trained(amplified)),
        amplified=amplified,
    )


def examine_embedding(
    patient: Patient, templates: Sequence[str], *, class_token: str, words: Sequence[str]
) -> Findings:
    """Measure an embedding: what is kept of the contexts of its class word.

    Args:
        patient: the file on its model.
        templates: contexts with ``{}``.
        class_token: the word it is compared with.
        words: ordinary words in the same place, for comparison.
    """
    untrained = patient.states(Prompts(templates, class_token), strength=0)

    def reading(word: str) -> Reading:
        states = patient.states(Prompts(templates, word), strength=1)
        return reading_of(patient, states, untrained)

    ordinary = [reading(word).text for word in words]
    with patient.with_embedding():
        whole = reading(patient.word)
    unchanged = reading(class_token)
    return Findings(
        whole=whole,
        text_part=whole,
        image_part=unchanged,
        leak=unchanged,
        ordinary=sum(ordinary) / len(ordinary),
    )


def verdict_of(findings: Findings) -> Diagnosis:
    """The one sentence, and what to do."""
    if findings.ordinary is not None:
        return _embedding_verdict(findings.whole.text, findings.ordinary)
    if _is_enlarged(findings.amplified):
        return _too_strong(
            findings,
            f"{findings.amplified:.1f} times what its learning rate explains, so it was enlarged "
            "after training; ",
        )
    if findings.text_part.text < KEPT:
        return _too_strong(findings)
    if findings.whole.image is None:
        return Diagnosis(
            "good",
            f"sentences stay whole: {percent(findings.whole.text)} of the context is in the text "
            "encoder's states; what the transformer reads of it is not examined",
        )
    if findings.image_part.image < KEPT:
        lost = percent(1 - findings.image_part.image)
        return Diagnosis(
            "strong",
            f"U-Net part too strong: its keys and values lose {lost} of the context",
            "use it at a lower strength, or train with the MLM term",
        )
    kept = percent(findings.whole.image)
    if findings.whole.image < KEPT:
        return Diagnosis(
            "strong",
            f"the two parts together too strong: {kept} of the context is still read",
            "use it at a lower strength, or train with the MLM term",
        )
    return Diagnosis("good", f"sentences stay whole: {kept} of the context is still read")


def _too_strong(findings: Findings, why: str = "") -> Diagnosis:
    at_fit = percent(_interpolated(findings.curve, findings.fit))
    lost = percent(1 - findings.text_part.text)
    return Diagnosis(
        "strong",
        f"text encoder part too strong: {why}context words lose {lost}",
        "use --fit --output F, or train with the MLM term; "
        f"at {findings.fit:.2g} it keeps {at_fit}",
    )


def _embedding_verdict(kept: float, ordinary: float) -> Diagnosis:
    if kept >= KEPT * ordinary:
        return Diagnosis(
            "good",
            f"the embedding is as quiet as a word: {percent(kept)} of the context is still read, "
            f"{percent(ordinary)} around an ordinary word",
        )
    return Diagnosis(
        "strong",
        f"the embedding is louder than a word: context words lose {percent(1 - kept)}, "
        f"{percent(1 - ordinary)} around an ordinary word",
        "take an earlier file of the run, fewer vectors, or train with the MLM term or "
        "--directional_embedding",
    )


def percent(share: float) -> str:
    """Such as "62 %"; shares just below 1 are not rounded up to it."""
    digits = 1 if min(share, 1 - share) < 0.005 and 0.0005 < share < 0.9995 else 0
    return f"{100 * share:.{digits}f} %"


def _as_trained(amplified: float | None) -> float:
    return round(1 / amplified, 2) if _is_enlarged(amplified) else 1.0


def _is_enlarged(amplified: float | None) -> bool:
    return amplified is not None and amplified >= SUSPICIOUS


def _interpolated(curve: Sequence[tuple[float, float]], strength: float) -> float:
    """The share between two points of the curve."""
    for (low, before), (high, after) in pairwise(curve):
        if low <= strength <= high:
            return before + (after - before) * (strength - low) / (high - low)
    return curve[-1][1]


def _fit(curve, kept_at) -> float:
    """Bisect between the last strength that keeps enough and the first that does not."""
    strengths = [strength for strength, _ in curve]
    too_strong = next((s for s, kept in curve if kept < KEPT), None)
    if too_strong is None:
        return 1.0
    low, high = strengths[max(0, strengths.index(too_strong) - 1)], too_strong
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept_at(middle) >= KEPT else (low, middle)
    return round(low, 2)


def broken_verdict(contents: Contents) -> Diagnosis | None:
    """What can be said without a model; ``None`` if the file is whole."""
    if contents.broken:
        return Diagnosis(
            "broken",
            f"broken: {len(contents.broken)} tensor(s) hold values that are not finite "
            f"({contents.broken[0]}, ...)",
            "take an earlier file of the run, or train again at a lower learning rate",
        )
    if contents.halves:
        return Diagnosis(
            "broken",
            f"broken: {len(contents.halves)} module(s) have one of their two matrices "
            f"({contents.halves[0]}, ...)",
            "get the file again",
        )
    total = sum(contents.counts.values())
    if total and contents.zeros == total:
        return Diagnosis(
            "broken", "empty: nothing in the file changes the model", "train it for longer"
        )
    return None
