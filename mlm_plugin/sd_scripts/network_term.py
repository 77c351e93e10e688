"""The MLM term of a network trainer, set up while the models are untrained.

The launcher's mixin and the network module do this alike, so that both train the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.arguments import (
    read_at,
    text_encoder_rates,
    why_network_has_no_gradient,
    why_unet_untrained,
)
from mlm_plugin.sd_scripts.term import MLMTerm, is_clip_text_model, wrap_text_encoder

__all__ = ["Models", "create_term", "use_models"]


class Models(NamedTuple):
    """What a network trainer trains, still untrained.

    Attributes:
        network: LoRA or the like; not yet applied.
        text_encoders: of the base model.
        tokenizers: theirs, in the same order.
        unet: of the base model.
    """

    network: nn.Module
    text_encoders: Sequence[nn.Module]
    tokenizers: Sequence[Any]
    unet: nn.Module


def create_term(args: argparse.Namespace, options: MLMOptions, *, arch: str) -> MLMTerm | None:
    """The term of a run; ``None`` at weight 0.

    Args:
        args: options of the host.
        options: of the term.
        arch: ``sd``, ``sdxl``, ``sd3`` or ``flux``.

    Raises:
        UserError: the host's options leave untrained what the term reads.
    """
    if not options.mlm_loss_weight:
        return None
    if reason := why_network_has_no_gradient(args, options, arch=arch):
        raise UserError(no_gradient_message(options, reason))
    return MLMTerm(options, seed=args.seed)


def use_models(
    term: MLMTerm, args: argparse.Namespace, models: Models, accelerator: Accelerator, *, arch: str
) -> None:
    """Find the contextualizers and let the untrained text encoders read the prompts.

    Args:
        term: knows its concepts.
        args: options of the host.
        models: untrained.
        accelerator: its device does the work.
        arch: ``sd``, ``sdxl``, ``sd3`` or ``flux``; which states the image model sees.

    Raises:
        UserError: nothing that the term reads is trained, or a contextualizer does not fit.
    """
    trained = _trained_text_encoders(args, models)
    trains_unet = why_unet_untrained(args) is None
    place = read_at(term.options, arch=arch, trains_text=any(trained), trains_unet=trains_unet)
    if place == "encoder" and not any(trained):
        reason = "no CLIP text encoder is trained here"
        raise UserError(no_gradient_message(term.options, reason))
    if place != "encoder" and not all(map(is_clip_text_model, models.text_encoders)):
        raise UserError(
            f"mlm_read_at = {place}: the U-Net reads a text encoder here that is not CLIP; "
            "take mlm_read_at = encoder or set mlm_loss_weight = 0"
        )
    term.read_at(place, models.unet)
    for model, tokenizer, is_trained in zip(
        models.text_encoders, models.tokenizers, trained, strict=False
    ):
        text_encoder = wrap_text_encoder(model, tokenizer, arch=arch, clip_skip=args.clip_skip)
        term.add_text_encoder(text_encoder, accelerator, is_trained=is_trained)


def _trained_text_encoders(args: argparse.Namespace, models: Models) -> list[bool]:
    """For each text encoder, whether it is CLIP and trained by this network."""
    count = len(models.text_encoders)
    if getattr(args, "network_train_unet_only", False) or not _has_text_modules(models.network):
        return [False] * count
    rates = text_encoder_rates(args, models.network, count=count)
    return [
        bool(rate and is_clip_text_model(model))
        for model, rate in zip(models.text_encoders, rates, strict=True)
    ]


def _has_text_modules(network: nn.Module) -> bool:
    """Whether the network has modules for text encoders; true where it does not say.

    Source: sd-scripts ``networks/lora.py`` and others (a list of modules for each), ``oft.py``
    (a list for the U-Net alone).
    """
    if hasattr(network, "text_encoder_loras"):
        return bool(network.text_encoder_loras)
    return not hasattr(network, "unet_ofts")
