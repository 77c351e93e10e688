"""Optimizer steps inside the backward pass: a gradient is used as soon as it exists, then freed.

For full fine-tuning, where all gradients together are as large as the model. Knows parameters and
an optimizer, but no losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["FusedSteps"]


class FusedSteps:
    """Steps each of some parameters as soon as its gradient is complete.

    Each of them must get its whole gradient in one backward pass. The optimizer's own ``step`` then
    skips them, as they have no gradient left. A gradient that is not finite is treated as 0 and
    shows in the norm of :meth:`clip_others`.

    Args:
        parameters: what to step; those that the optimizer does not have are left alone.
        optimizer: one that can step tensors one by one (``optimizers.steps_one_by_one``).
        max_grad_norm: norm to which each gradient is clipped separately, as all of them never
            exist at the same time; 0 = no clipping.

    Source: the idea is PyTorch's tutorial "optimizer step in backward"; clipping: sd-scripts
    ``sdxl_train.py`` (``fused_backward_pass``).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer, *, max_grad_norm: float = 0.0
    ):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        self.max_grad_norm = max_grad_norm or math.inf  # inf: measures only
        self._norms: list[Tensor] = []
        fused = set(parameters)
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter in fused.intersection(group["params"]):
                parameter.register_post_accumulate_grad_hook(partial(self._step, number))

    def clip_others(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Clip the remaining gradients, each separately.

        Returns:
            The norm of all gradients since the last call, before clipping, 0-d fp32.
        """
        norms = [*self._norms, *(self._clip(p) for p in parameters if p.grad is not None)]
        self._norms = []
        return torch.stack([norm.float() for norm in norms]).norm()

    def _clip(self, parameter: nn.Parameter) -> Tensor:
        return nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)

    @torch.no_grad()
    def _step(self, group_number: int, parameter: nn.Parameter) -> None:
        norm = self._clip(parameter)
        self._norms.append(norm)
        parameter.grad.masked_fill_(~norm.isfinite(), 0.0)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**groups[group_number], "params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None
