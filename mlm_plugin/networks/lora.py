"""LoRA through peft on the layers that sd-scripts' ``networks.lora`` chooses, with its dropouts.

Layers are replaced in place, so whoever holds the model sees the LoRA. Knows the layers of Stable
Diffusion's U-Net and of CLIP; knows nothing of learning rates, files or training.
Shapes: r rank, I inputs, O outputs, k kernel, B batch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mlm_plugin.models.quantized import QuantizedLinear

__all__ = [
    "Dropouts",
    "LoraModule",
    "LoraTarget",
    "MaxNorm",
    "Ranks",
    "inject_lora",
    "limit_norms",
    "lora_targets",
    "with_ranks_of",
]

ADAPTER = "default"
BLOCKS = ("Transformer2DModel", "CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
CONV_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
LAYERS = (nn.Linear, QuantizedLinear, nn.Conv2d)


class Ranks(NamedTuple):
    """Rank and alpha of each kind of layer."""

    linear: int  # linear layers and 1x1 convolutions
    linear_alpha: float
    conv: int | None = None  # 3x3 convolutions; None leaves them and their blocks out
    conv_alpha: float = 1.0


class LoraTarget(NamedTuple):
    """One layer that gets a LoRA."""

    module_name: str  # path in the model
    kohya_name: str  # name in the file
    rank: int
    alpha: float


class MaxNorm(NamedTuple):
    """What a norm limit did. Tensors are 0-d and on the device; reading them waits for it."""

    keys_scaled: Tensor | int
    mean_norm: Tensor | float
    max_norm: Tensor | float


@dataclass
class Dropouts:
    """The three dropout kinds of ``networks.lora``; act on what leaves the down projection.

    Args:
        dropout: probability of dropping a single value.
        rank_dropout: probability of dropping a whole rank of a sample; the rest grows by
            1 / (1 - p).
        module_dropout: probability that the layer's LoRA is left out of this call.
        training: off means that nothing is dropped. It is not the model's own mode, because models
            are switched for checkpointing and sampling, independently of the network.

    Source: sd-scripts ``networks/lora.py`` ``LoRAModule.forward``, including the order of draws
    from the global torch stream.
    """

    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    training: bool = True

    @property
    def any(self) -> bool:
        """Whether anything can be dropped at all."""
        return any((self.dropout, self.rank_dropout, self.module_dropout))

    def __call__(self, ranks: Tensor) -> Tensor:
        """Drop from a down projection's output, ``(B, r)``, ``(B, L, r)`` or ``(B, r, H, W)``."""
        if not self.training:
            return ranks
        if self.module_dropout and torch.rand(1) < self.module_dropout:
            return torch.zeros_like(ranks)
        if self.dropout:
            ranks = nn.functional.dropout(ranks, p=self.dropout)
        if self.rank_dropout:
            ranks = ranks * self._rank_mask(ranks) / (1 - self.rank_dropout)
        return ranks

    def _rank_mask(self, ranks: Tensor) -> Tensor:
        num_ranks = ranks.shape[1 if ranks.ndim == 4 else -1]
        kept_Br = torch.rand((len(ranks), num_ranks), device=ranks.device) > self.rank_dropout
        if ranks.ndim == 4:
            return kept_Br[:, :, None, None]
        return kept_Br[:, None] if ranks.ndim == 3 else kept_Br


class LoraModule:
    """The LoRA of one layer: ``org(x) + up(down(x)) * alpha / rank``.

    Args:
        kohya_name: name in the file.
        layer: peft's wrapper of that layer.
    """

    def __init__(self, kohya_name: str, layer: LoraLayer):
        self.kohya_name, self.layer = kohya_name, layer

    @property
    def down(self) -> nn.Parameter:
        """``(r, I)`` or ``(r, I, k, k)``."""
        return self.layer.lora_A[ADAPTER].weight

    @property
    def up(self) -> nn.Parameter:
        """``(O, r)`` or ``(O, r, 1, 1)``."""
        return self.layer.lora_B[ADAPTER].weight

    @property
    def rank(self) -> int:
        """``r``."""
        return self.layer.r[ADAPTER]

    @property
    def alpha(self) -> float:
        """Scale times rank."""
        return self.layer.lora_alpha[ADAPTER]

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.layer.lora_alpha[ADAPTER] = value
        self.layer.scaling[ADAPTER] = value / self.rank

    def set_strength(self, strength: float) -> None:
        """Multiply what the LoRA adds; setting ``alpha`` resets it to 1."""
        self.layer.scaling[ADAPTER] = self.alpha / self.rank * strength

    @property
    def scale(self) -> float:
        """What the LoRA's output is multiplied by."""
        return self.layer.scaling[ADAPTER]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained weights under their names in the file."""
        yield "lora_down.weight", self.down
        yield "lora_up.weight", self.up

    def set_enabled(self, enabled: bool) -> None:
        """Let the LoRA act, or give the bare layer's own output, bit by bit."""
        trained = [(parameter, parameter.requires_grad) for _, parameter in self.named_parameters()]
        self.layer.enable_adapters(enabled)
        # peft has changed it, but here learning rates decide.
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def lora_targets(
    model: nn.Module, ranks: Ranks, *, name_of: Callable[[str], str]
) -> list[LoraTarget]:
    """Layers of a U-Net or of CLIP that ``networks.lora`` adapts.

    In the U-Net every linear layer and 1x1 convolution of the attention blocks; with a rank for
    convolutions also those of the residual, down- and upsampling blocks, and their 3x3
    convolutions. SD 1.5: 192 layers, with convolutions 278; SDXL: 722 and 788. In CLIP all linear
    layers, 6 in each block.

    Args:
        model: diffusers' or transformers' model.
        ranks: by kind of layer.
        name_of: from a layer's path to its name in the file.

    Source: sd-scripts ``networks/lora.py`` ``LoRANetwork.__init__``.
    """
    targets = []
    blocks = BLOCKS if ranks.conv is None else BLOCKS + CONV_BLOCKS
    for name, layer in _layers_within(model, blocks):
        if _is_pointwise(layer):
            targets.append(LoraTarget(name, name_of(name), ranks.linear, ranks.linear_alpha))
        elif ranks.conv is not None:
            targets.append(LoraTarget(name, name_of(name), ranks.conv, ranks.conv_alpha))
    return targets


