"""The base models of sd-scripts: their tokenizers, their network modules, how they read text."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlm_plugin.errors import UserError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture_named",
    "current_architecture",
    "tokenize_strategy",
]


class Architecture(NamedTuple):
    """What a base model has.

    Attributes:
        arch: value of ``mlm_arch``.
        tokenizers: attributes of the trainer's tokenize strategy, one for each text encoder.
        inner: the network module made for it.
        groups: text encoders whose states lie side by side, by number, for each sequence of tokens
            that the image model reads. In Anima it reads what its adapter makes of them.
        is_unet: whether the image model is a U-Net, otherwise a transformer.
    """

    arch: str
    tokenizers: tuple[str, ...]
    inner: str
    groups: tuple[tuple[int, ...], ...]
    is_unet: bool = False


ARCHITECTURES = {
    "SdTokenizeStrategy": Architecture("sd", ("tokenizer",), "networks.lora", ((0,),), True),
    "SdxlTokenizeStrategy": Architecture(
        "sdxl", ("tokenizer1", "tokenizer2"), "networks.lora", ((0, 1),), True
    ),
    "Sd3TokenizeStrategy": Architecture(
        "sd3", ("clip_l", "clip_g", "t5xxl"), "networks.lora_sd3", ((0, 1), (2,))
    ),
    "FluxTokenizeStrategy": Architecture(
        "flux", ("clip_l", "t5xxl"), "networks.lora_flux", ((1,),)
    ),
    "AnimaTokenizeStrategy": Architecture(
        "anima", ("qwen3_tokenizer",), "networks.lora_anima", ((0,),)
    ),
    "LuminaTokenizeStrategy": Architecture(
        "lumina", ("tokenizer",), "networks.lora_lumina", ((0,),)
    ),
}
"""By the class of the trainer's tokenize strategy. Source: sd-scripts ``library/strategy_*.py``."""


def architecture_named(arch: str) -> Architecture:
    """By the value of ``mlm_arch``."""
    return next(one for one in ARCHITECTURES.values() if one.arch == arch)


def tokenize_strategy(place: str) -> Any:
    """The trainer's own.

    Args:
        place: who asks, for errors.

    Raises:
        UserError: this is not a trainer of sd-scripts.
    """
    try:
        from library.strategy_base import TokenizeStrategy
    except ImportError as error:
        raise UserError(
            f"{place}: works inside sd-scripts v0.10.0 or later ({error}); update sd-scripts"
        ) from error
    return TokenizeStrategy.get_strategy()


def current_architecture(place: str) -> Architecture:
    """Of the trainer that runs.

    Args:
        place: who asks, for errors.

    Raises:
        UserError: it is not supported.
    """
    name = type(tokenize_strategy(place)).__name__
    if name not in ARCHITECTURES:
        known = ", ".join(architecture.arch for architecture in ARCHITECTURES.values())
        raise UserError(
            f"{place}: {name.removesuffix('TokenizeStrategy')} models are not supported, only "
            f"{known}; choose the network module made for this model"
        )
    return ARCHITECTURES[name]
