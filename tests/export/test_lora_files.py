"""LoRA files: bytes, hashes, checks, what diffusers makes of them, and the files beside them."""

import json
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.export.lora_files import SAVE_DTYPES, kohya_hashes, save_lora, verify_lora
from mlm_plugin.export.sidecar import write_preview, write_sidecar
from mlm_plugin.networks.create import create_network

PROJECTION = "lora_unet_mid_block_attentions_0_proj_in"

# number of values -> sshs_model_hash, sshs_legacy_hash; from tests/reference/derive_hashes.py
KOHYA_HASHES = {
    100: ("927a3ff4a1c07b92b19c9f9a7489b661c545d273cde35a0076bc1e3c4bb6ea6b", "e3b0c442"),
    600_000: ("862dcdeb71f56b60ba47618937a07fa9446435038696569907dc1ab2ef078b8b", "6e82c47a"),
}
METADATA = {"ss_network_dim": "4", "modelspec.title": "x", "sshs_model_hash": "old"}


def state_of(num_values=100):
    return {
        f"{PROJECTION}.lora_down.weight": torch.arange(num_values).float().reshape(4, -1),
        f"{PROJECTION}.alpha": torch.tensor(1.0),
    }


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def models(*, linear=False):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        use_linear_projection=linear,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            bos_token_id=98,
            eos_token_id=99,
            pad_token_id=99,
        )
    )
    return SimpleNamespace(text_encoders=[SimpleNamespace(model=text_encoder)], unet=unet)


def outputs(text_encoder, unet):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        states = text_encoder(input_ids=torch.tensor([[98, 5, 6, 99]])).last_hidden_state
        predicted = unet(latents, torch.tensor([5]), encoder_hidden_states=states).sample
    return states, predicted


# --- bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_values", KOHYA_HASHES)
def test_hashes_are_those_of_sd_scripts(num_values):
    hashes = kohya_hashes(state_of(num_values), METADATA)
    expected = dict(
        zip(("sshs_model_hash", "sshs_legacy_hash"), KOHYA_HASHES[num_values], strict=True)
    )
    assert hashes == expected


def test_the_hash_ignores_metadata_that_may_be_edited_later():
    assert kohya_hashes(state_of(), {"modelspec.title": "a"}) == kohya_hashes(state_of(), {})


def test_a_file_holds_tensors_metadata_and_hashes(tmp_path):
    save_lora(tmp_path / "x.safetensors", state_of(), metadata=METADATA)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in state_of().items())
    assert header_of(tmp_path / "x.safetensors") == {
        "ss_network_dim": "4",
        "modelspec.title": "x",
        "sshs_model_hash": KOHYA_HASHES[100][0],
        "sshs_legacy_hash": KOHYA_HASHES[100][1],
    }


@pytest.mark.parametrize("precision", SAVE_DTYPES)
def test_every_tensor_has_the_save_precision_and_the_hash_is_of_that(tmp_path, precision):
    path = tmp_path / "x.safetensors"
    save_lora(path, state_of(), metadata={}, dtype=SAVE_DTYPES[precision])
    loaded = load_file(path)
    assert {value.dtype for value in loaded.values()} == {SAVE_DTYPES[precision] or torch.float32}
    assert loaded[f"{PROJECTION}.alpha"].shape == ()
    assert header_of(path)["sshs_model_hash"] == kohya_hashes(loaded, {})["sshs_model_hash"]


def test_tensors_that_share_or_skip_memory_can_be_saved(tmp_path):
    weight = torch.arange(32.0).reshape(4, 8)
    state = {f"{PROJECTION}.lora_down.weight": weight.T}
    save_lora(tmp_path / "x.safetensors", state, metadata={})
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded[f"{PROJECTION}.lora_down.weight"], weight.T)


def test_pickles_hold_the_same_tensors(tmp_path):
    save_lora(tmp_path / "x.pt", state_of(), metadata=METADATA, dtype=torch.float16)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded.keys() == state_of().keys()
    assert verify_lora(tmp_path / "x.pt") == (0, 1)


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "x.safetensors"
    save_lora(path, state_of(), metadata={})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_lora(path, state_of(), metadata={"ss_steps": 3})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