def with_ranks_of(state: Mapping[str, Tensor], targets: Iterable[LoraTarget]) -> list[LoraTarget]:
    """Those targets that a file has weights for, with the file's rank and alpha.

    Args:
        state: tensors under canonical kohya names; a missing alpha means alpha = rank.
        targets: candidates of any rank.
    """
    chosen = []
    for target in targets:
        down = state.get(f"{target.kohya_name}.lora_down.weight")
        if down is not None:
            rank = down.shape[0]
            alpha = float(state.get(f"{target.kohya_name}.alpha", rank))
            chosen.append(target._replace(rank=rank, alpha=alpha))
    return chosen


def inject_lora(
    model: nn.Module, targets: Iterable[LoraTarget], *, dropouts: Dropouts
) -> list[LoraModule]:
    """Put a LoRA on layers of a model, in place, and freeze the rest.

    LoRA weights are fp32 on the layer's device, whatever the model's precision. The down projection
    starts as kaiming uniform with a = sqrt(5), drawn from the global torch stream; the up
    projection starts as zero, so the model's output is unchanged.

    Source: sd-scripts ``networks/lora.py`` ``LoRAModule.__init__``.
    """
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules()), (
        "the model carries a LoRA already"
    )
    targets = list(targets)
    model.requires_grad_(False)
    if not targets:
        return []
    inject_adapter_in_model(_peft_config(targets), model, adapter_name=ADAPTER)
    modules = [LoraModule(t.kohya_name, model.get_submodule(t.module_name)) for t in targets]
    for module in modules:
        _initialize(module)
        if dropouts.any:
            module.layer.lora_A[ADAPTER].register_forward_hook(
                lambda _layer, _inputs, ranks: dropouts(ranks)
            )
    return modules


@torch.no_grad()
def limit_norms(modules: Iterable[LoraModule], max_norm: float) -> MaxNorm:
    """Scale LoRAs down whose weight change ``alpha / r * up @ down`` is above a limit in norm.

    The norm is Frobenius'; both matrices shrink by the root of ``max_norm / norm``.

    Source: sd-scripts ``networks/lora.py`` ``apply_max_norm_regularization``.
    """
    norms, ratios = [], []
    for module in modules:
        norm = (module.up.flatten(1) @ module.down.flatten(1)).norm() * module.scale
        ratio = (max_norm / norm.clamp(min=max_norm / 2)).clamp(max=1)
        module.up.mul_(ratio.sqrt())
        module.down.mul_(ratio.sqrt())
        norms.append(norm * ratio)
        ratios.append(ratio)
    device = norms[0].device  # a text encoder may have stayed on the CPU
    norms, ratios = (torch.stack([one.to(device) for one in ones]) for ones in (norms, ratios))
    return MaxNorm((ratios != 1).sum(), norms.mean(), norms.max())


def _layers_within(model: nn.Module, classes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name, block in model.named_modules():
        if type(block).__name__ in classes:
            for inner_name, layer in block.named_modules():
                if type(layer) in LAYERS:
                    yield f"{name}.{inner_name}", layer


def _is_pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)


def _peft_config(targets: list[LoraTarget]) -> LoraConfig:
    (rank, alpha), _ = Counter((target.rank, target.alpha) for target in targets).most_common(1)[0]
    escaped = {re.escape(target.module_name): target for target in targets}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="|".join(escaped),  # a string is matched as a whole, a list by suffix
        rank_pattern={name: t.rank for name, t in escaped.items() if t.rank != rank},
        alpha_pattern={name: t.alpha for name, t in escaped.items() if t.alpha != alpha},
        lora_dropout=0.0,  # peft drops inputs, kohya drops ranks: see Dropouts
        init_lora_weights=False,  # peft would round the first values to the model's precision
    )


def _initialize(module: LoraModule) -> None:
    module.layer.lora_A[ADAPTER].float()
    module.layer.lora_B[ADAPTER].float()
    nn.init.kaiming_uniform_(module.down, a=math.sqrt(5))
    nn.init.zeros_(module.up)
