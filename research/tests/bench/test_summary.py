"""Means over seeds, Holm's correction, and a comparison that treats both arms alike."""

from statistics import harmonic_mean

import numpy as np
import pytest

from mlm_plugin.evaluation.measures import matched_difference
from research.bench.summary import compare, curves_of, holm, num_before_first_evaluation

START = (0.16, 0.99)


def curve(*points):
    return np.array([START, *points])


def test_seeds_are_averaged_first_behind_the_untrained_model():
    def record(seed, *evaluations):
        return {"concept": "sks dog", "seed": seed, "evaluations": evaluations}

    untrained = [record(0, (0, 1.0, 0.1)), record(1, (0, 0.9, 0.2))]
    trained = [record(0, (200, 0.6, 0.5)), record(1, (200, 0.8, 0.7))]
    found = curves_of(trained, untrained)
    assert found["sks dog"] == pytest.approx(np.array([[0.15, 0.95], [0.6, 0.7]]))


def test_arms_are_compared_where_both_have_been():
    """Ours ends at 0.5 with 0.8; there theirs is halfway from 0.7 to 0.5."""
    ours, theirs = curve((0.3, 0.95), (0.5, 0.8)), curve((0.4, 0.7), (0.6, 0.5))
    assert matched_difference(ours, theirs) == pytest.approx(0.2)
    assert matched_difference(theirs, ours) == pytest.approx(-0.2)


def test_reads_before_the_first_evaluation_are_counted():
    theirs = curve((0.4, 0.7), (0.6, 0.5))
    ours = {"before": curve((0.3, 0.9)), "behind": curve((0.5, 0.8)), "on": curve((0.4, 0.8))}
    assert num_before_first_evaluation(ours, dict.fromkeys(ours, theirs)) == 1


def test_the_unit_is_the_concept():
    gains = {f"concept {i}": 0.05 + 0.01 * i for i in range(12)}
    theirs = {name: curve((0.6, 0.5)) for name in gains}
    ours = {name: curve((0.6, 0.5 + gain)) for name, gain in gains.items()}
    found = compare(ours, theirs)
    assert found.by_concept == pytest.approx(gains)
    assert found.matched.n == 12
    assert found.p_value == 2 / 4096
    assert found.fidelity.mean == pytest.approx(np.mean(list(gains.values())))
    scores = [harmonic_mean((0.6, 0.5 + gain)) for gain in gains.values()]
    assert found.score.mean == pytest.approx(np.mean(scores) - harmonic_mean((0.6, 0.5)))
    assert compare(ours, {}) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


# Simulated arms. On the shared curve, fidelity falls by 0.8 per unit of identity.


def simulated(rng, end):
    """Three noisy evaluations of an arm whose identity ends at ``end``: the mean over two seeds."""
    identity = np.linspace(0.45, 1, 3) ** 0.5 * end
    truth_K2 = np.stack([identity, 1.1 - 0.8 * identity], axis=1)
    noise_SK2 = rng.normal(0, (0.03, 0.08), (2, *truth_K2.shape))
    return np.vstack([(0.16, 1.1 - 0.8 * 0.16), (truth_K2 + noise_SK2).mean(axis=0)])


def greatest_common_identity(ours, theirs):
    """The rule of before: best fidelity on the Pareto front, where the lower maximum is."""
    reached = min(ours[:, 0].max(), theirs[:, 0].max())
    return _on_front(reached, ours) - _on_front(reached, theirs)


def _on_front(identity, curve_K2):
    front = []
    for point in sorted(map(tuple, curve_K2), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return np.interp(identity, *zip(*reversed(front), strict=True))


def mean_and_error(rule, ends, *, number=4000):
    rng = np.random.default_rng(0)
    values = [rule(simulated(rng, ends[0]), simulated(rng, ends[1])) for _ in range(number)]
    return np.mean(values), np.std(values) / np.sqrt(number)


@pytest.mark.parametrize("ends", [(0.65, 0.65), (0.58, 0.66), (0.66, 0.58)])
def test_arms_on_one_curve_differ_by_nothing_on_average(ends):
    mean, error = mean_and_error(matched_difference, ends)
    assert abs(mean) < 3 * error < 0.004


def test_on_a_curve_that_bends_down_the_arm_that_ends_earlier_is_favoured():
    """The other one is read on a line below its own curve; as the pages say."""

    def arm(end):
        identity = np.array([0.16, *np.linspace(0.45, 1, 3) ** 0.5 * end])
        return np.stack([identity, 1 - identity**4], axis=1)

    assert matched_difference(arm(0.5), arm(0.66)) > 0.001
    assert matched_difference(arm(0.66), arm(0.5)) < -0.001


def test_the_rule_of_before_favoured_the_arm_that_goes_further():
    mean, error = mean_and_error(greatest_common_identity, (0.58, 0.66))
    assert mean < -5 * error
    assert mean < -0.005
