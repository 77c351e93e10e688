"""What a module of a file adds to the weight of its layer, for every algorithm.

Plain LoRA is multiplied out here; LyCORIS knows all others.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from mlm_plugin.doctor.learned_file import Module, algorithm_of
from mlm_plugin.errors import UserError

__all__ = ["LINEAR_FACTORS", "weight_change"]

LINEAR_FACTORS = {
    "LoRA": ("lora_up.weight",),
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1", "lokr_w1_a"),
    "GLoRA": ("a2.weight", "b2.weight"),
    "full": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
    "IA3": ("weight",),
}
"""By algorithm the tensors that the change is proportional to."""


def weight_change(module: Module, layer: nn.Module, *, scale: float = 1.0) -> Tensor:
    """``dW`` in fp32, shaped as the layer's weight.

    Args:
        module: tensors of the file.
        layer: of the base model, in fp32.
        scale: strength, as the number behind a LoRA's name in a prompt.

    Raises:
        UserError: LyCORIS is needed and missing, or does not know the module.
    """
    if algorithm_of(module) == "LoRA" and "lora_mid.weight" not in module:
        return scale * _lora_product(module).reshape(layer.weight.shape)
    return _lycoris_change(module, layer, scale)


def _lora_product(module: Module) -> Tensor:
    up, down = (module[key].float().flatten(1) for key in ("lora_up.weight", "lora_down.weight"))
    rank = len(down)
    alpha = float(module["alpha"]) if "alpha" in module else float(rank)
    return (up @ down) * (alpha / rank)


@torch.no_grad()
def _lycoris_change(module: Module, layer: nn.Module, scale: float) -> Tensor:
    lycoris = _lycoris()
    state = {f"layer.{key}": tensor.float() for key, tensor in module.items()}
    kind, weights = lycoris.get_module(state, "layer")
    adapter = kind and lycoris.make_module(kind, weights, "layer", layer)
    if adapter is None:
        raise UserError(f"LyCORIS does not know a module with {', '.join(sorted(module))}")
    merged, _bias = adapter.get_merged_weight(scale, layer.weight.shape)
    return merged.detach().float() - layer.weight


def _lycoris():
    try:
        return importlib.import_module("lycoris.modules")
    except ImportError as error:
        raise UserError(
            "the file holds modules of LyCORIS; `pip install lycoris-lora` to read them"
        ) from error