def test_a_network_passes_the_check_with_its_counts(tmp_path, linear):
    network = create_network(models(linear=linear), NetworkOptions(network_args=["conv_dim=2"]))
    save_lora(tmp_path / "x.safetensors", network.kohya_state_dict(), metadata={})
    counts = verify_lora(tmp_path / "x.safetensors")
    assert counts.text_encoder == network.num_text_encoder_modules == 12
    assert counts.unet == network.num_unet_modules


def test_keys_that_webuis_do_not_know_are_refused(tmp_path):
    save_lora(tmp_path / "x.safetensors", {"mlm_head.weight": torch.ones(2)}, metadata={})
    with pytest.raises(UserError, match="1 of 1 tensors.*mlm_head"):
        verify_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e6, torch.float16)])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    state = {f"{PROJECTION}.lora_down.weight": torch.full((4, 8), value)}
    save_lora(tmp_path / "x.safetensors", state, metadata={}, dtype=dtype)
    with pytest.raises(UserError, match="NaN or infinity"):
        verify_lora(tmp_path / "x.safetensors")


# --- other software -------------------------------------------------------------------------


# One rank for all layers: diffusers 0.32 scales files of mixed ranks wrongly (0.42 does it right).
@pytest.mark.parametrize("network_args", [(), ("conv_dim=4", "conv_alpha=2")])
def test_diffusers_loads_the_file_and_computes_what_our_model_computes(tmp_path, network_args):
    live = models()
    bare = outputs(live.text_encoders[0].model, live.unet)
    network = create_network(
        live, NetworkOptions(network_dim=4, network_alpha=2.0, network_args=network_args)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in chain(*network.parts().values()):
        parameter.data.normal_(generator=generator).mul_(0.2)
    expected = outputs(live.text_encoders[0].model, live.unet)
    save_lora(tmp_path / "x.safetensors", network.kohya_state_dict(), metadata={})

    fresh = models()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=fresh.text_encoders[0].model,
        tokenizer=None,
        unet=fresh.unet,
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    loaded = outputs(pipeline.text_encoder, pipeline.unet)
    for ours, theirs, without in zip(expected, loaded, bare, strict=True):
        assert (ours - without).abs().max() > 1e-2
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


# --- beside the file ------------------------------------------------------------------------


def test_the_sidecar_has_the_keys_a1111_reads(tmp_path):
    path = write_sidecar(
        tmp_path / "my.v1.safetensors", base_model_version="sd_v1", activation_text="sks dog"
    )
    assert path == tmp_path / "my.v1.json"
    assert json.loads(path.read_text("utf-8")) == {
        "description": "",
        "sd version": "SD1",
        "activation text": "sks dog",
        "preferred weight": 0.0,
        "negative text": "",
        "notes": "",
    }


def test_a_sidecar_of_the_user_stays(tmp_path):
    (tmp_path / "x.json").write_text("mine")
    written = write_sidecar(
        tmp_path / "x.safetensors", base_model_version="sd_v2_v", activation_text="sks"
    )
    assert written is None
    assert (tmp_path / "x.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("version", "name"), [("sd_v2_v", "SD2"), ("sdxl_base_v1-0", "SDXL"), ("sd_v1_v", "SD1")]
)
def test_the_base_model_is_named_as_a1111_names_it(tmp_path, version, name):
    path = write_sidecar(tmp_path / "x.safetensors", base_model_version=version, activation_text="")
    assert json.loads(path.read_text("utf-8"))["sd version"] == name


def test_a_preview_follows_the_file_unless_the_user_chose_another(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    lora, path = tmp_path / "x.safetensors", tmp_path / "x.png"
    assert write_preview(lora, first) == path
    assert write_preview(lora, second) == path
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
    first.save(path)
    assert write_preview(lora, second) is None
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    embedding = tmp_path / "x.v1.safetensors"
    assert write_preview(embedding, first, is_embedding=True) == tmp_path / "x.v1.preview.png"
    first.save(tmp_path / "x.v1.preview.png")
    assert write_preview(embedding, second, is_embedding=True) is None


@pytest.mark.parametrize("name", ["x.preview.png", "x.webp", "x.jpeg"])
def test_a_preview_of_any_kind_stays_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert write_preview(tmp_path / "x.safetensors", Image.new("RGB", (8, 8))) is None
    assert [path.name for path in tmp_path.iterdir()] == [name]
