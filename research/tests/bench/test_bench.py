"""The bench on a miniature: every setting runs as asked, pairs share noise, and it resumes."""

import dataclasses
import json
import os
import signal

import pytest

from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import REPORTED, TUNING
from mlm_plugin.training.callbacks import Callback
from research.bench import trial
from research.bench.__main__ import main
from research.bench.context import BenchContext
from research.bench.plan import FULL, METHOD_FLAGS, SHORT, Setting, chosen
from research.bench.run import run_bench
from research.bench.trial import Trial, options_of, run_trial

STEPS = dict.fromkeys(METHOD_FLAGS, (1, 2))
SMALL = dataclasses.replace(
    FULL, ablations=(), evaluation_steps=STEPS, num_steps=2, concepts=REPORTED[:1], seeds=(0,)
)
KINDS = {(s.method, s.regularizer): s for s in reversed(FULL.settings)}


@pytest.fixture(scope="module")
def context(tiny_pocket, tmp_path_factory):
    return BenchContext(tiny_pocket[0], tmp_path_factory.mktemp("bench"), SMALL)


@pytest.mark.parametrize("setting", KINDS.values(), ids=lambda setting: setting.name)
def test_every_kind_of_setting_trains_and_is_evaluated(setting, context):
    records = run_trial(Trial(setting, REPORTED[0], 0), context)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert (record["method"], record["regularizer"]) == (setting.method, setting.regularizer)
        assert 0 <= record["prompt_fidelity"] <= 1
        assert 0 <= record["identity"] <= 1
        assert -1 <= record["clip_t"] <= 1
    assert records[0]["seconds_per_step"] == records[1]["seconds_per_step"] > 0


def test_no_two_settings_share_a_name():
    names = [setting.name for setting in (*FULL.settings, *FULL.ablations)]
    assert len(set(names)) == len(names)
    assert {setting.name for setting in SHORT.settings} <= set(names)


class Losses(Callback):
    def __init__(self):
        self.diffusion, self.terms = [], []

    def on_step_end(self, trainer, result):
        self.diffusion.append(result.diffusion)
        self.terms.append(result.mlm)


def losses_of(setting, context, tmp_path):
    trainer = trial.trainer_of(Trial(setting, REPORTED[0], 0), context, tmp_path)
    callback = Losses()
    trainer.callbacks = [callback]
    trainer.run()
    return callback


@pytest.mark.parametrize("regularizer", ["mlm", "core", "output_preservation"])
def test_settings_of_a_seed_see_the_same_pictures_and_noise(regularizer, context, tmp_path):
    plain = losses_of(Setting("lora"), context, tmp_path)
    other = losses_of(Setting("lora", regularizer, 0.1), context, tmp_path)
    assert other.diffusion[0] == plain.diffusion[0]
    assert plain.terms == [None, None]
    assert all(term is not None for term in other.terms)


def test_a_term_of_weight_zero_is_the_plain_run(context):
    plain, nothing = (
        run_trial(Trial(Setting("lora", name), REPORTED[0], 0), context)
        for name in ("plain", "core")
    )
    for a, b in zip(plain, nothing, strict=True):
        assert a["identity"] == b["identity"]
        assert a["clip_t"] == b["clip_t"]


def test_the_table_of_a_plan_is_written_and_a_second_run_does_nothing(
    tiny_pocket, tmp_path, capsys
):
    plan = dataclasses.replace(SMALL, settings=(Setting("lora"), Setting("lora", "core", 0.1)))
    assert run_bench(plan, model=tiny_pocket[0], output=tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    steps = [(r["method"], r["regularizer"], r["step"]) for r in results["records"]]
    assert steps == [
        ("base", "plain", 0),
        *(("lora", n, s) for n in ("plain", "core") for s in (1, 2)),
    ]
    assert "lora + core 0.1" in (tmp_path / "table.md").read_text()
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out.count("fidelity") == 3

    assert run_bench(plan, model=tiny_pocket[0], output=tmp_path) == 0
    assert "fidelity" not in capsys.readouterr().out
    more = dataclasses.replace(plan, settings=(*plan.settings, Setting("lora", "textboost", 0.1)))
    assert run_bench(more, model=tiny_pocket[0], output=tmp_path) == 0
    assert capsys.readouterr().out.count("fidelity") == 1


def test_a_signal_ends_the_bench_and_keeps_what_is_done(tiny_pocket, tmp_path, monkeypatch, capsys):
    plan = dataclasses.replace(SMALL, settings=(Setting("lora"), Setting("lora", "core", 0.1)))
    evaluate = trial.BenchTest.evaluate

    def evaluate_and_stop(test, model, words=None):
        if words is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(test, model, words)

    monkeypatch.setattr(trial.BenchTest, "evaluate", evaluate_and_stop)
    assert run_bench(plan, model=tiny_pocket[0], output=tmp_path) == 143
    assert "the same command continues" in capsys.readouterr().err
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [record["method"] for record in records] == ["base"]


def test_trials_in_processes_of_their_own_give_the_same_records(tiny_pocket, tmp_path):
    plan = dataclasses.replace(SMALL, settings=(Setting("lora"), Setting("lora", "core", 0.1)))
    records = []
    for jobs in (1, 2):
        output = tmp_path / str(jobs)
        assert run_bench(plan, model=tiny_pocket[0], output=output, jobs=jobs) == 0
        found = json.loads((output / "results.json").read_text())["records"]
        records.append(sorted(found, key=lambda r: (r["method"], r["regularizer"], r["step"])))
    for one, other in zip(*records, strict=True):
        assert one.keys() == other.keys()
        for name in ("regularizer", "step", "prompt_fidelity", "identity"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)


def test_results_of_another_model_are_not_mixed(tiny_pocket, tmp_path):
    (tmp_path / "results.json").write_text('{"model": "other", "records": [], "done": []}')
    with pytest.raises(UserError, match="results of another model"):
        run_bench(SMALL, model=tiny_pocket[0], output=tmp_path)


def test_parts_of_a_plan_can_be_chosen():
    plan = chosen(FULL, methods=["xti"], tuning=True)
    assert {setting.method for setting in plan.settings} == {"xti"}
    assert plan.concepts == TUNING
    with pytest.raises(UserError, match="--method dora: not in this plan; it has lora"):
        chosen(FULL, methods=["dora"], tuning=False)


def test_a_class_word_is_where_the_plan_says_so(context, tmp_path):
    options = options_of(Trial(Setting("textual_inversion"), REPORTED[1], 3), context, tmp_path)
    assert options["init_word"] == "robot"
    assert options["seed"] == "3"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--output", "{}", "--model", "{}"], "no oracle.safetensors there"),
        ([], "required: --output"),
        (["--output", "{}", "--method", "dora"], "--method dora"),
        (["--output", "{}", "--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(argv, named, tmp_path):
    with pytest.raises(UserError, match=named):
        main([part.format(tmp_path) for part in argv])
