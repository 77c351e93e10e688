"""Curves: kohya's tags, so that old dashboards work, with the two losses separate."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from mlm_plugin.errors import shown_error
from mlm_plugin.training.callbacks import Callback, StepResult, mlm_curves
from mlm_plugin.training.drift import DriftWatch
from mlm_plugin.training.trainer import Trainer

__all__ = ["CurveLogger", "TrackerCloser"]

logger = logging.getLogger(__name__)


class CurveLogger(Callback):
    """Sends numbers to the accelerator's trackers after every optimizer step.

    Args:
        drift: measures the text encoders in front of it, if they are measured.
    """

    def __init__(self, drift: DriftWatch | None = None):
        self.recent: deque[float] = deque()
        self.drift = drift
        self._failed: set[str] = set()  # names of trackers that could not write

    def on_train_start(self, trainer: Trainer) -> None:
        """Average losses over an epoch."""
        self.recent = deque(maxlen=trainer.plan.steps_per_epoch)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Losses, learning rates, norms, and the drift where it was measured."""
        self.recent.append(result.loss)
        step = trainer.progress.current_step
        values = {
            "loss/current": result.loss,
            "loss/average": sum(self.recent) / len(self.recent),
            "loss/diffusion": result.diffusion,
            **_learning_rates(trainer),
            **{name: float(value) for name, value in (result.extras or {}).items()},
        }
        if result.mlm is not None:
            values["loss/mlm"] = result.mlm
            values["loss/mlm_weighted"] = result.mlm_weight * result.mlm
            values |= mlm_curves(result.mlm_parts)
        if self.drift is not None:
            values |= self.drift.at(step)
        self.log(trainer, values)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Mean loss of the epoch, over epochs."""
        if not self.recent:  # resumed where only the end of the epoch was left
            return
        values = {"loss/epoch_average": sum(self.recent) / len(self.recent)}
        self.log(trainer, values, by_epoch=True)

    def close(self, trainer: Trainer) -> None:
        """Flush and close the trackers, which take nothing afterwards."""
        # not accelerator.end_training(): it destroys the process group
        for tracker in trainer.accelerator.trackers:
            self._try(tracker.name, tracker.finish)

    def log(self, trainer: Trainer, values: dict, *, by_epoch: bool = False) -> None:
        """Send values to every tracker, by step or, where the tracker allows it, by epoch."""
        progress = trainer.progress
        for tracker in trainer.accelerator.trackers:
            # wandb drops values whose step is in the past, so epochs cannot be its x axis
            is_epoch = by_epoch and tracker.name == "tensorboard"
            step = progress.current_epoch if is_epoch else progress.current_step
            self._try(tracker.name, partial(tracker.log, values, step=step))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Curves are not worth a run: a tracker that fails is left out from then on."""
        if name in self._failed:
            return
        try:
            write()
        except Exception as error:  # each tracker has its own: full disks, lost connections
            self._failed.add(name)
            shown = shown_error(error)
            logger.warning("%s: the curves end here (%s); training continues", name, shown)


class TrackerCloser(Callback):
    """Closes the trackers after the callbacks that log something at the end themselves."""

    def __init__(self, curves: CurveLogger):
        self.curves = curves

    def on_train_end(self, trainer: Trainer) -> None:
        """Close them."""
        self.curves.close(trainer)

    on_stop = on_train_end


def _learning_rates(trainer: Trainer) -> dict[str, float]:
    rates = {}
    for group, rate in zip(
        trainer.optimizer.param_groups, trainer.scheduler.get_last_lr(), strict=True
    ):
        rates[f"lr/{group['name']}"] = float(rate)
        if "d" in group:  # Prodigy and D-Adaptation estimate the actual rate
            rates[f"lr/d*lr/{group['name']}"] = float(group["d"] * group["lr"])
    return rates
