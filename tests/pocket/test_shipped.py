"""The built-in model, pictures and contexts behind the name "pocket"."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from mlm_plugin.contextualizer_file import load_contextualizer
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.metric_models import load_clip
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.pocket import shipped
from mlm_plugin.pocket.oracle import load_oracle
from mlm_plugin.setup import builtin_names


def test_the_name_pocket_means_a_model_every_loader_takes():
    folder = builtin_names.model_path("pocket")
    assert folder == builtin_names.model_path("pocket")
    states = load_stable_diffusion(folder).text_encoders[0].encode_captions(["a red cat"])
    assert states.shape == (1, 77, 96)
    assert load_clip(f"{folder}/clip").text_features(["a dog"]).isfinite().all()
    load_oracle(shipped.pocket_model() / "oracle.safetensors")


def test_the_unpacked_text_encoder_is_the_text_tower_of_clip():
    models = load_stable_diffusion(builtin_names.model_path("pocket"))
    clip = CLIPModel.from_pretrained(shipped.SHIPPED / "clip", dtype=torch.float32)
    ours = models.text_encoders[0].model.state_dict()
    tower = {n.removeprefix("text_model."): v for n, v in clip.text_model.state_dict().items()}
    for name, value in ours.items():
        assert torch.equal(value, tower[name.removeprefix("text_model.")]), name


def test_the_name_pocket_means_pictures_and_prompts():
    assert len(list(Path(builtin_names.data_path("pocket")).rglob("*.png"))) == 4
    lines = Path(builtin_names.contexts_path("pocket")).read_text().splitlines()
    assert len(lines) == 1000
    assert all("{}" in line for line in lines)


def test_a_folder_of_the_users_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    assert builtin_names.model_path("pocket") == "pocket"
    assert builtin_names.model_path("model.safetensors") == "model.safetensors"
    assert builtin_names.model_path(None) is None


def test_a_package_without_the_model_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(UserError, match="python -m research.pocket_model --output DIR"):
        builtin_names.model_path("pocket")


def test_the_built_in_contextualizer_reads_the_built_in_text_encoder():
    models = load_stable_diffusion(builtin_names.model_path("pocket"))
    path = builtin_names.contextualizer_path("pocket")
    _, facts = load_contextualizer(path, models.text_encoders[0])
    assert facts.accuracy > 0.3
