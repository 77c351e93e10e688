"""Cross-attention layers: their order and codes, and text states for each of them."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.cross_attention import (
    MAX_SHARED_TOKENS,
    cross_attention_names,
    join_layers,
    layer_codes,
    layer_window,
    per_layer_conditioning,
    split_layers,
)
from mlm_plugin.models.ldm_names import unet_names

# sd-scripts train_textual_inversion_XTI.py, commit 48d368fa
KOHYA_CODES = (
    "IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
).split()
K, B, L, D = 16, 2, 77, 32


@pytest.fixture
def unet(toy_folder):
    return UNet2DConditionModel.from_pretrained(toy_folder / "unet").eval().requires_grad_(False)


def pocket_unet(**changes):
    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": D,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**settings | changes)


def predict(unet, states, **kwargs):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(B, 4, 8, 8, generator=generator)
    return unet(latents, torch.tensor([5, 500]), encoder_hidden_states=states, **kwargs).sample


def layers_of(unet):
    return [unet.get_submodule(name) for name in cross_attention_names(unet)]


def seen_by_layers(unet, states):
    """The text states that each layer makes keys of, by order of layers, and the order of calls."""
    seen, order = {}, []

    def record(number):
        def hook(_module, args):
            seen[number] = args[0].detach()
            order.append(number)

        return hook

    handles = [
        layer.to_k.register_forward_pre_hook(record(number))
        for number, layer in enumerate(layers_of(unet))
    ]
    predict(unet, states)
    for handle in handles:
        handle.remove()
    return seen, order


# --- names ----------------------------------------------------------------------------------


def test_names_are_in_the_order_in_which_the_layers_run(unet):
    assert len(cross_attention_names(unet)) == K
    assert seen_by_layers(unet, torch.randn(B, L, D))[1] == list(range(K))


def test_a_transformer_whose_second_attention_has_this_name_has_no_cross_attention():
    """As in SD 3.5 medium, ``joint_blocks.0.x_block.attn2``."""
    block = torch.nn.ModuleDict({"x_block": torch.nn.ModuleDict({"attn2": torch.nn.Identity()})})
    transformer = torch.nn.ModuleDict({"joint_blocks": torch.nn.ModuleList([block])})
    assert cross_attention_names(transformer) == []


def test_the_codes_of_stable_diffusion_are_those_of_kohya(unet):
    assert layer_codes(unet) == KOHYA_CODES


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, "IN01 MID OUT02 OUT03"),
        ({"layers_per_block": 2}, "IN01 IN02 MID OUT03 OUT04 OUT05"),
        ({"mid_block_type": None}, "IN01 OUT02 OUT03"),
        (
            {"transformer_layers_per_block": 2},
            "IN01 IN01_1 MID MID_1 OUT02 OUT02_1 OUT03 OUT03_1",
        ),
    ],
)
def test_other_unets_have_codes_by_the_same_rule(changes, codes):
    unet = pocket_unet(**changes)
    assert layer_codes(unet) == codes.split()
    ldm = unet_names(unet.state_dict())
    for name, code in zip(cross_attention_names(unet), codes.split(), strict=True):
        block = code.partition("_")[0].lstrip("INOUTMD").lstrip("0") or "1"
        assert f"_block{'' if code[0] == 'M' else 's'}.{block}." in ldm[f"{name}.to_k.weight"].key


def test_a_lora_changes_neither_names_nor_codes(unet):
    names = cross_attention_names(unet)
    config = LoraConfig(r=1, target_modules=["to_k", "to_v", "conv_in", "conv1"])
    inject_adapter_in_model(config, unet)
    assert cross_attention_names(unet) == names
    assert layer_codes(unet) == KOHYA_CODES


# --- shapes ---------------------------------------------------------------------------------


def test_joined_states_hold_layer_after_layer_and_split_again():
    states_KBLD = torch.randn(K, B, L, D)
    joined = join_layers(states_KBLD)
    assert joined.shape == (B, K * L, D)
    assert torch.equal(split_layers(joined, K), states_KBLD)
    for number in range(K):
        assert torch.equal(layer_window(joined, number, K), states_KBLD[number])


@pytest.mark.parametrize(("num_layers", "length"), [(2, 77), (4, 40), (1, MAX_SHARED_TOKENS)])
def test_states_as_short_as_shared_ones_are_refused(num_layers, length):
    with pytest.raises(UserError, match=f"{num_layers} layers x {length} tokens"):
        join_layers(torch.randn(num_layers, B, length, D))


def test_a_number_of_tokens_that_fits_no_layers_is_refused(unet):
    per_layer_conditioning(unet)
    with pytest.raises(UserError, match="302 tokens.*16 cross-attention layers"):
        predict(unet, torch.randn(B, 302, D))


# --- conditioning ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [77, 152, MAX_SHARED_TOKENS])
def test_shared_states_give_the_same_bits_with_and_without_windows(unet, length):
    states = torch.randn(B, length, D)
    before = predict(unet, states)
    per_layer_conditioning(unet)
    assert torch.equal(predict(unet, states), before)


@pytest.mark.parametrize("length", [77, MAX_SHARED_TOKENS])
def test_equal_states_for_all_layers_are_shared_states(unet, length):
    states = torch.randn(B, length, D)
    per_layer_conditioning(unet)
    joined = join_layers(states.expand(K, -1, -1, -1))
    torch.testing.assert_close(predict(unet, joined), predict(unet, states), atol=1e-6, rtol=0)


def test_each_layer_sees_its_own_window_and_nothing_else(unet):
    states_KBLD = torch.randn(K, B, L, D)
    per_layer_conditioning(unet)
    before = predict(unet, join_layers(states_KBLD))
    for changed in (0, 6, 15):
        states = states_KBLD.clone()
        states[changed] += 1
        seen, _ = seen_by_layers(unet, join_layers(states))
        for number in range(K):
            assert torch.equal(seen[number], states[number])
            assert torch.equal(seen[number], states_KBLD[number]) == (number != changed)
        assert (predict(unet, join_layers(states)) - before).abs().max() > 1e-4


def test_a_mask_is_cut_like_the_states(unet):
    states, mask = torch.randn(B, L, D), torch.rand(B, L) > 0.5
    per_layer_conditioning(unet)
    shared = predict(unet, states, encoder_attention_mask=mask)
    joined = predict(
        unet, join_layers(states.expand(K, -1, -1, -1)), encoder_attention_mask=mask.repeat(1, K)
    )
    torch.testing.assert_close(joined, shared, atol=1e-6, rtol=0)
    assert not torch.allclose(shared, predict(unet, states), atol=1e-4)


@pytest.mark.parametrize(
    "processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)], ids=type
)
def test_every_attention_processor_of_diffusers_works(unet, processor):
    states_KBLD = torch.randn(K, B, L, D)
    unet.set_attn_processor(processor)
    per_layer_conditioning(unet)
    seen, _ = seen_by_layers(unet, join_layers(states_KBLD))
    assert all(torch.equal(seen[number], states_KBLD[number]) for number in range(K))


# --- gradients ------------------------------------------------------------------------------


def gradient(unet, states_KBLD):
    leaf = states_KBLD.clone().requires_grad_()
    predict(unet, join_layers(leaf)).square().mean().backward()
    return leaf.grad


@pytest.mark.parametrize("checkpointed_weights", [False, True])
def test_gradients_reach_every_window_and_checkpointing_keeps_them(unet, checkpointed_weights):
    states_KBLD = torch.randn(K, B, L, D)
    per_layer_conditioning(unet)
    unet.requires_grad_(checkpointed_weights).train()
    plain = gradient(unet, states_KBLD)
    assert (plain.abs().amax(dim=(1, 2, 3)) > 0).all()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(unet, states_KBLD), plain)


# --- undo and refusals ----------------------------------------------------------------------


def test_remove_gives_every_layer_its_processor_back(unet):
    before = dict(unet.attn_processors)
    installed = per_layer_conditioning(unet)
    assert installed.num_layers == K
    changed = {name for name, value in unet.attn_processors.items() if value is not before[name]}
    assert changed == {f"{name}.processor" for name in cross_attention_names(unet)}
    installed.remove()
    installed.remove()
    assert all(value is before[name] for name, value in unet.attn_processors.items())
    assert not unet._forward_pre_hooks
    per_layer_conditioning(unet)


def test_processors_set_later_are_noticed_and_stay_after_remove(unet):
    installed = per_layer_conditioning(unet)
    later = AttnProcessor()
    unet.set_attn_processor(later)
    predict(unet, torch.randn(B, L, D))
    joined = join_layers(torch.randn(K, B, L, D))
    with pytest.raises(UserError, match="processors were replaced"):
        predict(unet, joined)
    with pytest.raises(UserError, match="processors were replaced"):
        unet(torch.randn(B, 4, 8, 8), 5, joined)
    installed.remove()
    assert all(value is later for value in unet.attn_processors.values())


def test_a_second_installation_is_refused(unet):
    per_layer_conditioning(unet)
    with pytest.raises(UserError, match="already"):
        per_layer_conditioning(unet)


def test_too_few_layers_are_refused():
    with pytest.raises(UserError, match="3 cross-attention layers.*at least 4"):
        per_layer_conditioning(pocket_unet(mid_block_type=None))


def test_processors_with_weights_are_refused(unet):
    class Adapter(nn.Module):
        pass

    layers_of(unet)[6].set_processor(Adapter())
    before = dict(unet.attn_processors)
    with pytest.raises(UserError, match=r"mid_block.*attn2.*\(Adapter\)"):
        per_layer_conditioning(unet)
    assert all(value is before[name] for name, value in unet.attn_processors.items())
