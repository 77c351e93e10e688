"""Whole models: what sd-scripts, diffusers and our own loader make of the files."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mlm_plugin.errors import UserError
from mlm_plugin.export.checkpoint import (
    CheckpointCounts,
    ldm_tensors,
    require_replaceable,
    save_checkpoint,
    save_diffusers_folder,
    verify_checkpoint,
)
from mlm_plugin.export.lora_files import SAVE_DTYPES
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.models.components import Components

# family -> number and digest of names and shapes; from tests/reference/derive_checkpoint.py
SD_SCRIPTS_TENSORS = {
    "sd_v1": (1130, "21503364ca61d806"),
    "sd_v2": (1228, "9ead00576b208d09"),
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
PROJ_IN = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
OPEN_CLIP = "cond_stage_model.model."
SMALL = {
    "unet": {
        "block_out_channels": [32, 32, 32, 32],
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    # As many layers as SD 2: diffusers knows the unused one by its number.
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 23,
        "vocab_size": 2000,
    },
}


def config_of(family, part):
    return json.loads((ARCHITECTURES / family / part / "config.json").read_text())


def build(family, *, changes=None):
    changes = changes or {"unet": {}, "vae": {}, "text_encoder": {}}
    return Components(
        unet=UNet2DConditionModel.from_config(config_of(family, "unet") | changes["unet"]),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**config_of(family, "text_encoder") | changes["text_encoder"])
        ),
        vae=AutoencoderKL.from_config(config_of(family, "vae") | changes["vae"]),
    )


def tokenizer_of(folder):
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def scheduler():
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def folder_parts(parts, toy_folder):
    return {
        "networks": parts,
        "tokenizers": [tokenizer_of(toy_folder)],
        "noise_scheduler": scheduler(),
        "prediction_type": "epsilon",
    }


@pytest.fixture(scope="module")
def sd1(toy_folder) -> Components:
    return load_stable_diffusion(toy_folder).components


@pytest.fixture(scope="module")
def sd2() -> Components:
    torch.manual_seed(3)
    return build("sd_v2", changes=SMALL)


@pytest.fixture(scope="module", params=["sd_v1", "sd_v2"])
def saved(request, tmp_path_factory, toy_folder):
    """One family's toy, as a file and as a folder, and what went in."""
    family = request.param
    parts = request.getfixturevalue("sd1" if family == "sd_v1" else "sd2")
    root = tmp_path_factory.mktemp(family)
    save_checkpoint(root / "x.safetensors", parts, family=family, metadata={})
    save_diffusers_folder(root / "x", **folder_parts(parts, toy_folder))
    return family, parts, root / "x.safetensors", root / "x"


def flat(module: nn.Module):
    return {name.removeprefix("text_model."): t for name, t in module.state_dict().items()}


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = flat(left), flat(right)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_same_parts(model, parts: Components) -> None:
    assert_same(model.unet, parts.unet)
    assert_same(model.vae, parts.vae)
    encoders = getattr(model, "text_encoders", None)
    assert_same(encoders[0].model if encoders else model.text_encoder, parts.text_encoder)


def names_below(path: Path):
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 1 MB, as if the disk were full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- one file: who can read it ---------------------------------------------------------------


def test_our_loader_reads_back_every_tensor(saved, toy_folder):
    family, parts, path, folder = saved
    settings = ModelSettings(tokenizer_cache_dir=toy_folder / "tokenizer")
    model = load_stable_diffusion(path, settings, architecture=folder)
    assert_same_parts(model, parts)
    assert model.version == family


def test_diffusers_reads_back_every_tensor(saved):
    _, parts, path, folder = saved
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True
    )
    assert_same_parts(pipeline, parts)


@pytest.mark.parametrize("family", SD_SCRIPTS_TENSORS)
def test_names_and_shapes_are_those_that_sd_scripts_writes(family):
    with torch.device("meta"):
        parts = build(family)
    shapes = {name: tuple(t.shape) for name, t in ldm_tensors(parts, family=family).items()}
    lines = "\n".join(f"{name} {shapes[name]}" for name in sorted(shapes))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert (len(shapes), digest) == SD_SCRIPTS_TENSORS[family]


