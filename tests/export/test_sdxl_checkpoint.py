"""Whole SDXL models: what sd-scripts, diffusers and our own loader make of the files."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlm_plugin.export.checkpoint import (
    CheckpointCounts,
    ldm_tensors,
    require_replaceable,
    save_checkpoint,
    save_diffusers_folder,
    verify_checkpoint,
)
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.models.components import Components

# Number and digest of names and shapes; from tests/reference/derive_checkpoint.py. The projection
# of the real model is square, so the digest does not depend on its orientation.
SD_SCRIPTS_TENSORS = (2514, "0e7097ed9dccb5ed")
CLIP_G = "conditioner.embedders.1.model."


def parts_of(model):
    return model.components.by_part()


@pytest.fixture(scope="module")
def model(toy_sdxl_folder):
    """The toy with values that fp16 holds, so that nothing is lost on the way."""
    model = load_stable_diffusion(toy_sdxl_folder)
    for module in parts_of(model).values():
        module.half().float()
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The model as a file and as a folder in half precision."""
    root = tmp_path_factory.mktemp("sdxl")
    save_checkpoint(
        root / "x.safetensors",
        model.components,
        family="sdxl",
        metadata={"modelspec.title": "x"},
        dtype=torch.float16,
    )
    save_diffusers_folder(
        root / "x",
        model.components,
        tokenizers=[text_encoder.tokenizer for text_encoder in model.text_encoders],
        noise_scheduler=model.noise_scheduler,
        prediction_type="epsilon",
        dtype=torch.float16,
    )
    return root / "x.safetensors", root / "x"


def assert_same_parts(loaded, model):
    for name, module in parts_of(model).items():
        ours, theirs = module.state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)


def test_names_and_shapes_are_those_that_sd_scripts_writes():
    def config(part):
        return json.loads((ARCHITECTURES / "sdxl" / part / "config.json").read_text())

    with torch.device("meta"):
        networks = Components(
            unet=UNet2DConditionModel.from_config(config("unet")),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))),
            vae=AutoencoderKL.from_config(config("vae")),
        )
        tensors = ldm_tensors(networks, family="sdxl")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    lines = "\n".join(f"{name} {shapes[name]}" for name in sorted(shapes))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert (len(shapes), digest) == SD_SCRIPTS_TENSORS


def test_our_loader_reads_back_every_tensor(saved, model, toy_sdxl_folder):
    file, folder = saved
    for path in (file, folder):
        settings = ModelSettings(tokenizer_cache_dir=toy_sdxl_folder / "tokenizer")
        loaded = load_stable_diffusion(path, settings, architecture=folder)
        assert loaded.is_sdxl
        for ours, theirs in zip(parts_of(model).values(), parts_of(loaded).values(), strict=True):
            assert all(
                torch.equal(ours.state_dict()[name], tensor)
                for name, tensor in theirs.state_dict().items()
            )


def test_diffusers_reads_back_every_tensor_of_the_file(saved, model):
    file, folder = saved
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True
    )
    assert_same_parts(pipeline, model)


def test_diffusers_makes_pictures_with_the_folder(saved, model):
    _, folder = saved
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert_same_parts(pipeline, model)
    assert pipeline.tokenizer.pad_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.tokenizer_2.pad_token_id == 0
    assert pipeline.vae.config.force_upcast
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a dog", num_inference_steps=1, height=32, width=32, output_type="np")
    assert pictures.images.shape == (1, 32, 32, 3)


def test_a_folder_written_before_may_be_replaced(saved):
    require_replaceable(saved[1])


def test_the_tensors_of_each_part_are_counted(saved, model):
    num = {name: len(module.state_dict()) for name, module in parts_of(model).items()}
    # OpenCLIP joins query, key and value, weight and bias, in 3 layers; and has a logit scale.
    text = num["text_encoder"] + num["text_encoder_2"] - 3 * 4 + 1
    assert verify_checkpoint(saved[0]) == CheckpointCounts(num["unet"], text, num["vae"])


def test_the_scale_that_is_never_used_is_that_of_openclip(saved):
    scale = load_file(saved[0])[f"{CLIP_G}logit_scale"]
    assert scale.item() == pytest.approx(math.log(100), rel=1e-3)


@pytest.mark.parametrize("nested", [True, False])
def test_text_encoders_of_any_transformers_version_get_the_same_names(saved, model, nested):
    parts = parts_of(model)
    bodies = []
    for name in ("text_encoder", "text_encoder_2"):
        body = getattr(parts[name], "text_model", parts[name])
        bodies.append(nn.ModuleDict({"text_model": body}) if nested else body)
    bodies[1].text_projection = parts["text_encoder_2"].text_projection
    networks = Components(model.unet, bodies[0], model.vae, bodies[1])
    tensors = ldm_tensors(networks, family="sdxl")
    del bodies[1].text_projection
    assert tensors.keys() == load_file(saved[0]).keys()
