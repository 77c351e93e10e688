"""From records to numbers: means, paired differences, and fidelity at equal identity.

A *run* is one arm on one concept with one seed; its *curve* are its looks over the training. Runs
of two arms are paired by concept and seed. Knows no models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mlm_plugin.evaluation.measures import Mean, mean_with_interval, sign_flip_p_value

__all__ = [
    "MEASURES",
    "ArmKey",
    "Difference",
    "Duel",
    "Row",
    "curves",
    "difference",
    "duels",
    "fidelity_at",
    "matched_difference",
    "summarize",
]

MEASURES = ("prompt_fidelity", "identity", "clip_t", "clip_i")
Record = Mapping[str, Any]
RunKey = tuple[str, int]  # concept, seed


class ArmKey(NamedTuple):
    """What tells arms apart."""

    method: str
    regularizer: str
    weight: float
    variant: str

    @property
    def plain(self) -> ArmKey:
        """The arm that it is compared with."""
        return ArmKey(self.method, "plain", 0.0, "")

    @property
    def title(self) -> str:
        """As tables name it."""
        if self.regularizer == "plain":
            return self.method
        weight = f" {self.weight:g}" if self.weight else ""
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.method} + {self.regularizer}{weight}{variant}"


class Difference(NamedTuple):
    """Mean of paired differences, their 95 % interval and the chance of it without any effect."""

    value: Mean
    p_value: float


class Row(NamedTuple):
    """One line of the table."""

    arm: ArmKey
    means: dict[str, Mean]
    seconds_per_step: float
    fidelity: Difference | None  # against the plain arm of the method, at the last look
    identity: Difference | None
    matched: Difference | None  # of fidelity, at the identity that both runs reach


class Duel(NamedTuple):
    """The MLM term against a rival on the same method: ours minus theirs, at the last look."""

    ours: ArmKey
    theirs: ArmKey
    num_runs: int
    fidelity: Difference
    identity: Difference
    matched: Difference


def curves(records: Sequence[Record]) -> dict[ArmKey, dict[RunKey, list[Record]]]:
    """Looks by arm and run, in the order of the steps."""
    found: dict[ArmKey, dict[RunKey, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["step"]):
        found[_arm_of(record)][record["concept"], record["seed"]].append(record)
    return {arm: dict(runs) for arm, runs in found.items()}


def fidelity_at(identity: float, curve: Sequence[Record]) -> float:
    """Best prompt fidelity of a run among models of at least this identity.

    Linear between the looks that no other look of the run beats on both counts. Below the least
    identity of these it is their highest fidelity; ``nan`` above the greatest.
    """
    points = sorted((look["identity"], look["prompt_fidelity"]) for look in curve)
    front: list[tuple[float, float]] = []
    for point in reversed(points):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    xs, ys = zip(*reversed(front), strict=True)
    return float(np.interp(identity, xs, ys, right=np.nan))


def matched_difference(
    ours: Mapping[RunKey, Sequence[Record]], theirs: Mapping[RunKey, Sequence[Record]]
) -> Difference | None:
    """Fidelity of one arm over another at the greatest identity that both runs of a pair reach."""
    values = []
    for run in sorted(ours.keys() & theirs.keys()):
        reached = min(max(look["identity"] for look in arm[run]) for arm in (ours, theirs))
        values.append(fidelity_at(reached, ours[run]) - fidelity_at(reached, theirs[run]))
    return _difference(values)


def difference(
    name: str, ours: Mapping[RunKey, Sequence[Record]], theirs: Mapping[RunKey, Sequence[Record]]
) -> Difference | None:
    """A measure of one arm over another at their last looks."""
    both = sorted(ours.keys() & theirs.keys())
    return _difference([ours[run][-1][name] - theirs[run][-1][name] for run in both])


def summarize(records: Sequence[Record]) -> list[Row]:
    """The table, in the order in which arms first appear."""
    by_arm = curves(records)
    return [_row(arm, by_arm) for arm in _arms(records)]


def duels(records: Sequence[Record]) -> list[Duel]:
    """The first MLM arm of a method against every arm of it that is neither plain nor MLM."""
    by_arm = curves(records)
    arms = _arms(records)
    found = []
    for theirs in arms:
        ours = next((a for a in arms if a[:2] == (theirs.method, "mlm") and not a.variant), None)
        if ours is None or theirs.regularizer in ("plain", "mlm"):
            continue
        pair = by_arm[ours], by_arm[theirs]
        num_runs = len(pair[0].keys() & pair[1].keys())
        if num_runs:
            fidelity, identity = difference("prompt_fidelity", *pair), difference("identity", *pair)
            found.append(
                Duel(ours, theirs, num_runs, fidelity, identity, matched_difference(*pair))
            )
    return found


def _arm_of(record: Record) -> ArmKey:
    return ArmKey(*(record[name] for name in ArmKey._fields))


def _arms(records: Sequence[Record]) -> list[ArmKey]:
    """In the order in which they first appear."""
    return list(dict.fromkeys(map(_arm_of, records)))


def _row(arm: ArmKey, by_arm: Mapping[ArmKey, Mapping[RunKey, list[Record]]]) -> Row:
    runs = by_arm[arm]
    last = [runs[run][-1] for run in sorted(runs)]
    means = {
        name: mean_with_interval(torch.tensor([look[name] for look in last])) for name in MEASURES
    }
    seconds = float(np.median([look["seconds_per_step"] for look in last]))
    plain = by_arm.get(arm.plain)
    if plain is None or arm == arm.plain:
        return Row(arm, means, seconds, None, None, None)
    return Row(
        arm,
        means,
        seconds,
        difference("prompt_fidelity", runs, plain),
        difference("identity", runs, plain),
        matched_difference(runs, plain),
    )


def _difference(values: Sequence[float]) -> Difference | None:
    if not values:
        return None
    tensor = torch.tensor(values)
    return Difference(mean_with_interval(tensor), sign_flip_p_value(tensor))
