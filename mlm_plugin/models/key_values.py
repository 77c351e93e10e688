"""Keys and values that an image model makes of the prompt, as they are trained and as they were.

Whatever trains them is seen through: adapters that wrap the layer (peft), that replace its
``forward`` (LyCORIS, sd-scripts), and training of the weights themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.mlm.cross_attention import CrossAttention, Projection, TextInput
from mlm_plugin.models.cross_attention import cross_attention_names
from mlm_plugin.models.quantized import QuantizedLinear

__all__ = [
    "MATRICES",
    "matrices_of",
    "read_cross_attention",
    "read_image_transformer",
    "replaced_weights",
]

MATRICES = ("to_k", "to_v")
"""Layers of a cross-attention that take text, in diffusers' U-Nets."""

HALF = torch.float16  # more digits than bf16, and weights are far from its limits

ANIMA_LAYER = re.compile(r"blocks\.\d+\.cross_attn\.[kv]_proj")
"""Keys and values of Anima's transformer; those of its ``llm_adapter`` are not meant."""


class FirstBlock(NamedTuple):
    """The first of an MM-DiT's layers in which the prompt meets the picture, by module names."""

    embedder: str
    norm: str
    projection: str


FIRST_BLOCKS = (
    FirstBlock(
        "context_embedder", "joint_blocks.0.context_block.norm1",
        "joint_blocks.0.context_block.attn.qkv",
    ),  # SD 3
    FirstBlock("txt_in", "double_blocks.0.txt_norm1", "double_blocks.0.txt_attn.qkv"),  # FLUX
    FirstBlock(
        "cap_embedder", "context_refiner.0.attention_norm1", "context_refiner.0.attention.qkv"
    ),  # Lumina 2
)  # fmt: skip
"""Source: sd-scripts ``library/sd3_models.py``, ``flux_models.py``, ``lumina_models.py``."""


def matrices_of(unet: nn.Module) -> list[list[nn.Module]]:
    """What makes keys and values of the prompt, for each cross-attention layer."""
    return [
        [unet.get_submodule(f"{name}.{matrix}") for matrix in MATRICES]
        for name in cross_attention_names(unet)
    ]


def read_cross_attention(unet: nn.Module, *, keep_copies: bool) -> CrossAttention | None:
    """The cross-attention layers of a U-Net; ``None`` if it has none.

    Args:
        unet: diffusers' or sd-scripts', with what is trained in place.
        keep_copies: whether the weights themselves are trained; a copy in half precision is made
            now. Otherwise the frozen weights are used.
    """
    projections = [
        _projection(module, layer, keep_copy=keep_copies)
        for layer, pair in enumerate(matrices_of(unet))
        for module in pair
    ]
    return CrossAttention(projections) if projections else None


def read_image_transformer(
    transformer: nn.Module, groups: list[list[int]]
) -> CrossAttention | None:
    """What a diffusion transformer of sd-scripts makes of the prompt; ``None`` if it is unknown.

    Anima has cross-attention layers. Those of SD 3, FLUX and Lumina 2 are read in their first
    block, where the modulation by the timestep, which no adapter of sd-scripts trains by default,
    is left out.

    Args:
        transformer: with what is trained in place; its own weights are frozen.
        groups: as in :class:`CrossAttention`.
    """
    layers = [
        _projection(module, int(name.split(".")[1]), keep_copy=False)
        for name, module in transformer.named_modules()
        if ANIMA_LAYER.fullmatch(name)
    ]
    projections = layers or list(_first_blocks(transformer))
    return CrossAttention(projections, groups=groups) if projections else None


def _first_blocks(transformer: nn.Module) -> Iterator[Projection]:
    names = {name for name, _ in transformer.named_modules()}
    for block in FIRST_BLOCKS:
        if names.issuperset(block):
            embedder, norm, qkv = map(transformer.get_submodule, block)
            text_input = _text_input(embedder, norm)
            before = (embedder, norm)
            yield _projection(qkv, 0, keep_copy=False, text_input=text_input, before=before)


def _text_input(embedder: nn.Module, norm: nn.Module) -> TextInput:
    """An embedder, which may be a norm and a linear map, and the first norm after it."""
    *before, linear = embedder if isinstance(embedder, nn.Sequential) else [embedder]
    weight = _frozen(linear)
    width = linear.in_features

    def embedded(states_ND: Tensor, last: Callable[[Tensor], Tensor]) -> Tensor:
        states_ND = states_ND.to(weight().dtype)
        states_ND = F.pad(states_ND, (0, width - states_ND.shape[-1]))  # SD 3: CLIP beside T5
        for module in before:
            states_ND = module(states_ND)
        return norm(last(states_ND))

    return TextInput(
        trained=lambda states_ND: embedded(states_ND, linear),
        untrained=lambda states_ND: embedded(
            states_ND, lambda x: F.linear(x.to(weight().dtype), weight(), linear.bias)
        ),
        width=width,
    )


def _projection(
    module: nn.Module,
    layer: int,
    *,
    keep_copy: bool,
    text_input: TextInput | None = None,
    before: Sequence[nn.Module] = (),
) -> Projection:
    linear = getattr(module, "base_layer", module)  # of peft
    copy = _weight(linear).detach().to(HALF, copy=True) if keep_copy else None
    return Projection(
        layer,
        trained=module,
        weight=_frozen(linear) if copy is None else lambda: copy.to(_weight(linear)),
        bias=linear.bias,
        text_input=text_input,
        is_on=lambda device: _weight(linear).device == device,
        is_trained=partial(_is_trained, (*before, module)),
        copy=copy,
    )


def _is_trained(modules: Iterable[nn.Module]) -> bool:
    """Networks of sd-scripts and LyCORIS put a method of their own in the place of ``forward``."""
    within = (child for module in modules for child in module.modules())
    owners = (getattr(module.forward, "__self__", module) for module in within)
    return any(parameter.requires_grad for owner in owners for parameter in owner.parameters())


def _frozen(linear: nn.Module) -> Callable[[], Tensor]:
    if isinstance(linear, QuantizedLinear):
        return linear.unpacked
    _weight(linear)  # is there, before training
    return lambda: _in_computing_precision(_weight(linear).detach())


def _weight(linear: nn.Module) -> Tensor:
    """Weights of a layer.

    Raises:
        UserError: LyCORIS' "full" has taken them away.
    """
    weight = getattr(linear, "weight", None)
    if weight is None:
        raise replaced_weights()
    return weight


def replaced_weights() -> UserError:
    """LyCORIS' "full" is trained, and the cross-attention is to be read."""
    return UserError(
        "mlm_read_at: the MLM term cannot read keys and values that the network replaces "
        "(network_args algo=full); take mlm_read_at = encoder, or another algo"
    )


def _in_computing_precision(weight: Tensor) -> Tensor:
    """Weights in 8 bits (``fp8_base`` of sd-scripts) are only stored in them."""
    return weight.to(torch.bfloat16) if weight.itemsize == 1 else weight
