"""From records to the table: Pareto fronts, pairs, and runs without a partner."""

import math

import pytest

from research.bench.report import html_report, markdown_table
from research.bench.summary import (
    SettingKey,
    comparisons,
    fidelity_at,
    matched_difference,
    summarize,
)


def evaluation(step, fidelity, identity, *, regularizer="plain", concept="sks dog", seed=0):
    return {
        "method": "lora", "regularizer": regularizer, "weight": 0.1 * (regularizer != "plain"),
        "variant": "", "concept": concept, "seed": seed, "step": step,
        "prompt_fidelity": fidelity, "identity": identity, "clip_t": 0.2, "clip_i": 0.5,
        "seconds_per_step": 0.05,
    }  # fmt: skip


CURVE = [evaluation(50, 0.9, 0.2), evaluation(100, 0.7, 0.4), evaluation(200, 0.5, 0.6)]


def test_fidelity_is_linear_between_evaluations_and_level_below_them():
    assert fidelity_at(0.3, CURVE) == pytest.approx(0.8)
    assert fidelity_at(0.4, CURVE) == pytest.approx(0.7)
    assert fidelity_at(0.0, CURVE) == pytest.approx(0.9)
    assert math.isnan(fidelity_at(0.7, CURVE))


def test_an_evaluation_that_another_beats_on_both_counts_does_not_lower_the_front():
    assert fidelity_at(0.5, [*CURVE, evaluation(300, 0.4, 0.5)]) == pytest.approx(0.6)


def test_runs_are_compared_where_both_have_been():
    """Theirs reaches 0.6 of identity, ours 0.5: there theirs has 0.6 of fidelity and ours 0.8."""
    ours = {("sks dog", 0): [evaluation(50, 0.95, 0.3), evaluation(200, 0.8, 0.5)]}
    theirs = {("sks dog", 0): CURVE, ("zwx robot", 0): CURVE}
    found = matched_difference(ours, theirs)
    assert found.value.mean == pytest.approx(0.2)
    assert found.value.n == 1
    assert matched_difference(theirs, ours).value.mean == pytest.approx(-0.2)


def test_the_table_pairs_runs_by_concept_and_seed():
    records = []
    for seed, gain in enumerate((0.1, 0.2, 0.3)):
        records += [evaluation(100, 0.5 + seed / 10, 0.6, seed=seed)]
        records += [evaluation(100, 0.5 + seed / 10 + gain, 0.5, seed=seed, regularizer="mlm")]
    plain, mlm = summarize(records)
    assert plain.setting == SettingKey("lora", "plain", 0.0, "")
    assert plain.fidelity is None
    assert plain.means["prompt_fidelity"].mean == pytest.approx(0.6)
    assert mlm.fidelity.value.mean == pytest.approx(0.2)
    assert mlm.identity.value.mean == pytest.approx(-0.1)
    assert mlm.fidelity.value.n == 3
    assert mlm.fidelity.p_value == pytest.approx(0.25, abs=0.02)  # 2 of 8 signs


def test_the_term_is_held_against_every_rival_of_its_method():
    records = []
    for seed in range(3):
        for regularizer, fidelity in (("plain", 0.5), ("mlm", 0.9), ("core", 0.8)):
            records += [evaluation(100, fidelity, 0.5, seed=seed, regularizer=regularizer)]
    (comparison,) = comparisons(records)
    assert (comparison.ours.regularizer, comparison.theirs.regularizer, comparison.num_runs) == (
        "mlm",
        "core",
        3,
    )
    assert comparison.fidelity.value.mean == pytest.approx(0.1)
    assert comparison.identity.value.mean == pytest.approx(0.0)
    assert comparison.matched.value.mean == pytest.approx(0.1)
    assert "| lora + mlm 0.1 | lora + core 0.1 | 3 | +10.0" in markdown_table(records)
    assert comparisons([record for record in records if record["regularizer"] != "core"]) == []


def test_only_the_last_evaluation_of_a_run_counts_as_its_end():
    (row,) = summarize(CURVE)
    assert row.means["identity"].mean == pytest.approx(0.6)
    assert row.means["identity"].n == 1


def test_table_and_page_name_every_setting_once_and_escape_it():
    records = [*CURVE, evaluation(200, 0.6, 0.6, regularizer="mlm")]
    table = markdown_table(records)
    assert table.count("\n") == 4
    assert "| lora + mlm 0.1 | 1 | 60.0 | 60.0 |" in table
    page = html_report({"model": "<b>", "records": records})
    assert "lora + mlm 0.1" in page
    assert "&lt;b&gt;" in page
    assert page.count('<g class="dot">') == 4  # one per setting and evaluation
    assert page.count('<g class="curve">') == 2  # one per setting
