"""The network module: an inner network of any kind, with the MLM term in its training.

The trainer passes a network module everything but its accelerator and its data. The data are named
by its options; the accelerator is met when it prepares the models (:mod:`.accelerator_hooks`).

Source: sd-scripts ``train_network.py`` (order of calls), ``networks/lora.py`` (signatures).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from accelerate import PartialState
from torch import nn

from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.accelerator_hooks import exits_on_user_error, join_next_accelerator
from mlm_plugin.sd_scripts.architectures import current_architecture, tokenize_strategy
from mlm_plugin.sd_scripts.data import named_data
from mlm_plugin.sd_scripts.locate import config_file_values
from mlm_plugin.sd_scripts.network_run import NetworkRun
from mlm_plugin.sd_scripts.network_term import Models
from mlm_plugin.sd_scripts.term import MLMTerm

__all__ = ["MODULE", "create_network", "create_network_from_weights", "split_arguments"]

logger = logging.getLogger(__name__)

MODULE = "mlm_plugin.kohya"
OURS = {name for name, entry in OPTIONS.items() if entry.group == "mlm"}


class NetworkArguments(NamedTuple):
    """``network_args``, sorted by whom they are for.

    Attributes:
        inner: name of the inner module; ``None`` where nothing says which.
        ours: options of the term.
        rest: arguments of the inner module.
    """

    inner: str | None
    ours: dict[str, Any]
    rest: dict[str, Any]

    @property
    def typed(self) -> dict[str, str]:
        """What of ``rest`` the user gave; the trainer adds values of other types."""
        return {name: value for name, value in self.rest.items() if isinstance(value, str)}


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module,
    text_encoder: nn.Module | list[nn.Module],
    unet: nn.Module,
    **network_args: Any,
) -> nn.Module | None:
    """The inner module's network, with the term attached. Called by kohya's trainers.

    Exits with code 2 and one line if an argument cannot be used.
    """
    neuron_dropout = network_args.pop("neuron_dropout", None)  # an option, not an argument
    with exits_on_user_error():
        given = _with_config_file(split_arguments(network_args), sys.argv[1:])
        inner = _import_inner(given.inner or _default_inner())
        network = inner.create_network(
            multiplier,
            network_dim,
            network_alpha,
            vae,
            text_encoder,
            unet,
            neuron_dropout=neuron_dropout,
            **given.rest,
        )
        return _with_term(network, _Run(inner.__name__, given, text_encoder, unet))


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: nn.Module,
    text_encoder: nn.Module | list[nn.Module],
    unet: nn.Module,
    for_inference: bool = False,
    **network_args: Any,
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The same with the shapes of a file; without the term where nothing is trained.

    The inner module is the one that wrote the file, as far as its metadata say.
    """
    with exits_on_user_error():
        given = _with_config_file(split_arguments(network_args), sys.argv[1:])
        inner = _import_inner(_module_that_wrote(file) or given.inner or _default_inner())
        network, weights = inner.create_network_from_weights(
            multiplier,
            file,
            vae,
            text_encoder,
            unet,
            for_inference=for_inference,
            **given.rest,
        )
        if not for_inference:
            network = _with_term(network, _Run(inner.__name__, given, text_encoder, unet))
        return network, weights


def split_arguments(network_args: Mapping[str, Any]) -> NetworkArguments:
    """Ours are ``inner`` and every ``mlm`` option; several values are separated by commas.

    ``algo`` is an argument of LyCORIS, so without ``inner`` it names that module.
    """
    rest = dict(network_args)
    inner = rest.pop("inner", "lycoris.kohya" if "algo" in rest else None)
    is_ours = [name for name in rest if name in OURS or name.startswith("mlm_")]
    ours = {name: rest.pop(name) for name in is_ours}
    for name in set(ours) & OURS:
        if OPTIONS[name].many:
            ours[name] = [part.strip() for part in str(ours[name]).split(",")]
    return NetworkArguments(inner, ours, rest)


