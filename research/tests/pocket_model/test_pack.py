"""What ships is small, unpacks to what was built, and is as good as its report says."""

import json

import pytest
import torch
from transformers import CLIPTextModel

from mlm_plugin.contextualizer_file import load_contextualizer
from mlm_plugin.evaluation.metric_models import load_clip
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.pocket import shipped
from mlm_plugin.pocket.oracle import load_oracle
from mlm_plugin.pocket.text_to_image import Sampling, TextToImage, generate
from mlm_plugin.setup import builtin_names
from research.pocket_model.pack import pack
from research.pocket_model.quality import held_out_prompts, judge, missed_bars


@pytest.fixture
def packed(tiny_pocket, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    size = pack(tiny_pocket[0], folder)
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    monkeypatch.setattr(shipped, "SHIPPED", folder)
    return folder


def test_what_can_be_made_again_is_not_packed(packed, tiny_pocket):
    names = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(("text_encoder/", "stages/"))]
    assert {"quality.json", "oracle.safetensors", "contextualizer.safetensors"} <= names
    assert "clip/vocab.json" not in names


def test_the_name_pocket_means_a_model_every_loader_takes(packed, tiny_pocket):
    folder = builtin_names.model_path("pocket")
    assert folder == builtin_names.model_path("pocket")
    models = load_stable_diffusion(folder)
    built = CLIPTextModel.from_pretrained(tiny_pocket[0] / "text_encoder", dtype=torch.float32)
    ours = models.text_encoders[0].model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in built.state_dict().items())
    load_contextualizer(builtin_names.contextualizer_path("pocket"), models.text_encoders[0])
    assert load_clip(f"{folder}/clip").text_features(["a dog"]).isfinite().all()
    load_oracle(shipped.pocket_model() / "oracle.safetensors")


def test_the_quality_report_says_where_it_comes_from(tiny_pocket):
    card = json.loads((tiny_pocket[0] / "quality.json").read_text())
    for name in ("accuracy", "num_prompts", "seed", "commit", "recipe", "seconds", "hardware"):
        assert name in card


# --- the model in the package ---------------------------------------------------------------


def test_the_built_in_model_meets_every_bar_and_is_small():
    card = json.loads((shipped.SHIPPED / "quality.json").read_text())
    assert missed_bars(card) == {}
    assert card["num_prompts"] >= 1000
    size = sum(path.stat().st_size for path in shipped.SHIPPED.rglob("*") if path.is_file())
    assert size <= 12 * 2**20


def test_the_built_in_model_draws_as_its_report_says():
    """Some of the report's prompts, with fewer steps."""
    folder = shipped.pocket_model()
    models = load_stable_diffusion(str(folder))
    prompts = held_out_prompts(48, seed=0)
    pictures = generate(
        [prompt.text for prompt in prompts],
        TextToImage(models.unet, models.vae, models.text_encoders[0].encode_captions),
        Sampling(num_steps=10, guidance=4.0),
        seed=0,
    )
    verdict = judge(load_oracle(folder / "oracle.safetensors"), pictures, prompts)
    for name in ("background", "position", "subject", "colour", "companion"):
        assert verdict["accuracy"][name] > 0.9, name
    assert verdict["held_out_pairs"] > 0.85
