"""The one loop: ``loss = diffusion + weight * mlm``. Takes objects, not flags.

The two losses have no activations in common, so each has a backward pass of its own and what one
keeps for it is gone before the other's forward pass. A step waits for its device once, before the
optimizer (with steps inside the backward pass, before that too): nothing that is not finite reaches
the weights.

Knows no files and no command line: saving, sampling and logging are listeners that the host adds.
Shapes: B images, L tokens, D text width, h and w latent sides.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlm_plugin.data.dataset import Batch
from mlm_plugin.methods.base import Method, Part
from mlm_plugin.mlm.regularizer import MLMOutput, MLMRegularizer, MLMSchedule
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.conditioning import Conditioning, size_ids, unet_inputs
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.fused_steps import FusedSteps
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
    "batch_diffusion_loss",
    "batch_latents",
    "term_output",
]

logger = logging.getLogger(__name__)

BUCKET = 64 * 2**20  # bytes of gradients that processes exchange at once


class NonFiniteLoss(Exception):
    """The loss or its gradient became NaN or infinite; the trainer has gone back one step.

    Weights, optimizer, scheduler and progress are those of before the last optimizer step, because
    the weights that this step made are the ones that failed. Where nothing is kept (the first step
    of a run, or networks above ``rollback.LIMIT``), they are those that failed. With steps inside
    the backward pass, a gradient or an MLM loss that is not finite is seen when the U-Net has taken
    this step already, without its share; that step is then the last one.

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
    extras: dict[str, Tensor | float] | None = None  # tensors on the device, for who reads them


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
        fused_steps: steps the U-Net inside the backward pass; for one batch per step on one
            process, without a gradient scaler.
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
        fused_steps: FusedSteps | None = None,
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
        self.fused_steps = fused_steps
        self.progress = Progress(seed=seed, num_processes=accelerator.num_processes)
        self._exit_code = 0  # of a signal, as far as the processes have told each other
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
            result = self._train_step(batches, exit_code=stop.exit_code if stop else 0)
            self.progress.current_step += 1
            bar.update()
            bar.set_postfix(_postfix(result))
            self._tell("on_step_end", result)
            if self.progress.current_step >= self.plan.num_steps:
                break
            if stop and self.accelerator.num_processes == 1:  # else all must know of it
                self._exit_code = stop.exit_code
            if self._exit_code:
                raise Stopped(self._exit_code)
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

    def _train_step(self, batches: list[Batch], *, exit_code: int) -> StepResult:
        self._freeze_due_parts()
        weight, first = self._mlm_weight(), self.progress.num_batches
        losses = [self._backward(batch, first + i, weight) for i, batch in enumerate(batches)]
        has_gradient = self._average_over_processes()
        norm = self._clip_gradients()
        readings = self._read(torch.stack(losses), norm, on_host=[exit_code, *has_gradient])
        self._require_finite(readings, batches, weight)
        self._heed_others(readings)
        if self.fused_steps is None:
            self._step_before.remember(self.progress)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.batches_in_epoch += len(batches)
        self.progress.num_batches += len(batches)
        result = _result(readings[self.accelerator.process_index].losses, weight)
        result.extras = self.method.after_step()
        return result

    def _freeze_due_parts(self) -> None:
        for part, step in list(self.freeze_at.items()):
            if self.progress.current_step >= step:
                self.method.freeze(part)
                del self.freeze_at[part]
                logger.info("step %d: %s is trained no further", step, part)

    def _clip_gradients(self) -> Tensor:
        """Clip, and give the norm of before, 0-d on the device."""
        if self.fused_steps is not None:
            return self.fused_steps.clip_others(self.method.parameters())
        limit = self.plan.max_grad_norm or math.inf  # inf: measures only
        return self.accelerator.clip_grad_norm_(self.method.parameters(), limit)

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

    def _mlm_weight(self) -> float:
        """Weight of the term in the coming step; 0 where it does not act."""
        if self.regularizer is None or not self.method.trains_text_side:
            return 0.0
        return self.mlm_schedule.weight_at(self.progress.current_step)

    def _backward(self, batch: Batch, number: int, weight: float) -> Tensor:
        """Both losses of one batch, each through its forward and backward pass in turn.

        Gradients add up until the optimizer steps.

        Returns:
            ``(K,)`` fp32 on the device: the denoising loss, and where the term acts its loss, its
            accuracy and its loss for each text encoder.
        """
        diffusion = self._diffusion_loss(batch)
        if self.fused_steps is not None:
            self._prepare_fused_steps(diffusion, batch)
        self.accelerator.backward(diffusion)
        losses = [diffusion.detach()]
        del diffusion  # and its graph with it
        if weight:
            term = self._term(number)
            self.accelerator.backward(weight * term.loss)
            losses += [term.loss.detach(), term.accuracy, *term.losses]
        return torch.stack([loss.detach().float() for loss in losses])

    def _prepare_fused_steps(self, diffusion: Tensor, batch: Batch) -> None:
        """Look at the loss and copy the weights, as the backward pass will change them."""
        reading = _Reading([[diffusion.item()]], norm=0.0, exit_code=0, has_gradient=[])
        self._require_finite([reading], [batch], weight=0.0)
        self._step_before.remember(self.progress)

    def _diffusion_loss(self, batch: Batch) -> Tensor:
        return batch_diffusion_loss(
            batch,
            models=self.models,
            encode=self.encode,
            diffusion_loss=self.diffusion_loss,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )

    def _term(self, number: int) -> MLMOutput:
        return term_output(
            partial(self.regularizer, number),
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )

    def _average_over_processes(self) -> list[bool]:
        """Give all processes the mean gradients; says which tensors had one on this process.

        A tensor without is counted as 0; see :meth:`_heed_others` for those that none has.
        """
        if self.accelerator.num_processes == 1:
            return []
        parameters = self.method.parameters()
        has_gradient = [parameter.grad is not None for parameter in parameters]
        for parameter in parameters:
            if parameter.grad is None:  # every process must take part in the exchange
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(parameters):
            flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
            flat = self.accelerator.reduce(flat, reduction="mean")
            sizes = [parameter.numel() for parameter in bucket]
            for parameter, mean in zip(bucket, flat.split(sizes), strict=True):
                parameter.grad = mean.view_as(parameter)
        return has_gradient

    def _read(self, losses_NK: Tensor, norm: Tensor, *, on_host: Sequence[float]) -> list[_Reading]:
        """Numbers of all processes, by rank. Here, and only here, a step waits for its device.

        Args:
            losses_NK: of the step's batches.
            norm: of the gradients, 0-d.
            on_host: exit code of a signal, and for each tensor whether it has a gradient.
        """
        numbers = torch.cat([losses_NK.flatten(), norm.to(losses_NK).reshape(1)])
        if self.accelerator.num_processes == 1:
            rows = [[*numbers.tolist(), *on_host]]
        else:
            more = torch.tensor(on_host, dtype=numbers.dtype)
            numbers = torch.cat([numbers, more.to(numbers.device, non_blocking=True)])
            rows = self.accelerator.gather(numbers[None]).tolist()
        return [_Reading.of(row, *losses_NK.shape) for row in rows]

    def _require_finite(
        self, readings: Sequence[_Reading], batches: Sequence[Batch], weight: float
    ) -> None:
        """Stop before the optimizer where a loss or a gradient is not finite, on all processes.

        Raises:
            NonFiniteLoss: the same on every process; the gradients are dropped.
        """
        if not all(map(math.isfinite, itertools.chain(*(r.all_losses() for r in readings)))):
            self.optimizer.zero_grad(set_to_none=True)
            mine = readings[self.accelerator.process_index]
            failures = (
                self._failure(batch, _result([losses], weight))
                for batch, losses in zip(batches, mine.losses, strict=True)
                if not all(map(math.isfinite, losses))
            )
            raise next(filter(None, gather_object([next(failures, None)])))
        if self.accelerator.scaler is not None:
            return  # fp16: the scaler skips steps with infinite gradients, and starts with some
        norm = readings[0].norm  # averaged before, so the same on every process
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(
                f"the norm of the gradient is {norm} at step {self.progress.current_step + 1}"
            )

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

    def _heed_others(self, readings: Sequence[_Reading]) -> None:
        """Take over what only all processes together know: signals, and what nobody used."""
        self._exit_code = max(reading.exit_code for reading in readings)
        used = map(any, zip(*(reading.has_gradient for reading in readings), strict=True))
        # a gradient of 0 would let a layer that nobody used decay
        for parameter, is_used in zip(self.method.parameters(), used, strict=False):
            if not is_used:
                parameter.grad = None

    def _tell(self, event: str, *values: object) -> None:
        for listener in self.listeners:
            getattr(listener, event)(self, *values)


