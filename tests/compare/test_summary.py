"""Numbers of a comparison on records with known results."""

import pytest

from mlm_plugin.compare.summary import (
    axes_of,
    complete_runs,
    differences,
    matched_difference,
    means,
)

AXES = ("clip_t", "dino")


def records(arm, values):
    """Records from ``(subject, seed): [(clip_t, dino) at each evaluation]``."""
    return [
        {"arm": arm, "subject": subject, "seed": seed, "step": step,
         "measures": {"clip_t": text, "dino": likeness}}
        for (subject, seed), points in values.items()
        for step, (text, likeness) in enumerate(points)
    ]  # fmt: skip


def test_a_subject_counts_once_however_many_seeds_it_has():
    values = {("dog", 0): [(0.1, 0)], ("dog", 1): [(0.3, 0)], ("cat", 0): [(0.6, 0)]}
    found = means(records("a", values))["clip_t"]
    assert found["mean"] == pytest.approx((0.2 + 0.6) / 2)
    assert found["n"] == 2


def test_differences_are_paired_by_subject_and_seed():
    first = {("dog", 0): [(0.1, 0.5)], ("dog", 1): [(0.2, 0.5)], ("cat", 0): [(0.3, 0.5)]}
    other = {("dog", 0): [(0.3, 0.4)], ("cat", 0): [(0.4, 0.4)], ("bird", 0): [(9, 9)]}
    found = differences(records("a", first), records("b", other))
    assert found["clip_t"]["mean"] == pytest.approx((0.2 + 0.1) / 2)
    assert found["clip_t"]["n"] == 2
    assert found["clip_t"]["p"] == 0.5, "of four patterns of signs two reach it"
    assert found["dino"]["mean"] == pytest.approx(-0.1)


def test_six_subjects_of_one_sign_are_the_fewest_below_a_twentieth():
    subjects = [(f"s{i}", 0) for i in range(6)]
    first = records("a", {s: [(0.1, 0.5)] for s in subjects})
    other = records("b", {s: [(0.2 + i / 100, 0.5)] for i, s in enumerate(subjects)})
    assert differences(first, other)["clip_t"]["p"] == 2 / 2**6
    five = [record for record in other if record["subject"] != "s0"]
    assert differences(first, five)["clip_t"]["p"] > 0.05


def test_arms_are_compared_on_what_all_have_learned():
    dog, cat = {("dog", 0): [(0.1, 0.5)]}, {("cat", 0): [(0.9, 0.5)]}
    plain, half = records("a", {**dog, **cat}), records("b", dog)
    kept = complete_runs([*plain, *half], ["a", "b"])
    assert {record["subject"] for record in kept} == {"dog"}
    assert len(kept) == 2
    assert complete_runs(plain, ["a", "b"]) == plain, "until there is something to compare"


def test_one_subject_has_no_p():
    one = {("dog", 0): [(0.1, 0.5)]}
    found = differences(records("a", one), records("b", one))["clip_t"]
    assert (found["p"], found["interval"]) == (None, None)


def test_a_shorter_training_gains_nothing_at_equal_likeness():
    whole = {("dog", 0): [(0.30, 0.4), (0.25, 0.6), (0.20, 0.7)]}
    short = {("dog", 0): [(0.30, 0.4), (0.25, 0.6)]}
    found = matched_difference(records("a", whole), records("b", short), AXES)
    assert found["mean"] == pytest.approx(0)
    assert differences(records("a", whole)[2:], records("b", short)[1:])["clip_t"]["mean"] > 0


def test_text_kept_at_the_same_likeness_is_a_gain():
    plain = {("dog", 0): [(0.30, 0.4), (0.20, 0.6)]}
    other = {("dog", 0): [(0.30, 0.4), (0.28, 0.5)]}
    found = matched_difference(records("a", plain), records("b", other), AXES)
    assert found["mean"] == pytest.approx(0.28 - 0.25)


def test_without_the_untrained_model_there_is_no_equal_likeness():
    """The weaker arm ends below the first evaluation of the other, where nothing of it is known."""
    strong = {("dog", 0): [(0.32, 0.2), (0.25, 0.6), (0.20, 0.7)]}
    weak = {("dog", 0): [(0.32, 0.2), (0.31, 0.3)]}
    first, other = records("a", strong), records("b", weak)
    found = matched_difference(first, other, AXES)
    assert found["mean"] == pytest.approx(0.31 - (0.32 - 0.07 / 4))
    later = [record for record in first if record["step"]]
    assert matched_difference(later, other, AXES) is None
    assert matched_difference(other, later, AXES) is None


def test_the_axes_are_measures_that_all_have():
    both = records("a", {("dog", 0): [(0.1, 0.2)]})
    assert axes_of(both) == AXES
    assert axes_of([{"measures": {"clip_t": 1, "clip_i": 1}}, *both]) is None
