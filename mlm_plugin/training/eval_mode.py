"""Models and optimizer in evaluation mode for a while, as for saving and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mlm_plugin.methods.base import Method
from mlm_plugin.training.optimizers import set_optimizer_mode

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(method: Method, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Evaluation mode while the block runs; schedule-free weights are the averaged ones in it.

    The training then continues with exactly the same weights, so one process may enter alone.
    """
    method.train(False)
    weights = _weights(optimizer) if _has_modes(optimizer) else []
    kept = [weight.detach().clone() for weight in weights]  # switching there and back rounds them
    set_optimizer_mode(optimizer, training=False)
    try:
        yield
    finally:
        method.train(True)
        set_optimizer_mode(optimizer, training=True)
        if kept:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer changes, including parts that are now frozen."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether evaluation changes the weights; accelerate's wrapper has the methods in any case."""
    return callable(getattr(getattr(optimizer, "optimizer", optimizer), "eval", None))