@pytest.mark.parametrize("nested", [True, False])
def test_text_encoders_of_any_transformers_version_get_the_same_names(sd1, nested):
    state = flat(sd1.text_encoder)
    body = getattr(sd1.text_encoder, "text_model", sd1.text_encoder)
    module = nn.ModuleDict({"text_model": body}) if nested else body
    tensors = ldm_tensors(sd1._replace(text_encoder=module), family="sd_v1")
    prefix = "cond_stage_model.transformer.text_model."
    found = {n.removeprefix(prefix) for n in tensors if n.startswith("cond_stage_model.")}
    assert found == state.keys()


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("family", "shape"), [("sd_v1", (32, 32, 1, 1)), ("sd_v2", (32, 32))])
def test_projections_have_the_shape_of_the_family_whatever_the_unet_has(sd2, linear, family, shape):
    config = config_of("sd_v2", "unet") | SMALL["unet"] | {"use_linear_projection": linear}
    unet = UNet2DConditionModel.from_config(config)
    tensors = ldm_tensors(sd2._replace(unet=unet), family=family)
    assert tensors[PROJ_IN].shape == shape
    weight = unet.down_blocks[0].attentions[0].proj_in.weight
    assert torch.equal(tensors[PROJ_IN].flatten(), weight.flatten())


def test_the_tensors_that_sd2_never_uses_have_harmless_values(sd2):
    tensors = ldm_tensors(sd2, family="sd_v2")
    layers = [
        {
            name.removeprefix(start): tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
        for start in (f"{OPEN_CLIP}transformer.resblocks.{number}." for number in (22, 23, 24))
    ]
    assert layers[0].keys() == layers[1].keys()
    assert all(torch.equal(tensor, layers[1][name]) for name, tensor in layers[0].items())
    assert not layers[2]
    assert torch.equal(tensors[f"{OPEN_CLIP}text_projection"], torch.eye(32))
    assert tensors[f"{OPEN_CLIP}logit_scale"].item() == pytest.approx(math.log(100))


def test_a_weight_that_checkpoints_do_not_have_is_refused_and_nothing_is_written(tmp_path, sd1):
    unet = UNet2DConditionModel.from_config(sd1.unet.config)
    unet.adapter = nn.Linear(2, 2)
    parts = sd1._replace(unet=unet)
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        save_checkpoint(tmp_path / "x.safetensors", parts, family="sd_v1", metadata={})
    assert not names_below(tmp_path)


# --- one file: precision, metadata, memory, failure ------------------------------------------


@pytest.mark.parametrize("precision", SAVE_DTYPES)
def test_every_tensor_has_the_save_precision_and_the_model_keeps_its_own(tmp_path, sd2, precision):
    dtype = SAVE_DTYPES[precision]
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, sd2, family="sd_v2", metadata={}, dtype=dtype)
    loaded, live = load_file(path), ldm_tensors(sd2, family="sd_v2")
    assert loaded.keys() == live.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == (dtype or torch.float32)
        assert torch.equal(tensor, live[name].to(tensor.dtype))
        assert live[name].dtype == torch.float32


def test_without_a_save_precision_each_part_keeps_its_own(tmp_path, sd1):
    half = UNet2DConditionModel.from_config(sd1.unet.config).half()
    path = tmp_path / "x.safetensors"
    parts = sd1._replace(unet=half)
    save_checkpoint(path, parts, family="sd_v1", metadata={})
    for name, tensor in load_file(path).items():
        is_unet = name.startswith("model.diffusion_model.")
        assert tensor.dtype == (torch.float16 if is_unet else torch.float32)


def test_metadata_is_written_as_given(tmp_path, sd1):
    metadata = {"modelspec.title": "größer", "ss_steps": "3"}
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, sd1, family="sd_v1", metadata=metadata)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata


def test_weights_that_need_no_change_are_not_copied(sd1):
    live = {
        tensor.untyped_storage().data_ptr()
        for module in sd1.by_part().values()
        for tensor in module.state_dict().values()
    }
    tensors = ldm_tensors(sd1, family="sd_v1")
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == live


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, sd1, full_disk):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="large"):
        save_checkpoint(path, sd1, family="sd_v1", metadata={})
    assert path.read_bytes() == b"old"
    assert names_below(tmp_path) == ["x.safetensors"]


# --- one file: check -------------------------------------------------------------------------


def test_the_check_counts_the_tensors_of_each_part(saved):
    family, parts, path, _ = saved
    counts = verify_checkpoint(path)
    text_tensors = len(parts.text_encoder.state_dict())
    if family == "sd_v2":  # q, k, v in one; one more layer; projection and scale
        text_tensors = 4 + 24 * 12 + 2
    assert counts == CheckpointCounts(
        unet=len(parts.unet.state_dict()),
        text_encoder=text_tensors,
        vae=len(parts.vae.state_dict()),
    )


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e6, torch.float16)])
def test_values_that_are_not_finite_are_refused(tmp_path, sd1, value, dtype):
    unet = UNet2DConditionModel.from_config(sd1.unet.config)
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = value
    parts = sd1._replace(unet=unet)
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, parts, family="sd_v1", metadata={}, dtype=dtype)
    with pytest.raises(UserError, match=rf"1 of \d+ tensors hold NaN or infinity.*{CONV_IN}"):
        verify_checkpoint(path)


