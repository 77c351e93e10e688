"""Folders, WebUI files and hub ids give the same model, or one clear line."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.errors import UserError
from mlm_plugin.models import diffusers_folder
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.models.ldm_names import (
    clip_names,
    open_clip_names,
    to_ldm,
    unet_names,
    vae_names,
)
from mlm_plugin.models.tokenizers import SHIPPED, find_tokenizers, load_tokenizer
from research.benchmarks import make_sd15

UNET_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SD2_TINY = {
    "unet": {
        "block_out_channels": [32, 32, 64, 64],
        "attention_head_dim": [1, 1, 2, 2],
        "cross_attention_dim": 32,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 600,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32]},
}


def write_tokenizer(folder: Path) -> Path:
    """A CLIP tokenizer that knows single letters only."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Made:
    """A tiny SD 1.x model on disk in both forms, and what went in."""

    def __init__(self, root: Path):
        self.tokenizer = write_tokenizer(root / "tokenizer_cache" / "openai_clip-vit-large-patch14")
        self.models = make_sd15.build_models(tiny=True, seed=1)
        self.folder, self.file = root / "diffusers", root / "sd15.safetensors"
        make_sd15.save_diffusers(self.models, self.folder, tokenizer=self.tokenizer)
        make_sd15.save_single_file(self.models, self.file)
        self.state = load_file(self.file)

    def load(self, path: Path | None = None, **options):
        options = {"architecture": self.folder, "tokenizer_cache_dir": self.tokenizer} | options
        architecture = options.pop("architecture")
        return load_stable_diffusion(
            path or self.file, ModelSettings(**options), architecture=architecture
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    cache = tmp_path / "hub_cache"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of the diffusers folder to spoil."""
    return Path(shutil.copytree(made.folder, tmp_path / "model"))


def assert_same(left: torch.nn.Module, right: torch.nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_same_model(left, right) -> None:
    assert_same(left.unet, right.unet)
    assert_same(left.vae, right.vae)
    assert_same(left.text_encoders[0].model, right.text_encoders[0].model)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error_of(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the same model from every source ---


def test_a_single_file_gives_every_tensor_of_the_diffusers_folder(made):
    from_file, from_folder = made.load(), load_stable_diffusion(made.folder)
    assert_same_model(from_file, from_folder)
    assert_same(from_file.unet, made.models.unet)
    assert_same(from_file.vae, made.models.vae)
    assert_same(from_file.text_encoders[0].model, made.models.text_encoder)
    assert from_file.version == from_folder.version == "sd_v1"


def test_a_single_file_computes_what_the_diffusers_folder_computes(made):
    outputs = []
    for model in (made.load(), load_stable_diffusion(made.folder)):
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            states = model.text_encoders[0].encode_captions(["a dog", "a cat on a mat"])
            latents = torch.randn(2, 4, 8, 8, generator=noise)
            sample = model.unet(
                latents, torch.tensor([5, 900]), encoder_hidden_states=states
            ).sample
            image = model.vae.decode(latents).sample
        outputs.append((states, sample, image))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.isfinite(ours).all()
        assert ours.std() > 0.01


@pytest.mark.parametrize(("part", "cls"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_our_file_means_the_same_to_diffusers_own_reader(made, part, cls):
    theirs = cls.from_single_file(
        str(made.file), config=str(made.folder), subfolder=part, local_files_only=True
    )
    assert_same(theirs, getattr(made.models, part))


def test_models_are_frozen_in_eval_mode_and_of_the_dtypes_asked_for(made):
    for source in (made.file, made.folder):
        model = made.load(source, dtype=torch.float16, vae_dtype=torch.bfloat16)
        parts = {
            "unet": (model.unet, torch.float16),
            "text": (model.text_encoders[0].model, torch.float16),
            "vae": (model.vae, torch.bfloat16),
        }
        for module, dtype in parts.values():
            assert {parameter.dtype for parameter in module.parameters()} == {dtype}
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert not any(submodule.training for submodule in module.modules())


def test_loading_a_file_leaves_the_random_stream_alone(made):
    before = torch.get_rng_state()
    made.load()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_outlives_its_file(made, tmp_path):
    path = Path(shutil.copy(made.file, tmp_path / "model.safetensors"))
    model = made.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(model.unet, made.models.unet)


def test_clip_skip_and_token_length_reach_the_text_encoder(made):
    encoder = made.load(clip_skip=2, max_token_length=150).text_encoders[0]
    assert (encoder.clip_skip, encoder.max_token_length) == (2, 150)


# --- kinds of checkpoint files ---


def test_old_clip_names_and_position_ids_are_understood(made, tmp_path):
    state = {name.replace(".text_model.", "."): tensor for name, tensor in made.state.items()}
    assert "cond_stage_model.transformer.embeddings.position_ids" in state
    save_file(state, tmp_path / "old.safetensors")
    assert_same_model(made.load(tmp_path / "old.safetensors"), load_stable_diffusion(made.folder))


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state, "global_step": 3}])
def test_a_ckpt_of_tensors_loads_with_or_without_a_state_dict_entry(made, tmp_path, wrap):
    torch.save(wrap(made.state), tmp_path / "model.ckpt")
    assert_same_model(made.load(tmp_path / "model.ckpt"), load_stable_diffusion(made.folder))


def test_moving_averages_and_loss_weights_in_a_file_are_ignored(made, tmp_path):
    extra = {
        "model_ema.diffusion_modelout0bias": torch.ones(3),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    save_file(made.state | extra, tmp_path / "ema.safetensors")
    assert_same_model(made.load(tmp_path / "ema.safetensors"), load_stable_diffusion(made.folder))


class Payload:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_a_ckpt_with_code_is_refused_and_not_run(made, tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": made.state, "callbacks": Payload()}, path)
    message = error_of(made.load, path)
    assert "print" in message
    assert "safetensors" in message
    assert "weights_only" not in message
    assert capsys.readouterr().out == ""


def test_a_plain_pickle_named_ckpt_is_refused_and_not_run(made, tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(Payload()))
    assert str(path) in error_of(made.load, path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_cut_off_file_is_one_line(made, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    if suffix == "ckpt":
        torch.save(made.state, path)
    else:
        shutil.copy(made.file, path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "download complete" in error_of(made.load, path)


def test_a_git_lfs_pointer_is_called_by_its_name(made, tmp_path):
    path = tmp_path / "pointer.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n")
    assert "git-lfs" in error_of(made.load, path)


def test_an_unknown_suffix_lists_the_known_ones(made, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert ".safetensors, .ckpt" in error_of(made.load, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        ("conditioner.embedders.0.model.ln_final.bias", "the refiner of Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "a LoRA"),
    ],
)
def test_other_kinds_of_file_are_named(made, tmp_path, prefix, kind):
    save_file({prefix: torch.ones(2)}, tmp_path / "other.safetensors")
    message = error_of(made.load, tmp_path / "other.safetensors")
    assert f"is {kind}" in message
    assert "trains Stable Diffusion 1.x, 2.x and XL base" in message


def test_an_inpainting_checkpoint_is_refused(made, tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(made.state | {name: torch.ones(32, 9, 3, 3)}, tmp_path / "inpaint.safetensors")
    assert "9 input channels" in error_of(made.load, tmp_path / "inpaint.safetensors")


def test_a_unet_of_another_width_than_its_family_is_refused(made):
    assert "context width 32, not 768" in error_of(made.load, architecture=None)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [("model.diffusion_model.", "holds no U-Net"), ("cond_stage_model.", "holds no text encoder")],
)
def test_a_file_without_a_part_is_refused(made, tmp_path, prefix, message):
    state = {name: tensor for name, tensor in made.state.items() if not name.startswith(prefix)}
    save_file(state, tmp_path / "part.safetensors")
    assert message in error_of(made.load, tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.quant_conv.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_a_missing_or_unknown_tensor_is_an_error_that_names_it(made, tmp_path, name):
    path = tmp_path / "gap.safetensors"
    state = dict(made.state)
    tensor = state.pop(name).clone()
    save_file(state, path)
    assert f"lacks 1 tensors ({name})" in error_of(made.load, path)
    save_file(made.state | {f"{name}.more": tensor}, path)
    assert f"has unknown 1 tensors ({name}.more)" in error_of(made.load, path)
    save_file(made.state | {name: torch.ones(5)}, path)
    assert f"{name} has shape (5,)" in error_of(made.load, path)


def test_errors_name_only_the_first_few_tensors(made, tmp_path):
    state = {name: t for name, t in made.state.items() if ".transformer_blocks." not in name}
    save_file(state, tmp_path / "gaps.safetensors")
    message = error_of(made.load, tmp_path / "gaps.safetensors")
    assert message.count("transformer_blocks") == 3
    assert len(message) < 600


# --- Stable Diffusion 2.x ---


def write_sd2(root: Path, *, conv_projections: bool) -> tuple[Path, Path, CLIPTextModel]:
    """Configurations, a checkpoint with hand-made OpenCLIP names, and the text model in it."""
    configs = root / "configs"
    for part, changes in SD2_TINY.items():
        shutil.copytree(ARCHITECTURES / "sd_v2" / part, configs / part)
        edit_json(configs / part / "config.json", **changes)
    read = {part: json.loads((configs / part / "config.json").read_text()) for part in SD2_TINY}
    torch.manual_seed(2)
    text = CLIPTextModel(CLIPTextConfig(**read["text_encoder"])).eval()
    unet = UNet2DConditionModel.from_config(read["unet"]).state_dict()
    vae = AutoencoderKL.from_config(read["vae"]).state_dict()
    state = to_ldm(unet, unet_names(unet)) | to_ldm(vae, vae_names(vae)) | open_clip_state(text)
    if conv_projections:
        for name in state:
            if re.search(r"proj_(in|out)\.weight$", name) and "first_stage" not in name:
                state[name] = state[name].reshape(*state[name].shape[:2], 1, 1)
    save_file({k: v.contiguous() for k, v in state.items()}, root / "sd2.safetensors")
    return configs, root / "sd2.safetensors", text


def open_clip_state(text: CLIPTextModel) -> dict[str, torch.Tensor]:
    """OpenCLIP's names written out by hand, with the layer and tensors that SD 2.x never uses."""
    body = getattr(text, "text_model", text)
    embeddings = body.embeddings
    state = {
        "token_embedding.weight": embeddings.token_embedding.weight,
        "positional_embedding": embeddings.position_embedding.weight,
        "ln_final.weight": body.final_layer_norm.weight,
        "ln_final.bias": body.final_layer_norm.bias,
        "text_projection": torch.ones(32, 32),
        "logit_scale": torch.tensor(4.6),
        "transformer.resblocks.2.ln_1.weight": torch.ones(32),
    }
    for i, layer in enumerate(body.encoder.layers):
        attention, block = layer.self_attn, f"transformer.resblocks.{i}"
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        state[f"{block}.attn.in_proj_weight"] = torch.cat([p.weight for p in projections])
        state[f"{block}.attn.in_proj_bias"] = torch.cat([p.bias for p in projections])
        modules = {
            "attn.out_proj": attention.out_proj,
            "ln_1": layer.layer_norm1,
            "ln_2": layer.layer_norm2,
            "mlp.c_fc": layer.mlp.fc1,
            "mlp.c_proj": layer.mlp.fc2,
        }
        for name, module in modules.items():
            state[f"{block}.{name}.weight"] = module.weight
            state[f"{block}.{name}.bias"] = module.bias
    return {f"cond_stage_model.model.{name}": t.detach() for name, t in state.items()}


@pytest.mark.parametrize("conv_projections", [False, True], ids=["linear", "convolution"])
def test_an_sd2_file_gives_the_text_model_behind_its_openclip_names(
    made, tmp_path, conv_projections
):
    configs, path, text = write_sd2(tmp_path, conv_projections=conv_projections)
    model = made.load(path, architecture=configs, v2=True)
    assert_same(model.text_encoders[0].model, text)
    ids = torch.arange(77)[None]
    with torch.no_grad():
        ours = model.text_encoders[0].encode(ids)
        theirs = text(input_ids=ids).last_hidden_state
        sample = model.unet(torch.ones(1, 4, 8, 8), 10, encoder_hidden_states=ours).sample
    assert torch.equal(ours, theirs)
    assert torch.isfinite(sample).all()
    assert model.text_encoders[0].tokenizer.pad_token == "!"


def test_openclip_names_are_written_as_by_hand(tmp_path):
    _, _, text = write_sd2(tmp_path, conv_projections=False)
    state, by_hand = text.state_dict(), open_clip_state(text)
    ours = to_ldm(state, open_clip_names(state))
    assert by_hand.keys() - ours.keys() == {
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.transformer.resblocks.2.ln_1.weight",
    }
    assert all(torch.equal(tensor, by_hand[name]) for name, tensor in ours.items())


def test_an_sd2_file_is_known_without_v2_and_the_option_decides_what_it_predicts(
    made, tmp_path, caplog
):
    configs, path, _ = write_sd2(tmp_path, conv_projections=False)
    model = made.load(path, architecture=configs)
    assert (model.version, model.prediction_type) == ("sd_v2", "epsilon")
    assert "--v_parameterization" in caplog.text
    model = made.load(path, architecture=configs, v_parameterization=True)
    assert (model.version, model.prediction_type) == ("sd_v2_v", "v_prediction")
    assert model.noise_scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("source", ["file", "folder"])
def test_v2_said_of_an_sd1_model_names_both(made, source):
    message = error_of(made.load, getattr(made, source), v2=True)
    assert "--v2 says Stable Diffusion 2.x" in message
    assert "is Stable Diffusion 1.x" in message


# --- shipped architectures ---


@pytest.mark.parametrize(
    ("family", "num_unet", "num_text"),
    [("sd_v1", 859_520_964, 123_060_480), ("sd_v2", 865_910_724, 340_387_840)],
)
def test_shipped_architectures_have_the_published_sizes_and_distinct_names(
    family, num_unet, num_text
):
    def read(part):
        return json.loads((ARCHITECTURES / family / part / "config.json").read_text())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read("unet"))
        vae = AutoencoderKL.from_config(read("vae"))
        text = CLIPTextModel(CLIPTextConfig(**read("text_encoder")))
    assert sum(p.numel() for p in unet.parameters()) == num_unet
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in text.parameters()) == num_text
    text_names = clip_names if family == "sd_v1" else open_clip_names
    for module, names in ((unet, unet_names), (vae, vae_names), (text, text_names)):
        places = names(module.state_dict())
        assert len(set(places.values())) == len(places)


