"""The MLM term of a network trainer, set up while the models are untrained."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.errors import UserError
from mlm_plugin.mlm_setup import AnyEncoder
from mlm_plugin.models.key_values import replaced_weights
from mlm_plugin.models.language_model import AdaptedEncoder
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.sd_scripts.architectures import Architecture
from mlm_plugin.sd_scripts.arguments import (
    read_at,
    text_encoder_rates,
    why_network_has_no_gradient,
    why_unet_untrained,
)
from mlm_plugin.sd_scripts.term import MLMTerm
from mlm_plugin.sd_scripts.text_encoders import is_clip_text_model, is_t5, wrap_text_encoder

__all__ = ["Models", "create_term", "encoders_of", "use_models"]

logger = logging.getLogger(__name__)


class Models(NamedTuple):
    """What a network trainer trains, still untrained.

    Attributes:
        network: LoRA or the like; not yet applied.
        text_encoders: of the base model.
        strategy: the trainer's tokenize strategy, which has the tokenizers.
        unet: the image model, a U-Net or a transformer.
    """

    network: nn.Module
    text_encoders: Sequence[nn.Module]
    strategy: Any
    unet: nn.Module


class Encoder(NamedTuple):
    """A text encoder of the base model."""

    text_encoder: AnyEncoder
    is_trained: bool


def create_term(args: argparse.Namespace, options: MLMOptions, *, arch: str) -> MLMTerm | None:
    """The term of a run; ``None`` at weight 0.

    Args:
        args: options of the host.
        options: of the term.
        arch: architecture of the base model.

    Raises:
        UserError: the host's options leave untrained what the term reads.
    """
    if not options.mlm_loss_weight:
        return None
    if reason := why_network_has_no_gradient(args, options, arch=arch):
        elsewhere = why_unet_untrained(args) is None
        raise UserError(no_gradient_message(options, reason, elsewhere=elsewhere))
    precision = getattr(args, "mixed_precision", None)
    return MLMTerm(options, seed=args.seed, mixed_precision=precision)


def use_models(
    term: MLMTerm,
    args: argparse.Namespace,
    models: Models,
    accelerator: Accelerator,
    architecture: Architecture,
    *,
    network_args: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Find the contextualizers and let the untrained text encoders read the prompts.

    Args:
        term: knows its concepts.
        args: options of the host.
        models: untrained.
        accelerator: its device does the work; its first process prints what the term does.
        architecture: of the base model.
        network_args: of the network.

    Raises:
        UserError: nothing that the term reads is trained, or a contextualizer does not fit.
    """
    encoders = encoders_of(args, models, architecture)
    trains_text = any(encoder.is_trained for encoder in encoders.values())
    trains_unet = why_unet_untrained(args) is None
    place = read_at(
        term.options, arch=architecture.arch, trains_text=trains_text, trains_unet=trains_unet
    )
    if place == "encoder" and not trains_text:
        reason = "no text encoder is trained by this network"
        raise UserError(no_gradient_message(term.options, reason, elsewhere=trains_unet))
    if place != "encoder" and network_args.get("algo", "").lower() == "full":
        raise replaced_weights()
    if place == "encoder":
        encoders = {number: one for number, one in encoders.items() if one.is_trained}
        encoders = _readable(term, encoders)
    elif architecture.is_unet:
        if not all(map(is_clip_text_model, models.text_encoders)):
            raise UserError(
                f"mlm_read_at = {place}: the U-Net reads a text encoder here that is not CLIP; "
                "take mlm_read_at = encoder or set mlm_loss_weight = 0"
            )
        term.read_at(place, models.unet)
    else:
        encoders = _read_transformer(term, args, models, architecture, encoders, place)
    _check_language_model(term, encoders)
    term.add_text_encoders(
        [encoder.text_encoder for encoder in encoders.values()],
        accelerator,
        trained=[encoder.is_trained for encoder in encoders.values()],
    )
    accelerator.print(term.describe())


