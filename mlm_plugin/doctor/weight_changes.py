"""What a module of a file adds to the weight of its linear layer, for every algorithm.

Plain LoRA and whole differences are taken from the tensors. For all others LyCORIS' own module is
asked what it makes of the unit vectors: its ``get_merged_weight`` counts alpha / rank twice for
LoHa and LoKr (3.2.0), its ``forward`` does not, and neither do the WebUIs.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.doctor.learned_file import Module, algorithm_of
from mlm_plugin.errors import UserError

__all__ = ["LINEAR_FACTORS", "Change", "weight_change"]

LINEAR_FACTORS = {
    "LoRA": ("lora_up.weight",),
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1", "lokr_w1_a"),
    "GLoRA": ("a2.weight", "b2.weight"),
    "full": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
}
"""By algorithm the tensors that the change is proportional to."""


class Change(NamedTuple):
    """``dW (O, D)`` and ``db (O,)`` of a layer, fp32."""

    weight: Tensor
    bias: Tensor | None = None


@torch.no_grad()
def weight_change(module: Module, layer: nn.Linear, *, scale: float = 1.0) -> Change:
    """What the file adds to a layer.

    Args:
        module: tensors of the file.
        layer: of the base model, in fp32.
        scale: strength, as the number after a LoRA's name in a prompt.

    Raises:
        UserError: LyCORIS is needed and missing, or does not know the module.
    """
    algorithm = algorithm_of(module)
    if algorithm == "LoRA":
        return Change(scale * _lora_product(module).reshape(layer.weight.shape))
    if algorithm == "full":
        bias = module.get("diff_b")
        weight = module.get("diff", torch.zeros_like(layer.weight))
        return Change(scale * weight.float(), None if bias is None else scale * bias.float())
    return _lycoris_change(module, layer, scale)


def _lora_product(module: Module) -> Tensor:
    up, down = (module[key].float().flatten(1) for key in ("lora_up.weight", "lora_down.weight"))
    rank = len(down)
    alpha = float(module["alpha"]) if "alpha" in module else float(rank)
    return (up @ down) * (alpha / rank)


def _lycoris_change(module: Module, layer: nn.Linear, scale: float) -> Change:
    lycoris = _lycoris()
    state = {f"layer.{key}": tensor.float() for key, tensor in module.items()}
    copy = nn.Linear(layer.in_features, layer.out_features, bias=False)
    copy.weight = layer.weight
    kind, weights = lycoris.get_module(state, "layer")
    adapter = kind and lycoris.make_module(kind, weights, "layer", copy)
    if adapter is None:
        raise UserError(f"LyCORIS does not know a module with {', '.join(sorted(module))}")
    adapter.multiplier = scale
    adapter.eval().apply_to()
    return Change(copy(torch.eye(layer.in_features)).T - layer.weight)


def _lycoris():
    try:
        return importlib.import_module("lycoris.modules")
    except ImportError as error:
        raise UserError(
            "the file holds modules of LyCORIS; `pip install lycoris-lora` to read them"
        ) from error
