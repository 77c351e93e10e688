"""One run of a network trainer: its options, the term, and what watches it.

The launcher's mixin and the network module meet the host's options, data and models at different
places, and do the same with them here, so that both train the same.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, PartialState

from mlm_plugin.networks.network_args import parse_network_args, warn_of_output_norms
from mlm_plugin.sd_scripts.architectures import Architecture
from mlm_plugin.sd_scripts.arguments import PLACE, read_mlm_options, read_watch_options
from mlm_plugin.sd_scripts.data import LearnedData
from mlm_plugin.sd_scripts.network_term import Models, create_term, use_models
from mlm_plugin.sd_scripts.run_watch import RunWatch, WatchedRun, check_watching, watch_run
from mlm_plugin.setup.console import keep_warnings

__all__ = ["NetworkRun"]


class NetworkRun:
    """The options of a run, checked; then come :meth:`use_data` and :meth:`use_models`.

    Args:
        args: options of the host; may hold ours.
        architecture: of the base model.
        given: options of ours that take precedence over them.
        place: where they were given, for errors.
        network_args: of the inner network, where they are not those of the host's options.

    Attributes:
        term: ``None`` at weight 0.

    Raises:
        UserError: an option that cannot be used, or with which the term has no gradient.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        architecture: Architecture,
        *,
        given: Mapping[str, Any] | None = None,
        place: str = PLACE,
        network_args: Mapping[str, str] | None = None,
    ):
        self.args, self.architecture = args, architecture
        if network_args is None:
            network_args = parse_network_args(getattr(args, "network_args", None) or ())
        self._network_args = network_args
        self.options = read_mlm_options(args, given or {}, place=place)
        self.watched = read_watch_options(args, given or {}, place=place)
        if self.watched.page:
            keep_warnings(logging.getLogger())  # of every library
        check_watching(self.watched, args, architecture)
        self.term = create_term(args, self.options, arch=architecture.arch)
        if self.term:
            warn_of_output_norms(network_args)
        self._data: LearnedData | None = None

    @property
    def needs_data(self) -> bool:
        """Whether anything of ours is on."""
        return bool(self.term or self.watched.given)

    def use_data(self, data: LearnedData) -> None:
        """Take concepts and captions.

        Raises:
            UserError: the concept is not known, or in no caption.
        """
        self._data = data
        if self.term:
            self.term.use_datasets(*data)

    def use_models(
        self, models: Models, accelerator: Accelerator | PartialState
    ) -> RunWatch | None:
        """Set the term up, and what follows the run, while the models are untrained.

        Args:
            models: untrained.
            accelerator: its device does the work.

        Returns:
            What follows the run; ``None`` if nothing does.

        Raises:
            UserError: what is asked for cannot be had with these models.
        """
        if self.term:
            use_models(
                self.term,
                self.args,
                models,
                accelerator,
                self.architecture,
                network_args=self._network_args,
            )
        run = WatchedRun(self.args, self.options, models, self.architecture, self._data)
        return watch_run(self.watched, run, accelerator)