# --- diffusers folder ------------------------------------------------------------------------


def test_diffusers_loads_the_folder_and_makes_a_picture(saved):
    _, parts, _, folder = saved
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert_same_parts(pipeline, parts)
    assert pipeline.safety_checker is None
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a dog", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_our_loader_reads_the_folder(saved, toy_folder):
    family, parts, _, folder = saved
    model = load_stable_diffusion(folder)
    assert_same_parts(model, parts)
    assert model.version == family
    original, read = tokenizer_of(toy_folder), model.text_encoders[0].tokenizer
    for text in ("a photo of sks dog", "Zwx, ohwx 3 cats!", "größe"):
        assert read(text).input_ids == original(text).input_ids
    assert read.pad_token == original.pad_token


def test_the_folder_has_files_for_every_version_of_the_libraries(saved):
    folder = saved[3]
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(
        names_below(folder / "tokenizer")
    )
    names = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    assert oct(folder.stat().st_mode)[-3:] == oct((folder / "unet").stat().st_mode)[-3:]


def test_the_folder_says_what_the_model_predicts(tmp_path, sd1, toy_folder):
    options = folder_parts(sd1, toy_folder) | {"prediction_type": "v_prediction"}
    save_diffusers_folder(tmp_path / "x", **options)
    assert load_stable_diffusion(tmp_path / "x").prediction_type == "v_prediction"
    assert options["noise_scheduler"].config.prediction_type == "epsilon"
    loaded = DDPMScheduler.from_pretrained(tmp_path / "x" / "scheduler")
    assert torch.equal(loaded.betas, options["noise_scheduler"].betas)
    assert loaded.config.prediction_type == "v_prediction"


def test_the_folder_has_the_save_precision(tmp_path, sd1, toy_folder):
    save_diffusers_folder(tmp_path / "x", **folder_parts(sd1, toy_folder), dtype=torch.float16)
    for file in (tmp_path / "x").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    config = json.loads((tmp_path / "x" / "text_encoder" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert sd1.text_encoder.dtype == torch.float32


def test_a_folder_saved_before_is_replaced_and_nothing_of_it_stays(tmp_path, sd1, sd2, toy_folder):
    save_diffusers_folder(tmp_path / "x", **folder_parts(sd1, toy_folder))
    (tmp_path / "x" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    save_diffusers_folder(tmp_path / "x", **folder_parts(sd2, toy_folder))
    assert_same(load_stable_diffusion(tmp_path / "x").unet, sd2.unet)
    assert not list(tmp_path.rglob("*fp16*"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("foreign", ["notes.txt", "unet"])
def test_a_folder_with_other_things_in_it_is_refused_and_kept(tmp_path, sd1, toy_folder, foreign):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / foreign).write_text("mine")
    with pytest.raises(UserError, match=foreign):
        require_replaceable(tmp_path / "x")
    with pytest.raises(UserError, match="output_name"):
        save_diffusers_folder(tmp_path / "x", **folder_parts(sd1, toy_folder))
    assert names_below(tmp_path) == ["x", f"x/{foreign}"]


def test_a_free_name_an_empty_folder_and_an_old_save_can_be_taken_but_no_file(tmp_path, saved):
    require_replaceable(tmp_path / "new")
    require_replaceable(tmp_path)
    require_replaceable(saved[3])
    with pytest.raises(UserError, match="is a file"):
        require_replaceable(saved[2])


def test_a_full_disk_leaves_the_old_folder_and_no_rest(tmp_path, saved, toy_folder, request):
    _, parts, _, folder = saved
    target = Path(shutil.copytree(folder, tmp_path / "x"))
    before = names_below(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="large"):
        save_diffusers_folder(target, **folder_parts(parts, toy_folder))
    assert names_below(tmp_path) == before
    with pytest.raises(OSError, match="large"):
        save_diffusers_folder(tmp_path / "new", **folder_parts(parts, toy_folder))
    assert names_below(tmp_path) == before


# --- full size -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", SD_SCRIPTS_TENSORS)
def test_diffusers_reads_a_full_size_checkpoint(tmp_path, toy_folder, family):
    torch.set_default_dtype(torch.float16)
    try:
        parts = build(family)
    finally:
        torch.set_default_dtype(torch.float32)
    folder, path = tmp_path / "configs", tmp_path / "x.safetensors"
    save_diffusers_folder(folder, **folder_parts(parts, toy_folder))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    save_checkpoint(path, parts, family=family, metadata={})
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float16
    )
    assert_same_parts(pipeline, parts)
    del pipeline
    settings = ModelSettings(
        tokenizer_cache_dir=toy_folder / "tokenizer", dtype=torch.float16, vae_dtype=torch.float16
    )
    model = load_stable_diffusion(path, settings)
    assert_same_parts(model, parts)
