"""The one loop: ``loss = diffusion + weight * mlm``. Takes objects, not flags.

Knows no files and no command line: saving, sampling and logging are listeners that the host adds.
Shapes: B images, L tokens, D text width, h and w latent sides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlm_plugin.data.dataset import Batch
from mlm_plugin.methods.base import Method, Part
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.conditioning import Conditioning, size_ids, unet_inputs
from mlm_plugin.regularizer import MLMOutput, MLMRegularizer, MLMSchedule
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.interrupt import StopRequest
from mlm_plugin.training.optimizers import set_optimizer_mode
from mlm_plugin.training.rollback import StepBefore
from mlm_plugin.training.state import Progress, load_state, save_state

__all__ = [
    "Listener",
    "NonFiniteLatents",
    "NonFiniteLoss",
    "StepResult",
    "Stopped",
    "TrainPlan",
    "Trainer",
    "batch_latents",
    "batch_losses",
]

logger = logging.getLogger(__name__)


class NonFiniteLoss(Exception):
    """The loss or its gradient became NaN or infinite; the trainer has gone back one step.

    Weights, optimizer, scheduler and progress are those of before the last optimizer step, because
    the weights that this step made are the ones that failed. Where nothing is kept (the first step
    of a run, or networks above ``rollback.LIMIT``), they are those that failed.

    Attributes:
        advice: what to start again with.
    """

    advice = "a lower learning rate, or try no_half_vae or mixed_precision bf16"


class NonFiniteLatents(NonFiniteLoss):
    """The VAE overflowed in half precision; no other weights or rates help."""

    advice = "no_half_vae, or with a VAE that was made for half precision (--vae)"


class Stopped(Exception):
    """A signal ended the run at a step boundary."""

    def __init__(self, exit_code: int):
        super().__init__("stopped by a signal")
        self.exit_code = exit_code


@dataclass(frozen=True)
class TrainPlan:
    """Length and rhythm of a run.

    Attributes:
        num_steps: optimizer steps.
        batches_per_epoch: batches of one epoch on this process.
        gradient_accumulation_steps: batches per optimizer step; an epoch's last may have fewer.
        max_grad_norm: norm to which gradients are clipped; 0 = not at all.
    """

    num_steps: int
    batches_per_epoch: int
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps)

    @property
    def num_epochs(self) -> int:
        """Epochs, the last one perhaps cut short."""
        return math.ceil(self.num_steps / self.steps_per_epoch)


@dataclass
class StepResult:
    """What one optimizer step was: means over its batches, ready to log."""

    loss: float  # diffusion + weight * mlm
    diffusion: float
    mlm: float | None = None  # before the weight; None where the term did not act
    mlm_weight: float = 0.0
    mlm_accuracy: float | None = None
    mlm_losses: tuple[float, ...] = ()  # of each text encoder, where there are several
    extras: dict[str, float] | None = None


class Listener:
    """Told of what happens; overrides what it needs. All methods run on every process."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step (also when resumed)."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """After an optimizer step; ``trainer.progress`` counts it already."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch's last step."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def on_stop(self, trainer: Trainer) -> None:
        """A signal, a non-finite loss or another error ends the run early."""


class Trainer:
    """Runs the loop.

    Args:
        accelerator: device, precision, processes. Only optimizer and scheduler are prepared: the
            trained tensors are few, so their gradients are averaged by hand, and models keep their
            own forward.
        models: the base model on its device.
        method: what is trained.
        loader: batches of this process in the order of its ``EpochOrder`` sampler.
        optimizer: prepared.
        scheduler: prepared.
        diffusion_loss: the denoising loss; it calls the U-Net through ``predict``.
        plan: length and rhythm.
        seed: seed of the run, kept in states.
        regularizer: the MLM term, or ``None``.
        mlm_schedule: its weight by step.
        listeners: told of steps and epochs, in this order.
        settings: options on which a state depends, by name; states keep them, and one with other
            settings is refused.
        freeze_at: the optimizer step, from 0, from which a part of the method is trained no more.
        encode: captions to conditioning, where they were encoded beforehand; else the method's.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        models: StableDiffusion,
        method: Method,
        loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler,
        diffusion_loss: DiffusionLoss,
        plan: TrainPlan,
        seed: int,
        regularizer: MLMRegularizer | None = None,
        mlm_schedule: MLMSchedule | None = None,
        listeners: Sequence[Listener] = (),
        settings: Mapping[str, str] | None = None,
        freeze_at: Mapping[Part, int] | None = None,
        encode: Callable[[Sequence[str]], Conditioning] | None = None,
    ):
        assert (regularizer is None) == (mlm_schedule is None), "a regularizer needs its schedule"
        self.accelerator = accelerator
        self.models = models
        self.method = method
        self.encode = encode or method.encode
        self.loader = loader
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.diffusion_loss = diffusion_loss
        self.plan = plan
        self.regularizer = regularizer
        self.mlm_schedule = mlm_schedule
        self.listeners = list(listeners)
        self.settings = dict(settings or {})
        self.freeze_at = dict(freeze_at or {})
        self.progress = Progress(seed=seed, num_processes=accelerator.num_processes)
        self._step_before = StepBefore(method.parameters(), optimizer, scheduler)

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: after SIGINT or SIGTERM; listeners have been told.
            NonFiniteLoss: the state of the step before is in place; listeners have been told.
            Exception: whatever else went wrong, unchanged; listeners have been told if this is the
                only process (others would wait for it) and has steps to lose.
        """
        first_step = self.progress.current_step
        self._tell("on_train_start")
        bar = tqdm(
            total=self.plan.num_steps,
            initial=self.progress.current_step,
            desc="steps",
            disable=not self.accelerator.is_local_main_process,
        )
        with StopRequest() as stop, bar:
            try:
                while self.progress.current_step < self.plan.num_steps:
                    self._run_epoch(bar, stop)
            except NonFiniteLoss:
                self._go_back()
                self._tell("on_stop")
                raise
            except Stopped:
                self._tell("on_stop")
                raise
            except Exception:
                if self.accelerator.num_processes == 1 and self.progress.current_step > first_step:
                    self._rescue()
                raise
        self._tell("on_train_end")

    def save_state(self, folder: Path) -> None:
        """Write everything needed to go on from here."""
        save_state(
            folder,
            accelerator=self.accelerator,
            method=self.method,
            progress=self.progress,
            settings=self.settings,
        )

    def load_state(self, folder: Path) -> None:
        """Go on from a state folder."""
        self.progress = load_state(
            folder,
            accelerator=self.accelerator,
            method=self.method,
            seed=self.progress.seed,
            settings=self.settings,
        )

    def evaluating(self) -> AbstractContextManager:
        """Models and optimizer in evaluation mode while the block runs (schedule-free weights).

        The training goes on with exactly the weights it had, so one process may enter alone.
        """
        return _Evaluating(self)

    def _run_epoch(self, bar: tqdm, stop: StopRequest) -> None:
        self.method.train(True)
        set_optimizer_mode(self.optimizer, training=True)
        for batches in self._steps_of_epoch():
            result = self._train_step(batches)
            self.progress.current_step += 1
            bar.update()
            bar.set_postfix(_postfix(result))
            self._tell("on_step_end", result)
            if self.progress.current_step >= self.plan.num_steps:
                break
            if exit_code := self._highest(stop.exit_code if stop else 0):
                raise Stopped(exit_code)
        if self.progress.batches_in_epoch >= self.plan.batches_per_epoch:
            self._tell("on_epoch_end")
            self.progress.current_epoch += 1
            self.progress.batches_in_epoch = 0

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """The batches of each optimizer step that this epoch still holds."""
        progress, step = self.progress, []
        left = self.plan.batches_per_epoch - progress.batches_in_epoch
        self.loader.sampler.start_epoch(
            progress.current_epoch - 1, skip=progress.batches_in_epoch, step=progress.current_step
        )
        for batch in self.loader:
            step.append(batch)
            left -= 1
            if len(step) == self.plan.gradient_accumulation_steps or not left:
                yield step
                step = []

    def _train_step(self, batches: list[Batch]) -> StepResult:
        self._freeze_due_parts()
        first = self.progress.num_batches
        results = [self._backward(batch, first + i) for i, batch in enumerate(batches)]
        self._average_over_processes()
        self._clip_gradients()
        self._step_before.remember(self.progress)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.batches_in_epoch += len(batches)
        self.progress.num_batches += len(batches)
        result = _mean(results)
        result.extras = self.method.after_step()
        return result

    def _freeze_due_parts(self) -> None:
        for part, step in list(self.freeze_at.items()):
            if self.progress.current_step >= step:
                self.method.freeze(part)
                del self.freeze_at[part]
                logger.info("step %d: %s is trained no further", step, part)

    def _clip_gradients(self) -> None:
        limit = self.plan.max_grad_norm or math.inf  # inf: measures only
        norm = self.accelerator.clip_grad_norm_(self.method.parameters(), limit)
        if self.accelerator.scaler is not None:
            return  # fp16: the scaler skips steps with infinite gradients, and starts with some
        if not math.isfinite(norm):  # averaged before, so the same on every process
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(
                f"the norm of the gradient is {float(norm)} at step "
                f"{self.progress.current_step + 1}"
            )

    def _rescue(self) -> None:
        """Tell every listener of the end, whatever fails; the error that led here counts."""
        self.optimizer.zero_grad(set_to_none=True)  # half a step's, and memory if that ran out
        for listener in self.listeners:
            try:
                listener.on_stop(self)
            except Exception:
                logger.exception("saving after an error failed too")

    def _go_back(self) -> None:
        """Take back the step that made the weights whose loss is not finite."""
        progress = self._step_before.restore()
        if progress is not None:
            self.progress = progress
        elif self.progress.current_step:
            logger.warning("no copy of the step before: the weights are those that failed")

    def _backward(self, batch: Batch, number: int) -> StepResult:
        """Forward and backward of one batch; gradients add up until the optimizer steps."""
        diffusion, mlm, weight = self._losses(batch, number)
        loss = diffusion if mlm is None else diffusion + weight * mlm.loss
        result = StepResult(loss=loss.item(), diffusion=diffusion.item(), mlm_weight=weight)
        if mlm is not None:
            result.mlm, result.mlm_accuracy = mlm.loss.item(), mlm.accuracy.item()
            if len(mlm.losses) > 1:
                result.mlm_losses = tuple(loss.item() for loss in mlm.losses)
        failed = not math.isfinite(result.loss)
        if self._highest(int(failed)):
            self.optimizer.zero_grad(set_to_none=True)
            errors = gather_object([self._failure(batch, result) if failed else None])
            raise next(filter(None, errors))  # the same on every process
        self.accelerator.backward(loss)
        return result

    def _failure(self, batch: Batch, result: StepResult) -> NonFiniteLoss:
        """Tell a VAE that overflows (SDXL's own does in fp16) from weights that went astray."""
        latents = batch_latents(batch, self.models.vae, device=self.accelerator.device)
        if not latents.isfinite().all():
            return NonFiniteLatents(
                f"the VAE gives latents that are not finite in {self.models.vae.dtype} for "
                f"{', '.join(batch.image_paths)}"
            )
        return NonFiniteLoss(
            f"the loss is {result.loss} at step {self.progress.current_step + 1} "
            f"(diffusion {result.diffusion}, mlm {result.mlm})"
        )

    def _losses(self, batch: Batch, number: int) -> tuple[Tensor, MLMOutput | None, float]:
        weight = 0.0
        if self.regularizer and self.method.trains_text_side:
            weight = self.mlm_schedule.weight_at(self.progress.current_step)
        diffusion, mlm = batch_losses(
            batch,
            models=self.models,
            encode=self.encode,
            diffusion_loss=self.diffusion_loss,
            mlm=partial(self.regularizer, number) if weight else None,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )
        return diffusion, mlm, weight

    def _average_over_processes(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        parameters = self.method.parameters()
        has_grad = torch.tensor([float(p.grad is not None) for p in parameters])
        has_grad = self.accelerator.reduce(has_grad.to(self.accelerator.device), reduction="sum")
        for parameter, num_processes in zip(parameters, has_grad.tolist(), strict=True):
            if not num_processes:  # a layer that nobody used; a gradient of 0 would let it decay
                continue
            if parameter.grad is None:  # every process must take part in the exchange
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _highest(self, number: int) -> int:
        """The highest of the processes' numbers: they must not part ways."""
        if self.accelerator.num_processes == 1:
            return number
        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return int(numbers.max())

    def _tell(self, event: str, *values: object) -> None:
        for listener in self.listeners:
            getattr(listener, event)(self, *values)


def batch_losses(
    batch: Batch,
    *,
    models: StableDiffusion,
    encode: Callable[[Sequence[str]], Conditioning],
    diffusion_loss: DiffusionLoss,
    mlm: Callable[[], MLMOutput] | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Tensor, MLMOutput | None]:
    """Forward pass of one batch: the denoising loss and the term, if it acts.

    Args:
        batch: pictures or latents with their captions.
        models: what is trained.
        encode: captions to conditioning.
        diffusion_loss: calls the U-Net.
        mlm: computes the term; ``None`` where it does not act.
        device: of the models.
        autocast: enters mixed precision.
    """
    latents = batch_latents(batch, models.vae, device=device)
    with autocast():
        conditioning = encode(batch.captions)
        sizes_B6 = size_ids(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)

        def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            dtype = models.unet.dtype
            inputs = unet_inputs(conditioning, sizes_B6, dtype=dtype)
            return models.unet(noisy_latents.to(dtype), timesteps, **inputs).sample

        diffusion = diffusion_loss(
            predict,
            latents,
            loss_weights_B=batch.loss_weights,
            loss_masks=None if batch.loss_masks is None else batch.loss_masks.to(device),
            valid_masks=None if batch.valid_masks is None else batch.valid_masks.to(device),
        )
    if mlm is None:
        return diffusion, None
    # dropout of the adapters draws here too: the diffusion noise must not depend on it
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), autocast():
        return diffusion, mlm()


@torch.no_grad()
def batch_latents(batch: Batch, vae: nn.Module, *, device: torch.device) -> Tensor:
    """Scaled latents ``(B, 4, h, w)``, from the cache or from pixels."""
    if batch.latents is not None:
        latents = batch.latents.to(device)
    else:
        pixels = batch.pixel_values.to(device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.sample().float()
    return latents * vae.config.scaling_factor


class _Evaluating:
    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.trained: list[Tensor] = []

    def __enter__(self) -> None:
        self.trainer.method.train(False)
        if _has_modes(self.trainer.optimizer):  # the way there and back rounds the weights
            self.trained = [p.detach().clone() for p in self._parameters()]
        set_optimizer_mode(self.trainer.optimizer, training=False)

    @torch.no_grad()
    def __exit__(self, *_exception: object) -> None:
        self.trainer.method.train(True)
        set_optimizer_mode(self.trainer.optimizer, training=True)
        if self.trained:
            torch._foreach_copy_(self._parameters(), self.trained)

    def _parameters(self) -> list[Tensor]:
        """What the optimizer changes, parts that are frozen by now included."""
        return [p for group in self.trainer.optimizer.param_groups for p in group["params"]]


def _has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether evaluation changes the weights; accelerate's wrapper has the methods in any case."""
    return callable(getattr(getattr(optimizer, "optimizer", optimizer), "eval", None))


def _mean(results: list[StepResult]) -> StepResult:
    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present else None

    return StepResult(
        loss=mean([r.loss for r in results]),
        diffusion=mean([r.diffusion for r in results]),
        mlm=mean([r.mlm for r in results]),
        mlm_weight=results[0].mlm_weight,
        mlm_accuracy=mean([r.mlm_accuracy for r in results]),
        mlm_losses=tuple(
            mean(column) for column in zip(*(r.mlm_losses for r in results), strict=True)
        ),
    )


def _postfix(result: StepResult) -> dict[str, str]:
    shown = {"loss": f"{result.loss:.4f}", "diffusion": f"{result.diffusion:.4f}"}
    if result.mlm is not None:
        shown |= {"mlm": f"{result.mlm:.3f}", "mlm_acc": f"{result.mlm_accuracy:.0%}"}
    return shown
