"""Keys and values of a U-Net's cross-attention, as they are trained and as they were.

Whatever trains them is seen through: adapters that wrap the layer (peft), that replace its
``forward`` (LyCORIS, sd-scripts), and training of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlm_plugin.mlm.cross_attention import CrossAttention, Projection
from mlm_plugin.models.cross_attention import cross_attention_names
from mlm_plugin.models.quantized import QuantizedLinear

__all__ = ["MATRICES", "read_cross_attention"]

MATRICES = ("to_k", "to_v")
HALF = torch.float16  # more digits than bf16, and weights are far from its limits


def read_cross_attention(unet: nn.Module, *, keep_copies: bool) -> CrossAttention | None:
    """The cross-attention layers of a U-Net; ``None`` if it has none.

    Args:
        unet: diffusers' or sd-scripts', with what is trained in place.
        keep_copies: whether the weights themselves are trained; a copy in half precision is made
            now. Otherwise the frozen weights are used.
    """
    projections = [
        _projection(unet.get_submodule(f"{name}.{matrix}"), layer, keep_copy=keep_copies)
        for layer, name in enumerate(cross_attention_names(unet))
        for matrix in MATRICES
    ]
    return CrossAttention(projections) if projections else None


def _projection(module: nn.Module, layer: int, *, keep_copy: bool) -> Projection:
    linear = getattr(module, "base_layer", module)  # of peft
    return Projection(
        layer,
        trained=module,
        weight=_copied(linear) if keep_copy else _frozen(linear),
        bias=linear.bias,
    )


def _copied(linear: nn.Module) -> Callable[[], Tensor]:
    copy = linear.weight.detach().to(HALF, copy=True)
    return lambda: copy.to(linear.weight)


def _frozen(linear: nn.Module) -> Callable[[], Tensor]:
    if isinstance(linear, QuantizedLinear):
        return linear.unpacked
    return lambda: _in_computing_precision(linear.weight.detach())


def _in_computing_precision(weight: Tensor) -> Tensor:
    """Weights in 8 bits (``fp8_base`` of sd-scripts) are only stored in them."""
    return weight.to(torch.bfloat16) if weight.itemsize == 1 else weight
