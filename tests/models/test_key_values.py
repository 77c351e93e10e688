"""What diffusion transformers make of the prompt: modules under the names of sd-scripts."""

import random

import pytest
import torch
from torch import nn

from mlm_plugin.models.key_values import read_image_transformer

WIDTH, INNER = 12, 8


def nested(modules):
    """A module with submodules under dotted names."""
    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)
    return root.requires_grad_(False)


def norm():
    return nn.LayerNorm(INNER, elementwise_affine=False)


TRANSFORMERS = {
    "sd3": {
        "context_embedder": nn.Linear(WIDTH, INNER),
        "joint_blocks.0.context_block.norm1": norm(),
        "joint_blocks.0.context_block.attn.qkv": nn.Linear(INNER, 3 * INNER),
        "joint_blocks.1.context_block.attn.qkv": nn.Linear(INNER, 3 * INNER),
    },
    "flux": {
        "txt_in": nn.Linear(WIDTH, INNER),
        "double_blocks.0.txt_norm1": norm(),
        "double_blocks.0.txt_attn.qkv": nn.Linear(INNER, 3 * INNER),
        "double_blocks.1.txt_attn.qkv": nn.Linear(INNER, 3 * INNER),
    },
    "lumina": {
        "cap_embedder": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER)),
        "context_refiner.0.attention_norm1": nn.LayerNorm(INNER),
        "context_refiner.0.attention.qkv": nn.Linear(INNER, 3 * INNER, bias=False),
    },
    "anima": {
        f"blocks.{layer}.cross_attn.{name}": nn.Linear(WIDTH, INNER, bias=False)
        for layer in range(3)
        for name in ("q_proj", "k_proj", "v_proj", "output_proj")
    }
    | {"llm_adapter.blocks.0.cross_attn.k_proj": nn.Linear(WIDTH, INNER, bias=False)},
}
LAST = {
    "sd3": "joint_blocks.0.context_block.attn.qkv",
    "flux": "double_blocks.0.txt_attn.qkv",
    "lumina": "context_refiner.0.attention.qkv",
    "anima": "blocks.2.cross_attn.v_proj",
}


def adapt(linear, scale):
    """What an adapter of sd-scripts does: replace ``forward``."""
    forward = linear.forward
    change = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0)) * scale
    change.requires_grad_()
    linear.forward = lambda x: forward(x) + x @ change.T
    return change


@pytest.fixture
def states():
    """h, g and h0 of five tokens; h has not moved."""
    torch.manual_seed(0)
    states, teacher = torch.randn(2, 5, WIDTH).unbind()
    return states, teacher, states


def text_path(arch, transformer, states):
    """The states on their way to the compared projection, by hand; ``None`` for Anima."""
    if arch == "anima":
        return states
    names = list(TRANSFORMERS[arch])[:2]
    for name in names:
        states = transformer.get_submodule(name)(states)
    return states


@pytest.mark.parametrize("arch", TRANSFORMERS)
def test_untrained_it_is_zero_and_an_adapter_is_heard(arch, states):
    transformer = nested(TRANSFORMERS[arch])
    reading = read_image_transformer(transformer, [[0]])
    assert reading.distance(*states, random.Random(0)).item() == 0
    linear = transformer.get_submodule(LAST[arch])
    original = linear.forward
    change = adapt(linear, 0.5)
    loss = reading.distance(*states, random.Random(0))
    loss.backward()
    linear.forward = original
    assert loss.item() > 0
    assert change.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["sd3", "flux", "lumina"])
def test_the_first_block_is_compared_behind_embedder_and_norm(arch, states):
    transformer = nested(TRANSFORMERS[arch])
    h, g, _ = states
    reading = read_image_transformer(transformer, [[0]])
    qkv = transformer.get_submodule(LAST[arch])
    trained, wanted = (qkv(text_path(arch, transformer, x)) for x in (h, g))
    expected = (trained - wanted).square().sum() / wanted.square().sum()
    found = reading.distance(h, g, g, random.Random(0))  # h0 = g: nothing is free
    torch.testing.assert_close(found, expected)


def test_narrow_states_are_padded_as_sd_3_pads_those_of_clip(states):
    transformer = nested(TRANSFORMERS["sd3"])
    reading = read_image_transformer(transformer, [[0], [1]])
    h, g, _ = (x[:, :7] for x in states)
    padded = [nn.functional.pad(x, (0, WIDTH - 7)) for x in (h, g)]
    found = reading.distance(h, g, g, random.Random(0))
    wanted = reading.distance(*padded, padded[1], random.Random(0))
    torch.testing.assert_close(found, wanted)
    assert reading.groups_of(2) == [[0], [1]]


def test_training_the_embedder_is_heard(states):
    transformer = nested(TRANSFORMERS["flux"])
    reading = read_image_transformer(transformer, [[0]])
    original = transformer.txt_in.forward
    change = adapt(transformer.txt_in, 0.5)
    reading.distance(*states, random.Random(0)).backward()
    transformer.txt_in.forward = original
    assert change.grad.abs().sum() > 0


def test_the_adapter_of_anima_is_not_taken_for_a_layer():
    reading = read_image_transformer(nested(TRANSFORMERS["anima"]), [[0]])
    assert sorted(reading.by_layer) == [0, 1, 2]
    assert [len(members) for members in reading.by_layer.values()] == [2, 2, 2]


def test_layers_that_are_swapped_away_are_left_out(states):
    transformer = nested(TRANSFORMERS["anima"])
    away = nn.Linear(WIDTH, INNER, bias=False, device="meta")
    transformer.blocks.get_submodule("1.cross_attn").k_proj = away
    reading = read_image_transformer(transformer, [[0]])
    assert reading.distance(*states, random.Random(0)).item() == 0


def test_other_transformers_are_not_read():
    assert read_image_transformer(nested({"layers.0.attn.qkv": nn.Linear(4, 4)}), [[0]]) is None
