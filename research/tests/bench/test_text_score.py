"""Rank correlations, and that the committed records are those of the plan."""

import pytest

from mlm_plugin.pocket.concepts import REPORTED
from research.bench.text_score import (
    SETTINGS,
    STEPS,
    correlations,
    partial,
    read_looks,
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
    found = {(one["concept"], one["setting"], one["step"]) for one in read_looks()}
    planned = {(c.name, name, step) for c in REPORTED for name in SETTINGS for step in STEPS}
    assert found == planned
    assert all(0 <= one["cross_attention"] <= 1 for one in read_looks())


def test_a_score_that_follows_fidelity_ranks_every_group():
    looks = [
        {"concept": c, "setting": "plain", "step": step, "identity": (7 * step + c) % 5 / 5,
         "fidelity": (c + step) / 300, "cross_attention": ((c + step) / 300) ** 3}
        for c in range(4) for step in STEPS
    ]  # fmt: skip
    found = correlations(looks, "cross_attention")
    assert found["all files"] == pytest.approx(1.0)
    assert found["steps of one run"] == pytest.approx(1.0)
