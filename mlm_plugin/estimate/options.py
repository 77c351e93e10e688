"""Options of `mlm-plugin estimate`: those of a training, and two of its own. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.config.loading import load_config
from mlm_plugin.config.options import TrainConfig

__all__ = ["FAMILIES", "EstimateCommand", "parse_estimate"]

FAMILIES = ("sd_v1", "sd_v2", "sdxl")


class EstimateCommand(NamedTuple):
    """What `mlm-plugin estimate` was asked for."""

    config: TrainConfig  # of the training
    architecture: str | None  # a family whose shipped configurations stand for the model
    savings: bool  # whether to try what would save memory


def parse_estimate(argv: Sequence[str]) -> EstimateCommand:
    """Read the command line of `mlm-plugin estimate`.

    Raises:
        UserError: an unknown option or value, of this command or of the training.
    """
    own, training = _parser().parse_known_args(list(argv))
    return EstimateCommand(load_config(training), own.architecture, not own.no_savings)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mlm-plugin estimate",
        description="Predict the GPU memory of a training, part by part. Loads no weights.",
        epilog="All other options are those of the training: --config_file and what follows it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--architecture",
        choices=FAMILIES,
        help="stands for the model where it is not on this machine yet",
    )
    parser.add_argument(
        "--no_savings",
        action="store_true",
        help="leave out the list of what would save memory (faster)",
    )
    return parser
