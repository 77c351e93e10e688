"""The search for an arm's setting: successive halving on the tuning concepts, alike for all arms.

Every setting is tried on the first concepts, the better half goes on to the next ones. Knows no
models and does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import harmonic_mean, mean
from typing import NamedTuple

from research.bench.plan import Arm, Flags, Trial, tuning_trials
from research.bench.records import Record, key_of

__all__ = ["NUM_TRIALS", "ROUNDS", "Search", "first_search", "score", "search"]


class Round(NamedTuple):
    """How many settings are tried, and on which of the tuning concepts."""

    num_settings: int
    concepts: slice


ROUNDS = (Round(6, slice(0, 2)), Round(3, slice(2, 4)), Round(2, slice(4, 6)))
NUM_TRIALS = 22  # of a grid: 6 * 2 + 3 * 2 + 2 * 2


class Search(NamedTuple):
    """Where a search is.

    Attributes:
        missing: the trials that the current round lacks; none when the search is complete.
        scores: mean score of each setting still in the race over all its trials, best first.
    """

    missing: list[Trial]
    scores: list[tuple[Flags, float]]

    @property
    def winner(self) -> Flags | None:
        """The setting found; ``None`` while the search is incomplete."""
        return None if self.missing else self.scores[0][0]


def score(record: Record) -> float:
    """Harmonic mean of prompt fidelity and identity after the last step."""
    _step, fidelity, identity = record["evaluations"][-1]
    return harmonic_mean((fidelity, identity))


def search(arm: Arm, records: Mapping[str, Record]) -> Search:
    """The state of an arm's search: of its grid, then of its second one where it has one.

    Args:
        arm: its grids are searched.
        records: finished tuning trials by key.
    """
    first = first_search(arm, records)
    if first.missing or not arm.second_grid:
        return first
    second = _halving(arm, arm.second_grid, records)
    return Search(second.missing, _best_first([*first.scores, *second.scores]))


def first_search(arm: Arm, records: Mapping[str, Record]) -> Search:
    """The state of the search of an arm's first grid; arguments as in ``search``."""
    return _halving(arm, arm.grid, records)


def _halving(arm: Arm, grid: Sequence[Flags], records: Mapping[str, Record]) -> Search:
    settings = grid
    done: list[Trial] = []
    ranked: list[tuple[Flags, float]] = []
    for num_settings, concepts in ROUNDS:
        settings = settings[:num_settings]
        trials = tuning_trials(arm, settings, concepts)
        missing = [trial for trial in trials if key_of(trial) not in records]
        if missing:
            return Search(missing, ranked)
        done += trials
        ranked = _ranked(settings, done, records)
        settings = [setting for setting, _score in ranked]
    return Search([], ranked)


def _ranked(
    settings: Sequence[Flags], done: Sequence[Trial], records: Mapping[str, Record]
) -> list[tuple[Flags, float]]:
    """Best first; of equal ones, the first in the grid."""
    means = [
        mean(score(records[key_of(trial)]) for trial in done if trial.setting == setting)
        for setting in settings
    ]
    return _best_first(zip(settings, means, strict=True))


def _best_first(scores: Iterable[tuple[Flags, float]]) -> list[tuple[Flags, float]]:
    return sorted(scores, key=lambda pair: -pair[1])
