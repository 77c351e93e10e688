"""The bench on a miniature: every kind of arm runs as asked, pairs share noise, and it resumes."""

import dataclasses
import json
import os
import signal

import pytest

from mlm_plugin.config.loading import load_config
from mlm_plugin.demo.command import DEFAULT_CONCEPT
from mlm_plugin.demo.options import BATCH_SIZE, FOUND_RATES, MLM_WEIGHT, RECOMMENDED_TERM, as_argv
from mlm_plugin.demo.run import DemoSettings
from mlm_plugin.errors import UserError
from mlm_plugin.methods.checks import check_config
from mlm_plugin.pocket.concepts import REPORTED, TUNING
from mlm_plugin.training.callbacks import Callback
from research.bench import run, search, trial
from research.bench.__main__ import main
from research.bench.context import BenchContext
from research.bench.grammars import GRAMMARS
from research.bench.plan import (
    ARMS,
    PLAN,
    RATES,
    RECOMMENDED,
    REPORT_SEEDS,
    UNTRAINED,
    BenchPlan,
    Trial,
    trials_to_report,
)
from research.bench.records import Records
from research.bench.run import Limits, run_stage
from research.bench.search import Round, first_search
from research.bench.trial import options_of, run_trial, trainer_of
from research.pocket_model.contextualizer import CONTEXTUALIZER_RECIPE

SMALL = BenchPlan(evaluation_steps=(1, 2), num_steps=2)
PLAIN = dataclasses.replace(ARMS["lora plain"], second_grid=())
CORE = dataclasses.replace(ARMS["lora core"], second_grid=())


def kinds():
    """Every regularizer on LoRA, every family plain, and the term in the U-Net alone."""
    found = {"cross": ARMS["lora_unet_only cross/states"]}
    for arm in ARMS.values():
        if arm.family.name == "lora" or arm.form == "plain":
            found.setdefault((arm.family.name, arm.regularizer), arm)
    return found.values()


@pytest.fixture(scope="module")
def context(tiny_pocket, tmp_path_factory):
    return BenchContext(tiny_pocket[0], tmp_path_factory.mktemp("bench"), SMALL)


@pytest.mark.parametrize("arm", kinds(), ids=lambda arm: arm.name)
def test_every_kind_of_arm_trains_and_is_evaluated(arm, context, monkeypatch):
    monkeypatch.setattr("research.bench.context.NUM_CLASS_IMAGES", 4)
    record = run_trial(Trial(arm, arm.grid[0], REPORTED[0], 0), context)
    assert [step for step, *_ in record["evaluations"]] == [1, 2]
    assert all(0 <= value <= 1 for _step, *values in record["evaluations"] for value in values)
    assert record["ms_per_step"] > 0
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_the_trainer_accepts_every_setting(arm, context, tmp_path, monkeypatch):
    monkeypatch.setattr(context, "contextualizer", lambda grammar: tmp_path)
    for pictures in ("class_images", "data_beside_class_images"):
        monkeypatch.setattr(context, pictures, lambda _of: tmp_path)
    for setting in arm.grid:
        options = options_of(Trial(arm, setting, REPORTED[0], 3), context, tmp_path)
        config = load_config(as_argv(options))
        check_config(config)
        assert config.schedule.seed == 3
        assert options.get("init_word") in (None, REPORTED[0].scene.subject)


def test_beside_class_pictures_the_concept_is_shown_as_often_as_elsewhere(
    tiny_pocket, tmp_path, monkeypatch
):
    """kohya's rule uses as many class pictures as there are training pictures, with repeats."""
    monkeypatch.setattr("research.bench.context.NUM_CLASS_IMAGES", 8)
    arm = ARMS["lora prior_preservation"]
    context = BenchContext(tiny_pocket[0], tmp_path, SMALL)
    trainer = trainer_of(Trial(arm, arm.grid[0], REPORTED[0], 0), context, tmp_path / "run")
    data = trainer.loader.dataset
    of_class = [info for info in data.images if info.is_reg]
    assert data.num_train_images == data.num_reg_images == len(of_class) == 8
    assert {info.caption for info in of_class} == {"a photo of a dog"}
    assert len(next(iter(trainer.loader)).captions) == 2 * BATCH_SIZE


def test_on_tuning_concepts_only_the_end_is_evaluated(context):
    record = run_trial(Trial(PLAIN, PLAIN.grid[0], TUNING[0], 0), context)
    assert [step for step, *_ in record["evaluations"]] == [2]


def test_the_untrained_model_is_evaluated_with_both_words(context):
    name, word = (
        run_trial(Trial(UNTRAINED, setting, REPORTED[0], 0), context) for setting in UNTRAINED.grid
    )
    assert [step for step, *_ in (*name["evaluations"], *word["evaluations"])] == [0, 0]
    assert name["key"] != word["key"]