def batch_diffusion_loss(
    batch: Batch,
    *,
    models: StableDiffusion,
    encode: Callable[[Sequence[str]], Conditioning],
    diffusion_loss: DiffusionLoss,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """Forward pass of one batch: the denoising loss, 0-d.

    Args:
        batch: pictures or latents with their captions.
        models: what is trained.
        encode: captions to conditioning.
        diffusion_loss: calls the U-Net.
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

        return diffusion_loss(
            predict,
            latents,
            loss_weights_B=batch.loss_weights,
            loss_masks=batch.loss_masks,
            valid_masks=batch.valid_masks,
        )


def term_output(
    mlm: Callable[[], MLMOutput],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> MLMOutput:
    """Forward pass of the term; the random streams of the rest stay as they are.

    Dropout of the adapters draws here too, and the diffusion noise must not depend on it.

    Args:
        mlm: computes the term.
        device: of the models.
        autocast: enters mixed precision.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), autocast():
        return mlm()


@torch.no_grad()
def batch_latents(batch: Batch, vae: nn.Module, *, device: torch.device) -> Tensor:
    """Scaled latents ``(B, 4, h, w)``, from the cache or from pixels."""
    if batch.latents is not None:
        latents = batch.latents.to(device, non_blocking=True)
    else:
        pixels = batch.pixel_values.to(device, vae.dtype, non_blocking=True)
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


