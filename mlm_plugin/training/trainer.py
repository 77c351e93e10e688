"""The one loop: ``loss = diffusion + weight * mlm``. Takes objects, not flags.

The two losses share no activations, so each has its own backward pass, and the graph of one is
freed before the other's forward pass. A step synchronizes its device once, before the optimizer
step (with steps inside the backward pass, before that too): nothing that is not finite reaches the
weights.

Knows no files and no command line: saving, sampling and logging are callbacks. What processes
exchange is in ``processes.py``; losses that are not finite are handled in ``guards.py`` and
``rollback.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlm_plugin.data.dataset import Batch
from mlm_plugin.methods.base import Method
from mlm_plugin.mlm.regularizer import MLMOutput
from mlm_plugin.training.callbacks import Callback, SaveFailed, StepResult
from mlm_plugin.training.eval_mode import evaluation_mode
from mlm_plugin.training.forward import batch_diffusion_loss, term_output
from mlm_plugin.training.guards import NonFiniteLoss, explain_losses, losses_are_finite
from mlm_plugin.training.interrupt import Stopped, StopRequest
from mlm_plugin.training.loss_sum import LossSum
from mlm_plugin.training.optimizers import set_optimizer_mode
from mlm_plugin.training.plan import Objective, Optimization, TrainPlan
from mlm_plugin.training.processes import (
    ProcessLost,
    ProcessStep,
    average_gradients,
    drop_unused_gradients,
    first_given,
    gather_step,
    tells_lost_process,
)
from mlm_plugin.training.rollback import StepBefore
from mlm_plugin.training.state import (
    Progress,
    RunIdentity,
    load_state,
    read_measured,
    save_state,
)

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """Runs the loop.

    Args:
        accelerator: device, precision, processes. Only optimizer and scheduler are prepared: the
            trained tensors are few, so their gradients are averaged by hand, and models keep their
            own forward.
        method: what is trained, in models that are on their device.
        loader: batches of this process in the order of its ``EpochOrder`` sampler.
        objective: the losses.
        optimization: the parts of a step.
        plan: length of the run.
        identity: what a state must have in common with this run.
        callbacks: called in this order.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        method: Method,
        loader: DataLoader,
        objective: Objective,
        optimization: Optimization,
        plan: TrainPlan,
        identity: RunIdentity,
        callbacks: Sequence[Callback] = (),
    ):
        self.accelerator = accelerator
        self.method = method
        self.models = method.models
        self.loader = loader
        self.diffusion_loss = objective.diffusion
        self.encode = objective.encode or method.encode
        self.regularizer, self.mlm_schedule, self.mlm_read_at = objective.mlm or (None, None, "")
        self._term_parts: tuple[str, ...] = ()  # names of what is logged with the term
        self.optimizer = optimization.optimizer
        self.scheduler = optimization.scheduler
        self.max_grad_norm = optimization.max_grad_norm
        self.freeze_at = dict(optimization.freeze_at)
        self.fused_steps = optimization.fused_steps
        self.plan = plan
        self.identity = identity
        self.callbacks = list(callbacks)
        self.progress = Progress(seed=identity.seed, num_processes=identity.num_processes)
        self._exit_code = 0  # of a signal, once the processes have exchanged it
        self.stop_code = 0  # of a signal in the last step, which ended the run anyway
        self._step_before = StepBefore(method.parameters(), self.optimizer, self.scheduler)

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: after SIGINT or SIGTERM and ``on_stop``.
            SaveFailed: a last file or state is not where it should be.
            ProcessLost: another process has ended, and with it what both exchange.
            NonFiniteLoss: after a rollback by one step and ``on_stop``.
            Exception: whatever else went wrong, unchanged; where there are steps to lose,
                ``on_stop`` was called, or ``on_lost`` where other processes may be gone.
        """
        first_step = self.progress.current_step
        self._call("on_train_start")
        bar = tqdm(
            total=self.plan.num_steps,
            initial=first_step,
            desc="steps",
            disable=not self.accelerator.is_local_main_process,
        )
        with StopRequest() as stop, bar:
            try:
                while self.progress.current_step < self.plan.num_steps:
                    self._run_epoch(bar, stop)
            except NonFiniteLoss as error:
                self._go_back(error)
                self._call_all("on_stop")
                raise
            except Stopped:
                self._call_all("on_stop")
                raise
            except Exception as error:
                if self.progress.current_step > first_step:
                    self._rescue()
                if self.accelerator.num_processes > 1 and tells_lost_process(error):
                    raise ProcessLost from error
                raise
            self.stop_code = stop.exit_code if stop else 0
            stop.expect_end()
            bar.close()  # so that what is printed now has its own lines
            self._call_all("on_train_end")
            if stop:
                self.stop_code = stop.exit_code

    def _run_epoch(self, bar: tqdm, stop: StopRequest) -> None:
        self.method.train(True)
        set_optimizer_mode(self.optimizer, training=True)
        for batches in self._steps_of_epoch():
            result = self._train_step(batches, exit_code=stop.exit_code if stop else 0)
            self.progress.current_step += 1
            bar.update()
            bar.set_postfix(result.summary())
            self._call("on_step_end", result)
            if self.progress.current_step >= self.plan.num_steps:
                break
            if stop and self.accelerator.num_processes == 1:  # else all must agree
                self._exit_code = stop.exit_code
            if self._exit_code:
                raise Stopped(self._exit_code)
        if self.progress.batches_in_epoch >= self.plan.batches_per_epoch:
            self._call("on_epoch_end")
            self.progress.current_epoch += 1
            self.progress.batches_in_epoch = 0

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """The batches of each remaining optimizer step of this epoch."""
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

    def _call(self, event: str, *values: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *values)

    def _call_all(self, event: str) -> None:
        """The last event: a callback that fails does not keep the others from ending properly."""
        errors = []
        for callback in self.callbacks:
            try:
                getattr(callback, event)(self)
            except Exception as error:
                errors.append(error)
        for error in errors[1:]:
            logger.error("%s", error)
        if errors:
            raise errors[0]

    # --- a step ---------------------------------------------------------------------------------

    def _train_step(self, batches: list[Batch], *, exit_code: int) -> StepResult:
        self._freeze_due_parts()
        self.accelerator.gradient_accumulation_steps = len(batches)  # an epoch's end has fewer
        weight, first = self._mlm_weight(), self.progress.num_batches
        losses = [self._backward(batch, first + i, weight) for i, batch in enumerate(batches)]
        has_gradient = average_gradients(self.accelerator, self.method.parameters())
        steps = gather_step(  # the only place where a step synchronizes
            self.accelerator,
            torch.stack(losses),
            self._clip_gradients(),
            exit_code=exit_code,
            has_gradient=has_gradient,
        )
        self._require_finite(steps, batches, weight)
        self._exit_code = max(step.exit_code for step in steps)
        drop_unused_gradients(self.method.parameters(), steps)
        if self.fused_steps is None:
            self._step_before.remember(self.progress)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.batches_in_epoch += len(batches)
        self.progress.num_batches += len(batches)
        losses = steps[self.accelerator.process_index].losses
        result = StepResult.mean_of(losses, weight, parts=self._term_parts)
        result.extras = self.method.after_step()
        return result

    def _freeze_due_parts(self) -> None:
        for part, step in list(self.freeze_at.items()):
            if self.progress.current_step >= step:
                self.method.freeze(part)
                del self.freeze_at[part]
                logger.info("step %d: %s is trained no further", step, part)

    def _mlm_weight(self) -> float:
        """Weight of the term in the coming step; 0 where it does not act."""
        if self.regularizer is None or not self.method.trains_before(self.mlm_read_at):
            return 0.0
        return self.mlm_schedule.weight_at(self.progress.current_step)

    def _backward(self, batch: Batch, number: int, weight: float) -> Tensor:
        """Add the gradients of one batch, and of the method's own prior, to the existing ones.

        Returns:
            ``(K,)`` fp32 on the device: the denoising loss and, where the term acts, its loss and
            the numbers that are logged with it.
        """
        diffusion = LossSum(partial(self._diffusion_summand, batch))
        mlm = LossSum(partial(self._mlm_summand, number))
        loss = diffusion + weight * mlm
        values = loss.backward(self.accelerator.backward)
        if (prior := self.method.prior_loss()) is not None:
            self.accelerator.backward(prior)
        return values

    def _diffusion_summand(self, batch: Batch) -> tuple[Tensor]:
        loss = self._diffusion_loss(batch)
        if self.fused_steps is not None:  # the backward pass will change the weights
            step = ProcessStep([[loss.item()]], norm=0.0)
            self._require_finite([step], [batch], weight=0.0)
            self._step_before.remember(self.progress)
        return (loss,)

    def _mlm_summand(self, number: int) -> tuple[Tensor, ...]:
        term = self._term(number)
        self._term_parts = tuple(term.parts)
        return (term.loss, *term.parts.values())

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

    def _clip_gradients(self) -> Tensor:
        """Clip, and return the norm before clipping, 0-d on the device."""
        if self.fused_steps is not None:
            return self.fused_steps.clip_others(self.method.parameters())
        limit = self.max_grad_norm or math.inf  # inf: measures only
        return self.accelerator.clip_grad_norm_(self.method.parameters(), limit)

    # --- when something is wrong ----------------------------------------------------------------

    def _require_finite(
        self, steps: Sequence[ProcessStep], batches: Sequence[Batch], weight: float
    ) -> None:
        """Stop before the optimizer where a loss or a gradient is not finite, on all processes.

        Raises:
            NonFiniteLoss: the same on every process; the gradients are dropped.
        """
        number = self.progress.current_step + 1
        if not losses_are_finite(steps):
            self.optimizer.zero_grad(set_to_none=True)
            failure = explain_losses(
                steps[self.accelerator.process_index].losses,
                batches,
                mlm_weight=weight,
                vae=self.models.vae,
                device=self.accelerator.device,
                step=number,
            )
            raise first_given(failure)
        if self.accelerator.scaler is not None:
            return  # fp16: the scaler skips steps with infinite gradients, and starts with some
        norm = steps[0].norm
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(f"the norm of the gradient is {norm} at step {number}")

    def _go_back(self, error: NonFiniteLoss) -> None:
        """Undo the step whose weights gave a loss that is not finite."""
        progress = self._step_before.restore()
        if progress is not None:
            self.progress = progress
            if not progress.current_step:
                error.saved = "the weights failed after the first step, so no state is saved"
        elif not self.progress.current_step:
            error.saved = "no step was done, so what the run starts from or its data is at fault"
        else:
            error.saved = "the saved state holds the weights that failed"
            logger.warning("no copy of the step before: the weights are those that failed")

    def _rescue(self) -> None:
        """Call every ``on_stop`` or ``on_lost``, whatever fails; the original error is raised."""
        event = "on_stop" if self.accelerator.num_processes == 1 else "on_lost"
        if self.fused_steps is not None:
            logger.warning(
                "fused_backward_pass: the step that failed may have trained a part of the U-Net, "
                "so the state may be ahead by that; an earlier one is exact"
            )
        self.optimizer.zero_grad(set_to_none=True)  # half a step's, and memory if that ran out
        for callback in self.callbacks:
            try:
                getattr(callback, event)(self)
            except SaveFailed as error:
                logger.error("%s", error)
            except Exception:
                logger.exception("saving after an error failed too")

    # --- for callbacks --------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """Write everything needed to resume from here."""
        save_state(
            folder,
            accelerator=self.accelerator,
            method=self.method,
            progress=self.progress,
            settings=self.identity.settings,
            measured={type(one).__name__: one.measured() for one in self.callbacks},
        )

    def load_state(self, folder: Path) -> None:
        """Resume from a state folder; one of another run is refused (``state.py``)."""
        self.progress = load_state(
            folder, accelerator=self.accelerator, method=self.method, identity=self.identity
        )
        self._recall(read_measured(folder))

    def _recall(self, measured: Mapping[str, Any]) -> None:
        """Curves and rankings go on; they are not worth a run."""
        for callback in self.callbacks:
            name = type(callback).__name__
            try:
                if found := measured.get(name):
                    callback.recall(self, found)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s does not know what it had measured (%s)", name, error)

    def evaluating(self) -> AbstractContextManager:
        """Models and optimizer in evaluation mode while the block runs; see ``eval_mode.py``."""
        return evaluation_mode(self.method, self.optimizer)
