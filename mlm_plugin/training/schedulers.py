"""Learning-rate schedules by kohya's names, built by transformers, diffusers or torch.

Knows how a factor changes over the steps; the rates themselves are in the optimizer's groups.
Names and rules are those of sd-scripts ``library/train_util.py`` ``get_scheduler_fix`` (commit
48d368fa).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.optimization import (
    TYPE_TO_SCHEDULER_FUNCTION,
    Adafactor,
    AdafactorSchedule,
    SchedulerType,
)

from mlm_plugin.config.options import OptimizerOptions
from mlm_plugin.errors import UserError
from mlm_plugin.training.optimizers import (
    import_class,
    is_schedule_free,
    parse_arguments,
    uses_relative_step,
)

__all__ = ["SCHEDULERS", "create_scheduler", "num_steps", "rate_jumps", "scheduler_name"]

logger = logging.getLogger(__name__)

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
)
WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor", "custom")


class Lengths(NamedTuple):
    """Steps of the parts of a schedule."""

    total: int
    warmup: int
    decay: int

    @property
    def stable(self) -> int:
        """Steps between warm-up and decay."""
        return self.total - self.warmup - self.decay


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
    if uses_relative_step(optimizer):
        _warn_relative_step(options)
    kind = _kind(optimizer, options)
    shown = options.lr_scheduler_type or scheduler_name(optimizer, options)
    if kind in WITHOUT_WARMUP and lengths.warmup:
        raise UserError(
            f"lr_scheduler={shown} has no warm-up, but "
            f"lr_warmup_steps={options.lr_warmup_steps}: set it to 0 or use constant_with_warmup"
        )
    try:
        if kind == "custom":
            return _custom_class(options)(optimizer, **settings)
        if kind == "adafactor":
            return _adafactor(optimizer, options)
        own = _completed(settings, kind, options, lengths)
        # Not one dict: what is given twice is a TypeError, as is what the function does not have.
        return _function(kind)(optimizer, **_settings(kind, options, lengths), **own)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"lr_scheduler={shown} refuses its settings "
            f"{settings or '(none in lr_scheduler_args)'}: {error}"
        ) from error


def rate_jumps(scheduler: LRScheduler) -> list[tuple[float, float]]:
    """Learning rates after a resumed step where this schedule goes on at another one.

    A schedule that depends on the length of the run gives other rates in a longer run. Those of a
    class of the user's are not known beforehand.

    Returns:
        The rate of the state and that of this run, for each group where they differ.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's wrapper
    if type(scheduler) is not LambdaLR:
        return []
    rates = [
        (old, base * factor(scheduler.last_epoch))
        for old, base, factor in zip(
            scheduler.get_last_lr(), scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        )
    ]
    return [(old, new) for old, new in rates if not math.isclose(old, new, rel_tol=1e-6)]


def scheduler_name(optimizer: Optimizer, options: OptimizerOptions) -> str:
    """The schedule's name in kohya's metadata; relative-step Adafactor has its own schedule."""
    if uses_relative_step(optimizer):
        return f"adafactor:{options.learning_rate}"
    return options.lr_scheduler


def num_steps(length: int | float, total: int) -> int:
    """Steps from a number of steps, or from a ratio below 1 of the total."""
    return int(length * total) if length < 1 else int(length)


def _kind(optimizer: Optimizer, options: OptimizerOptions) -> str:
    """One of ``SCHEDULERS``, or ``custom`` for a class in ``lr_scheduler_type``."""
    name = scheduler_name(optimizer, options)
    if options.lr_scheduler_type and not uses_relative_step(optimizer):
        return "custom"
    if name.startswith("adafactor:"):
        return "adafactor"
    if name not in SCHEDULERS:
        raise UserError(
            f"lr_scheduler={name}: not known; expected one of {', '.join(SCHEDULERS)}, or a class "
            "in lr_scheduler_type"
        )
    return name


def _function(kind: str) -> Callable[..., LRScheduler]:
    if kind == "piecewise_constant":
        return get_piecewise_constant_schedule
    return TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]


def _settings(kind: str, options: OptimizerOptions, lengths: Lengths) -> dict[str, Any]:
    """Arguments of the schedule's function that come from the options."""
    warmup = {"num_warmup_steps": lengths.warmup}
    course = {**warmup, "num_training_steps": lengths.total}
    cycles = options.lr_scheduler_num_cycles
    return {
        "constant": {},
        "constant_with_warmup": warmup,
        "linear": course,
        "cosine": course,
        "cosine_with_restarts": {**course, "num_cycles": cycles},
        "polynomial": {**course, "power": options.lr_scheduler_power},
        "inverse_sqrt": {**warmup, "timescale": options.lr_scheduler_timescale},
        "cosine_with_min_lr": {**course, "num_cycles": cycles / 2},
        "warmup_stable_decay": {
            **warmup,
            "num_stable_steps": lengths.stable,
            "num_decay_steps": lengths.decay,
            "num_cycles": cycles / 2,
            "min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
        },
        "piecewise_constant": {},
    }[kind]


def _completed(
    given: Mapping[str, Any], kind: str, options: OptimizerOptions, lengths: Lengths
) -> dict[str, Any]:
    """The user's own arguments, refused where the schedule cannot work with them."""
    settings = dict(given)
    if kind == "cosine_with_min_lr" and options.lr_scheduler_min_lr_ratio is not None:
        settings.setdefault("min_lr_rate", options.lr_scheduler_min_lr_ratio)
    if kind == "cosine_with_min_lr" and not settings.keys() & {"min_lr", "min_lr_rate"}:
        raise UserError(
            "lr_scheduler=cosine_with_min_lr needs lr_scheduler_min_lr_ratio, e.g. 0.1 to end at a "
            "tenth of the learning rate"
        )
    if kind == "piecewise_constant" and "step_rules" not in settings:
        raise UserError(
            "lr_scheduler=piecewise_constant needs lr_scheduler_args step_rules='1:10,0.1:20,0.01' "
            "(factor:until which step, ..., last factor)"
        )
    if kind == "warmup_stable_decay" and lengths.stable < 0:
        raise UserError(
            f"lr_warmup_steps and lr_decay_steps are {lengths.warmup} + {lengths.decay} steps, "
            f"more than the {lengths.total} of the run: make them shorter"
        )
    return settings


def _adafactor(optimizer: Optimizer, options: OptimizerOptions) -> LRScheduler:
    if not isinstance(optimizer, Adafactor):
        raise UserError("lr_scheduler=adafactor belongs to optimizer_type=Adafactor")
    _, _, initial_lr = scheduler_name(optimizer, options).partition(":")
    return _AdafactorSchedule(optimizer, float(initial_lr or options.learning_rate))


class _AdafactorSchedule(AdafactorSchedule):
    """Tells the rate of every group, not of those with a gradient alone, as torch expects."""

    def get_lr(self) -> list[float]:
        states = [self.optimizer.state.get(g["params"][0]) for g in self.optimizer.param_groups]
        return [
            self.optimizer._get_lr(group, state) if state else initial
            for group, state, initial in zip(
                self.optimizer.param_groups, states, self.base_lrs, strict=True
            )
        ]


def _custom_class(options: OptimizerOptions) -> type[LRScheduler]:
    return import_class(
        options.lr_scheduler_type,
        option_name="lr_scheduler_type",
        default_module="torch.optim.lr_scheduler",
    )


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
