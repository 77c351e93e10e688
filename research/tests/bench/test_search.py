"""Every arm gets the same search, and the search finds the better settings."""

import dataclasses

import pytest

from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import TUNING
from research.bench.plan import (
    ARMS,
    CLAIMS,
    FAMILIES,
    FORMS,
    NUM_SETTINGS,
    RECOMMENDED,
    SEARCHED,
    UNTRAINED,
    find_arms,
    trials_to_report,
)
from research.bench.records import Records, key_of
from research.bench.search import NUM_TRIALS, score, search

ARM = ARMS["lora plain"]


def result(fidelity, identity=0.6):
    return {"looks": [[100, 0.1, 0.1], [200, fidelity, identity]]}


def run(arm, fidelity_of):
    """Search an arm to the end; returns the state and the trials in the order they ran."""
    records, ran = {}, []
    while (state := search(arm, records)).missing:
        for trial in state.missing:
            records[key_of(trial)] = result(fidelity_of(trial))
            ran.append(trial)
    return state, ran


CONTROLS = [arm for arm in ARMS.values() if arm.grammar == "disjoint"]
BEYOND = [arm for arm in ARMS.values() if arm.form.endswith(("/beyond", "/further"))]


@pytest.mark.parametrize("arm", SEARCHED, ids=lambda arm: arm.name)
def test_every_arm_has_six_settings_and_as_many_trials(arm):
    settings = {tuple(setting.items()) for setting in arm.grid}
    assert len(settings) == len(arm.grid) == NUM_SETTINGS
    _state, ran = run(arm, lambda trial: 0.5)
    assert len(ran) == len({key_of(trial) for trial in ran}) == NUM_TRIALS
    assert {trial.seed for trial in ran} == {0}


@pytest.mark.parametrize("arm", CONTROLS, ids=lambda arm: arm.name)
def test_controls_differ_from_the_recommended_form_in_their_contexts_alone(arm):
    term = ARMS[arm.name.removesuffix("/disjoint")]
    found = search(term, Records().of("tuning", term.name)).winner
    assert arm == dataclasses.replace(term, form=arm.form, grid=(found,), grammar="disjoint")


@pytest.mark.parametrize("arm", BEYOND, ids=lambda arm: arm.name)
def test_settings_beyond_the_edges_are_beyond_them_and_otherwise_as_found(arm):
    searched = ARMS[arm.name.rpartition("/")[0]]
    assert arm == dataclasses.replace(searched, form=arm.form, grid=arm.grid)
    found = search(searched, Records().of("tuning", searched.name)).winner
    values = {**searched.family.flags, **searched.family.other_rates, **found}
    for setting in arm.grid:
        changed = {name for name, value in setting.items() if value != values[name]}
        assert changed
        assert changed - set(found) <= {"unet_lr", "embedding_lr"}
        for name in changed & set(found):
            tried = [float(one[name]) for one in searched.grid]
            assert not min(tried) <= float(setting[name]) <= max(tried)


def test_no_two_trials_of_the_plan_share_a_key():
    trials = [t for arm in ARMS.values() for s in arm.grid for t in trials_to_report(arm, s)]
    trials += trials_to_report(UNTRAINED, UNTRAINED.grid[0])
    assert len({key_of(trial) for trial in trials}) == len(trials)


def test_the_better_half_goes_on_and_the_best_wins():
    def fidelity_of(trial):
        return 0.4 + 0.05 * ARM.grid.index(trial.setting)

    state, ran = run(ARM, fidelity_of)
    assert state.winner == ARM.grid[-1]
    by_concept = {
        concept.name: [ARM.grid.index(t.setting) for t in ran if t.concept == concept]
        for concept in TUNING
    }
    assert [sorted(found) for found in by_concept.values()] == [
        *2 * [[0, 1, 2, 3, 4, 5]], *2 * [[3, 4, 5]], *2 * [[4, 5]],
    ]  # fmt: skip


def test_the_winner_is_chosen_by_all_its_trials():
    """The last setting is best on the first four concepts, the one before it on the last two."""

    def fidelity_of(trial):
        place, late = ARM.grid.index(trial.setting), TUNING.index(trial.concept) >= 4
        return 0.9 if place == 4 and late else 0.3 + 0.05 * place

    state, _ran = run(ARM, fidelity_of)
    assert state.winner == ARM.grid[4]
    assert len(state.scores) == 2


def test_equal_settings_are_ranked_as_in_the_grid():
    assert run(ARM, lambda trial: 0.5)[0].winner == ARM.grid[0]


def test_the_score_is_a_harmonic_mean_after_the_last_step():
    assert score(result(0.9, 0.6)) == pytest.approx(0.72)
    assert score(result(0.0, 0.9)) == 0


def test_claims_are_about_arms_of_the_plan():
    assert len(set(CLAIMS)) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.ours in ARMS
        assert claim.theirs in ARMS
        assert ARMS[claim.ours].form == RECOMMENDED[ARMS[claim.ours].family.name]
        assert ARMS[claim.ours].regularizer == "mlm"
        assert ARMS[claim.theirs].regularizer != "mlm"


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.other_rates])
def test_arms_with_a_term_take_over_what_the_best_plain_setting_has_besides(family):
    plain = f"{family.name} plain"
    winner = search(ARMS[plain], Records().of("tuning", plain)).winner
    if winner is None:
        pytest.skip("not tuned yet")
    assert winner == {**winner, **family.other_rates}


@pytest.mark.parametrize("family", RECOMMENDED)
def test_the_recommended_form_is_the_one_with_the_best_tuning_score(family):
    forms = [
        arm for arm in find_arms([family])
        if arm.form in FORMS and arm.form != "encoder/word"
    ]  # fmt: skip
    found = {arm.form: search(arm, Records().of("tuning", arm.name)) for arm in forms}
    if any(state.winner is None for state in found.values()):
        pytest.skip("not tuned yet")
    assert RECOMMENDED[family] == max(found, key=lambda form: found[form].scores[0][1])


def test_arms_are_chosen_by_name_or_family():
    assert find_arms(["lora core"]) == [ARMS["lora core"]]
    assert {arm.family.name for arm in find_arms(["xti", "xti plain"])} == {"xti"}
    assert len(find_arms(None)) == len(ARMS)
    with pytest.raises(UserError, match="--arms 'dora': not in the plan; it has lora"):
        find_arms(["dora"])
