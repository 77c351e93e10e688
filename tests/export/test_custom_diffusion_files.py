"""Custom Diffusion files: what diffusers makes of them, and the LoRA of the change."""

import math
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlm_plugin.errors import UserError
from mlm_plugin.export.custom_diffusion_files import (
    delta_to_lora,
    low_rank_factors,
    read_delta,
    save_delta,
    verify_delta,
)
from mlm_plugin.export.lora_files import save_lora, verify_lora

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
FILE = "x.safetensors"

# sd-scripts 48d368fa: those of networks.lora's modules in its SD 1.5 U-Net with attn2_to_k or _v.
KOHYA_NAMES = {
    f"lora_unet_{block}_attentions_{attention}_transformer_blocks_0_attn2_to_{matrix}"
    for block, num_attentions in {
        **{f"down_blocks_{i}": 2 for i in (0, 1, 2)},
        "mid_block": 1,
        **{f"up_blocks_{i}": 3 for i in (1, 2, 3)},
    }.items()
    for attention in range(num_attentions)
    for matrix in "kv"
}


@pytest.fixture
def unet(toy_folder):
    return UNet2DConditionModel.from_pretrained(toy_folder / "unet").eval()


def cross_attention(unet):
    weights = dict(unet.named_parameters())
    return {name: weights[name] for name in weights if re.search(r"attn2\.to_[kv]\.", name)}


def train(unet):
    """Change all keys and values; returns them before and after."""
    generator = torch.Generator().manual_seed(0)
    weights = cross_attention(unet)
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return base, {name: weight.detach().clone() for name, weight in weights.items()}


def prediction(unet):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 77, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([5]), encoder_hidden_states=states).sample


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- whole matrices -------------------------------------------------------------------------


def test_the_diffusers_pipeline_computes_what_the_trained_unet_computes(unet, toy_folder, tmp_path):
    bare = prediction(unet)
    _, trained = train(unet)
    save_delta(tmp_path / FILE, trained, unet=unet, metadata={})
    pipeline = StableDiffusionPipeline.from_pretrained(toy_folder)
    pipeline.unet.load_attn_procs(tmp_path, weight_name=FILE, _pipeline=pipeline)
    assert (prediction(unet) - bare).abs().max() > 1e-2
    torch.testing.assert_close(prediction(pipeline.unet), prediction(unet), atol=1e-5, rtol=0)


def test_what_was_saved_can_be_read(unet, tmp_path):
    _, trained = train(unet)
    save_delta(tmp_path / FILE, trained, unet=unet, metadata={"ss_steps": "250"})
    loaded = read_delta(tmp_path / FILE)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert verify_delta(tmp_path / FILE) == 16
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "ss_steps": "250"}


def test_the_files_of_diffusers_can_be_read(unet, toy_folder, tmp_path):
    _, trained = train(unet)
    save_delta(tmp_path / FILE, trained, unet=unet, metadata={})
    pipeline = StableDiffusionPipeline.from_pretrained(toy_folder)
    pipeline.unet.load_attn_procs(tmp_path, weight_name=FILE, _pipeline=pipeline)
    for safe, name in ((True, "theirs.safetensors"), (False, "theirs.bin")):
        pipeline.unet.save_attn_procs(tmp_path, weight_name=name, safe_serialization=safe)
        loaded = read_delta(tmp_path / name)
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[key], trained[key]) for key in trained)


def test_every_matrix_has_the_save_precision(unet, tmp_path):
    save_delta(tmp_path / FILE, cross_attention(unet), unet=unet, metadata={}, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.float16}


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e6, torch.float16)])
def test_values_that_are_not_finite_are_refused(unet, tmp_path, value, dtype):
    weights = cross_attention(unet)
    weights[f"{LAYER}.to_k.weight"].data[0, 0] = value
    save_delta(tmp_path / FILE, weights, unet=unet, metadata={}, dtype=dtype)
    with pytest.raises(UserError, match=rf"1 of 32 matrices.*{re.escape(LAYER)}\.to_k"):
        verify_delta(tmp_path / FILE)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "lora_unet_conv_in.alpha is not a key"),
        (
            {f"{LAYER}.processor.to_q_custom_diffusion.weight": torch.ones(2, 2)},
            "to_q_custom_diffusion.weight is not a key or value",
        ),
        (
            {f"{LAYER}.processor.to_k_custom_diffusion.weight": torch.ones(2, 2)},
            f"lacks {LAYER}.to_v.weight",
        ),
        ({f"{LAYER}.processor": torch.empty(0)}, "lacks any matrix"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, named):
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=re.escape(named)):
        read_delta(tmp_path / FILE)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_delta(tmp_path / FILE)


