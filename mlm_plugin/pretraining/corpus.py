"""What a contextualizer learns to read: contexts around hundreds of ordinary subjects, captions.

Never a concept token. Knows no torch.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlm_plugin.errors import UserError
from mlm_plugin.mlm.prompts import PromptSet
from mlm_plugin.prompt_sets.english import subjects
from mlm_plugin.prompt_sets.files import BUILTIN

__all__ = ["Corpus", "read_caption_files", "require_both_sides"]

HELD_OUT_SHARE = 20  # one prompt in twenty is never trained on
TAG_SHARE = 0.3


class Corpus:
    """Text to learn from: built-in contexts around ordinary subjects, and the user's captions.

    Args:
        captions: the user's own.
        caption_share: how often they are drawn, where there are any.

    Raises:
        UserError: see :func:`require_both_sides`.
    """

    def __init__(self, captions: Sequence[str] = (), *, caption_share: float = 0.5):
        require_both_sides(captions, caption_share)
        self.captions, self.caption_share = list(captions), caption_share
        self.prompt_sets = {
            syntax: {name: PromptSet.load(name, syntax=syntax) for name in BUILTIN}
            for syntax in ("natural", "tags")
        }
        self.subjects = {name: subjects(name) for name in BUILTIN}

    def draw(self, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
        """A text of one side of the split and its family; the sides never share a text."""
        while True:
            text, family = self._draw_any(rng)
            if _is_held_out(text) == held_out:
                return text, family

    def _draw_any(self, rng: random.Random) -> tuple[str, str]:
        if self.captions and rng.random() < self.caption_share:
            return rng.choice(self.captions), "captions"
        syntax = "tags" if rng.random() < TAG_SHARE else "natural"
        category = rng.choice(BUILTIN)
        context = self.prompt_sets[syntax][category].draw(rng)
        return context.text.replace("{}", rng.choice(self.subjects[category])), context.family


def require_both_sides(captions: Sequence[str], caption_share: float) -> None:
    """Refuse captions that alone have no text to train on, or none to be scored by.

    Raises:
        UserError: nothing else is drawn, and all of them are on one side of the split.
    """
    if captions and caption_share == 1 and len({_is_held_out(text) for text in captions}) == 1:
        is_held_out = _is_held_out(captions[0])
        raise UserError(
            f"--caption_share = 1: {'all' if is_held_out else 'none'} of the {len(set(captions))} "
            f"different captions would be held out to score the training (1 in {HELD_OUT_SHARE} "
            "is, chosen by its text); give more captions or a share below 1"
        )


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def read_caption_files(paths: Iterable[str | Path]) -> list[str]:
    """Captions from text files, one per line; empty lines are skipped.

    Raises:
        UserError: if a file is missing, empty, or not UTF-8 text.
    """
    captions: list[str] = []
    for path in map(Path, paths):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--captions: cannot read {path} ({error}); give UTF-8 text files"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--captions: {path} holds no caption; write one per line")
        captions += found
    return captions
