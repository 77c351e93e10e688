"""The MLM term in the network trainers: a mixin in front of the trainer's own class.

The arguments of every call are bound by name to the signature of the overridden method, so that
more parameters or another order in other versions do not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.accelerator_hooks import join_accelerator
from mlm_plugin.sd_scripts.architectures import architecture_named
from mlm_plugin.sd_scripts.data import built_data, has_weighted_captions
from mlm_plugin.sd_scripts.network_run import NetworkRun
from mlm_plugin.sd_scripts.network_term import Models
from mlm_plugin.sd_scripts.term import MLMTerm

__all__ = ["MLMTrainerMixin", "bind", "require_methods", "with_mlm"]

NEEDED = {
    "assert_extra_args": {"args", "train_dataset_group"},
    "post_process_network": {"args", "accelerator", "network", "text_encoders", "unet"},
    "get_tokenizers": {"tokenize_strategy"},
    "update_metadata": {"metadata"},
}
"""Methods that are overridden or called, and the parameters that are read."""


class MLMTrainerMixin:
    """Adds the term to the backward pass of a network trainer; at weight 0, the plain trainer.

    Attributes:
        mlm_arch: architecture of the base model; which states the image model sees.
        mlm: the term; ``None`` at weight 0 and before the options are read.
    """

    mlm_arch = "sd"
    mlm: MLMTerm | None = None
    _strategy: Any = None
    _run: NetworkRun

    def get_tokenizers(self, *args, **kwargs):
        """Keep the tokenize strategy, which has the tokenizers of all text encoders."""
        self._strategy = bind(super().get_tokenizers, args, kwargs)["tokenize_strategy"]
        return super().get_tokenizers(*args, **kwargs)

    def assert_extra_args(self, *args, **kwargs):
        """Read the options and refuse runs in which the term has no gradient."""
        given = bind(super().assert_extra_args, args, kwargs)
        self._run = NetworkRun(given["args"], architecture_named(self.mlm_arch))
        self.mlm = self._run.term
        if self._run.needs_data:
            weighted = has_weighted_captions(given["args"])
            self._run.use_data(built_data(given["train_dataset_group"], weighted=weighted))
        return super().assert_extra_args(*args, **kwargs)

    def post_process_network(self, *args, **kwargs):
        """Find the contextualizers while the text encoders are untrained."""
        result = super().post_process_network(*args, **kwargs)
        given = bind(super().post_process_network, args, kwargs)
        models = Models(given["network"], given["text_encoders"], self._strategy, given["unet"])
        watch = self._run.use_models(models, given["accelerator"])
        if self.mlm or watch:
            join_accelerator(given["accelerator"], self.mlm, watch)
        return result

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
