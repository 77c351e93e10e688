"""The step-time benchmark runs at toy size and writes the expected keys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_plugin.commands.estimate import estimate_of
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.estimate.options import parse_estimate
from mlm_plugin.estimate.step import COPY
from mlm_plugin.toy import build_toy_tokenizer, toy_corpus
from research.benchmarks.make_sd15 import build_models, save_diffusers
from research.benchmarks.step_time import parse

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "research.benchmarks.step_time", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    shape = ("--shape", "tiny", "--resolution", "64", "--mlm_batch_size", "2")
    shape += ("--mlm_target", "class")
    done = run(*shape, "--num_warmup", "0", "--num_pairs", "1", "--output", output)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_the_result_says_what_was_measured_and_how(result):
    assert (result["shape"], result["resolution"], result["dtype"]) == ("tiny", 64, "float32")
    assert result["mlm_batch_size"] == 2
    assert result["num_steps"] == {"on": 1, "off": 1}
    assert result["device"].startswith("cpu")
    assert "torch" in result["versions"]
    assert "toy" in result["tokenizer"]
    assert "profiler" in result["memory_method"]
    assert "--shape tiny" in result["command"]


def test_ratios_are_those_of_the_printed_figures(result):
    seconds, peak = result["median_seconds"], result["peak_bytes"]
    assert result["ratio_time"] == pytest.approx(seconds["on"] / seconds["off"])
    assert result["ratio_memory"] == pytest.approx(peak["on"] / peak["off"])


def test_the_contextualizer_is_the_only_resident_difference(result):
    (sizes,) = result["contextualizers"]
    resident = result["resident_bytes"]
    assert resident["on"] - resident["off"] > 4 * sizes["vocab_size"]  # its output bias alone
    assert result["working_bytes"]["off"] > 0


def test_the_predicted_memory_is_what_the_profiler_finds(result, tmp_path):
    tokenizer, model = tmp_path / "tokenizer", tmp_path / "model"
    build_toy_tokenizer(tokenizer, toy_corpus())
    save_diffusers(build_models(tiny=True), model, tokenizer=tokenizer)
    for name, weight in (("on", 1e-3), ("off", 0)):
        options = {
            "pretrained_model_name_or_path": model,
            "resolution": 64,
            "network_dim": 16,
            "network_alpha": 16,
            "learning_rate": 1e-4,
            "optimizer_type": result["optimizer"],
            "mlm_target": "class",
            "mlm_batch_size": 2,
            "mlm_loss_weight": weight,
        }
        flags = [f"--{option}={value}" for option, value in options.items()]
        config = parse_estimate([*flags, "--cache_latents", "--gradient_checkpointing"]).config
        moment = estimate_of(config).moments["training step"]
        predicted = moment.total() - moment[COPY]  # made before the steps that are measured
        assert predicted == pytest.approx(result["peak_bytes"][name], rel=0.15)


def test_the_target_is_that_of_the_trainer_unless_another_is_given():
    arguments = ["--shape", "tiny", "--output", "f.json"]
    assert parse(arguments).mlm_target == TrainConfig().mlm.mlm_target
    assert parse([*arguments, "--mlm_target", "word"]).mlm_target == "word"


def test_a_resolution_the_u_net_cannot_take_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--shape tiny --resolution 100 --output f.json".split())
    assert "multiple of 64" in capsys.readouterr().err
