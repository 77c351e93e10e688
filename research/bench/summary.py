"""From records to numbers: means over concepts, differences, and fidelity at matched identity.

The unit is the concept: seeds are averaged first. ``PLAN.md`` states the rules. Knows no models.
Shapes: S seeds, K looks, C concepts, P points of a pooled curve.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mlm_plugin.evaluation.measures import Mean, mean_with_interval, sign_flip_p_value

__all__ = [
    "Comparison",
    "Curve",
    "compare",
    "curves_of",
    "holm",
    "matched_difference",
    "pooled",
]

Record = Mapping[str, Any]
Curve = np.ndarray
"""Identity and prompt fidelity at each look, ``(K, 2)``; the first is the untrained model."""


class Comparison(NamedTuple):
    """One arm minus another.

    Attributes:
        by_concept: difference in fidelity at matched identity of every concept.
        matched: their mean.
        p_value: of the exact sign flips, uncorrected.
        fidelity: difference in prompt fidelity after the last step.
        identity: difference in identity after the last step.
    """

    by_concept: Mapping[str, float]
    matched: Mean
    p_value: float
    fidelity: Mean
    identity: Mean


def curves_of(records: Iterable[Record], untrained: Iterable[Record]) -> dict[str, Curve]:
    """By concept, the mean over seeds of an arm's looks, behind that of the untrained model.

    Args:
        records: the arm's.
        untrained: of the untrained model with the concepts' names; the same seeds are used.
    """
    starts = {(r["concept"], r["seed"]): r["looks"] for r in untrained}
    found = defaultdict(list)
    for record in records:
        start = starts[record["concept"], record["seed"]]
        looks = np.array([*start, *record["looks"]], float)
        found[record["concept"]].append(looks[:, [2, 1]])
    return {concept: np.mean(curves_SK2, axis=0) for concept, curves_SK2 in found.items()}


def pooled(curve_K2: Curve) -> Curve:
    """The curve with looks pooled until identity rises from each point to the next, ``(P, 2)``.

    Source: pool adjacent violators (Ayer et al. 1955), applied to both coordinates.
    """
    blocks: list[tuple[np.ndarray, int]] = []
    for point in curve_K2:
        mean, count = point, 1
        while blocks and blocks[-1][0][0] >= mean[0]:
            before, num_before = blocks.pop()
            mean = (num_before * before + count * mean) / (num_before + count)
            count += num_before
        blocks.append((mean, count))
    return np.stack([mean for mean, _count in blocks])


def matched_difference(ours_K2: Curve, theirs_K2: Curve) -> float:
    """Fidelity of one curve over another at the lower of the identities at which they end.

    Both are pooled and linear between their points. Exchanging them changes the sign alone.
    """
    ours_P2, theirs_P2 = pooled(ours_K2), pooled(theirs_K2)
    identity = min(ours_P2[-1, 0], theirs_P2[-1, 0])
    return float(np.interp(identity, *ours_P2.T) - np.interp(identity, *theirs_P2.T))


def compare(ours: Mapping[str, Curve], theirs: Mapping[str, Curve]) -> Comparison | None:
    """One arm minus another over the concepts that both have; ``None`` if there are none."""
    concepts = [concept for concept in ours if concept in theirs]
    if not concepts:
        return None
    by_concept = {c: matched_difference(ours[c], theirs[c]) for c in concepts}
    last_C2 = torch.tensor(np.stack([ours[c][-1] - theirs[c][-1] for c in concepts]))
    matched_C = torch.tensor(list(by_concept.values()), dtype=torch.float64)
    return Comparison(
        by_concept,
        mean_with_interval(matched_C),
        sign_flip_p_value(matched_C),
        mean_with_interval(last_C2[:, 1]),
        mean_with_interval(last_C2[:, 0]),
    )


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
