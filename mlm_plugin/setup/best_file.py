"""Which of a run's files is the best, and when a run has lost its context: from text alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.errors import UserError
from mlm_plugin.methods import Method
from mlm_plugin.mlm.kept_context import KEPT
from mlm_plugin.mlm_setup import prompts_for
from mlm_plugin.setup.data import captions_of
from mlm_plugin.training.context_score import (
    NUM_PROMPTS,
    ContextReading,
    ContextScore,
    ScorePrompts,
)
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.trainer import Trainer

__all__ = ["BestFile", "ContextLost", "Ranked", "watch_context"]

logger = logging.getLogger(__name__)

NUM_SHOWN = 12
"""Prompts where a page alone shows the ranking."""


class ContextLost(Stopped):
    """The run was told to end where so much of the context is lost."""

    def __init__(self, kept: float, limit: float):
        super().__init__(0, f"{kept:.0%} of the context is kept, mlm_stop_below is {limit:.0%}")


class Ranked(NamedTuple):
    """What a saved file keeps, and after which step it was saved."""

    step: int
    reading: ContextReading


class BestFile:
    """Ranks files as they are saved.

    The best is the last one that keeps ``KEPT`` of its context: likeness, which text cannot tell,
    grows with every step. Where none does, it is the one that keeps most.

    Args:
        score: of the weights as they are now.
        keep: whether the best file is kept.
        stop_below: the run ends where less is kept; ``None`` = never.
    """

    def __init__(self, score: ContextScore, *, keep: bool, stop_below: float | None):
        self.score, self.keep, self.stop_below = score, keep, stop_below
        self.files: dict[str, Ranked] = {}

    @property
    def kept(self) -> dict[str, float]:
        """What each file keeps in the keys and values, by name."""
        return {name: one.reading.cross_attention for name, one in self.files.items()}

    def measure(self, trainer: Trainer, name: str) -> ContextReading:
        """Score the file that is saved now."""
        with trainer.evaluating():
            reading = self.score()
        self.files[name] = Ranked(trainer.progress.current_step, reading)
        curves = {
            "context/text_encoder": reading.encoder,
            "context/cross_attention": reading.cross_attention,
        }
        trainer.accelerator.log(curves, step=trainer.progress.current_step)
        logger.info("%s keeps %.0f%% of the context", name, 100 * reading.cross_attention)
        return reading

    @property
    def best(self) -> str | None:
        """Name of the best file so far."""
        kept = self.kept
        good = [name for name, share in kept.items() if share >= KEPT]
        return good[-1] if good else max(kept, key=kept.__getitem__, default=None)

    def spares(self, name: str) -> bool:
        """Whether a file that is due to be removed has to stay."""
        return self.keep and name == self.best

    def report(self, path_of: Callable[[str], Path]) -> str:
        """The last line of a run: its best file and what that keeps.

        Args:
            path_of: the file that has a name.
        """
        kept = self.kept[self.best]
        return f"best by its context: {path_of(self.best)}, which keeps {100 * kept:.0f}% of it"

    def require_context(self) -> None:
        """End the run where too little is kept.

        Raises:
            ContextLost: the last file keeps less than ``stop_below``.
        """
        kept = next(reversed(self.kept.values()), 1.0)  # of the last file
        if self.stop_below is not None and kept < self.stop_below:
            raise ContextLost(kept, self.stop_below)


def watch_context(
    config: TrainConfig,
    method: Method,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    *,
    accelerator: Accelerator,
    for_page: bool,
) -> BestFile | None:
    """The ranking that the options or a page ask for; ``None`` if none does.

    Args:
        config: options of the run.
        method: untrained.
        concepts: what is learned.
        dataset: its captions may serve as prompts.
        accelerator: its precision.
        for_page: whether the run's page shows it.

    Raises:
        UserError: the options ask for it, and there are no prompts.
    """
    options = config.output
    is_asked = options.mlm_keep_best or options.mlm_stop_below is not None
    if not is_asked and not (for_page and concepts):
        return None
    try:
        prompts = _prompts(
            config, method, concepts, dataset, number=NUM_PROMPTS if is_asked else NUM_SHOWN
        )
    except UserError as error:
        if is_asked:
            raise
        logger.warning("the page shows no words around the concept: %s", error)
        return None
    method.train(False)
    score = ContextScore(method, prompts, autocast=accelerator.autocast)
    return BestFile(score, keep=options.mlm_keep_best, stop_below=options.mlm_stop_below)


def _prompts(
    config: TrainConfig,
    method: Method,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    *,
    number: int,
) -> ScorePrompts:
    prompts = prompts_for(config.mlm, concepts, captions=captions_of(dataset))
    texts = [concept.text for concept in concepts]
    drawn = ScorePrompts.drawn(lambda rng: prompts.sample(rng).text, texts, number=number)
    found = drawn.within(method.models.text_encoders[0])
    if not found.texts:
        raise UserError(
            f"mlm_prompt_set = {config.mlm.mlm_prompt_set!r}: no prompt holds {texts[0]!r} within "
            "75 tokens; choose another set"
        )
    return found