def test_each_grammar_has_its_contextualizer_and_contexts(tiny_pocket, tmp_path, monkeypatch):
    recipe = dataclasses.replace(CONTEXTUALIZER_RECIPE, max_train_steps=2, eval_every_n_steps=2)
    monkeypatch.setattr("research.bench.context.CONTEXTUALIZER_RECIPE", recipe)
    monkeypatch.setattr("research.pocket_model.contextualizer.NUM_CAPTIONS", 300)
    context = BenchContext(tiny_pocket[0], tmp_path, SMALL)
    context.prepare(
        Trial(ARMS[name], ARMS[name].grid[0], REPORTED[0], 0)
        for name in ("lora encoder/word", "lora encoder/word/linked")
    )
    free, linked = (context.contextualizer(grammar) for grammar in ("free", "linked"))
    assert free == tiny_pocket[0] / "contextualizer.safetensors"
    assert linked.read_bytes() != free.read_bytes()
    texts = [context.prompts(REPORTED[0], grammar)[0].read_text() for grammar in GRAMMARS]
    assert len(set(texts)) == 3


class Losses(Callback):
    def __init__(self):
        self.diffusion, self.terms = [], []

    def on_step_end(self, trainer, result):
        self.diffusion.append(result.diffusion)
        self.terms.append(result.mlm)


def losses_of(arm, setting, context, tmp_path):
    trainer = trial.trainer_of(Trial(arm, setting, REPORTED[0], 0), context, tmp_path)
    callback = Losses()
    trainer.callbacks = [callback]
    trainer.run()
    return callback


@pytest.mark.parametrize("form", ["encoder/class", "core", "output_preservation"])
def test_arms_see_the_same_pictures_and_noise(form, context, tmp_path):
    rates = {"unet_lr": "5e-3", "text_encoder_lr": "5e-3"}
    plain = losses_of(PLAIN, rates, context, tmp_path)
    other = losses_of(ARMS[f"lora {form}"], {**rates, "weight": "0.1"}, context, tmp_path)
    assert other.diffusion[0] == plain.diffusion[0]
    assert plain.terms == [None, None]
    assert all(term is not None for term in other.terms)


def test_a_term_of_weight_zero_is_the_plain_run(context):
    rates = {"unet_lr": "5e-3", "text_encoder_lr": "5e-3"}
    plain = run_trial(Trial(PLAIN, rates, REPORTED[0], 0), context)
    nothing = run_trial(Trial(CORE, {**rates, "weight": "0"}, REPORTED[0], 0), context)
    assert nothing["evaluations"] == plain["evaluations"]


@pytest.fixture
def short_search(monkeypatch):
    """Two settings on one concept, the better one on another: three trials."""
    rounds = (Round(2, slice(0, 1)), Round(1, slice(1, 2)))
    monkeypatch.setattr(search, "ROUNDS", rounds)


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "records", "a model")


def test_a_second_run_does_nothing_and_a_longer_one_goes_on(context, records, short_search, capsys):
    everything = {"context": context, "records": records}
    assert run_stage("tuning", [PLAIN], **everything) == 0
    assert capsys.readouterr().out.count("fidelity") == 3
    assert len(records.of("tuning", PLAIN.name)) == 3
    unet_only = ARMS["lora_unet_only plain"]
    assert run_stage("tuning", [PLAIN, unet_only], **everything, limits=Limits(jobs=2)) == 0
    out = capsys.readouterr().out
    assert out.count("fidelity") == out.count("lora_unet_only plain (") == 3
    assert "tuning of lora plain: complete" in out


def test_terms_wait_for_plain_training_and_take_over_its_rates(context, records, fake_trials):
    """The best plain setting of the fake trials is the last, with ``unet_lr`` 5e-3."""
    everything = {"context": context, "records": records}
    with pytest.raises(UserError, match="lora core: takes over rates of lora plain; tune that"):
        run_stage("tuning", [CORE], **everything)
    for rate, named in (("5e-3", None), ("2.5e-3", "best with .*5e-3.*set other_rates")):
        family = dataclasses.replace(CORE.family, other_rates={"unet_lr": rate})
        arms = [PLAIN, dataclasses.replace(CORE, family=family)]
        if named is None:
            assert run_stage("tuning", arms, **everything) == 0
        else:
            with pytest.raises(UserError, match=named):
                run_stage("tuning", arms, **everything)


