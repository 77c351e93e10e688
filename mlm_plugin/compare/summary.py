"""From records to numbers: subjects are the unit, seeds are averaged first. Knows no files.

A record has ``arm``, ``subject``, ``seed``, ``step`` and ``measures`` by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlm_plugin.evaluation import measures
from mlm_plugin.evaluation.measures import mean_with_interval, sign_flip_p_value
from mlm_plugin.evaluation.results import AXES, IMAGE_MEASURES

__all__ = [
    "axes_of",
    "by_subject",
    "complete_runs",
    "differences",
    "last_evaluation",
    "matched_difference",
    "means",
]

Record = Mapping[str, Any]
Run = tuple[str, int]  # subject, seed


def axes_of(records: Sequence[Record]) -> tuple[str, str] | None:
    """Text score and likeness: the first of ``AXES`` that all records have."""
    return next(
        (pair for pair in AXES if all(set(pair) <= r["measures"].keys() for r in records)), None
    )


def complete_runs(records: Sequence[Record], arms: Collection[str]) -> list[Record]:
    """Those of subjects and seeds that every arm has learned; all, while there are none.

    So that arms are not compared on different subjects while the others are still in training.
    """
    arms_of: dict[Run, set[str]] = {}
    for record in records:
        arms_of.setdefault((record["subject"], record["seed"]), set()).add(record["arm"])
    runs = {run for run, found in arms_of.items() if found == set(arms)}
    return [r for r in records if (r["subject"], r["seed"]) in runs] or list(records)


def last_evaluation(records: Sequence[Record]) -> list[Record]:
    """Those of the last step."""
    last = max(record["step"] for record in records)
    return [record for record in records if record["step"] == last]


def by_subject(records: Sequence[Record], measure: str) -> dict[str, float]:
    """The mean over seeds for each subject, of records of one arm and step."""
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record["subject"], []).append(record["measures"][measure])
    return {subject: sum(found) / len(found) for subject, found in values.items()}


def means(records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Mean over subjects with its 95 % interval, by measure, of records of one arm and step."""
    names = [name for name in IMAGE_MEASURES if all(name in r["measures"] for r in records)]
    return {name: _mean(list(by_subject(records, name).values())) for name in names}


def differences(first: Sequence[Record], other: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """``other - first`` over subjects, by measure: ``mean``, ``interval``, ``n``, ``p``.

    Args:
        first: records of one arm and step.
        other: those of another; runs of equal subject and seed are paired.
    """

    def values(records: Sequence[Record], name: str) -> dict[Run, float]:
        return {(r["subject"], r["seed"]): r["measures"][name] for r in records}

    return {
        name: found
        for name in means(first).keys() & means(other).keys()
        if (found := _paired(values(first, name), values(other, name), lambda a, b: b - a))
    }


def matched_difference(
    first: Sequence[Record], other: Sequence[Record], axes: tuple[str, str]
) -> dict[str, Any] | None:
    """Difference in text score at the lower of the likenesses at which both curves end.

    The curves start at the untrained model: without an evaluation at step 0 an arm that ends below
    the first one of another would be compared with more likeness than its own. The curves of a
    subject are means over the seeds that both arms have.

    Args:
        first: records of one arm, all steps.
        other: those of another.
        axes: names of the text score and the likeness.

    Returns:
        ``mean``, ``interval``, ``n``, ``p``; None without an evaluation at step 0, or a common run.
    """
    if any(min(r["step"] for r in records) for records in (first, other)):
        return None
    curves, others = _curves(first, axes), _curves(other, axes)
    seeds_of: dict[str, list[int]] = {}
    for subject, seed in sorted(curves.keys() & others.keys()):
        seeds_of.setdefault(subject, []).append(seed)
    values = [
        measures.matched_difference(
            *(np.mean([arm[subject, seed] for seed in seeds], axis=0) for arm in (others, curves))
        )
        for subject, seeds in seeds_of.items()
    ]
    return _tested(values) if values else None


def _curves(records: Sequence[Record], axes: tuple[str, str]) -> dict[Run, np.ndarray]:
    """Likeness and text score of each run at its evaluations, ``(K, 2)``."""
    text, likeness = axes
    found: dict[Run, list[tuple[float, float]]] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        point = record["measures"][likeness], record["measures"][text]
        found.setdefault((record["subject"], record["seed"]), []).append(point)
    return {run: np.array(points, float) for run, points in found.items()}


def _paired(
    first: Mapping[Run, Any], other: Mapping[Run, Any], difference: Callable[[Any, Any], float]
) -> dict[str, Any] | None:
    """Differences of common runs, averaged over seeds, then over subjects."""
    by_name: dict[str, list[float]] = {}
    for run in sorted(first.keys() & other.keys()):
        by_name.setdefault(run[0], []).append(difference(first[run], other[run]))
    values = [sum(found) / len(found) for found in by_name.values()]
    return _tested(values) if values else None


def _tested(values: Sequence[float]) -> dict[str, Any]:
    """Mean over subjects, its interval and ``p``."""
    p = sign_flip_p_value(torch.tensor(values, dtype=torch.float64)) if len(values) > 1 else None
    return {**_mean(values), "p": p}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return mean_with_interval(torch.tensor(values, dtype=torch.float64))._asdict()
