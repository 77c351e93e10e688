"""Every arm gets the same search, and the search finds the better settings."""

import dataclasses

import pytest

from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import TUNING
from research.bench.plan import (
    ARMS,
    CLAIMS,
    CONTROLS,
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
from research.bench.search import NUM_TRIALS, first_search, score, search

ARM = dataclasses.replace(ARMS["lora plain"], second_grid=())
TWICE = ARMS["lora plain"]


def result(fidelity, identity=0.6):
    return {"evaluations": [[100, 0.1, 0.1], [200, fidelity, identity]]}


def run(arm, fidelity_of):
    """Search an arm to the end; returns the state and the trials in the order they ran."""
    records, ran = {}, []
    while (state := search(arm, records)).missing:
        for trial in state.missing:
            records[key_of(trial)] = result(fidelity_of(trial))
            ran.append(trial)
    return state, ran


SECOND = [arm for arm in SEARCHED if arm.second_grid]


@pytest.mark.parametrize("arm", SEARCHED, ids=lambda arm: arm.name)
def test_every_arm_has_six_settings_and_as_many_trials(arm):
    settings = {tuple(setting.items()) for setting in arm.grid}
    assert len(settings) == len(arm.grid) == NUM_SETTINGS
    _state, ran = run(arm, lambda trial: 0.5)
    num_grids = 2 if arm.second_grid else 1
    assert len(ran) == len({key_of(trial) for trial in ran}) == NUM_TRIALS * num_grids
    assert {trial.seed for trial in ran} == {0}


@pytest.mark.parametrize("arm", CONTROLS, ids=lambda arm: arm.name)
def test_controls_differ_from_the_recommended_form_in_their_contexts_alone(arm):
    term = ARMS[arm.name.removesuffix("/disjoint")]
    found = first_search(term, Records().of("tuning", term.name)).winner
    expected = {"form": arm.form, "grid": (found,), "grammar": "disjoint", "second_grid": ()}
    assert arm == dataclasses.replace(term, **expected)


@pytest.mark.parametrize("arm", SECOND, ids=lambda arm: arm.name)
def test_second_grids_have_six_new_settings_around_the_one_found_first(arm):
    found = first_search(arm, Records().of("tuning", arm.name)).winner
    values = {**arm.family.flags, **arm.family.other_rates, **found}
    settings = [{**values, **setting} for setting in arm.second_grid]
    first = [{**values, **setting} for setting in arm.grid]
    assert len(settings) == len({tuple(sorted(s.items())) for s in settings}) == NUM_SETTINGS
    assert not [setting for setting in settings if setting in first]
    if arm.form != "plain":
        changed = {name for s in settings for name in s if s[name] != values[name]}
        assert changed <= {"weight", "unet_lr", "embedding_lr"}


@pytest.mark.parametrize("family", sorted({arm.family.name for arm in SECOND}))
def test_both_sides_of_a_claim_have_as_many_searches(family):
    names = {name for claim in CLAIMS for name in claim}
    arms = {name: arm for name, arm in ARMS.items() if name in names and arm.family.name == family}
    assert arms
    for name, arm in arms.items():
        is_done = first_search(arm, Records().of("tuning", name)).winner is not None
        assert bool(arm.second_grid) == is_done, "around what the first search has found"


def test_the_better_of_two_searches_wins():
    def fidelity_of(trial):
        return 0.9 if trial.setting == TWICE.second_grid[2] else 0.5

    state, ran = run(TWICE, fidelity_of)
    assert state.winner == TWICE.second_grid[2]
    assert len(ran) == 2 * NUM_TRIALS
    assert run(TWICE, lambda trial: 0.5)[0].winner == TWICE.grid[0]


def test_no_two_trials_of_the_plan_share_a_key():
    trials = [t for arm in ARMS.values() for s in arm.settings for t in trials_to_report(arm, s)]
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
    winner = first_search(ARMS[plain], Records().of("tuning", plain)).winner
    if winner is None:
        pytest.skip("not tuned yet")
    assert winner == {**winner, **family.other_rates}


@pytest.mark.parametrize("family", RECOMMENDED)
def test_the_recommended_form_is_the_one_with_the_best_tuning_score(family):
    forms = [
        arm for arm in find_arms([family])
        if arm.form in FORMS and arm.form != "encoder/word"
    ]  # fmt: skip
    found = {arm.form: first_search(arm, Records().of("tuning", arm.name)) for arm in forms}
    scores = {form: state.scores[0][1] for form, state in found.items() if state.winner}
    assert len(scores) > (family != "lora_unet_only"), "one of several"
    assert RECOMMENDED[family] == max(scores, key=scores.get)


def test_arms_are_chosen_by_name_or_family():
    assert find_arms(["lora core"]) == [ARMS["lora core"]]
    assert {arm.family.name for arm in find_arms(["xti", "xti plain"])} == {"xti"}
    assert len(find_arms(None)) == len(ARMS)
    with pytest.raises(UserError, match="--arms 'dora': not in the plan; it has lora"):
        find_arms(["dora"])
