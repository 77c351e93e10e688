"""The bench on a miniature: every arm runs as asked, pairs share their noise, and it resumes."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from mlm_plugin.bench import trial
from mlm_plugin.bench.command import run_pocket
from mlm_plugin.bench.demo import run_demo
from mlm_plugin.bench.plan import DEMO, FULL, METHOD_FLAGS, SHORT, Arm, chosen
from mlm_plugin.bench.run import run_bench
from mlm_plugin.bench.trial import Workshop, flags_of, run_trial
from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import REPORTED, TUNING
from mlm_plugin.training.callbacks import Callback

LOOKS = dict.fromkeys(METHOD_FLAGS, (1, 2))
SMALL = dataclasses.replace(
    FULL, ablations=(), looks=LOOKS, num_steps=2, concepts=REPORTED[:1], seeds=(0,)
)
KINDS = {(arm.method, arm.regularizer): arm for arm in reversed(FULL.arms)}


@pytest.fixture(scope="module")
def workshop(tiny_pocket, tmp_path_factory):
    return Workshop(tiny_pocket[0], tmp_path_factory.mktemp("bench"), SMALL)


@pytest.mark.parametrize("arm", KINDS.values(), ids=lambda arm: arm.name)
def test_every_kind_of_arm_trains_and_is_looked_at(arm, workshop):
    records = run_trial(arm, REPORTED[0], 0, workshop)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert (record["method"], record["regularizer"]) == (arm.method, arm.regularizer)
        assert 0 <= record["prompt_fidelity"] <= 1
        assert 0 <= record["identity"] <= 1
        assert -1 <= record["clip_t"] <= 1
    assert records[0]["seconds_per_step"] == records[1]["seconds_per_step"] > 0


def test_no_two_arms_share_a_name():
    names = [arm.name for arm in (*FULL.arms, *FULL.ablations)]
    assert len(set(names)) == len(names)
    assert {arm.name for arm in SHORT.arms} <= set(names)


class Losses(Callback):
    def __init__(self):
        self.diffusion, self.terms = [], []

    def on_step_end(self, trainer, result):
        self.diffusion.append(result.diffusion)
        self.terms.append(result.mlm)


def losses_of(arm, workshop, tmp_path):
    trainer = trial._create_trainer(arm, REPORTED[0], 0, workshop, tmp_path)
    callback = Losses()
    trainer.callbacks = [callback]
    trainer.run()
    return callback


@pytest.mark.parametrize("regularizer", ["mlm", "core", "output_preservation"])
def test_arms_of_a_seed_see_the_same_pictures_and_noise(regularizer, workshop, tmp_path):
    plain = losses_of(Arm("lora"), workshop, tmp_path)
    other = losses_of(Arm("lora", regularizer, 0.1), workshop, tmp_path)
    assert other.diffusion[0] == plain.diffusion[0]
    assert plain.terms == [None, None]
    assert all(term is not None for term in other.terms)


def test_a_term_of_weight_zero_is_the_plain_run(workshop):
    plain, nothing = (
        run_trial(Arm("lora", name), REPORTED[0], 0, workshop) for name in ("plain", "core")
    )
    for a, b in zip(plain, nothing, strict=True):
        assert a["identity"] == b["identity"]
        assert a["clip_t"] == b["clip_t"]


def test_the_table_of_a_plan_is_written_and_a_second_run_does_nothing(
    tiny_pocket, tmp_path, capsys
):
    plan = dataclasses.replace(SMALL, arms=(Arm("lora"), Arm("lora", "core", 0.1)))
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
    more = dataclasses.replace(plan, arms=(*plan.arms, Arm("lora", "textboost", 0.1)))
    assert run_bench(more, model=tiny_pocket[0], output=tmp_path) == 0
    assert capsys.readouterr().out.count("fidelity") == 1


def test_a_signal_ends_the_bench_and_keeps_what_is_done(tiny_pocket, tmp_path, monkeypatch, capsys):
    plan = dataclasses.replace(SMALL, arms=(Arm("lora"), Arm("lora", "core", 0.1)))
    look = trial._look

    def look_and_stop(concept, words, *others):
        if words == concept.name:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(concept, words, *others)

    monkeypatch.setattr(trial, "_look", look_and_stop)
    assert run_bench(plan, model=tiny_pocket[0], output=tmp_path) == 143
    assert "the same command goes on" in capsys.readouterr().err
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [record["method"] for record in records] == ["base"]


def test_trials_in_processes_of_their_own_give_the_same_records(tiny_pocket, tmp_path):
    plan = dataclasses.replace(SMALL, arms=(Arm("lora"), Arm("lora", "core", 0.1)))
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


def test_the_demo_writes_two_loras_and_a_grid(tiny_pocket, tmp_path, capsys):
    plan = dataclasses.replace(DEMO, looks={"lora": (2,)}, num_steps=2)
    assert run_demo(plan, REPORTED[0], model=tiny_pocket[0], output=tmp_path) == 0
    plain, mlm = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "mlm"))
    assert plain.keys() == mlm.keys()
    assert any(not torch.equal(plain[name], mlm[name]) for name in plain)
    from PIL import Image

    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 128
        assert len(set(grid.convert("L").getdata())) > 50
    assert "plain and" in capsys.readouterr().out.splitlines()[-1]


def test_parts_of_a_plan_can_be_chosen():
    plan = chosen(FULL, methods=["xti"], tuning=True)
    assert {arm.method for arm in plan.arms} == {"xti"}
    assert plan.concepts == TUNING
    with pytest.raises(UserError, match="--method dora: not in this plan; it has lora"):
        chosen(FULL, methods=["dora"], tuning=False)


def test_a_class_word_stands_where_the_plan_says_so(workshop, tmp_path):
    flags = flags_of(Arm("textual_inversion"), REPORTED[1], 3, workshop, tmp_path)
    assert flags[flags.index("--init_word") + 1] == "robot"
    assert flags[flags.index("--seed") + 1] == "3"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["bench", "--output", "{}", "--model", "{}"], "no oracle.safetensors there"),
        (["demo", "--output", "{}", "--model", "{}"], "no oracle.safetensors there"),
        (["bench"], "required: --output"),
        (["bench", "--output", "{}", "--method", "dora"], "--method dora"),
        (["bench", "--output", "{}", "--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(argv, named, tmp_path):
    with pytest.raises(UserError, match=named):
        run_pocket([part.format(tmp_path) for part in argv])