def test_names_of_the_real_checkpoint_are_hit():
    """Names as in v1-5-pruned-emaonly.safetensors."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            json.loads((ARCHITECTURES / "sd_v1" / "unet" / "config.json").read_text())
        ).state_dict()
    places = unet_names(unet)
    expected = {
        "down_blocks.2.downsamplers.0.conv.weight": "input_blocks.9.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "up_blocks.3.attentions.2.proj_out.weight": "output_blocks.11.1.proj_out.weight",
        "mid_block.resnets.1.time_emb_proj.bias": "middle_block.2.emb_layers.1.bias",
        "mid_block.attentions.0.norm.weight": "middle_block.1.norm.weight",
        "time_embedding.linear_2.weight": "time_embed.2.weight",
    }
    for name, key in expected.items():
        assert places[name].key == f"model.diffusion_model.{key}"


def test_a_weight_that_the_family_does_not_have_has_no_ldm_name():
    with pytest.raises(ValueError, match="no LDM name for the U-Net weight class_embedding"):
        unet_names(["down_blocks.0.resnets.0.conv1.bias", "class_embedding.weight"])


# --- diffusers folders ---


@pytest.mark.parametrize("nested", [True, False])
def test_text_encoders_of_any_transformers_version_load(made, folder, nested):
    path = folder / "text_encoder" / "model.safetensors"
    flat = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    prefix = "text_model." if nested else ""
    state = {prefix + name: tensor for name, tensor in flat.items()}
    save_file(state | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, path)
    model = load_stable_diffusion(folder)
    assert_same(model.text_encoders[0].model, made.models.text_encoder)


def test_fp16_variant_files_are_used_when_there_are_no_others(made, folder):
    for path in folder.glob("*/*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    model = load_stable_diffusion(folder)
    assert torch.equal(model.unet.conv_in.weight, made.models.unet.conv_in.weight.half().float())


def test_plain_weights_are_preferred_to_a_variant(made, folder):
    for path in folder.glob("*/*.safetensors"):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
        save_file(zeros, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    assert_same_model(load_stable_diffusion(folder), load_stable_diffusion(made.folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_with_gaps_is_refused(folder, part):
    path = next((folder / part).glob("*.safetensors"))
    state = load_file(path)
    name = next(name for name in sorted(state) if name.endswith(".bias"))
    del state[name]
    save_file(state, path, metadata={"format": "pt"})
    message = error_of(load_stable_diffusion, folder)
    assert str(folder / part) in message
    assert name.removeprefix("text_model.") in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_without_weights_or_with_damaged_ones_is_refused(folder, part):
    path = next((folder / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    assert part in error_of(load_stable_diffusion, folder)
    path.unlink()
    assert f"{folder / part} holds no weights" in error_of(load_stable_diffusion, folder)


def test_a_folder_that_is_not_a_model_says_what_is_missing(folder):
    shutil.rmtree(folder / "unet")
    assert "unet/config.json is missing" in error_of(load_stable_diffusion, folder)


def test_a_folder_of_a_transformer_is_named(folder):
    (folder / "transformer").mkdir()
    edit_json(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    message = error_of(load_stable_diffusion, folder)
    assert "StableDiffusion3Pipeline (with a transformer)" in message


def test_an_inpainting_folder_is_refused(folder):
    edit_json(folder / "unet" / "config.json", in_channels=9)
    assert "9 input channels" in error_of(load_stable_diffusion, folder)


def test_the_folders_scheduler_decides_betas_and_prediction(folder):
    config = folder / "scheduler" / "scheduler_config.json"
    edit_json(
        config,
        _class_name="PNDMScheduler",
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=True,
    )
    model = load_stable_diffusion(folder)
    assert (model.version, model.prediction_type) == ("sd_v1_v", "v_prediction")
    assert model.noise_scheduler.config.beta_end == 0.02
    assert model.noise_scheduler.config.clip_sample is False
    assert type(model.noise_scheduler).__name__ == "DDPMScheduler"
    edit_json(config, prediction_type="epsilon")
    message = error_of(load_stable_diffusion, folder, ModelSettings(v_parameterization=True))
    assert "--v_parameterization" in message
    assert "epsilon" in message
    edit_json(config, prediction_type="sample")
    assert "'sample'" in error_of(load_stable_diffusion, folder)


def test_a_file_gets_the_betas_of_stable_diffusion(made):
    scheduler = made.load().noise_scheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.betas, betas)


def test_a_folder_without_a_scheduler_follows_the_option(folder):
    shutil.rmtree(folder / "scheduler")
    assert load_stable_diffusion(folder).prediction_type == "epsilon"
    model = load_stable_diffusion(folder, ModelSettings(v_parameterization=True))
    assert model.prediction_type == "v_prediction"


# --- names that do not exist ---


@pytest.mark.parametrize("option", ["name", "vae"])
def test_a_missing_path_names_the_option(made, tmp_path, option):
    missing = str(tmp_path / "none" / "model.safetensors")
    options = {"vae": missing} if option == "vae" else {}
    message = error_of(made.load, made.file if options else missing, **options)
    assert message.startswith("--vae" if options else "--pretrained_model_name_or_path")
    assert missing in message


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def refuse(hub_id, *, variant):
        raise OSError(f"Cannot load model {hub_id}: not cached\nand a long story")

    monkeypatch.setattr(diffusers_folder, "_download", refuse)
    message = error_of(load_stable_diffusion, "someone/some-model")
    assert "someone/some-model is not a file or folder here, nor on the hub" in message
    assert "not cached" in message


def test_a_hub_snapshot_loads_as_a_folder(made, monkeypatch):
    monkeypatch.setattr(diffusers_folder, "_download", lambda hub_id, *, variant: str(made.folder))
    model = load_stable_diffusion("someone/some-model")
    assert_same(model.unet, made.models.unet)
    assert model.source == "someone/some-model"


# --- replacement VAE ---


@pytest.fixture(scope="module")
def other_vae() -> AutoencoderKL:
    return make_sd15.build_models(tiny=True, seed=9).vae


def old_diffusers_name(name: str) -> str:
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in words.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize("kind", ["ldm", "bare", "diffusers", "old", "bin", "folder", "subfolder"])
def test_a_replacement_vae_loads_from_every_form(made, other_vae, tmp_path, kind):
    state = other_vae.state_dict()
    ldm = {k: v.contiguous() for k, v in to_ldm(state, vae_names(state)).items()}
    path = tmp_path / "vae.safetensors"
    if kind == "ldm":
        save_file(ldm, path)
    elif kind == "bare":
        save_file({k.removeprefix("first_stage_model."): v for k, v in ldm.items()}, path)
    elif kind == "diffusers":
        save_file(state, path)
    elif kind == "old":
        save_file({old_diffusers_name(name): tensor for name, tensor in state.items()}, path)
    elif kind == "bin":
        path = tmp_path / "diffusion_pytorch_model.bin"
        torch.save(state, path)
    else:
        path = tmp_path / "folder"
        other_vae.save_pretrained(path / "vae" if kind == "subfolder" else path)
    assert_same(made.load(vae=path).vae, other_vae)
    assert_same(made.load(made.folder, vae=path).vae, other_vae)


def test_a_checkpoint_without_a_vae_loads_with_a_replacement(made, other_vae, tmp_path):
    state = {k: v for k, v in made.state.items() if not k.startswith("first_stage_model.")}
    save_file(state, tmp_path / "no_vae.safetensors")
    other_vae.save_pretrained(tmp_path / "vae")
    assert "first_stage_model.decoder" in error_of(made.load, tmp_path / "no_vae.safetensors")
    assert_same(made.load(tmp_path / "no_vae.safetensors", vae=tmp_path / "vae").vae, other_vae)


def test_a_folder_without_a_vae_is_refused_as_a_replacement(made):
    assert "holds no VAE" in error_of(made.load, vae=made.folder / "text_encoder")


# --- tokenizers ---


@pytest.mark.parametrize(
    "layout",
    [
        "openai_clip-vit-large-patch14",
        "stabilityai_stable-diffusion-2",
        "stabilityai_stable-diffusion-2/tokenizer",
        ".",
    ],
)
def test_every_layout_of_the_tokenizer_cache_is_found(made, tmp_path, layout):
    write_tokenizer(tmp_path / "cache" / layout)
    model = made.load(tokenizer_cache_dir=tmp_path / "cache")
    tokenizer = model.text_encoders[0].tokenizer
    assert tokenizer("ab", add_special_tokens=False).input_ids == [
        tokenizer.get_vocab()["a"],
        tokenizer.get_vocab()["b</w>"],
    ]
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_tokenizer_beside_the_checkpoint_is_found(made, tmp_path):
    path = Path(shutil.copy(made.file, tmp_path / "model.safetensors"))
    write_tokenizer(tmp_path / "tokenizer")
    assert made.load(path, tokenizer_cache_dir=None).text_encoders[0].tokenizer is not None


def test_the_local_hub_cache_is_searched(made, empty_hub_cache):
    repository = empty_hub_cache / "models--openai--clip-vit-large-patch14"
    write_tokenizer(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert made.load(tokenizer_cache_dir=None).text_encoders[0].tokenizer is not None


def test_a_checkpoint_alone_takes_the_shipped_vocabulary_of_clip(made):
    tokenizer = made.load(tokenizer_cache_dir=None).text_encoders[0].tokenizer
    ids = [49406, 320, 1125, 539, 48136, 1929, 49407]
    assert tokenizer("a photo of sks dog").input_ids == ids
    assert tokenizer(["dog", "a dog"], padding=True).input_ids[0] == [49406, 1929, 49407, 49407]
    (sd2,) = find_tokenizers("sd_v2", vocab_size=49408)
    assert sd2(["dog", "a dog"], padding=True).input_ids[0] == [49406, 1929, 49407, 0]


def test_the_shipped_vocabulary_is_the_real_one(clip_vocabulary):
    (ours,) = find_tokenizers("sd_v1", vocab_size=49408)
    assert ours.get_vocab() == load_tokenizer(clip_vocabulary).get_vocab()
    assert "MIT License" in (SHIPPED / "LICENSE.txt").read_text()


@pytest.mark.parametrize("given", [True, False])
def test_a_model_of_another_vocabulary_needs_its_tokenizer(tmp_path, given):
    cache = tmp_path / "empty" if given else None
    message = error_of(find_tokenizers, "sd_v1", vocab_size=600, cache_dir=cache)
    assert "--tokenizer_cache_dir" in message
    assert "openai/clip-vit-large-patch14" in message
    assert (str(cache) in message) is given


def test_a_folder_without_a_tokenizer_takes_the_cached_one(made, folder):
    shutil.rmtree(folder / "tokenizer")
    shipped = load_stable_diffusion(folder).text_encoders[0].tokenizer
    settings = ModelSettings(tokenizer_cache_dir=made.tokenizer.parent)
    cached = load_stable_diffusion(folder, settings).text_encoders[0].tokenizer
    assert (len(cached.get_vocab()), len(shipped.get_vocab())) == (514, 49408)


def test_a_damaged_tokenizer_is_one_line(folder):
    for path in (folder / "tokenizer").glob("*"):
        path.write_text("not json")
    assert "tokenizer" in error_of(load_stable_diffusion, folder)


# --- full size ---


@pytest.mark.slow
def test_a_full_size_sd15_file_gives_every_tensor_of_its_folder(made, tmp_path):
    models = make_sd15.build_models(dtype=torch.float16)
    make_sd15.save_diffusers(models, tmp_path / "diffusers", tokenizer=made.tokenizer)
    make_sd15.save_single_file(models, tmp_path / "sd15.safetensors")
    del models
    settings = ModelSettings(
        tokenizer_cache_dir=made.tokenizer, dtype=torch.float16, vae_dtype=torch.float16
    )
    from_folder = load_stable_diffusion(tmp_path / "diffusers", settings)
    from_file = load_stable_diffusion(tmp_path / "sd15.safetensors", settings)
    assert_same_model(from_file, from_folder)
    assert from_file.version == "sd_v1"
