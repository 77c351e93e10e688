"""When parts of the method are frozen during a run: the ``stop_*_training`` options."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlm_plugin.config.options import OptimizerOptions, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods import STOP_OPTIONS
from mlm_plugin.methods.base import Method, Part
from mlm_plugin.methods.facts import is_before

__all__ = ["freeze_steps"]

logger = logging.getLogger(__name__)


class _Stop(NamedTuple):
    """An option that is given; values below 1 are shares of the whole run."""

    option: str
    value: float


def freeze_steps(config: TrainConfig, method: Method, *, num_steps: int) -> dict[str, int]:
    """The optimizer step at which each part that does not train to the end is frozen.

    Raises:
        UserError: nothing would be left to train, or the MLM term could never act.
    """
    trained = [
        part
        for part, members in method.parts().items()
        if any(parameter.requires_grad for parameter in members)
    ]
    stops = {part: _stop_of(part, config.optimizer) for part in method.parts()}
    steps = _steps_of(stops, trained, num_steps)
    ends = {part: steps.get(part, num_steps) for part in trained}
    if (end := max(ends.values(), default=0)) < num_steps:
        raise UserError(
            f"{', '.join(dict.fromkeys(stops[part].option for part in steps))}: nothing is trained "
            f"from step {end} of {num_steps} on; let one part continue, or shorten the run"
        )
    read_at = method.mlm_read_at(config, num_text_encoders=len(method.models.text_encoders))
    last = max((end for part, end in ends.items() if is_before(part, read_at)), default=0)
    if config.mlm.mlm_loss_weight and last <= config.mlm.mlm_start_step:
        raise UserError(
            f"mlm_start_step = {config.mlm.mlm_start_step}: nothing that the MLM term reads is "
            f"trained from step {last} on, so it would never act; start it earlier, or train that "
            "part for longer"
        )
    return steps


def _steps_of(
    stops: Mapping[Part, _Stop | None], trained: Sequence[Part], num_steps: int
) -> dict[Part, int]:
    """Steps of the trained parts; warns about options without effect."""
    steps: dict[Part, int] = {}
    for stop in dict.fromkeys(found for found in stops.values() if found):
        step = stop.value if stop.value >= 1 else round(stop.value * num_steps)
        parts = [part for part in trained if stops[part] == stop]
        if not parts:
            logger.warning("%s = %g has no effect: nothing there is trained", *stop)
        elif step >= num_steps:
            logger.warning("%s = %g has no effect: the run ends at %d", *stop, num_steps)
        else:
            steps |= dict.fromkeys(parts, step)
    return steps


def _stop_of(part: Part, options: OptimizerOptions) -> _Stop | None:
    for option in STOP_OPTIONS[part]:
        value = getattr(options, option)
        if value is not None:
            return _Stop(option, value)
    return None
