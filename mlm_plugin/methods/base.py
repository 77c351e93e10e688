"""What the trainer needs of a method: four verbs, whatever is trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from mlm_plugin.config.options import OptimizerOptions

__all__ = ["Method"]


class Method(Protocol):
    """A way to teach a model a concept: what is trained, how text is encoded, what is saved."""

    def parameter_groups(self, options: OptimizerOptions) -> list[dict]:
        """Optimizer groups with ``params``, ``lr`` and ``name``; parts with rate 0 have none."""

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, for clipping and averaging over processes."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Conditioning of the U-Net, ``(B, L, D)``."""

    def train(self, mode: bool = True) -> None:
        """Training mode (dropout, gradient checkpointing) on or off."""

    def after_step(self) -> dict[str, float]:
        """What follows an optimizer step; numbers worth logging."""

    def state_dict(self) -> dict[str, Tensor]:
        """What is saved: names and shapes of the file, values as they are trained."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""

    def base_model(self) -> AbstractContextManager:
        """The model as it was before training, while the block runs."""
