"""Progress bars for runs whose own output goes to a file."""

from __future__ import annotations

import sys

from tqdm import tqdm

from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.trainer import Trainer

__all__ = ["LateBar", "StepBar"]


class StepBar(Callback):
    """Shows the steps of a run on the stderr of its creation, which may be redirected later.

    Args:
        title: stands before the bar.
    """

    def __init__(self, title: str):
        self.title, self.file = title, sys.stderr
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Start where the run starts or continues."""
        self.bar = tqdm(
            total=trainer.plan.num_steps,
            initial=trainer.progress.current_step,
            desc=self.title,
            unit="step",
            file=self.file,
        )

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """One step more."""
        self.bar.set_postfix(result.summary(), refresh=False)
        self.bar.update()
        if trainer.progress.current_step >= trainer.plan.num_steps:
            self.bar.close()

    def on_stop(self, trainer: Trainer) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class LateBar:
    """A bar that appears with its first step, on the stderr of its creation; call it after each.

    Args:
        title: stands before the bar.
        num_steps: when it is full, and closed.
    """

    def __init__(self, title: str, num_steps: int):
        self.title, self.num_steps, self.file = title, num_steps, sys.stderr
        self.bar: tqdm | None = None

    def __call__(self) -> None:
        """One step more."""
        if self.bar is None:
            self.bar = tqdm(total=self.num_steps, desc=self.title, unit="step", file=self.file)
        self.bar.update()
        if self.bar.n >= self.num_steps:
            self.bar.close()
