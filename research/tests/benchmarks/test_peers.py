"""The comparison with other trainers: their flags, ratios, and a run if one is available."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_plugin.config.loading import load_config
from mlm_plugin.toy import build_toy_tokenizer, toy_corpus
from research.benchmarks import peers

ROOT = Path(__file__).parents[3]
EXAMPLES = os.environ.get("DIFFUSERS_EXAMPLES_DIR")


@pytest.fixture
def arguments(tmp_path):
    return [
        *("--shape", "sd15", "--work", tmp_path, "--tokenizer", tmp_path),
        *("--output", tmp_path / "r.json", "--diffusers_examples", tmp_path),
    ]


def report(seconds, peak):
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "peak_bytes": peak,
        "loading_peak_bytes": 2 * peak,
        "load_average": 1.0,
        "device": "cpu",
        "num_threads": 1,
        "versions": {},
    }


def test_ratios_are_of_medians_over_all_rounds():
    ours = [report([1.0, 2.0, 9.0], 100), report([2.0, 2.0], 120)]
    theirs = [report([4.0, 4.0, 4.0], 220), report([4.0, 5.0], 220)]
    found = peers.compare(ours, theirs)
    assert (found["ratio_time"], found["ratio_memory"]) == (0.5, 0.5)
    assert found["ratio_cpu_time_of_rounds"] == [0.5, 2 / 4.5]
    table = peers.markdown_table({"diffusers": found})
    assert "| diffusers | 0.50 | 0.50 | 0.50 | 2.00 s, 0 MiB | 4.00 s, 0 MiB |" in table


def test_our_flags_are_options_of_the_standalone_trainer(arguments):
    args = peers.parse(map(str, arguments))
    config = load_config(peers.our_flags(args))
    assert config.mlm.mlm_loss_weight == 0
    assert config.network.network_dim == 16
    assert config.schedule.gradient_checkpointing


def test_both_peers_stand_beside_ours_in_their_own_interpreter(arguments, tmp_path):
    for name in ("train_network.py", "train_dreambooth_lora.py"):
        (tmp_path / name).touch()
    more = ["--sd_scripts", tmp_path, "--sd_scripts_python", "other-python"]
    pairs = peers.pairs_of(peers.parse(map(str, [*arguments, *more])))
    assert pairs["sd_scripts"].ours.python == "other-python"
    assert "--cache_latents" in pairs["sd_scripts"].ours.flags
    assert "--cache_latents" not in pairs["diffusers"].ours.flags
    command = pairs["diffusers"].theirs.command(tmp_path / "r", num_warmup=2, num_steps=3)
    assert command[command.index("--num_steps") + 1] == "5"


def test_a_folder_without_the_script_is_named(arguments):
    with pytest.raises(FileNotFoundError, match="train_dreambooth_lora.py"):
        peers.pairs_of(peers.parse(map(str, arguments)))


def test_sd_scripts_has_no_tiny_shape(arguments, capsys):
    with pytest.raises(SystemExit):
        peers.parse(map(str, [*arguments, "--sd_scripts", ".", "--shape", "tiny"]))
    assert "use a real one" in capsys.readouterr().err


@pytest.mark.skipif(EXAMPLES is None, reason="DIFFUSERS_EXAMPLES_DIR names no examples/dreambooth")
@pytest.mark.parametrize("shape", ["tiny", "tiny_sdxl"])
def test_the_example_of_diffusers_is_compared(shape, tmp_path):
    pytest.importorskip("torchvision", reason="the examples need torchvision")
    build_toy_tokenizer(tmp_path / "tokenizer", toy_corpus(num_prompts=200))
    flags = [
        *("--shape", shape, "--work", tmp_path, "--tokenizer", tmp_path / "tokenizer"),
        *("--output", tmp_path / "r.json", "--diffusers_examples", EXAMPLES),
        *("--resolution", "64", "--mixed_precision", "no", "--optimizer_type", "AdamW"),
        *("--num_warmup", "1", "--num_steps", "2", "--num_rounds", "1"),
    ]
    command = [sys.executable, "-m", "research.benchmarks.peers", *map(str, flags)]
    subprocess.run(command, check=True, cwd=ROOT)  # the runs find this package on their own
    found = json.loads((tmp_path / "r.json").read_text())["peers"]["diffusers"]
    assert found["ratio_time"] > 0
    assert len(found["theirs"]["seconds"]) == 2
