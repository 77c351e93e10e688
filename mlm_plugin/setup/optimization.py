"""How long a run is and how it steps: plan, optimizer, schedule, steps in the backward pass."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlm_plugin.config.options import OptimizerOptions, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods import Method
from mlm_plugin.models.key_values import matrices_of
from mlm_plugin.setup.freezing import freeze_steps
from mlm_plugin.training.fused_steps import FusedSteps
from mlm_plugin.training.optimizers import create_optimizer, steps_one_by_one
from mlm_plugin.training.plan import Optimization, TrainPlan
from mlm_plugin.training.schedulers import create_scheduler

__all__ = ["check_optimization", "create_optimization", "create_plan", "stepped_in_backward"]


def create_plan(config: TrainConfig, *, batches_per_epoch: int) -> TrainPlan:
    """The length of the run.

    Raises:
        UserError: the run ends before the MLM term would start.
    """
    schedule = config.schedule
    steps_per_epoch = math.ceil(batches_per_epoch / schedule.gradient_accumulation_steps)
    num_steps = schedule.max_train_steps
    if schedule.max_train_epochs is not None:
        num_steps = schedule.max_train_epochs * steps_per_epoch
    if config.mlm.mlm_loss_weight and config.mlm.mlm_start_step >= num_steps:
        raise UserError(
            f"mlm_start_step = {config.mlm.mlm_start_step}: the run ends after {num_steps} "
            "steps, the MLM term would never act; start it earlier"
        )
    return TrainPlan(
        num_steps=num_steps,
        batches_per_epoch=batches_per_epoch,
        gradient_accumulation_steps=schedule.gradient_accumulation_steps,
    )


def create_optimization(
    config: TrainConfig, method: Method, plan: TrainPlan, accelerator: Accelerator
) -> Optimization:
    """Optimizer and schedule of what the method trains, and when its parts are frozen.

    Raises:
        UserError: options that do not fit each other or the length of the run.
    """
    options = config.optimizer
    groups = method.parameter_groups(options)
    optimizer, scheduler = accelerator.prepare(
        *_optimizer_and_schedule(options, groups, plan, num_processes=accelerator.num_processes)
    )
    return Optimization(
        optimizer,
        scheduler,
        max_grad_norm=options.max_grad_norm,
        fused_steps=_fused_steps(config, method, optimizer),
        freeze_at=freeze_steps(config, method, num_steps=plan.num_steps),
    )


def check_optimization(
    config: TrainConfig, method: Method, plan: TrainPlan, *, num_processes: int
) -> None:
    """What :func:`create_optimization` would refuse, for a method without values.

    Raises:
        UserError: as there.
    """
    groups = [
        {**group, "params": [_stand_in(parameter) for parameter in group["params"]]}
        for group in method.parameter_groups(config.optimizer)
    ]
    optimizer, _ = _optimizer_and_schedule(
        config.optimizer, groups, plan, num_processes=num_processes
    )
    _fused_steps(config, method, optimizer)
    freeze_steps(config, method, num_steps=plan.num_steps)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter with values and as many dimensions, of size 1."""
    return nn.Parameter(torch.zeros((1,) * parameter.dim(), dtype=parameter.dtype))


def _optimizer_and_schedule(
    options: OptimizerOptions, groups: list[dict], plan: TrainPlan, *, num_processes: int
) -> tuple[Optimizer, LRScheduler]:
    optimizer = create_optimizer(
        options.optimizer_type,
        groups,
        learning_rate=options.learning_rate,
        optimizer_args=options.optimizer_args,
    )
    return optimizer, create_scheduler(
        optimizer, options, num_training_steps=plan.num_steps, num_processes=num_processes
    )


def stepped_in_backward(config: TrainConfig, method: Method) -> list[nn.Parameter]:
    """The weights that ``fused_backward_pass`` steps: those that get their gradient in one pass.

    Each loss has a backward pass of its own. The text encoders' gradients are complete after both,
    as are those of the U-Net's keys and values where the MLM term reads them.
    """
    unet = method.parts()["unet"]
    num_text_encoders = len(method.models.text_encoders)
    read_at = method.mlm_read_at(config, num_text_encoders=num_text_encoders)
    if config.mlm.mlm_loss_weight == 0 or read_at == "encoder":
        return unet
    layers = [layer for pair in matrices_of(method.models.unet) for layer in pair]
    read = {weight for layer in layers for weight in layer.parameters()}
    return [weight for weight in unet if weight not in read]


def _fused_steps(config: TrainConfig, method: Method, optimizer) -> FusedSteps | None:
    """Steps of the U-Net inside the backward pass, with ``fused_backward_pass``.

    Raises:
        UserError: an optimizer that cannot step tensors one by one.
    """
    options = config.optimizer
    if not options.fused_backward_pass:
        return None
    if not steps_one_by_one(optimizer):
        raise UserError(
            f"fused_backward_pass cannot be combined with optimizer_type = "
            f"{options.optimizer_type!r}, which is not known to step tensors one by "
            "one; use Adafactor, AdamW or AdamW8bit"
        )
    parameters = stepped_in_backward(config, method)
    return FusedSteps(parameters, optimizer, max_grad_norm=options.max_grad_norm)
