"""SDXL with random weights: the shapes, both forms, and a training of it from end to end."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlm_plugin.config.loading import load_config
from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.networks.create import create_network
from mlm_plugin.toy import build_toy_tokenizer, toy_corpus
from research.benchmarks import full_size_sdxl as full_size
from research.benchmarks import make_sdxl

ROOT = Path(__file__).parents[3]
PARTS = {"lora_te1": 72, "lora_te2": 192, "lora_unet": 722}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_toy_tokenizer(folder, toy_corpus(num_prompts=200))
    return folder


@pytest.fixture(scope="module")
def made():
    return make_sdxl.build_models(tiny=True, dtype=torch.bfloat16)


def test_the_tiny_model_has_all_modules_of_the_real_one(made):
    unet, _, *clips = copy.deepcopy(made)
    encoders = [SimpleNamespace(model=clip) for clip in clips]
    models = SimpleNamespace(unet=unet, text_encoders=encoders)
    network = create_network(models, NetworkOptions(network_dim=2))
    assert [len(modules) for modules in network.modules_of.values()] == list(PARTS.values())


def test_weights_are_drawn_in_their_precision_and_the_default_stays(made):
    assert {p.dtype for model in made for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_the_folder_is_a_model_that_the_trainer_loads(made, tokenizer, tmp_path):
    make_sdxl.save_folder(made, tmp_path / "model", tokenizer=tokenizer)
    loaded = load_stable_diffusion(tmp_path / "model", ModelSettings(dtype=torch.bfloat16))
    assert loaded.is_sdxl
    for name, tensor in loaded.unet.state_dict().items():
        assert torch.equal(tensor, made.unet.state_dict()[name]), name


def test_the_file_is_the_same_model(made, tokenizer, tmp_path):
    make_sdxl.save_folder(made, tmp_path / "model", tokenizer=tokenizer)
    make_sdxl.save_single_file(made, tmp_path / "sdxl.safetensors")
    loaded = load_stable_diffusion(
        tmp_path / "sdxl.safetensors",
        ModelSettings(tokenizer_cache_dir=tokenizer, dtype=torch.bfloat16),
        architecture=tmp_path / "model",
    )
    second = loaded.text_encoders[1].model
    expected = made.text_encoder_2.state_dict()
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_modules_are_counted_by_part():
    names = ["lora_te1_a.alpha", "lora_te1_a.lora_up.weight", "lora_unet_b.alpha"]
    assert full_size.module_counts(names) == {"lora_te1": 1, "lora_te2": 0, "lora_unet": 1}


def test_the_flags_of_the_training_are_options_of_the_product(tmp_path):
    args = SimpleNamespace(work=tmp_path, resolution=256, num_steps=3)
    flags = full_size.train_flags(args, model=tmp_path, contextualizers=[tmp_path / "a"])
    config = load_config(flags)
    assert config.schedule.mixed_precision == "bf16"
    assert config.dataset.cache_latents


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_a_lora_is_trained_and_loaded_by_diffusers(size, tokenizer, tmp_path):
    if size == "full":
        free = shutil.disk_usage(tmp_path).free / 2**30
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
        if free < 10 or memory < 18:
            pytest.skip("needs 10 GiB of disk and 18 GiB of memory that nobody uses")
    flags = [
        *("--work", tmp_path / "work", "--tokenizer", tokenizer, "--output", tmp_path / "r.json"),
        *("--resolution", "128", "--num_steps", "2", *(["--tiny"] if size == "tiny" else [])),
    ]
    command = [sys.executable, "-m", "research.benchmarks.full_size_sdxl", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["saved"]["modules"] == PARTS
    assert result["saved"]["is_finite"]
    assert min(result["saved"]["modules_that_learned"].values()) > 0
    assert list(result["loaded"]["modules"].values()) == list(PARTS.values())
    assert all(stage["peak_bytes"] < 20 * 2**30 for stage in result["stages"].values())
