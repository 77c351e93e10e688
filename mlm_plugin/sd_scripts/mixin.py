"""The MLM term in the network trainers: a mixin in front of the trainer's own class.

The arguments of every call are bound by name to the signature of the overridden method, so that
more parameters or another order in other versions do not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.arguments import (
    read_at,
    read_mlm_options,
    text_encoder_rates,
    why_network_has_no_gradient,
)
from mlm_plugin.sd_scripts.term import (
    MLMTerm,
    is_clip_text_model,
    wrap_text_encoder,
)

__all__ = ["MLMTrainerMixin", "bind", "require_methods", "with_mlm"]

NEEDED = {
    "process_batch": {"accelerator", "is_train"},
    "assert_extra_args": {"args", "train_dataset_group"},
    "post_process_network": {"args", "accelerator", "network", "text_encoders", "unet"},
    "get_tokenizers": set(),
    "get_text_encoders_train_flags": {"args", "text_encoders"},
    "update_metadata": {"metadata"},
    "generate_step_logs": set(),
}
"""Methods that are overridden or called, and the parameters that are read."""


class MLMTrainerMixin:
    """Adds the term where a network trainer computes its loss; at weight 0, the plain trainer.

    Attributes:
        mlm_arch: ``sd``, ``sdxl``, ``sd3`` or ``flux``; which states the image model sees.
        mlm: the term; ``None`` at weight 0 and before the options are read.
    """

    mlm_arch = "sd"
    mlm: MLMTerm | None = None
    _tokenizers: list[Any] = []

    def get_tokenizers(self, *args, **kwargs):
        """Keep the tokenizers, one for each text encoder."""
        self._tokenizers = super().get_tokenizers(*args, **kwargs)
        return self._tokenizers

    def assert_extra_args(self, *args, **kwargs):
        """Read the options and refuse runs in which the term has no gradient."""
        given = bind(super().assert_extra_args, args, kwargs)
        options = read_mlm_options(given["args"])
        if options.mlm_loss_weight:
            if reason := why_network_has_no_gradient(given["args"], options, arch=self.mlm_arch):
                raise UserError(no_gradient_message(options, reason))
            self.mlm = MLMTerm(options, seed=given["args"].seed)
            self.mlm.use_data(given["train_dataset_group"])
        return super().assert_extra_args(*args, **kwargs)

    def post_process_network(self, *args, **kwargs):
        """Find the contextualizers while the text encoders are untrained."""
        result = super().post_process_network(*args, **kwargs)
        if self.mlm:
            self._start_mlm(bind(super().post_process_network, args, kwargs))
        return result

    def _start_mlm(self, given: dict[str, Any]) -> None:
        args, network, text_encoders = given["args"], given["network"], given["text_encoders"]
        trained = self._trained_text_encoders(args, network, text_encoders)
        place = read_at(self.mlm.options, arch=self.mlm_arch, trains_text=any(trained))
        if place == "encoder" and not any(trained):
            reason = "no CLIP text encoder is trained here"
            raise UserError(no_gradient_message(self.mlm.options, reason))
        if place != "encoder" and not all(map(is_clip_text_model, text_encoders)):
            raise UserError(
                f"mlm_read_at = {place}: the U-Net reads a text encoder here that is not CLIP; "
                "take mlm_read_at = encoder or set mlm_loss_weight = 0"
            )
        self.mlm.read_at(place, given["unet"])
        for model, tokenizer, is_trained in zip(
            text_encoders, self._tokenizers, trained, strict=False
        ):
            text_encoder = wrap_text_encoder(
                model, tokenizer, arch=self.mlm_arch, clip_skip=args.clip_skip
            )
            self.mlm.add_text_encoder(text_encoder, given["accelerator"], is_trained=is_trained)
        self.mlm.attach(given["accelerator"])

    def _trained_text_encoders(self, args, network, text_encoders) -> list[bool]:
        """For each text encoder, whether it is CLIP and trained by this network."""
        if not getattr(network, "text_encoder_loras", True):
            return [False] * len(text_encoders)
        flags = self.get_text_encoders_train_flags(args, text_encoders)
        if getattr(args, "network_train_unet_only", False):
            flags = [False] * len(flags)
        rates = text_encoder_rates(args, network, count=len(text_encoders))
        return [
            bool(flag and rate and is_clip_text_model(model))
            for model, flag, rate in zip(text_encoders, flags, rates, strict=False)
        ]

    def process_batch(self, *args, **kwargs):
        """The host's loss, plus the term in training; validation is unchanged."""
        loss = super().process_batch(*args, **kwargs)
        given = bind(super().process_batch, args, kwargs)
        if not self.mlm or not given["is_train"]:
            return loss
        return self.mlm.add_to(loss, given["accelerator"])

    def generate_step_logs(self, *args, **kwargs):
        """The host's curves and the parts of the loss."""
        logs = super().generate_step_logs(*args, **kwargs)
        if self.mlm and self.mlm.parts:
            logs |= self.mlm.parts.logs()
        return logs

    def update_metadata(self, *args, **kwargs):
        """The host's metadata and ``ss_mlm_*``."""
        result = super().update_metadata(*args, **kwargs)
        if self.mlm:
            bind(super().update_metadata, args, kwargs)["metadata"].update(self.mlm.metadata())
        return result


def bind(method: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by parameter name, defaults included."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def require_methods(trainer: type, needed: Mapping[str, set[str]]) -> None:
    """Refuse a trainer that lacks a method or a parameter that a mixin reads.

    Raises:
        UserError: what is missing.
    """
    for name, parameters in needed.items():
        method = getattr(trainer, name, None)
        missing = parameters - set(inspect.signature(method).parameters) if method else {"itself"}
        if missing:
            raise UserError(
                f"this sd-scripts is newer or older than the plug-in knows: {trainer.__name__}."
                f"{name} lacks {', '.join(sorted(missing))}; use v0.10.0 to v0.11, or "
                "--host standalone"
            )


def with_mlm(trainer: type, *, arch: str) -> type:
    """The trainer's class with the mixin in front.

    Raises:
        UserError: the class lacks a method or a parameter that the mixin reads.
    """
    require_methods(trainer, NEEDED)
    return type(f"MLM{trainer.__name__}", (MLMTrainerMixin, trainer), {"mlm_arch": arch})
