"""Losses and gradients that are not finite: caught before the optimizer step, and explained.

Knows no loop; going back a step is ``rollback.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mlm_plugin.data.dataset import Batch
from mlm_plugin.training.callbacks import StepResult
from mlm_plugin.training.forward import batch_latents
from mlm_plugin.training.processes import ProcessStep

__all__ = ["NonFiniteLatents", "NonFiniteLoss", "explain_losses", "losses_are_finite"]


class NonFiniteLoss(Exception):
    """The loss or its gradient became NaN or infinite; the trainer has gone back one step.

    Weights, optimizer, scheduler and progress are those before the last optimizer step, because
    the weights after this step are the ones that failed. Where no copy is kept (the first step of a
    run, or networks above ``rollback.LIMIT``), they are those that failed. With steps inside the
    backward pass, a gradient or an MLM loss that is not finite is only noticed when the U-Net has
    already taken this step without it. That step is then the last one.

    Attributes:
        advice: what to change before starting again.
        saved: what the state on disk holds.
    """

    saved = "the last good state is saved"
    advice = "a lower learning rate, or try no_half_vae or mixed_precision bf16"


class NonFiniteLatents(NonFiniteLoss):
    """The VAE overflowed in half precision; other weights or rates do not help."""

    advice = "no_half_vae, or with a VAE that was made for half precision (--vae)"


def losses_are_finite(steps: Sequence[ProcessStep]) -> bool:
    """Whether every loss of every process is finite; all processes find the same."""
    return all(math.isfinite(loss) for step in steps for loss in step.all_losses())


def explain_losses(
    losses: Sequence[Sequence[float]],
    batches: Sequence[Batch],
    *,
    mlm_weight: float,
    vae: nn.Module,
    device: torch.device,
    step: int,
) -> NonFiniteLoss | None:
    """Why the first bad loss among a process's batches is not finite; ``None`` if all are.

    Tells a VAE that overflows (SDXL's own does in fp16) from weights that diverged.
    """
    for batch, of_batch in zip(batches, losses, strict=True):
        if all(map(math.isfinite, of_batch)):
            continue
        if not batch_latents(batch, vae, device=device).isfinite().all():
            return NonFiniteLatents(
                f"the VAE gives latents that are not finite in {vae.dtype} for "
                f"{', '.join(batch.image_paths)}"
            )
        result = StepResult.mean_of([of_batch], mlm_weight)
        return NonFiniteLoss(
            f"the loss is {result.loss} at step {step} "
            f"(diffusion {result.diffusion}, mlm {result.mlm})"
        )
    return None
