"""The formulas on vectors with known results."""

import math

import numpy as np
import pytest
import torch

from mlm_plugin.evaluation.measures import (
    custom_concept_score,
    intra_distance,
    matched_difference,
    mean_cosine_to,
    mean_with_interval,
    paired_cosine,
    pooled,
    sign_flip_p_value,
    student_t_quantile,
)

AXES = torch.eye(3)


def test_paired_cosine_of_known_angles():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 0.0]])
    expected = torch.tensor([1.0, 0.0, -1.0, math.sqrt(0.5)])
    torch.testing.assert_close(paired_cosine(a, b), expected)


def test_mean_cosine_is_the_mean_over_all_pairs_whatever_the_lengths():
    a, b = torch.randn(5, 8), torch.randn(4, 8)
    pairs = torch.tensor([[torch.cosine_similarity(x, y, dim=0) for y in b] for x in a])
    torch.testing.assert_close(mean_cosine_to(a, b), pairs.mean(dim=1))
    torch.testing.assert_close(mean_cosine_to(7 * a, 0.1 * b), pairs.mean(dim=1))


def test_pictures_at_right_angles_are_at_distance_one_and_copies_at_none():
    assert intra_distance(AXES) == pytest.approx(1)
    assert intra_distance(torch.ones(4, 3)) == pytest.approx(0, abs=1e-12)
    assert intra_distance(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(2)


def test_one_picture_has_no_diversity():
    assert intra_distance(AXES[:1]) is None


def test_the_distance_within_a_set_is_the_mean_over_pairs():
    a = torch.randn(6, 5)
    pairs = [
        1 - torch.cosine_similarity(a[i], a[j], dim=0).item() for i in range(6) for j in range(i)
    ]
    assert intra_distance(a) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


@pytest.mark.parametrize(("cosine", "score"), [(0.3, 0.75), (0.0, 0.0), (-0.2, 0.0)])
def test_the_score_of_custom_concept_101_is_clipped_and_scaled(cosine, score):
    assert custom_concept_score(cosine) == pytest.approx(score)


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (24, 2.064), (99, 1.984)],
)
def test_quantiles_of_students_distribution_are_those_of_the_tables(df, quantile):
    assert student_t_quantile(df) == pytest.approx(quantile, rel=0.01)


def test_the_interval_of_a_mean_by_hand():
    mean = mean_with_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean.mean == pytest.approx(3)
    assert mean.interval == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=0.005)
    assert mean_with_interval(torch.tensor([1.0])) == (1.0, None, 1)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    samples = torch.randn(2000, 8)
    held = sum(abs(m.mean) <= m.interval for m in map(mean_with_interval, samples))
    assert 0.93 < held / len(samples) < 0.97


def test_sign_flips_tell_a_shift_from_noise():
    assert sign_flip_p_value(torch.full((12,), 0.1)) < 0.002
    assert sign_flip_p_value(torch.tensor([1.0, -1.0, 0.5, -0.5])) == pytest.approx(1)
    assert sign_flip_p_value(torch.zeros(5)) == pytest.approx(1)
    assert 1 / 10_001 <= sign_flip_p_value(torch.ones(30)) < 0.001


@pytest.mark.parametrize("n", [1, 2, 4, 13])
def test_few_sign_flips_are_counted_exactly(n):
    # of 2^n sign patterns only all-plus and all-minus reach the mean
    assert sign_flip_p_value(torch.ones(n)) == 2 / 2**n
    assert sign_flip_p_value(torch.tensor([3.0, 2.0, -1.0])) == 0.5  # 4 of 8: |6|, |4| and theirs


def test_evaluations_are_pooled_until_the_first_measure_rises():
    curve = np.array([(0.5, 0.9), (0.4, 0.7), (0.6, 0.6)])
    assert pooled(curve) == pytest.approx(np.array([(0.45, 0.8), (0.6, 0.6)]))


def test_a_matched_difference_changes_its_sign_alone_when_the_curves_are_exchanged():
    ours = np.array([(0.0, 1.0), (0.5, 0.9), (0.6, 0.8)])
    theirs = np.array([(0.0, 1.0), (0.5, 0.7)])
    assert matched_difference(ours, theirs) == pytest.approx(0.2)
    assert matched_difference(theirs, ours) == pytest.approx(-0.2)
