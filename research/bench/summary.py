"""From records to numbers: means, paired differences, and fidelity at equal identity.

A *run* is one setting on one concept with one seed; its *curve* is its evaluations over the
training. Runs of two settings are paired by concept and seed. Knows no models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mlm_plugin.evaluation.measures import (
    Mean,
    best_at_level,
    mean_with_interval,
    sign_flip_p_value,
)

__all__ = [
    "MEASURES",
    "Comparison",
    "Difference",
    "Row",
    "SettingKey",
    "comparisons",
    "curves",
    "difference",
    "fidelity_at",
    "matched_difference",
    "summarize",
]

MEASURES = ("prompt_fidelity", "identity", "clip_t", "clip_i")
Record = Mapping[str, Any]
RunKey = tuple[str, int]  # concept, seed


class SettingKey(NamedTuple):
    """What identifies a setting."""

    method: str
    regularizer: str
    weight: float
    variant: str

    @property
    def plain(self) -> SettingKey:
        """The setting to compare with."""
        return SettingKey(self.method, "plain", 0.0, "")

    @property
    def title(self) -> str:
        """Name in tables."""
        if self.regularizer == "plain":
            return self.method
        weight = f" {self.weight:g}" if self.weight else ""
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.method} + {self.regularizer}{weight}{variant}"


class Difference(NamedTuple):
    """Mean of paired differences, with 95 % interval and p-value."""

    value: Mean
    p_value: float


class Row(NamedTuple):
    """One line of the table."""

    setting: SettingKey
    means: dict[str, Mean]
    seconds_per_step: float
    fidelity: Difference | None  # to the plain run of the method, at the last evaluation
    identity: Difference | None
    matched: Difference | None  # in fidelity, at the identity that both runs reach


class Comparison(NamedTuple):
    """The MLM term minus a rival on the same method, after the last step."""

    ours: SettingKey
    theirs: SettingKey
    num_runs: int
    fidelity: Difference
    identity: Difference
    matched: Difference


def curves(records: Sequence[Record]) -> dict[SettingKey, dict[RunKey, list[Record]]]:
    """Evaluations by setting and run, in the order of the steps."""
    found: dict[SettingKey, dict[RunKey, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["step"]):
        found[_setting_of(record)][record["concept"], record["seed"]].append(record)
    return {setting: dict(runs) for setting, runs in found.items()}


def fidelity_at(identity: float, curve: Sequence[Record]) -> float:
    """Best prompt fidelity of a run among models of at least this identity.

    Linear between the Pareto-optimal evaluations. Below their lowest identity it is their highest
    fidelity; above the highest identity it is ``nan``.
    """
    points = [(record["identity"], record["prompt_fidelity"]) for record in curve]
    return best_at_level(identity, points)


def matched_difference(
    ours: Mapping[RunKey, Sequence[Record]], theirs: Mapping[RunKey, Sequence[Record]]
) -> Difference | None:
    """Fidelity of one setting over another at the greatest identity that both runs reach."""
    values = []
    for run in sorted(ours.keys() & theirs.keys()):
        reached = min(max(record["identity"] for record in runs[run]) for runs in (ours, theirs))
        values.append(fidelity_at(reached, ours[run]) - fidelity_at(reached, theirs[run]))
    return _difference(values)


def difference(
    name: str, ours: Mapping[RunKey, Sequence[Record]], theirs: Mapping[RunKey, Sequence[Record]]
) -> Difference | None:
    """A measure of one setting over another at their last evaluations."""
    both = sorted(ours.keys() & theirs.keys())
    return _difference([ours[run][-1][name] - theirs[run][-1][name] for run in both])


def summarize(records: Sequence[Record]) -> list[Row]:
    """The table, in the order in which settings first appear."""
    by_setting = curves(records)
    return [_row(setting, by_setting) for setting in _settings(records)]


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """The first MLM setting of a method against those that are neither plain nor MLM."""
    by_setting = curves(records)
    settings = _settings(records)
    found = []
    for theirs in settings:
        ours = next(
            (s for s in settings if s[:2] == (theirs.method, "mlm") and not s.variant), None
        )
        if ours is None or theirs.regularizer in ("plain", "mlm"):
            continue
        pair = by_setting[ours], by_setting[theirs]
        num_runs = len(pair[0].keys() & pair[1].keys())
        if num_runs:
            fidelity, identity = difference("prompt_fidelity", *pair), difference("identity", *pair)
            found.append(
                Comparison(ours, theirs, num_runs, fidelity, identity, matched_difference(*pair))
            )
    return found


def _setting_of(record: Record) -> SettingKey:
    return SettingKey(*(record[name] for name in SettingKey._fields))


def _settings(records: Sequence[Record]) -> list[SettingKey]:
    """Settings in the order in which they first appear."""
    return list(dict.fromkeys(map(_setting_of, records)))


def _row(
    setting: SettingKey, by_setting: Mapping[SettingKey, Mapping[RunKey, list[Record]]]
) -> Row:
    runs = by_setting[setting]
    last = [runs[run][-1] for run in sorted(runs)]
    means = {
        name: mean_with_interval(torch.tensor([record[name] for record in last]))
        for name in MEASURES
    }
    seconds = float(np.median([record["seconds_per_step"] for record in last]))
    plain = by_setting.get(setting.plain)
    if plain is None or setting == setting.plain:
        return Row(setting, means, seconds, None, None, None)
    return Row(
        setting,
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
