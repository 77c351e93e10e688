"""Prompts for several concepts: one of them at a time, or two in one picture.

Puts prompt sets together; relations and suitable contexts are data (``joint_prompts.toml``). Knows
no tokenizer and no masking.

Source of the idea: two concepts in one prompt, as in Custom Diffusion, arXiv 2212.04488.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.data.prompts import PromptSet

__all__ = ["JointPrompts", "joint_phrase"]

_TABLES = read_toml(Path(__file__).parent / "joint_prompts.toml")

Member = tuple[PromptSet, str]


def joint_phrase(rng: random.Random, texts: Sequence[str], *, kind: str = "things") -> str:
    """Join two concept texts by a relation: "sks dog next to zwx cat".

    Args:
        rng: source of the draw.
        texts: the two, in their order.
        kind: "things", "thing_in_style" (the style is the second) or "styles".
    """
    first, second = texts
    return f"{first} {rng.choice(_TABLES['relations'][kind])} {second}"


class JointPrompts:
    """Prompts that hold one concept of several, or two of them.

    A joint prompt takes its context from the first concept's set, from the families that suit two
    (see the TOML). A style comes second: "sks dog in the style of zwx art". A context that names
    the other concept already, as a caption may, is filled with the first alone.

    Args:
        members: prompt set and text (``"sks dog"``) of each concept.
        joint_share: probability of two concepts in a prompt; without effect for a single member,
            whose prompts are drawn exactly as by its set.
    """

    def __init__(self, members: Sequence[Member], *, joint_share: float = 0.5):
        assert members, "no concept"
        assert len({text for _, text in members}) == len(members), "a concept is named twice"
        assert 0 <= joint_share <= 1, joint_share
        self._members = tuple(members)
        self._joint_share = joint_share
        self._joint_sets = {
            (text, kind): prompt_set.only(families)
            for prompt_set, text in members
            for kind, families in _TABLES["families"].items()
        }

    def sample(self, rng: random.Random) -> str:
        """Draw a prompt."""
        if len(self._members) > 1 and rng.random() < self._joint_share:
            return self._sample_joint(rng, rng.sample(self._members, 2))
        member = rng.choice(self._members) if len(self._members) > 1 else self._members[0]
        prompt_set, text = member
        return prompt_set.sample(rng, text)

    def _sample_joint(self, rng: random.Random, pair: Sequence[Member]) -> str:
        pair = sorted(pair, key=_is_style)  # stable: two of a kind stay as drawn
        kind = ("things", "thing_in_style", "styles")[sum(map(_is_style, pair))]
        first, second = (text for _, text in pair)
        context = self._joint_sets[first, kind].draw(rng)
        if second.lower() in context.text.lower():
            return context.fill(first)
        return context.fill(joint_phrase(rng, (first, second), kind=kind))


def _is_style(member: Member) -> bool:
    return member[0].name == "style"