# --- as a LoRA ------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((24, 10), 3), ((10, 24), 10), ((8, 8), 1)])
def test_the_factors_are_the_truncated_singular_value_decomposition(shape, rank):
    delta = matrix(*shape)
    up, down, energy, squared_norm = low_rank_factors(delta, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    left, values, right = torch.linalg.svd(delta)
    expected = sum(values[i] * torch.outer(left[:, i], right[i]) for i in range(rank))
    torch.testing.assert_close(up @ down, expected, atol=1e-5, rtol=0)
    error = (delta - up @ down).square().sum()  # Eckart and Young: what the others hold
    torch.testing.assert_close(error, values[rank:].square().sum(), atol=1e-4, rtol=1e-4)
    assert squared_norm == pytest.approx(delta.square().sum().item(), rel=1e-5)
    assert energy == pytest.approx(1 - error.item() / squared_norm, abs=1e-5)


def test_both_factors_share_the_singular_values():
    up, down, *_ = low_rank_factors(matrix(12, 7), 4)
    values = torch.linalg.svdvals(matrix(12, 7))[:4]
    torch.testing.assert_close(up.T @ up, values.diag(), atol=1e-5, rtol=0)
    torch.testing.assert_close(down @ down.T, values.diag(), atol=1e-5, rtol=0)


def test_full_rank_gives_the_change_back():
    up, down, energy, _ = low_rank_factors(matrix(12, 7), 7)
    torch.testing.assert_close(up @ down, matrix(12, 7), atol=1e-5, rtol=0)
    assert energy == 1.0


def test_half_precision_weights_are_subtracted_in_fp32():
    base, trained = matrix(6, 6).bfloat16(), matrix(6, 6, seed=1).bfloat16()
    state = delta_to_lora({"a.to_k.weight": base}, {"a.to_k.weight": trained}, rank=6).state
    change = state["lora_unet_a_to_k.lora_up.weight"] @ state["lora_unet_a_to_k.lora_down.weight"]
    torch.testing.assert_close(change, trained.float() - base.float(), atol=1e-5, rtol=0)


def test_the_energy_is_that_of_all_changes_together():
    trained = {"a.to_k.weight": matrix(9, 5), "a.to_v.weight": 3 * matrix(7, 5, seed=1)}
    base = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    delta = delta_to_lora(base, trained, rank=2)
    squares = {name: torch.linalg.svdvals(t).square() for name, t in trained.items()}
    kept = sum(values[:2].sum().item() for values in squares.values())
    assert delta.energy == pytest.approx(kept / sum(v.sum().item() for v in squares.values()))


def test_nothing_learned_is_kept_whole():
    weights = {"a.to_k.weight": matrix(6, 4)}
    delta = delta_to_lora(weights, weights, rank=2)
    assert delta.energy == 1.0
    assert delta.rank == 2
    assert not delta.state["lora_unet_a_to_k.lora_up.weight"].any()


def test_all_layers_have_one_rank_and_no_more_than_the_largest_can_have():
    trained = {"a.to_k.weight": matrix(4, 9), "a.to_v.weight": matrix(8, 9)}
    base = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    delta = delta_to_lora(base, trained, rank=100)
    for name, tensor in trained.items():
        lora = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        up, down = (delta.state[f"{lora}.lora_{side}.weight"] for side in ("up", "down"))
        assert up.shape[1] == down.shape[0] == delta.state[f"{lora}.alpha"].item() == 8
        torch.testing.assert_close(up @ down, tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rank", "value"), [(0, 1.0), (2, math.inf)])
def test_no_rank_and_no_numbers_are_refused(rank, value):
    weights = {"a.to_k.weight": torch.full((4, 4), value)}
    with pytest.raises(UserError, match=r"rank = 0|1 of 1 matrices.*a\.to_k"):
        delta_to_lora(weights, weights, rank=rank)


def test_the_lora_is_loaded_by_diffusers_and_at_full_rank_is_the_trained_unet(
    unet, toy_folder, tmp_path
):
    bare = prediction(unet)
    base, trained = train(unet)
    expected = prediction(unet)
    differences = []
    for rank in (4, 32):
        save_lora(tmp_path / FILE, delta_to_lora(base, trained, rank=rank).state, metadata={})
        assert verify_lora(tmp_path / FILE) == (0, 32)
        pipeline = StableDiffusionPipeline.from_pretrained(toy_folder)
        pipeline.load_lora_weights(tmp_path, weight_name=FILE)
        differences.append((prediction(pipeline.unet) - expected).abs().max().item())
    assert 1e-5 > differences[1]
    assert differences[0] > 1e-3
    assert (expected - bare).abs().max() > 1e-2


def test_the_names_are_those_of_sd_scripts(unet):
    base, trained = train(unet)
    state = delta_to_lora(base, trained, rank=1).state
    assert {key.partition(".")[0] for key in state} == KOHYA_NAMES
    assert {key.partition(".")[2] for key in state} == {
        "alpha",
        "lora_down.weight",
        "lora_up.weight",
    }
