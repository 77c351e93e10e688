"""SDXL: folder and file give the same model, both text encoders are used as in sd-scripts."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mlm_plugin.errors import UserError
from mlm_plugin.export.checkpoint import save_checkpoint
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.models.tokenizers import second_tokenizer

CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PROJECTION = f"{CLIP_G}text_projection"
CAPTIONS = ["a photo of a dog!", "sks"]


@pytest.fixture(scope="module")
def made(toy_sdxl_folder, tmp_path_factory):
    """The toy as a folder and as a file, what is in the file, and how to load it."""
    model = load_stable_diffusion(toy_sdxl_folder)
    path = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    save_checkpoint(path, model.components, family="sdxl", metadata={})

    def load(path=path, **options):
        settings = {"tokenizer_cache_dir": toy_sdxl_folder / "tokenizer"} | options
        return load_stable_diffusion(path, ModelSettings(**settings), architecture=toy_sdxl_folder)

    return SimpleNamespace(path=path, state=load_file(path), load=load, model=model)


@pytest.fixture
def folder(toy_sdxl_folder, tmp_path) -> Path:
    """A copy of the folder to spoil."""
    return Path(shutil.copytree(toy_sdxl_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def pipeline(toy_sdxl_folder):
    return StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder)


def weights_of(model):
    modules = [model.unet, model.vae, *(te.model for te in model.text_encoders)]
    return [tensor for module in modules for tensor in module.state_dict().values()]


def assert_same(left, right):
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_model(left, right):
    assert_same(left.unet, right.unet)
    assert_same(left.vae, right.vae)
    for ours, theirs in zip(left.text_encoders, right.text_encoders, strict=True):
        assert_same(ours.model, theirs.model)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error_of(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a folder --------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_diffusers_loads_it(made, pipeline):
    model = made.model
    assert_same(model.unet, pipeline.unet)
    assert_same(model.vae, pipeline.vae)
    assert_same(model.text_encoders[0].model, pipeline.text_encoder)
    assert_same(model.text_encoders[1].model, pipeline.text_encoder_2)
    assert (model.version, model.family, model.is_sdxl) == ("sdxl_base_v1-0", "sdxl", True)
    assert model.prediction_type == "epsilon"
    assert model.vae.config.scaling_factor == 0.13025
    assert not any(weight.requires_grad for weight in weights_of(model))


def test_sd1_is_not_sdxl(toy_folder):
    model = load_stable_diffusion(toy_folder)
    assert (len(model.text_encoders), model.family, model.is_sdxl) == (1, "sd_v1", False)


@torch.no_grad()
def test_both_encoders_give_what_diffusers_conditions_the_unet_on(made, pipeline):
    clip_l, clip_g = made.model.text_encoders
    states_g, pooled = clip_g.encode_captions_pooled(CAPTIONS)
    states = torch.cat([clip_l.encode_captions(CAPTIONS), states_g], dim=-1)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(pooled, expected_pooled)
    torch.testing.assert_close(clip_g.encode_captions(CAPTIONS), states_g)


@torch.no_grad()
@pytest.mark.parametrize("windows", [2, 3])
def test_long_captions_are_pooled_over_their_first_window(made, windows):
    _, clip_g = made.load(max_token_length=75 * windows).text_encoders
    captions = [" ".join(["dog beach rain"] * 40), "a dog"]
    states, pooled = clip_g.encode_captions_pooled(captions)
    assert states.shape == (2, 75 * windows + 2, 48)
    assert pooled.shape == (2, 24)
    first = clip_g.encode_pooled(clip_g.tokenize(captions)[:, 0])
    torch.testing.assert_close(pooled, first.pooled)
    torch.testing.assert_close(states[:, :76], first.states[:, :76])


@pytest.mark.parametrize("clip_skip", [1, 3])
def test_clip_skip_has_no_effect_and_says_so(made, caplog, clip_skip):
    with caplog.at_level(logging.WARNING):
        model = made.load(clip_skip=clip_skip)
    assert {te.clip_skip for te in model.text_encoders} == {2}
    assert f"--clip_skip {clip_skip} has no effect" in caplog.text


@pytest.mark.parametrize("clip_skip", [None, 2])
def test_the_layer_that_sdxl_reads_needs_no_warning(made, caplog, clip_skip):
    with caplog.at_level(logging.WARNING):
        made.load(clip_skip=clip_skip)
    assert "clip_skip" not in caplog.text


# --- a file ----------------------------------------------------------------------------------


def test_a_file_gives_the_model_of_the_folder(made):
    assert_same_model(made.load(), made.model)


def test_a_tensor_of_the_projection_is_stored_as_openclip_applies_it(made):
    weight = made.model.text_encoders[1].model.text_projection.weight
    assert torch.equal(made.state[PROJECTION], weight.T)
    assert made.state[PROJECTION].shape == (48, 24)


@pytest.mark.parametrize("change", ["linear projection", "flat CLIP", "unused tensors"])
def test_variants_of_the_file_give_the_same_model(made, tmp_path, change):
    state = dict(made.state)
    if change == "linear projection":
        state[f"{PROJECTION}.weight"] = state.pop(PROJECTION).T.contiguous()
    elif change == "flat CLIP":
        state = {name.replace(f"{CLIP_L}text_model.", CLIP_L): t for name, t in state.items()}
    else:
        state[f"{CLIP_L}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["denoiser.sigmas"] = torch.ones(1000)
    save_file(state, tmp_path / "x.safetensors")
    assert_same_model(made.load(tmp_path / "x.safetensors"), made.model)


@pytest.mark.parametrize("part", [CLIP_L, CLIP_G, "model.diffusion_model.", "first_stage_model."])
def test_a_missing_tensor_of_any_part_is_named(made, tmp_path, part):
    name = max(name for name in made.state if name.startswith(part) and "logit" not in name)
    state = {key: tensor for key, tensor in made.state.items() if key != name}
    save_file(state, tmp_path / "x.safetensors")
    assert f"lacks 1 tensors ({name})" in error_of(made.load, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("markers", "prediction_type"),
    [([], "epsilon"), (["v_pred"], "v_prediction"), (["v_pred", "ztsnr"], "v_prediction")],
)
def test_a_file_that_says_so_predicts_v(made, tmp_path, markers, prediction_type):
    path = tmp_path / "x.safetensors"
    save_file(made.state | {name: torch.empty(0) for name in markers}, path)
    model = made.load(path)
    assert (model.prediction_type, model.version) == (prediction_type, "sdxl_base_v1-0")
    assert model.zero_terminal_snr == ("ztsnr" in markers)
    assert made.load(path, v_parameterization=True).prediction_type == "v_prediction"


def test_the_second_tokenizer_is_made_of_the_first(made):
    clip_l, clip_g = made.load().text_encoders
    ids_l, ids_g = clip_l.tokenize(CAPTIONS)[:, 0], clip_g.tokenize(CAPTIONS)[:, 0]
    end = clip_l.tokenizer.eos_token_id
    assert ids_l[1, -1] == end
    assert ids_g[1, -1] == 0
    for row_l, row_g in zip(ids_l.tolist(), ids_g.tolist(), strict=True):
        length = row_l.index(end) + 1
        assert row_g == row_l[:length] + [0] * (77 - length)


def test_padding_with_a_mark_does_not_change_how_the_mark_is_read(clip_vocabulary):
    first = CLIPTokenizer.from_pretrained(clip_vocabulary)
    assert second_tokenizer(first)("hi!").input_ids == first("hi!").input_ids


# --- the VAE that is given instead -----------------------------------------------------------


def test_another_vae_from_a_file_is_scaled_as_sdxls(made, toy_sdxl_folder, tmp_path):
    prefix = "first_stage_model."
    state = {
        name.removeprefix(prefix): tensor + 1
        for name, tensor in made.state.items()
        if name.startswith(prefix)
    }
    save_file(state, tmp_path / "vae.safetensors")
    vae = made.load(vae=tmp_path / "vae.safetensors").vae
    assert vae.config.scaling_factor == 0.13025
    assert torch.equal(vae.quant_conv.bias, made.model.vae.quant_conv.bias + 1)


# --- other models than SDXL base -------------------------------------------------------------


def test_an_inpainting_model_is_refused(made, tmp_path, folder):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(made.state | {name: torch.ones(32, 9, 3, 3)}, tmp_path / "x.safetensors")
    assert "9 input channels" in error_of(made.load, tmp_path / "x.safetensors")
    edit_json(folder / "unet" / "config.json", in_channels=9)
    assert "9 input channels" in error_of(load_stable_diffusion, folder)


def test_the_refiner_is_named(made, tmp_path, folder):
    state = {
        name.replace(CLIP_G, "conditioner.embedders.0.model."): made.state[name]
        for name in made.state
    }
    save_file(state, tmp_path / "x.safetensors")
    assert "is the refiner of Stable Diffusion XL" in error_of(
        made.load, tmp_path / "x.safetensors"
    )
    shutil.rmtree(folder / "text_encoder")
    assert "is the refiner of Stable Diffusion XL" in error_of(load_stable_diffusion, folder)


def test_a_file_without_text_encoders_asks_for_the_full_one(made, tmp_path):
    state = {name: t for name, t in made.state.items() if not name.startswith("conditioner.")}
    save_file(state, tmp_path / "x.safetensors")
    assert "holds no text encoder" in error_of(made.load, tmp_path / "x.safetensors")


def test_v2_contradicts_sdxl(made):
    assert "is Stable Diffusion XL: drop --v2" in error_of(made.load, v2=True)


def test_a_folder_of_widths_that_do_not_add_up_is_refused(folder):
    edit_json(folder / "text_encoder_2" / "config.json", hidden_size=64)
    assert "context width 80" in error_of(load_stable_diffusion, folder)


# --- the shipped configurations --------------------------------------------------------------


def test_the_shipped_configurations_are_those_of_sdxl_base():
    """Numbers of parameters as published: U-Net 2.567e9, CLIP-L 123e6, OpenCLIP bigG 695e6."""

    def config(part):
        return json.loads((ARCHITECTURES / "sdxl" / part / "config.json").read_text())

    with torch.device("meta"):
        modules = [
            UNet2DConditionModel.from_config(config("unet")),
            CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
            CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))),
            AutoencoderKL.from_config(config("vae")),
        ]
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert counts == [2_567_463_684, 123_060_480, 694_659_840, 83_653_863]
    assert modules[3].config.force_upcast
