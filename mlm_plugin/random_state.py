"""Random streams that a block leaves as they were, on any device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

__all__ = ["preserved_random_state"]


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy, the CPU and ``device`` at the end of the block.

    Args:
        device: where the block draws besides the CPU; cpu and meta have no state of their own.
    """
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), _preserved_on(device):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def _preserved_on(device: torch.device) -> Iterator[None]:
    # torch.random.fork_rng covers device types whose functions take a device; those of MPS do not
    if device.type in ("cpu", "meta"):
        yield
        return
    module = getattr(torch, device.type)
    where = () if device.type == "mps" else (device,)
    state = module.get_rng_state(*where)
    try:
        yield
    finally:
        module.set_rng_state(state, *where)
