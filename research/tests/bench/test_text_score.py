"""Rank correlations, and that the committed records are those of the plan."""

import random

import pytest
import torch

from mlm_plugin.evaluation.measures import mean_with_interval
from mlm_plugin.pocket.concepts import REPORTED
from research.bench.text_score import (
    SETTINGS,
    STEPS,
    correlations,
    intervals,
    partial,
    read_evaluations,
    spearman,
)


@pytest.mark.parametrize(
    ("xs", "ys", "wanted"),
    [
        ((1, 2, 3, 4), (10, 20, 30, 99), 1.0),
        ((1, 2, 3, 4), (4, 3, 2, 1), -1.0),
        ((1, 2, 3, 4, 5), (2, 1, 4, 3, 5), 0.8),
        ((1, 1, 2, 3), (1, 2, 3, 4), 0.9486832980505138),  # ties share their mean rank
        ((1, 1, 1), (1, 2, 3), 0.0),
    ],
)
def test_spearman(xs, ys, wanted):
    assert spearman(xs, ys) == pytest.approx(wanted)


def test_a_partial_correlation_takes_the_third_variable_out():
    assert partial(0.5, 0.0, 0.0) == 0.5
    assert partial(0.48, 0.8, 0.6) == pytest.approx(0.0)


def test_the_records_are_those_of_the_plan():
    found = {(one["concept"], one["setting"], one["step"]) for one in read_evaluations()}
    planned = {(c.name, name, step) for c in REPORTED for name in SETTINGS for step in STEPS}
    assert found == planned
    assert all(0 <= one["cross_attention"] <= 1 for one in read_evaluations())


def test_a_score_that_follows_fidelity_ranks_every_group():
    evaluations = [
        {"concept": c, "setting": "plain", "step": step, "identity": (7 * step + c) % 5 / 5,
         "fidelity": (c + step) / 300, "cross_attention": ((c + step) / 300) ** 3}
        for c in range(4) for step in STEPS
    ]  # fmt: skip
    found = correlations(evaluations, "cross_attention")
    assert found["all files"] == pytest.approx(1.0)
    assert found["steps of one run"] == pytest.approx(1.0)


def test_the_jackknife_of_a_mean_over_concepts_is_its_interval():
    rng = random.Random(0)
    evaluations = [
        {"concept": c, "setting": "plain", "step": step, "identity": rng.random(),
         "fidelity": rng.random(), "cross_attention": rng.random()}
        for c in range(6) for step in STEPS
    ]  # fmt: skip
    by_concept = [
        correlations(
            [evaluation for evaluation in evaluations if evaluation["concept"] == c],
            "cross_attention",
        )
        for c in range(6)
    ]
    mean = mean_with_interval(torch.tensor([found["files of one concept"] for found in by_concept]))
    found = intervals(evaluations, "cross_attention")
    assert found["files of one concept"] == pytest.approx(mean.interval)
    assert all(half > 0 for half in found.values())
