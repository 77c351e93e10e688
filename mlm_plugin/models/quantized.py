"""Linear layers whose frozen weight is stored in 8 or 4 bits and unpacked at every use.

The computation stays in the model's own precision; only the stored weights are coarser. Neither
pass keeps the unpacked weight. Knows no adapters and no options.
Shapes: O outputs, I inputs, N = O I.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError

__all__ = ["FORMATS", "Format", "Packed", "QuantizedLinear", "quantize_linears"]

logger = logging.getLogger(__name__)

INT8_MAX = 127
NF4_BLOCK = 64  # weights that share one scale, as in QLoRA
BLOCK_CLASS = "Transformer2DModel"


class Packed(NamedTuple):
    """A weight in its storage format."""

    codes: Tensor  # whole numbers
    scales: Tensor  # fp32


class Format(NamedTuple):
    """A storage format.

    Attributes:
        pack: takes a weight ``(O, I)``.
        unpack: takes the packed weight, the weight's shape and the precision to compute in.
    """

    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Packed, torch.Size, torch.dtype], Tensor]


def pack_int8(weight_OI: Tensor) -> Packed:
    """Integers from -127 to 127, and a scale for the row of each output: N + 4 O bytes."""
    scales_O1 = weight_OI.float().abs().amax(dim=1, keepdim=True) / INT8_MAX
    smallest = torch.finfo(torch.float32).tiny  # a row of zeros stays zero
    codes_OI = (weight_OI / scales_O1.clamp(min=smallest)).round().to(torch.int8)
    return Packed(codes_OI, scales_O1)


def unpack_int8(packed: Packed, _shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight ``(O, I)``; codes are exact in every precision, so it is rounded once."""
    return packed.codes.to(dtype).mul_(packed.scales)


def pack_nf4(weight_OI: Tensor) -> Packed:
    """4 bits for each weight, and a scale for each 64 of them: N / 2 + N / 16 bytes.

    Raises:
        UserError: bitsandbytes is not installed.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3 (without the second quantisation, of
    the scales), as in bitsandbytes.
    """
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise UserError(
            "quantize_unet = 'nf4' needs bitsandbytes: `pip install bitsandbytes`, or use 'int8'"
        ) from error
    codes, state = quantize_4bit(weight_OI.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return Packed(codes, state.absmax)


def unpack_nf4(packed: Packed, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight ``(O, I)``."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(
        packed.scales, shape=shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4"
    )
    return dequantize_4bit(packed.codes, state)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a packed weight; gradients reach its input.

    It computes in the precision that the layer had, and follows the model's ``.to(dtype)``. The
    packed weight is moved between devices, but never cast.

    Args:
        layer: the layer to replace; its weight is packed on its device.
        kind: one of ``FORMATS``.
    """

    def __init__(self, layer: nn.Linear, kind: str):
        nn.Module.__init__(self)  # nn.Linear would allocate a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind = kind
        packed = FORMATS[kind].pack(layer.weight.detach())
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.bias = layer.bias
        # As raw bits, because casting the model would round floats.
        self.register_buffer("scale_bits", packed.scales.view(torch.int32))
        self.register_buffer("precision", layer.weight.new_empty(0), persistent=False)

    def unpacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``(O, I)`` used in the computation, in its own precision or in another."""
        packed = Packed(self.weight.detach(), self.scale_bits.view(torch.float32))
        shape = torch.Size((self.out_features, self.in_features))
        return FORMATS[self.kind].unpack(packed, shape, dtype or self.precision.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., I) -> (..., O)``, as the layer would under the autocast of its precision."""
        return _Frozen.apply(inputs.to(self.precision.dtype), self)

    def extra_repr(self) -> str:
        """Like that of a linear layer, plus the format."""
        return f"{super().extra_repr()}, kind={self.kind}"


class _Frozen(torch.autograd.Function):
    """A linear map whose weight is unpacked again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, layer.unpacked(), layer.bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


def quantize_linears(unet: nn.Module, kind: str, *, device: torch.device | str) -> int:
    """Pack the linear layers of the attention blocks of a U-Net, in place.

    They are 28 % of the weights of SD 1.5 and 86 % of SDXL's. Convolutions, and the layers for
    time and sizes, are left unchanged. Layers are moved to the device and packed one at a time, so
    that the full weights are never on it.

    Args:
        unet: diffusers' model, frozen, without adapters.
        kind: one of ``FORMATS``.
        device: where to pack; the packed layers stay there.

    Returns:
        how many layers were packed.

    Raises:
        UserError: the format's library is not installed.
    """
    blocks = [block for block in unet.modules() if type(block).__name__ == BLOCK_CLASS]
    count = 0
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, child = name.rpartition(".")
                packed = QuantizedLinear(layer.to(device), kind)
                setattr(block.get_submodule(parent), child, packed)
                count += 1
    logger.info("U-Net: the weights of %d linear layers are kept as %s", count, kind)
    return count


FORMATS: dict[str, Format] = {
    "int8": Format(pack_int8, unpack_int8),
    "nf4": Format(pack_nf4, unpack_nf4),
}