def encoders_of(
    args: argparse.Namespace, models: Models, architecture: Architecture
) -> dict[int, Encoder]:
    """The text encoders by their number in the trainer; placeholders without weights are left out.

    Lumina 2 has a system prompt before every caption.
    """
    trained = _trained_text_encoders(args, models)
    tokenizers = [getattr(models.strategy, name, None) for name in architecture.tokenizers]
    found = {}
    for number, (model, tokenizer) in enumerate(
        zip(models.text_encoders, tokenizers, strict=False)
    ):
        text_encoder = wrap_text_encoder(
            model,
            tokenizer,
            arch=architecture.arch,
            clip_skip=args.clip_skip,
            prefix=getattr(models.strategy, "system_prompt", None) or "",
        )
        if text_encoder is not None:
            found[number] = Encoder(text_encoder, trained[number])
    return found


def _readable(term: MLMTerm, encoders: dict[int, Encoder]) -> dict[int, Encoder]:
    """Those whose states something can turn into words, unless states are compared."""
    readable = {
        number: encoder
        for number, encoder in encoders.items()
        if isinstance(encoder.text_encoder, TextEncoder) or encoder.text_encoder.reads_itself
    }
    if term.options.mlm_target == "states" or len(readable) == len(encoders):
        return encoders
    if not readable:
        term.require_states("nothing reads the states of this text encoder as words")
        return encoders
    logger.warning(
        "MLM term: T5 is trained too, but nothing reads its states as words; "
        "with mlm_target = states it is read"
    )
    return readable


def _read_transformer(
    term: MLMTerm,
    args: argparse.Namespace,
    models: Models,
    architecture: Architecture,
    encoders: dict[int, Encoder],
    place: str,
) -> dict[int, Encoder]:
    """Set the term to read a transformer; returns the encoders that it needs, in their order.

    Raises:
        UserError: its text layers cannot be read, or are moved away while it would read them.
    """
    term.require_states("what an image transformer makes of the prompt is not words")
    if architecture.arch == "anima":
        adapted = _adapted(models, encoders[0])
        needed = {number: one for number, one in encoders.items() if one.is_trained}
        if place == "cross_attention":
            needed = {}
        needed[len(encoders)] = adapted
        groups = [[len(needed) - 1]]
    else:
        if getattr(args, "blocks_to_swap", None):
            raise UserError(
                f"mlm_read_at = {place}: blocks_to_swap moves the block away that would be read; "
                "leave it out, or take mlm_read_at = encoder if a text encoder is trained"
            )
        in_groups = {number for group in architecture.groups for number in group}
        needed = {n: one for n, one in encoders.items() if one.is_trained or n in in_groups}
        order = list(needed)
        groups = [
            [order.index(number) for number in group if number in order]
            for group in architecture.groups
        ]
    term.read_transformer(place, models.unet, [group for group in groups if group])
    return needed


def _adapted(models: Models, source: Encoder) -> Encoder:
    """What Anima's transformer reads: the language model through its adapter."""
    trains_adapter = getattr(models.network, "train_llm_adapter", True)  # LyCORIS does not say
    adapted = AdaptedEncoder(
        source.text_encoder,
        models.unet.llm_adapter,
        models.strategy.t5_tokenizer,
        keep_states=not source.is_trained,
    )
    return Encoder(adapted, source.is_trained or trains_adapter)


def _check_language_model(term: MLMTerm, encoders: dict[int, Encoder]) -> None:
    """Refuse what a language model cannot answer, and a file that it does not need."""
    if term.options.mlm_target == "states":
        return
    if not any(encoder.text_encoder.reads_itself for encoder in encoders.values()):
        return
    if term.options.mlm_contextualizer != "auto":
        raise UserError(
            f"mlm_contextualizer = {term.options.mlm_contextualizer!r} has no effect: this text "
            "encoder is a language model and reads itself; leave it out"
        )
    if term.options.mlm_target == "word":
        raise UserError(
            "mlm_target = word: no word is masked for a language model; take mlm_target = states, "
            "or class for its next words"
        )


def _trained_text_encoders(args: argparse.Namespace, models: Models) -> list[bool]:
    """For each text encoder, whether it is trained by this network."""
    count = len(models.text_encoders)
    if getattr(args, "network_train_unet_only", False) or not _has_text_modules(models.network):
        return [False] * count
    rates = text_encoder_rates(args, models.network, count=count)
    trains_t5 = bool(getattr(models.network, "train_t5xxl", False))
    return [
        bool(rate) and (trains_t5 or not is_t5(model))
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
