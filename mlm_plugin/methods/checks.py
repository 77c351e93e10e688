"""Which options fit the method of a run: what can be checked before data or a model is opened.

Checks of options alone are in ``config.checks``. Errors are ``UserError``; a setting without effect
causes a warning with its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain

from mlm_plugin.config.checks import (
    Rule,
    no_gradient_message,
    option_errors,
    option_warnings,
    without_effect,
)
from mlm_plugin.config.options import OPTIONS, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS

__all__ = ["check_config", "check_model"]

logger = logging.getLogger(__name__)


def check_config(config: TrainConfig) -> None:
    """Refuse options that contradict each other; warn about those without effect.

    Raises:
        UserError: The first contradiction found.
    """
    for message in chain(option_errors(config), _method_errors(config)):
        raise UserError(message)
    for message in chain(_method_warnings(config), option_warnings(config)):
        logger.warning("%s", message)


def check_model(config: TrainConfig, *, is_sdxl: bool) -> None:
    """Like :func:`check_config`, for what depends on the loaded model.

    Raises:
        UserError: the method does not support this kind of model.

    Source: sd-scripts library/sdxl_train_util.py verify_sdxl_training_args.
    """
    method = config.schedule.method
    if is_sdxl and not METHODS[method].supports_sdxl:
        raise UserError(
            f"method = {method!r} is for Stable Diffusion 1 and 2, and "
            f"{config.model.pretrained_model_name_or_path} is SDXL; use one of "
            f"{_names_of('supports_sdxl')}"
        )
    if not is_sdxl:
        names = [name for name in _OF_TWO_TEXT_ENCODERS if name in config.changed()]
        if len(config.optimizer.text_encoder_lr or ()) > 1:
            names.append("the second text_encoder_lr")
        for name in names:
            logger.warning("%s has no effect: this model has one text encoder", name)


def _method_errors(config: TrainConfig) -> Iterator[str]:
    """Options that contradict the facts of the method."""
    yield from _quantized(config)
    yield from _rates(config)
    yield from _fused(config)
    yield from _text_side(config)
    yield from _directional(config)


def _quantized(config: TrainConfig) -> Iterator[str]:
    kind, method = config.model.quantize_unet, config.schedule.method
    if kind != "no" and METHODS[method].trains_base_weights:
        yield (
            f"quantize_unet = {kind!r} cannot be combined with method = {method!r}, which trains "
            f"weights of the U-Net itself; leave it out, or use "
            f"{_names_of('trains_base_weights', False)}"
        )


def _rates(config: TrainConfig) -> Iterator[str]:
    rates = METHODS[config.schedule.method].learning_rates(config).values()
    for rate in rates:
        if rate.value < 0:
            yield f"{rate.option} = {rate.value:g}: a learning rate must not be negative"
    if not any(rate.value for rate in rates):
        names = dict.fromkeys(rate.option for rate in rates)
        verb = "are all" if len(names) > 1 else "is"
        yield f"{' and '.join(names)} {verb} 0: nothing would be trained"


def _fused(config: TrainConfig) -> Iterator[str]:
    method = config.schedule.method
    if config.optimizer.fused_backward_pass and not METHODS[method].supports_fused_backward:
        yield (
            f"fused_backward_pass with method = {method!r}: its gradients are small; leave it out, "
            f"it is for {_names_of('supports_fused_backward')}"
        )


def _text_side(config: TrainConfig) -> Iterator[str]:
    """Options that need, or exclude, training before the text encoder's output."""
    method = METHODS[config.schedule.method]
    if config.dataset.cache_text_encoder_outputs and method.why_text_untrained(config) is None:
        yield (
            "cache_text_encoder_outputs cannot be combined with training anything before the text "
            "encoder's output; add network_train_unet_only (lora, pivotal with embedding_lr = 0), "
            "no_train_text_encoder (dreambooth) or embedding_lr = 0 (custom_diffusion), or leave "
            "it out"
        )
    if config.mlm.mlm_loss_weight and (reason := method.why_no_gradient(config)):
        yield no_gradient_message(config.mlm, reason, elsewhere=True)


def _directional(config: TrainConfig) -> Iterator[str]:
    method = METHODS[config.schedule.method]
    if not config.embedding.directional_embedding or not method.learns_tokens:
        return
    rate = method.learning_rate_of("embedding", config.optimizer)
    if not rate.value:
        yield (
            f"directional_embedding asks for the direction of token embeddings to be learned, but "
            f"{rate.option} = 0 leaves them untrained; leave it out, or give a rate"
        )


def _method_warnings(config: TrainConfig) -> Iterator[str]:
    method, network = METHODS[config.schedule.method], config.network
    yield from without_effect(config, [*_rules_of_readers(), *method.rules])
    if (
        method.trains_network
        and (network.network_dim or 1) > 1
        and network.network_alpha == OPTIONS["network_alpha"].default
    ):
        yield (
            f"network_alpha is 1 with network_dim = {network.network_dim}: the LoRA is scaled by "
            f"1/{network.network_dim}; give network_alpha = {network.network_dim} for scale 1"
        )


def _rules_of_readers() -> list[Rule]:
    """Options that only some methods read: a rule for each set of methods."""
    options_by_readers: dict[frozenset[str], list[str]] = {}
    read = {name: method.options_read() for name, method in METHODS.items()}
    for option in OPTIONS:
        readers = frozenset(name for name, options in read.items() if option in options)
        if readers:
            options_by_readers.setdefault(readers, []).append(option)
    return [
        Rule(
            tuple(options),
            "with method = {method}",
            lambda flat, readers=readers: flat["method"] in readers,
        )
        for readers, options in options_by_readers.items()
    ]


def _names_of(fact: str, value: bool = True) -> str:
    """The methods for which a fact is true."""
    return ", ".join(name for name, method in METHODS.items() if getattr(method, fact) is value)


_OF_TWO_TEXT_ENCODERS = (
    "learning_rate_te1",
    "learning_rate_te2",
    "stop_text_encoder1_training",
    "stop_text_encoder2_training",
)