@pytest.fixture
def fake_trials(monkeypatch):
    ran = []

    def fake(trial_, _context):
        ran.append(trial_)
        fidelity = 0.5 + 0.1 * trial_.arm.grid.index(trial_.setting)
        return {
            "key": run.key_of(trial_), "setting": dict(trial_.setting),
            "concept": trial_.concept.name, "seed": trial_.seed,
            "evaluations": [[2, fidelity, 0.5]], "ms_per_step": 1.0, "seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(run, "run_trial", fake)
    return ran


def test_the_setting_found_is_reported_on_all_concepts_and_seeds(context, records, fake_trials):
    everything = {"context": context, "records": records}
    with pytest.raises(UserError, match="lora plain: its search is incomplete; run --stage tun"):
        run_stage("report", [PLAIN], **everything)
    run_stage("tuning", [PLAIN], **everything)
    assert {trial.concept.name for trial in fake_trials} == {c.name for c in TUNING}
    fake_trials.clear()
    run_stage("report", [UNTRAINED, PLAIN], **everything)
    trained = [trial for trial in fake_trials if trial.arm is PLAIN]
    assert len(fake_trials) == 3 * len(trained) == 3 * 24
    assert all(trial.setting == PLAIN.grid[-1] for trial in trained)
    assert {(t.concept.name, t.seed) for t in trained} == {
        (concept.name, seed) for concept in REPORTED for seed in (0, 1)
    }


def test_other_rates_are_trained_once_and_what_is_reported_counts(context, records, fake_trials):
    arm, (half, twice) = ARMS["lora plain"], RATES["lora plain"]
    for reported in trials_to_report(arm, half):
        record = {"key": run.key_of(reported), "evaluations": [[2, 0.5, 0.5]]}
        records.add("report", arm.name, record)
    assert run.missing_trials("rates", arm, records) == trials_to_report(arm, twice)


def test_no_trial_starts_after_the_time_is_up(context, records, fake_trials, capsys):
    limits = Limits(minutes=0)
    assert run_stage("tuning", [PLAIN], context=context, records=records, limits=limits) == 0
    assert not fake_trials
    assert "out of time; the same command continues" in capsys.readouterr().out


def test_a_signal_ends_the_bench_and_keeps_what_is_done(
    context, records, short_search, monkeypatch, capsys
):
    on_step_end = trial.TimedEvaluations.on_step_end

    def stop_in_the_second_trial(callback, trainer, result):
        if records.of("tuning", PLAIN.name):
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(callback, trainer, result)

    monkeypatch.setattr(trial.TimedEvaluations, "on_step_end", stop_in_the_second_trial)
    assert run_stage("tuning", [PLAIN], context=context, records=records) == 143
    assert "the same command continues" in capsys.readouterr().err
    assert len(records.of("tuning", PLAIN.name)) == 1


def test_results_of_another_model_are_not_mixed(records):
    record = {"key": "a", "evaluations": []}
    records.add("tuning", PLAIN.name, record)
    assert records.of("tuning", PLAIN.name) == {"a": record}
    with pytest.raises(UserError, match="results of another model"):
        Records(records.folder, "another").of("tuning", PLAIN.name)


def test_a_key_depends_on_all_that_determines_a_result():
    one = Trial(PLAIN, PLAIN.grid[0], REPORTED[0], 0)
    others = [
        one._replace(seed=1),
        one._replace(concept=REPORTED[1]),
        one._replace(setting=PLAIN.grid[1]),
        one._replace(arm=dataclasses.replace(PLAIN, flags={"network_dim": "4"})),
        one._replace(arm=dataclasses.replace(PLAIN, grammar="linked")),
    ]
    assert len({run.key_of(trial) for trial in (one, *others)}) == 6
    assert run.key_of(one) == run.key_of(one._replace(setting=dict(PLAIN.grid[0])))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--stage", "tuning", "--output", "{}", "--model", "{}"], "no oracle.safetensors there"),
        (["--stage", "tuning"], "required: --output"),
        (["--stage", "tuning", "--output", "{}", "--arms", "dora"], "--arms 'dora'"),
        (["--stage", "tuning", "--output", "{}", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--stage", "tuning", "--output", "{}", "--steps", "50"], "--steps is for --stage report"),
        (
            ["--stage", "rates", "--output", "{}", "--arms", "pivotal plain"],
            "--arms pivotal plain: --stage rates has lora plain, lora both/states",
        ),
    ],
)
def test_bad_input_is_one_line(argv, named, tmp_path):
    with pytest.raises(UserError, match=named):
        main([part.format(tmp_path) for part in argv])


def test_the_demo_is_two_trials_of_the_report():
    settings, term = DemoSettings(), ARMS[f"lora {RECOMMENDED['lora']}"]
    assert settings.seed in REPORT_SEEDS
    assert settings.num_train_steps == PLAN.evaluation_steps[-1]
    assert tuple(settings.sampling) == (PLAN.num_steps, PLAN.guidance)
    assert DEFAULT_CONCEPT in [concept.name for concept in REPORTED]
    for arm, expected in (
        (PLAIN, FOUND_RATES),
        (term, {**FOUND_RATES, **RECOMMENDED_TERM, "weight": str(MLM_WEIGHT)}),
    ):
        tuned = Records().of("tuning", arm.name)
        assert {**arm.flags, **first_search(arm, tuned).winner} == expected
