"""What the processes of a run exchange in each step: gradients, losses, and signals.

With a single process nothing is sent. Knows neither models nor the loop. Shapes: N batches of a
step, K losses of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mlm_plugin.errors import UserError

__all__ = [
    "ProcessLost",
    "ProcessStep",
    "average_gradients",
    "drop_unused_gradients",
    "first_given",
    "gather_step",
    "same_outcome",
    "tells_lost_process",
]

BUCKET = 64 * 2**20  # bytes of gradients that processes exchange at once
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
T = TypeVar("T")


class ProcessLost(Exception):
    """Another process of the run has ended."""

    def __init__(self):
        super().__init__("another process of this run has ended; its own message says why")


def tells_lost_process(error: Exception) -> bool:
    """Whether an exchange failed because another process is gone (gloo, NCCL)."""
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or any(words in str(error) for words in LOST)


class ProcessStep(NamedTuple):
    """A step as one process sees it, in plain numbers.

    Attributes:
        losses: K numbers for each batch.
        norm: norm of the averaged gradient before clipping, so the same on every process.
        exit_code: exit code of a signal that this process received, or 0.
        has_gradient: for each trained tensor, whether this process had a gradient; empty with a
            single process.
    """

    losses: list[list[float]]
    norm: float
    exit_code: int = 0
    has_gradient: Sequence[bool] = ()

    def all_losses(self) -> Iterator[float]:
        """Of all batches, one after the other."""
        return itertools.chain(*self.losses)


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Average gradients over all processes, in a few large messages instead of one per tensor.

    A tensor without a gradient counts as 0; see :func:`drop_unused_gradients`.

    Returns:
        Which tensors had a gradient on this process; empty with a single process.
    """
    if accelerator.num_processes == 1:
        return []
    has_gradient = [parameter.grad is not None for parameter in parameters]
    for parameter in parameters:
        if parameter.grad is None:  # every process must take part in the exchange
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(parameters):
        flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
        flat = accelerator.reduce(flat, reduction="mean")
        sizes = [parameter.numel() for parameter in bucket]
        for parameter, mean in zip(bucket, flat.split(sizes), strict=True):
            parameter.grad = mean.view_as(parameter)
    return has_gradient


def gather_step(
    accelerator: Accelerator,
    losses_NK: Tensor,
    norm: Tensor,
    *,
    exit_code: int,
    has_gradient: Sequence[bool],
) -> list[ProcessStep]:
    """The step as each process sees it, by rank. Synchronizes the device.

    Args:
        accelerator: of the run.
        losses_NK: losses of the step's batches.
        norm: norm of the gradients, 0-d.
        exit_code: exit code of a signal, or 0.
        has_gradient: from :func:`average_gradients`.
    """
    numbers = torch.cat([losses_NK.flatten(), norm.to(losses_NK).reshape(1)])
    if accelerator.num_processes == 1:
        rows = [[*numbers.tolist(), exit_code]]
    else:
        flags = torch.tensor([exit_code, *has_gradient], dtype=numbers.dtype)
        numbers = torch.cat([numbers, flags.to(numbers.device, non_blocking=True)])
        rows = accelerator.gather(numbers[None]).tolist()
    return [_parse(row, *losses_NK.shape) for row in rows]


def _parse(row: Sequence[float], num_batches: int, num_losses: int) -> ProcessStep:
    """Numbers in the order in which :func:`gather_step` sends them."""
    end = num_batches * num_losses
    losses = [list(row[i : i + num_losses]) for i in range(0, end, num_losses)]
    norm, exit_code, *has_gradient = row[end:]
    return ProcessStep(losses, norm, int(exit_code), list(map(bool, has_gradient)))


def drop_unused_gradients(parameters: Sequence[nn.Parameter], steps: Sequence[ProcessStep]) -> None:
    """Remove gradients of tensors that no process used: a gradient of 0 would let them decay."""
    used = map(any, zip(*(step.has_gradient for step in steps), strict=True))
    # with a single process there is nothing to compare
    for parameter, is_used in zip(parameters, used, strict=False):
        if not is_used:
            parameter.grad = None


def first_given(value: T | None) -> T:
    """The value of the lowest rank that has one; every process must call it."""
    return next(item for item in gather_object([value]) if item is not None)


def same_outcome(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run it on every process; where it fails on one, all raise that error.

    So no process waits for one that has gone another way. Every process must call it, and
    ``action`` must not let the processes wait for each other.

    Raises:
        OSError: of the lowest rank that failed; ``UserError`` likewise.
        RuntimeError: another error on another process.
    """
    error = None
    try:
        action()
    except Exception as own:
        if accelerator.num_processes == 1:
            raise
        known = isinstance(own, (OSError, UserError))
        error = own if known else RuntimeError(f"{type(own).__name__}: {own}")
    if accelerator.num_processes > 1:
        errors = [found for found in gather_object([error]) if found is not None]
        if errors:
            raise errors[0]


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups of parameters of one precision, each about ``BUCKET`` bytes.

    A larger parameter has its own bucket.
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
