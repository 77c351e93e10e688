"""Learning-rate schedules by kohya's names, built by transformers, diffusers or torch.

Knows the course of a factor over the steps; the rates themselves stand in the optimizer's groups.
Names and rules are those of sd-scripts ``library/train_util.py`` ``get_scheduler_fix`` (commit
48d368fa).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.optimization import (
    Adafactor,
    AdafactorSchedule,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from mlm_plugin.config.options import OptimizerOptions
from mlm_plugin.errors import UserError
from mlm_plugin.training.optimizers import (
    import_class,
    is_schedule_free,
    parse_arguments,
    uses_relative_step,
)

__all__ = ["SCHEDULERS", "create_scheduler", "num_steps", "scheduler_name"]

logger = logging.getLogger(__name__)


class Lengths(NamedTuple):
    """Steps of the parts of a schedule."""

    total: int
    warmup: int
    decay: int


def create_scheduler(
    optimizer: Optimizer,
    options: OptimizerOptions,
    *,
    num_training_steps: int,
    num_processes: int = 1,
) -> LRScheduler:
    """Build the schedule of a run.

    Args:
        optimizer: Built by ``create_optimizer``; decides first: schedule-free ones get a constant
            factor, relative-step Adafactor its own schedule.
        options: The ``optimizer`` group of the configuration.
        num_training_steps: Optimizer steps of the run.
        num_processes: Accelerate steps a schedule once per process, so lengths grow by this.

    Raises:
        UserError: An unknown name, a warm-up the schedule does not have, or refused settings.
    """
    if is_schedule_free(optimizer):
        _warn_schedule_free(options)
        return LambdaLR(optimizer, lambda _: 1.0)
    total = num_training_steps * num_processes
    lengths = Lengths(
        total, num_steps(options.lr_warmup_steps, total), num_steps(options.lr_decay_steps, total)
    )
    settings = parse_arguments("lr_scheduler_args", options.lr_scheduler_args)
    name = scheduler_name(optimizer, options)
    if uses_relative_step(optimizer):
        _warn_relative_step(options)
        build = _adafactor
    elif options.lr_scheduler_type:
        build = _custom
    elif name.startswith("adafactor:"):
        build = _adafactor
    elif name in SCHEDULERS:
        build = SCHEDULERS[name]
    else:
        raise UserError(
            f"lr_scheduler={name}: not known; expected one of {', '.join(SCHEDULERS)}, or a class "
            "in lr_scheduler_type"
        )
    if build in WITHOUT_WARMUP and lengths.warmup:
        raise UserError(
            f"lr_scheduler={options.lr_scheduler_type or name} has no warm-up, but "
            f"lr_warmup_steps={options.lr_warmup_steps}: set it to 0 or use constant_with_warmup"
        )
    try:
        return build(optimizer, options, lengths, **settings)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"lr_scheduler={options.lr_scheduler_type or name} refuses its settings "
            f"{settings or '(none in lr_scheduler_args)'}: {error}"
        ) from error


def scheduler_name(optimizer: Optimizer, options: OptimizerOptions) -> str:
    """The schedule's name as kohya's metadata gives it: relative-step Adafactor brings its own."""
    if uses_relative_step(optimizer):
        return f"adafactor:{options.learning_rate}"
    return options.lr_scheduler


def num_steps(length: int | float, total: int) -> int:
    """Steps from a number of steps, or from a ratio below 1 of the total."""
    return int(length * total) if length < 1 else int(length)


def _constant(optimizer, options, lengths, **settings):
    return get_constant_schedule(optimizer, **settings)


def _constant_with_warmup(optimizer, options, lengths, **settings):
    return get_constant_schedule_with_warmup(optimizer, lengths.warmup, **settings)


def _linear(optimizer, options, lengths, **settings):
    return get_linear_schedule_with_warmup(optimizer, lengths.warmup, lengths.total, **settings)


def _cosine(optimizer, options, lengths, **settings):
    return get_cosine_schedule_with_warmup(optimizer, lengths.warmup, lengths.total, **settings)


def _cosine_with_restarts(optimizer, options, lengths, **settings):
    return get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer,
        lengths.warmup,
        lengths.total,
        num_cycles=options.lr_scheduler_num_cycles,
        **settings,
    )


def _polynomial(optimizer, options, lengths, **settings):
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, lengths.warmup, lengths.total, power=options.lr_scheduler_power, **settings
    )


def _inverse_sqrt(optimizer, options, lengths, **settings):
    return get_inverse_sqrt_schedule(
        optimizer, lengths.warmup, timescale=options.lr_scheduler_timescale, **settings
    )


def _cosine_with_min_lr(optimizer, options, lengths, **settings):
    ratio = options.lr_scheduler_min_lr_ratio
    if ratio is not None:
        settings = {"min_lr_rate": ratio, **settings}
    if not settings.keys() & {"min_lr", "min_lr_rate"}:
        raise UserError(
            "lr_scheduler=cosine_with_min_lr needs lr_scheduler_min_lr_ratio, e.g. 0.1 to end at a "
            "tenth of the learning rate"
        )
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        lengths.warmup,
        lengths.total,
        num_cycles=options.lr_scheduler_num_cycles / 2,
        **settings,
    )


def _warmup_stable_decay(optimizer, options, lengths, **settings):
    stable = lengths.total - lengths.warmup - lengths.decay
    if stable < 0:
        raise UserError(
            f"lr_warmup_steps and lr_decay_steps are {lengths.warmup} + {lengths.decay} steps, "
            f"more than the {lengths.total} of the run: make them shorter"
        )
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=lengths.warmup,
        num_stable_steps=stable,
        num_decay_steps=lengths.decay,
        num_cycles=options.lr_scheduler_num_cycles / 2,
        min_lr_ratio=options.lr_scheduler_min_lr_ratio or 0.0,
        **settings,
    )


def _piecewise_constant(optimizer, options, lengths, **settings):
    if "step_rules" not in settings:
        raise UserError(
            "lr_scheduler=piecewise_constant needs lr_scheduler_args step_rules='1:10,0.1:20,0.01' "
            "(factor:until which step, ..., last factor)"
        )
    return get_piecewise_constant_schedule(optimizer, **settings)


def _adafactor(optimizer, options, lengths, **settings):
    if not isinstance(optimizer, Adafactor):
        raise UserError("lr_scheduler=adafactor belongs to optimizer_type=Adafactor")
    _, _, initial_lr = options.lr_scheduler.partition(":")
    if uses_relative_step(optimizer) or not initial_lr:
        initial_lr = options.learning_rate
    return AdafactorSchedule(optimizer, float(initial_lr))


def _custom(optimizer, options, lengths, **settings):
    scheduler_class = import_class(
        options.lr_scheduler_type,
        option_name="lr_scheduler_type",
        default_module="torch.optim.lr_scheduler",
    )
    return scheduler_class(optimizer, **settings)


def _warn_schedule_free(options: OptimizerOptions) -> None:
    chosen = options.lr_scheduler_type or options.lr_scheduler
    if chosen != "constant" or options.lr_warmup_steps:
        logger.warning(
            "a schedule-free optimizer has no schedule: lr_scheduler=%s and lr_warmup_steps=%s "
            "have no effect (it takes optimizer_args warmup_steps=n)",
            chosen,
            options.lr_warmup_steps,
        )


def _warn_relative_step(options: OptimizerOptions) -> None:
    chosen = options.lr_scheduler_type or options.lr_scheduler
    if chosen != "constant" and not chosen.startswith("adafactor"):
        logger.warning(
            "Adafactor with relative_step brings its own schedule: lr_scheduler=%s has no effect "
            "(it takes optimizer_args relative_step=False)",
            chosen,
        )


SCHEDULERS: dict[str, Callable[..., LRScheduler]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
    "adafactor": _adafactor,
}
WITHOUT_WARMUP = (_constant, _piecewise_constant, _adafactor, _custom)