class _Reading(NamedTuple):
    """What a process knows of a step, as numbers: N batches, K losses of each."""

    losses: list[list[float]]
    norm: float
    exit_code: int
    has_gradient: list[bool]

    @classmethod
    def of(cls, row: Sequence[float], num_batches: int, num_losses: int) -> _Reading:
        """From the numbers in the order in which :meth:`Trainer._read` has them."""
        end = num_batches * num_losses
        losses = [list(row[i : i + num_losses]) for i in range(0, end, num_losses)]
        norm, exit_code, *has_gradient = row[end:]
        return cls(losses, norm, int(exit_code), list(map(bool, has_gradient)))

    def all_losses(self) -> Iterator[float]:
        """Of all batches, one after the other."""
        return itertools.chain(*self.losses)


def _result(losses: Sequence[Sequence[float]], weight: float) -> StepResult:
    """The mean over batches, each in the order of :meth:`Trainer._backward`."""
    diffusion, *of_term = (sum(column) / len(column) for column in zip(*losses, strict=True))
    if not weight:
        return StepResult(loss=diffusion, diffusion=diffusion)
    mlm, accuracy, *by_encoder = of_term
    return StepResult(
        loss=diffusion + weight * mlm,
        diffusion=diffusion,
        mlm=mlm,
        mlm_weight=weight,
        mlm_accuracy=accuracy,
        mlm_losses=tuple(by_encoder) if len(by_encoder) > 1 else (),
    )


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one precision, together about ``BUCKET`` in size: one message instead of many.

    One that is larger has a bucket of its own.
    """
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in sorted(parameters, key=lambda parameter: str(parameter.dtype)):
        size += parameter.nbytes
        if bucket and (size > BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, size = [], parameter.nbytes
        bucket.append(parameter)
    if bucket:
        yield bucket


def _postfix(result: StepResult) -> dict[str, str]:
    shown = {"loss": f"{result.loss:.4f}", "diffusion": f"{result.diffusion:.4f}"}
    if result.mlm is not None:
        shown |= {"mlm": f"{result.mlm:.3f}", "mlm_acc": f"{result.mlm_accuracy:.0%}"}
    return shown
