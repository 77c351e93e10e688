"""The denoising loss of pictures that are not trained on, under kohya's tags.

The same pictures, noise and timesteps each time, whatever the number of processes. It leaves the
run as it was: weights, modes and random streams.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from mlm_plugin.config.options import ValidationOptions
from mlm_plugin.data.dataset import BatchKey, TrainDataset
from mlm_plugin.errors import UserError
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.training.callbacks import Callback, StepResult, by_step
from mlm_plugin.training.diffusion_loss import DiffusionLoss, timestep_range
from mlm_plugin.training.forward import batch_diffusion_loss
from mlm_plugin.training.logs import CurveLogger
from mlm_plugin.training.plan import TrainPlan
from mlm_plugin.training.trainer import Trainer

__all__ = [
    "NUM_TIMESTEPS",
    "Validator",
    "at_timestep",
    "check_validation",
    "validation_timesteps",
]

logger = logging.getLogger(__name__)

NUM_TIMESTEPS = 4
"""Timesteps of every picture. Source: sd-scripts ``train_network.py`` ``train``."""

SEEDS = 2**32


def check_validation(options: ValidationOptions, plan: TrainPlan) -> None:
    """Refuse intervals that the run never reaches; for a run that holds pictures out.

    Raises:
        UserError: the run is shorter than the interval.
    """
    steps, epochs = options.validate_every_n_steps, options.validate_every_n_epochs
    if steps and steps > plan.num_steps:
        raise UserError(
            f"validate_every_n_steps = {steps}: the run ends after {plan.num_steps} step(s); lower "
            "it, or leave it out to measure after every epoch"
        )
    if epochs and epochs > plan.num_epochs and not steps:  # with steps it switches epochs off
        raise UserError(
            f"validate_every_n_epochs = {epochs}: the run ends after {plan.num_epochs} epoch(s); "
            "lower it, or leave it out to measure after every epoch"
        )


class Validator(Callback):
    """Measures and logs the loss when it is due.

    Args:
        dataset: the pictures that are held out.
        options: when, and how many batches.
        seed: names the noise.
        curves: where the loss is logged.

    Attributes:
        losses: what was measured, by step.

    Source: sd-scripts ``train_network.py`` ``train``. There the noise of a picture depends on the
    number of processes.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        options: ValidationOptions,
        *,
        seed: int,
        curves: Sequence[CurveLogger] = (),
    ):
        self.dataset, self.options, self.seed, self.curves = dataset, options, seed, curves
        self.num_batches = min(options.max_validation_steps or len(dataset), len(dataset))
        self.losses: dict[int, float] = {}
        self.recent: deque[float] = deque()

    def measured(self) -> dict[str, Any]:
        """The losses."""
        return {"losses": self.losses}

    def recall(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        """Those before a resume."""
        self.losses.update(by_step(measured["losses"]))

    def on_train_start(self, trainer: Trainer) -> None:
        """Training losses are averaged over an epoch, for the divergence."""
        self.recent = deque(maxlen=trainer.plan.steps_per_epoch)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """``validate_every_n_steps``."""
        self.recent.append(result.diffusion)
        every = self.options.validate_every_n_steps
        if every and trainer.progress.current_step % every == 0:
            self._validate(trainer, "step")

    def on_epoch_end(self, trainer: Trainer) -> None:
        """``validate_every_n_epochs``; kohya's default is every epoch."""
        if trainer.progress.current_epoch % (self.options.validate_every_n_epochs or 1) == 0:
            self._validate(trainer, "epoch")

    def on_train_end(self, trainer: Trainer) -> None:
        """The last epoch may be cut short."""
        if trainer.progress.batches_in_epoch:
            self.on_epoch_end(trainer)

    def _validate(self, trainer: Trainer, interval: str) -> None:
        """Measure, unless that was done after this step, and log under the tags of an interval."""
        step = trainer.progress.current_step
        if step not in self.losses:
            self.losses[step] = self.measure(trainer)
            if trainer.accelerator.is_main_process:
                logger.info("step %d: validation loss %.4f", step, self.losses[step])
        loss = self.losses[step]
        values = {f"loss/validation/{interval}_average": loss}
        if self.recent:  # not where only the end of an epoch was left to resume
            training = sum(self.recent) / len(self.recent)
            values[f"loss/validation/{interval}_divergence"] = loss - training
        for curves in self.curves:
            curves.log(trainer, values, by_epoch=interval == "epoch")

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> float:
        """The mean over batches and timesteps; every process gets the same."""
        accelerator = trainer.accelerator
        mine = range(accelerator.process_index, self.num_batches, accelerator.num_processes)
        shown = None if accelerator.is_local_main_process else True  # None: not in a log file
        bar = tqdm(mine, desc="validation", leave=False, disable=shown)
        with trainer.evaluating(), preserved_random_state(accelerator.device):
            losses = [item for index in bar for item in self._losses(trainer, index)]
        everyone = sorted(gather_object(losses))  # so that their sum is always rounded alike
        return sum(loss for _, _, loss in everyone) / len(everyone)

    def _losses(self, trainer: Trainer, index: int) -> Iterator[tuple[int, int, float]]:
        """Of one batch at each timestep: its number, the timestep's and the loss."""
        batch = self.dataset[BatchKey(epoch=0, index=index)]
        for number, timestep in enumerate(validation_timesteps(trainer.diffusion_loss)):
            seed = (self.seed + index * NUM_TIMESTEPS + number) % SEEDS
            torch.manual_seed(seed)
            random.seed(seed)  # of pyramid noise
            loss = batch_diffusion_loss(
                batch,
                models=trainer.models,
                encode=trainer.encode,
                diffusion_loss=at_timestep(trainer.diffusion_loss, timestep),
                device=trainer.accelerator.device,
                autocast=trainer.accelerator.autocast,
            )
            yield index, number, loss.item()


def validation_timesteps(diffusion_loss: DiffusionLoss) -> list[int]:
    """Evenly spread between the limits of the options: 200, 400, 600 and 800 without any."""
    num_timesteps = diffusion_loss.noise_scheduler.config.num_train_timesteps
    low, high = timestep_range(diffusion_loss.options, num_timesteps)
    parts = NUM_TIMESTEPS + 1
    return [low + (high - low) * number // parts for number in range(1, parts)]


def at_timestep(diffusion_loss: DiffusionLoss, timestep: int) -> DiffusionLoss:
    """The same loss, always at one timestep."""
    fixed = copy.copy(diffusion_loss)
    fixed.options = dataclasses.replace(
        diffusion_loss.options, min_timestep=timestep, max_timestep=timestep
    )
    return fixed
