"""The step-time benchmark runs at toy size and writes what its readers look for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "benchmarks/step_time.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    shape = ("--shape", "tiny", "--resolution", "64", "--mlm_batch_size", "2")
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
    sizes = result["contextualizer"]
    resident = result["resident_bytes"]
    assert resident["on"] - resident["off"] > 4 * sizes["vocab_size"]  # its output bias alone
    assert result["working_bytes"]["off"] > 0


def test_a_resolution_the_u_net_cannot_take_is_refused(tmp_path):
    done = run("--shape", "tiny", "--resolution", "100", "--output", tmp_path / "f.json")
    assert done.returncode == 2
    assert "multiple of 64" in done.stderr
