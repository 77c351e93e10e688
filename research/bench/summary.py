"""From records to numbers: means over concepts, differences, and fidelity at matched identity.

The unit is the concept: seeds are averaged first. ``PLAN.md`` states the rules. Knows no models.
Shapes: S seeds, K evaluations, C concepts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import harmonic_mean
from typing import NamedTuple

import numpy as np
import torch

from mlm_plugin.evaluation.measures import (
    Mean,
    matched_difference,
    mean_with_interval,
    pooled,
    sign_flip_p_value,
)
from research.bench.records import Record

__all__ = [
    "Comparison",
    "Curve",
    "compare",
    "curves_of",
    "holm",
    "num_before_first_evaluation",
]

Curve = np.ndarray
"""Identity and prompt fidelity at each evaluation, ``(K, 2)``; the first is the untrained model."""


class Comparison(NamedTuple):
    """One arm minus another.

    Attributes:
        by_concept: difference in fidelity at matched identity of every concept.
        matched: their mean.
        p_value: of the exact sign flips, uncorrected.
        fidelity: difference in prompt fidelity after the last step.
        identity: difference in identity after the last step.
        score: difference in their harmonic mean, by which settings are searched.
    """

    by_concept: Mapping[str, float]
    matched: Mean
    p_value: float
    fidelity: Mean
    identity: Mean
    score: Mean


def curves_of(records: Iterable[Record], untrained: Iterable[Record]) -> dict[str, Curve]:
    """By concept, the mean over seeds of an arm's evaluations, behind that of the untrained model.

    Args:
        records: the arm's.
        untrained: of the untrained model with the concepts' names; the same seeds are used.
    """
    starts = {(r["concept"], r["seed"]): r["evaluations"] for r in untrained}
    found = defaultdict(list)
    for record in records:
        start = starts[record["concept"], record["seed"]]
        evaluations = np.array([*start, *record["evaluations"]], float)
        found[record["concept"]].append(evaluations[:, [2, 1]])
    return {concept: np.mean(curves_SK2, axis=0) for concept, curves_SK2 in found.items()}


def compare(ours: Mapping[str, Curve], theirs: Mapping[str, Curve]) -> Comparison | None:
    """One arm minus another over the concepts that both have; ``None`` if there are none."""
    concepts = [concept for concept in ours if concept in theirs]
    if not concepts:
        return None
    by_concept = {c: matched_difference(ours[c], theirs[c]) for c in concepts}
    last_C2 = torch.tensor(np.stack([ours[c][-1] - theirs[c][-1] for c in concepts]))
    scores = [harmonic_mean(ours[c][-1]) - harmonic_mean(theirs[c][-1]) for c in concepts]
    matched_C = torch.tensor(list(by_concept.values()), dtype=torch.float64)
    return Comparison(
        by_concept,
        mean_with_interval(matched_C),
        sign_flip_p_value(matched_C),
        mean_with_interval(last_C2[:, 1]),
        mean_with_interval(last_C2[:, 0]),
        mean_with_interval(torch.tensor(scores, dtype=torch.float64)),
    )


def num_before_first_evaluation(ours: Mapping[str, Curve], theirs: Mapping[str, Curve]) -> int:
    """Concepts for which ``theirs`` is read between the untrained model and its first evaluation.

    There the fidelity is interpolated and belongs to no trained model.
    """
    pairs = [(pooled(ours[c]), pooled(theirs[c])) for c in ours if c in theirs]
    return sum(min(a[-1, 0], b[-1, 0]) < b[1, 0] for a, b in pairs if len(b) > 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given.

    ``p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`` over the m sorted p-values.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    m, greatest = len(p_values), 0.0
    corrected = [0.0] * m
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        greatest = max(greatest, min(1.0, (m - rank) * p_values[index]))
        corrected[index] = greatest
    return corrected
