"""What a run minimizes, how it steps, and for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mlm_plugin.methods.base import Part
from mlm_plugin.mlm.regularizer import MLMRegularizer, MLMSchedule
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.fused_steps import FusedSteps

__all__ = ["MLMTerm", "Objective", "Optimization", "TrainPlan"]


class MLMTerm(NamedTuple):
    """The MLM loss, its weight by step, and the place that it reads."""

    regularizer: MLMRegularizer
    schedule: MLMSchedule
    read_at: str = "encoder"


@dataclass(frozen=True)
class Objective:
    """What is minimized: ``diffusion + weight * mlm``.

    Attributes:
        diffusion: the denoising loss; it calls the U-Net through ``predict``.
        mlm: the MLM term, or ``None``.
        encode: captions to conditioning, where they were encoded beforehand; else the method's.
    """

    diffusion: DiffusionLoss
    mlm: MLMTerm | None = None
    encode: Callable[[Sequence[str]], Conditioning] | None = None


@dataclass(frozen=True)
class Optimization:
    """The parts of an optimizer step.

    Attributes:
        optimizer: prepared by the accelerator.
        scheduler: prepared by the accelerator.
        max_grad_norm: norm to which gradients are clipped; 0 = not at all.
        freeze_at: the optimizer step, from 0, at which a part of the method is frozen.
        fused_steps: steps the U-Net inside the backward pass; for one batch per step on one
            process, without a gradient scaler.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any
    max_grad_norm: float = 1.0
    freeze_at: Mapping[Part, int] = field(default_factory=dict)
    fused_steps: FusedSteps | None = None


@dataclass(frozen=True)
class TrainPlan:
    """Length of a run.

    Attributes:
        num_steps: optimizer steps.
        batches_per_epoch: batches of one epoch on this process.
        gradient_accumulation_steps: batches per optimizer step; an epoch's last may have fewer.
    """

    num_steps: int
    batches_per_epoch: int
    gradient_accumulation_steps: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps)

    @property
    def num_epochs(self) -> int:
        """Epochs, the last one perhaps cut short."""
        return math.ceil(self.num_steps / self.steps_per_epoch)
