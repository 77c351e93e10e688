"""What a training loop reports: the numbers of each step, and its progress.

Saving, sampling and logging are callbacks; the loop knows none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mlm_plugin.training.trainer import Trainer

__all__ = ["Callback", "SaveFailed", "StepResult", "by_step", "mlm_curves"]


class SaveFailed(Exception):
    """The last file or state could not be written under its name; says where it is instead."""


@dataclass
class StepResult:
    """The result of one optimizer step: means over its batches, ready to log."""

    loss: float  # diffusion + weight * mlm
    diffusion: float
    mlm: float | None = None  # before the weight; None where the term did not act
    mlm_weight: float = 0.0
    mlm_parts: Mapping[str, float] = field(default_factory=dict)  # see ``MLMOutput.parts``
    extras: dict[str, Tensor | float] | None = None  # tensors on the device, read when logged

    @classmethod
    def mean_of(
        cls, losses_NK: Sequence[Sequence[float]], weight: float, *, parts: Sequence[str] = ()
    ) -> StepResult:
        """The mean over N batches.

        Args:
            losses_NK: for each batch the denoising loss and, where ``weight`` is not 0, the MLM
                loss and its parts.
            weight: weight of the MLM loss.
            parts: names of the parts.
        """
        diffusion, *of_term = (sum(column) / len(column) for column in zip(*losses_NK, strict=True))
        if not weight:
            return cls(loss=diffusion, diffusion=diffusion)
        mlm, *of_parts = of_term
        return cls(
            loss=diffusion + weight * mlm,
            diffusion=diffusion,
            mlm=mlm,
            mlm_weight=weight,
            mlm_parts=dict(zip(parts, of_parts, strict=False)),
        )

    def summary(self) -> dict[str, str]:
        """The numbers beside the progress bar."""
        shown = {"loss": f"{self.loss:.4f}", "diffusion": f"{self.diffusion:.4f}"}
        if self.mlm is not None:
            shown["mlm"] = f"{self.mlm:.3g}"
        if "accuracy" in self.mlm_parts:
            shown["mlm_acc"] = f"{self.mlm_parts['accuracy']:.0%}"
        return shown


def mlm_curves(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts of the MLM term under their tags."""
    return {
        "mlm/accuracy" if name == "accuracy" else f"loss/mlm_{name}": value
        for name, value in parts.items()
    }


def by_step(values: Mapping[str, Any]) -> dict[int, Any]:
    """Values by step, whose numbers JSON makes texts."""
    return {int(step): value for step, value in values.items()}


class Callback:
    """Hooks of the training loop; override what is needed. They run on every process."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step (also when resumed)."""

    def measured(self) -> dict[str, Any]:
        """What it has measured so far, for the state of the run; JSON."""
        return {}

    def recall(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        """Take up what it had measured, when the run is resumed."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """After an optimizer step; ``trainer.progress`` counts it already."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch's last step."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def on_lost(self, trainer: Trainer) -> None:
        """An error ends this process or another one: nothing here may wait for the others."""

    def on_stop(self, trainer: Trainer) -> None:
        """A signal, a non-finite loss or another error ends the run early."""
