"""One step back: a copy of what an optimizer step changes, made right before it.

Knows tensors, optimizer and scheduler, but no losses or files.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlm_plugin.training.state import Progress

__all__ = ["LIMIT", "StepBefore"]

LIMIT = 256 * 2**20  # bytes on the device; a LoRA of rank 64 with AdamW's moments fits


class StepBefore:
    """Weights, optimizer, scheduler and progress as they were before the last optimizer step.

    The optimizer's tensors are included: a schedule-free average without its other half would be
    useless. Buffers are allocated once. Networks whose weights and optimizer take more than
    ``LIMIT`` have no copy. Random states are not kept, so a repeated step sees other noise.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer, scheduler):
        self.parameters = list(parameters)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        self.scheduler = scheduler
        self._progress: Progress | None = None
        self._buffers: dict[tuple[object, str], Tensor] = {}

    @torch.no_grad()
    def remember(self, progress: Progress) -> None:
        """Copy everything; ``progress`` counts the steps done so far."""
        tensors = self._tensors()
        if sum(tensor.nbytes for tensor in tensors.values()) > LIMIT:
            self._progress, self._buffers = None, {}
            return
        self._copy(tensors)
        self._others = [
            (owner, {k: copy.copy(v) for k, v in values.items() if not torch.is_tensor(v)})
            for owner, values in self.optimizer.state.items()
        ]
        self._groups = [
            {name: copy.copy(value) for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self._schedule = copy.copy(self.scheduler.state_dict())
        self._progress = dataclasses.replace(progress)

    @torch.no_grad()
    def restore(self) -> Progress | None:
        """Restore everything; returns the progress of that moment, ``None`` without a copy.

        The buffers become the optimizer's tensors, so it works once.
        """
        progress, self._progress = self._progress, None
        if progress is None:
            return None
        for parameter in self.parameters:
            parameter.copy_(self._buffers.pop((parameter, "")))
        self.optimizer.state.clear()
        for owner, values in self._others:
            self.optimizer.state[owner] = values
        for (owner, name), tensor in self._buffers.items():
            self.optimizer.state[owner][name] = tensor
        self._buffers = {}
        for group, values in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(values)
        self.scheduler.load_state_dict(self._schedule)
        return progress

    def _tensors(self) -> dict[tuple[object, str], Tensor]:
        """Weights under ``(parameter, "")``, the optimizer's tensors under their own names."""
        tensors = {(parameter, ""): parameter.detach() for parameter in self.parameters}
        for owner, values in self.optimizer.state.items():
            tensors |= {(owner, k): v for k, v in values.items() if torch.is_tensor(v)}
        return tensors

    def _copy(self, tensors: dict[tuple[object, str], Tensor]) -> None:
        old, self._buffers = self._buffers, {}
        pairs = defaultdict(lambda: ([], []))  # by kind, so that each is one launch
        for key, tensor in tensors.items():
            buffer = old.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                self._buffers[key] = tensor.detach().clone()
                continue
            self._buffers[key] = buffer
            buffers, sources = pairs[tensor.device, tensor.dtype]
            buffers.append(buffer)
            sources.append(tensor)
        for buffers, sources in pairs.values():
            torch._foreach_copy_(buffers, sources)
