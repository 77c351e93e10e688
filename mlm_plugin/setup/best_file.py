"""Which of a run's files is the best, and when a run has lost its context: from text alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.kept_context import KEPT
from mlm_plugin.mlm_setup import prompts_for
from mlm_plugin.training.context_score import (
    NUM_PROMPTS,
    ContextReading,
    ContextScore,
    ScoredModel,
    ScorePrompts,
)
from mlm_plugin.training.interrupt import Stopped

__all__ = ["BestFile", "ContextLost", "Ranked", "ranking_of"]

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
    grows with every step. Where none does, it is the one that keeps most. Removed files do not
    count.

    Args:
        score: of the weights as they are now.
        keep: whether the best file is kept.
        stop_below: the run ends where less is kept; ``None`` = never.
    """

    def __init__(self, score: ContextScore, *, keep: bool, stop_below: float | None):
        self.score, self.keep, self.stop_below = score, keep, stop_below
        self.files: dict[str, Ranked] = {}
        self._removed: set[str] = set()

    @property
    def there(self) -> dict[str, Ranked]:
        """The files that have not been removed."""
        return {name: one for name, one in self.files.items() if name not in self._removed}

    def forget(self, name: str) -> None:
        """A file is removed."""
        self._removed.add(name)

    @property
    def kept(self) -> dict[str, float]:
        """What each file keeps in the keys and values, by name."""
        return {name: one.reading.cross_attention for name, one in self.files.items()}

    def measure(self, name: str, step: int) -> dict[str, float]:
        """Score the file that is saved now, with the models in evaluation mode; values to log."""
        reading = self.score()
        self.files.pop(name, None)  # saved again, which makes it the last
        self._removed.discard(name)
        self.files[name] = Ranked(step, reading)
        logger.info("%s keeps %.0f%% of the context", name, 100 * reading.cross_attention)
        return {
            "context/text_encoder": reading.encoder,
            "context/cross_attention": reading.cross_attention,
        }

    @property
    def best(self) -> str | None:
        """Name of the best file so far."""
        kept = {name: one.reading.cross_attention for name, one in self.there.items()}
        good = [name for name, share in kept.items() if share >= KEPT]
        return good[-1] if good else max(kept, key=kept.__getitem__, default=None)

    def measured(self) -> dict[str, list[float]]:
        """Step and shares of the files that are there, by name, for the state of a run."""
        return {name: [one.step, *one.reading] for name, one in self.there.items()}

    def recall(self, measured: Mapping[str, Sequence[float]]) -> None:
        """Take up what :meth:`measured` told."""
        for name, (step, *shares) in measured.items():
            self.files[name] = Ranked(int(step), ContextReading(*shares))

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


def ranking_of(
    model: ScoredModel,
    options: MLMOptions,
    concepts: Sequence[Concept],
    *,
    captions: Iterable[str],
    keep: bool,
    stop_below: float | None,
) -> BestFile | None:
    """The ranking of a run that asks for it, or whose page shows it.

    Args:
        model: untrained, in evaluation mode.
        options: the prompt set.
        concepts: what is learned.
        captions: may serve as prompts.
        keep: as in :class:`BestFile`.
        stop_below: as there; with neither, the page alone needs the ranking.

    Returns:
        ``None`` where the page alone needs it and there are no prompts, with a warning.

    Raises:
        UserError: there are no prompts, and more than the page needs them.
    """
    is_asked = keep or stop_below is not None
    number = NUM_PROMPTS if is_asked else NUM_SHOWN
    try:
        prompts = _prompts(model, options, concepts, captions=captions, number=number)
    except UserError as error:
        if is_asked:
            raise
        logger.warning("the page shows no words around the concept: %s", error)
        return None
    return BestFile(ContextScore(model, prompts), keep=keep, stop_below=stop_below)


def _prompts(
    model: ScoredModel,
    options: MLMOptions,
    concepts: Sequence[Concept],
    *,
    captions: Iterable[str],
    number: int,
) -> ScorePrompts:
    prompts = prompts_for(options, concepts, captions=captions)
    texts = [concept.text for concept in concepts]
    drawn = ScorePrompts.drawn(lambda rng: prompts.sample(rng).text, texts, number=number)
    if not drawn.texts and len(texts) > 1:
        raise UserError(
            f"mlm_prompt_set = {options.mlm_prompt_set!r}, mlm_joint_share = "
            f"{options.mlm_joint_share:g}: every prompt holds several concepts, and a file is "
            "scored with prompts of one; lower mlm_joint_share or choose another set"
        )
    found = drawn.within(model.text_encoder)
    if not found.texts:
        raise UserError(
            f"mlm_prompt_set = {options.mlm_prompt_set!r}: no prompt holds {texts[0]!r} within "
            "75 tokens; choose another set"
        )
    return found
