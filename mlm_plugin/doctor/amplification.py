"""Whether the text encoders' part of a LoRA was enlarged after training.

Adam's steps are about as long as the learning rate, whatever the gradient. So the matrices that
training starts at zero grow in proportion to their learning rates, and the two parts of a file in
the same proportion. On the pocket model's LoRAs the ratio of their growths is 0.76 to 1.19
(docs/doctor.md). A file that was merged, resized or rescaled can be far from that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch

from mlm_plugin.doctor.learned_file import LearnedFile, Module

__all__ = ["SUSPICIOUS", "amplification"]

SUSPICIOUS = 2.0
"""From here on the ratio is not explained by training."""


def amplification(file: LearnedFile) -> float | None:
    """How many times larger the text encoders' part is than its learning rate explains.

    ``None`` where that cannot be told: the file has one part, another algorithm, another optimizer,
    or no learning rates in its metadata.
    """
    unet_lr = _rate(file.metadata, "ss_unet_lr")
    text_lr = _rate(file.metadata, "ss_text_encoder_lr")
    optimizer = file.metadata.get("ss_optimizer", "").lower()
    if not unet_lr or not text_lr or "adam" not in optimizer or _has_other_rates(file):
        return None
    text, image = (
        _root_mean_square(m for name, m in file.modules.items() if ("_unet_" in name) == is_unet)
        for is_unet in (False, True)
    )
    return (text / text_lr) / (image / unet_lr) if text and image else None


def _root_mean_square(modules: Iterable[Module]) -> float:
    squares, count = 0.0, 0
    for module in modules:
        if "lora_up.weight" in module:
            up = module["lora_up.weight"].to(torch.float64)
            squares, count = squares + up.square().sum().item(), count + up.numel()
    return (squares / count) ** 0.5 if count else 0.0


def _rate(metadata: Mapping[str, str], key: str) -> float | None:
    """A learning rate; of several the first; else that of the whole run."""
    for name in (key, "ss_learning_rate"):
        text = metadata.get(name, "None")
        try:
            value = json.loads(text)
            return float(value[0] if isinstance(value, list) else value)
        except (ValueError, TypeError, IndexError):
            continue
    return None


def _has_other_rates(file: LearnedFile) -> bool:
    """Whether matrices (LoRA+, ``loraplus_lr_ratio``) or layers (``network_reg_lrs``) have own."""
    args = file.metadata.get("ss_network_args", "")
    return "ratio" in args or "reg_lrs" in args
