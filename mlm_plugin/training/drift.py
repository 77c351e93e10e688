"""How far the text encoder has drifted on text without the concept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.training.callbacks import Callback, StepResult, by_step

if TYPE_CHECKING:  # the doctor measures drift beside kohya's trainers, where no peft is installed
    from mlm_plugin.training.trainer import Trainer

__all__ = ["DriftWatch", "TextDrift"]

NUM_DRIFTS = 50  # times per run that the text encoders' drift is measured

PROBES = (
    "a photo of a mountain lake at sunrise",
    "a crowded street market at night",
    "an oil painting of two ships in a storm",
    "a child reading a book by the window",
    "a plate of fruit on a wooden table",
    "a quiet library with tall shelves",
    "a red bicycle leaning against a brick wall",
    "an old man walking in the rain",
)
"""Everyday prompts without a concept; only for measuring, never trained on."""


class TextDrift:
    """Mean cosine between the trained and the base encoder's states on fixed prompts.

    1 = the encoder is unchanged on ordinary text; lower = the concept has leaked into words that
    have nothing to do with it.

    Args:
        text_encoder: untrained when this is created; in evaluation mode whenever it is measured.
        autocast: mixed precision of the run.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.text_encoder, self.autocast = text_encoder, autocast
        self.base_BLD = self._states()

    def __call__(self) -> float:
        """Cosine in [-1, 1], averaged over prompts and positions."""
        return F.cosine_similarity(self._states(), self.base_BLD, dim=-1).mean().item()

    @torch.no_grad()
    def _states(self) -> Tensor:
        with self.autocast():
            return self.text_encoder.encode_captions(PROBES).float()


class DriftWatch(Callback):
    """Measures the drift of the text encoders ``NUM_DRIFTS`` times in a run.

    Args:
        drifts: measures by tag, created before anything is trained.

    Attributes:
        cosines: what was measured, by tag and step.
    """

    def __init__(self, drifts: Mapping[str, TextDrift]):
        self.drifts = dict(drifts)
        self.cosines: dict[str, dict[int, float]] = {tag: {} for tag in drifts}

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Measure, if it is due."""
        step = trainer.progress.current_step
        if step % max(1, trainer.plan.num_steps // NUM_DRIFTS) == 0:
            with trainer.evaluating():
                for tag, drift in self.drifts.items():
                    self.cosines[tag][step] = drift()

    def measured(self) -> dict[str, Any]:
        """The cosines."""
        return self.cosines

    def recall(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        """Those before a resume."""
        for tag, values in self.cosines.items():
            values.update(by_step(measured.get(tag, {})))

    def at(self, step: int) -> dict[str, float]:
        """What was measured after a step, by tag; empty after most steps."""
        return {tag: values[step] for tag, values in self.cosines.items() if step in values}
