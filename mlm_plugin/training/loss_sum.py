"""A weighted sum of losses, computed one summand at a time.

``loss = diffusion + weight * mlm`` reads like any sum, but nothing is computed until
:meth:`LossSum.backward`. The gradient of a sum is the sum of the gradients, so each summand has its
forward and backward pass before the next one starts: the sum needs the memory of its largest
summand, not of all together. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["LossSum"]


class LossSum:
    """A loss that has not been computed yet.

    Args:
        forward: computes the loss, 0-d with its graph, followed by 0-d numbers to log with it.
    """

    def __init__(self, forward: Callable[[], Sequence[Tensor]]):
        self._summands = [(1.0, forward)]

    def __add__(self, other: LossSum) -> LossSum:
        return self._of([*self._summands, *other._summands])

    def __rmul__(self, weight: float) -> LossSum:
        """Weight the loss; with weight 0 it is never computed."""
        return self._of([(weight * w, forward) for w, forward in self._summands if weight])

    def backward(self, backward: Callable[[Tensor], None]) -> Tensor:
        """Forward and backward pass of each summand in turn; gradients add up.

        Args:
            backward: runs the backward pass of a 0-d loss.

        Returns:
            ``(K,)`` fp32 on the device: each loss, before its weight, and what is logged with it.
        """
        values: list[Tensor] = []
        for weight, forward in self._summands:
            loss, *logged = forward()
            backward(weight * loss)
            values += [value.detach().float() for value in (loss, *logged)]
            del loss, logged  # and the graph with them
        return torch.stack(values)

    @classmethod
    def _of(cls, summands: list[tuple[float, Callable[[], Sequence[Tensor]]]]) -> LossSum:
        result = cls.__new__(cls)
        result._summands = summands
        return result
