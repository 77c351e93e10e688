"""How much of their context the states of prompts still hold: a score from text alone.

The states of prompts vary with their contexts. What share of that variation is still as it was
before training?

``kept = 1 - sum_i |(h_i - h) - (g_i - g)|^2 / sum_i |g_i - g|^2``

h_i and g_i are what the trained and the untrained model make of token i, h and g their means over
all tokens. A shift that all tokens share is the concept itself, and costs nothing. 1: the contexts
are read as before; 0: no better than a constant.

Source: the coefficient of determination, R^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KEPT", "kept_context", "lost_by_token"]

KEPT = 0.95
"""Share of the context from which on a file counts as one that reads it (docs/doctor.md)."""


def kept_context(states_ND: Tensor, untrained_ND: Tensor) -> float:
    """``kept`` for the states, keys or values of N tokens of several prompts; at least 0.

    Args:
        states_ND: h, as trained.
        untrained_ND: g, of the same tokens.
    """
    centred_ND, wanted_ND = (
        x.double() - x.double().mean(dim=0, keepdim=True) for x in (states_ND, untrained_ND)
    )
    smallest = torch.finfo(torch.double).tiny
    missed = (centred_ND - wanted_ND).square().sum() / wanted_ND.square().sum().clamp(min=smallest)
    return max(0.0, 1.0 - missed.item())


def lost_by_token(states_ND: Tensor, untrained_ND: Tensor) -> Tensor:
    """The share of each token's variation that is lost, ``(N,)`` in [0, 1].

    Weighted by how much each token varies, 1 minus their mean is :func:`kept_context`, as far as no
    token loses more than it had.
    """
    centred_ND, wanted_ND = (
        x.double() - x.double().mean(dim=0, keepdim=True) for x in (states_ND, untrained_ND)
    )
    smallest = torch.finfo(torch.double).tiny
    missed_N = (centred_ND - wanted_ND).square().sum(dim=1)
    return (missed_N / wanted_ND.square().sum(dim=1).clamp(min=smallest)).clamp(max=1.0)