def _with_config_file(given: NetworkArguments, argv: Sequence[str]) -> NetworkArguments:
    """Add the network module of a ``--config_file`` that is overridden on the command line.

    A GUI writes the chosen network and its arguments there, and adds what its user has typed, such
    as our module and ``mlm_loss_weight=0.1``, as flags, which replace them. Others replace the
    network in the file itself; there ``inner`` may be a key of the file, as all our options may.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config_file")
    in_file = config_file_values(peek.parse_known_args(list(argv))[0].config_file)
    inner = in_file.get("network_module")
    if inner == MODULE and given.inner is None:
        return given._replace(inner=in_file.get("inner"))
    if inner in (None, MODULE) or given.inner not in (None, inner):
        return given
    theirs = split_arguments(dict(_pairs(in_file.get("network_args"))))
    return NetworkArguments(
        inner, {**theirs.ours, **given.ours}, {**given.rest, **theirs.rest, **given.typed}
    )


def _pairs(network_args: Sequence[str] | None) -> Iterator[list[str]]:
    return (argument.split("=", 1) for argument in network_args or ())


def _default_inner() -> str:
    name = current_architecture(MODULE).inner
    logger.info("network: %s; inner=... in network_args chooses another", name)
    return name


def _import_inner(name: str) -> ModuleType:
    if name == MODULE:
        raise UserError(f"inner = {name!r}: must be another module, such as networks.lora")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"inner = {name!r}: cannot be imported ({error}); it must be a network module such as "
            "networks.lora or lycoris.kohya"
        ) from error
    if not hasattr(module, "create_network"):
        raise UserError(f"inner = {name!r}: is not a network module, it has no create_network")
    return module


def _module_that_wrote(file: str | None) -> str | None:
    """The module named by a file, if it is one of the known kinds: a file may come from anyone."""
    if file is None or Path(file).suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        name = (weights.metadata() or {}).get("ss_network_module", "")
    return name if name.startswith("networks.") or name == "lycoris.kohya" else None


class _Run:
    """The term of one network, from its arguments to the metadata of its file."""

    def __init__(
        self,
        inner: str,
        given: NetworkArguments,
        text_encoder: nn.Module | list[nn.Module],
        unet: nn.Module,
    ):
        self.inner = inner
        self.given = given
        self.text_encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        self.unet: nn.Module | None = unet
        self.args: argparse.Namespace | None = None
        self.term: MLMTerm | None = None

    def start(self, args: argparse.Namespace, network: nn.Module) -> None:
        """Set the term up while the models are untrained; at weight 0 there is none.

        Called once: the models are let go, as the trainer may delete them later.
        """
        self.args = args
        run = NetworkRun(
            args,
            current_architecture(MODULE),
            given=self.given.ours,
            place="network_args",
            network_args=self.given.typed,
        )
        self.term = run.term
        if run.needs_data:
            run.use_data(named_data(args))
        models = Models(network, self.text_encoders, tokenize_strategy(MODULE), self.unet)
        self.text_encoders, self.unet = [], None
        join_next_accelerator(self.term, run.use_models(models, PartialState()))

    def metadata(self, metadata: dict[str, str] | None) -> dict[str, str] | None:
        """What the inner module would have written, and ``ss_mlm_*``."""
        if metadata is None or self.args is None:
            return metadata
        metadata = {**metadata, "ss_network_module": self.inner}
        metadata.pop("ss_network_args", None)
        if self.given.typed:
            metadata["ss_network_args"] = json.dumps(self.given.rest)
        if self.term is not None and not self.args.no_metadata:
            metadata |= self.term.metadata()
        return metadata


class _MLMNetwork:
    """In front of the inner network's class."""

    mlm_run: _Run

    def prepare_network(self, args: argparse.Namespace) -> None:
        """The trainer's options are final here, and nothing is applied or trained yet."""
        if inner := getattr(super(), "prepare_network", None):
            inner(args)
        with exits_on_user_error():
            self.mlm_run.start(args, self)

    def apply_to(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a trainer that gave no options, in which the term would silently be missing."""
        if self.mlm_run.args is None:
            with exits_on_user_error():
                raise UserError(
                    f"{MODULE}: this trainer does not call prepare_network, so the MLM term cannot "
                    f"be added; set network_module = {self.mlm_run.inner}"
                )
        return super().apply_to(*args, **kwargs)

    def save_weights(self, file: str, dtype: Any, metadata: dict[str, str] | None) -> Any:
        """The inner network's file."""
        return super().save_weights(file, dtype, self.mlm_run.metadata(metadata))


def _with_term(network: nn.Module | None, run: _Run) -> nn.Module | None:
    if network is not None:
        inner = type(network)
        members = {"__module__": inner.__module__, "__doc__": inner.__doc__}
        network.__class__ = type(inner.__name__, (_MLMNetwork, inner), members)
        network.mlm_run = run
    return network
