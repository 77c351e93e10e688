"""Prompts for several concepts: one of them at a time, or two in one picture.

Puts prompt sets together; relations and suitable contexts are data (``joint_prompts.toml``). Knows
no tokenizer and no masking.

Source of the idea: two concepts in one prompt, as in Custom Diffusion, arXiv 2212.04488.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.mlm.prompts import Context, PromptSet
from mlm_plugin.prompt_sets.grammar import SETS

__all__ = ["JointPrompts", "Member", "PromptPair", "draw_relation"]

_TABLES = read_toml(SETS / "tables" / "joint_prompts.toml")


class Member(NamedTuple):
    """A concept and the contexts it may stand in."""

    prompt_set: PromptSet
    text: str  # "sks dog"
    class_text: str = ""  # "dog"


class PromptPair(NamedTuple):
    """A prompt with its concepts, and the same with their class words in their places."""

    text: str
    class_text: str


def draw_relation(rng: random.Random, *, kind: str = "things") -> str:
    """What stands between two concepts: "next to".

    Args:
        rng: source of the draw.
        kind: "things", "thing_in_style" (the style is the second) or "styles".
    """
    return rng.choice(_TABLES["relations"][kind])


class JointPrompts:
    """Prompts that hold one concept of several, or two of them.

    A joint prompt takes its context from the first concept's set, from the families that suit two
    (see the TOML). A style comes second: "sks dog in the style of zwx art". A context that names
    the other concept already, as a caption may, is filled with the first alone.

    Args:
        members: the concepts.
        joint_share: probability of two concepts in a prompt; without effect for a single member,
            whose prompts are drawn exactly as by its set.
    """

    def __init__(self, members: Sequence[Member], *, joint_share: float = 0.5):
        assert members, "no concept"
        assert len({member.text for member in members}) == len(members), "a concept is named twice"
        assert 0 <= joint_share <= 1, joint_share
        self._members = tuple(members)
        self._joint_share = joint_share
        self._joint_sets = {
            (member.text, kind): member.prompt_set.only(families)
            for member in members
            for kind, families in _TABLES["families"].items()
        }

    def sample(self, rng: random.Random) -> PromptPair:
        """Draw a prompt."""
        if len(self._members) > 1 and rng.random() < self._joint_share:
            return self._sample_joint(rng, rng.sample(self._members, 2))
        member = rng.choice(self._members) if len(self._members) > 1 else self._members[0]
        return _filled(member.prompt_set.draw(rng), member)

    def _sample_joint(self, rng: random.Random, pair: Sequence[Member]) -> PromptPair:
        first, second = sorted(pair, key=_is_style)  # stable: two of a kind stay as drawn
        kind = ("things", "thing_in_style", "styles")[sum(map(_is_style, pair))]
        context = self._joint_sets[first.text, kind].draw(rng)
        if second.text.lower() in context.text.lower():
            return _filled(context, first)
        relation = draw_relation(rng, kind=kind)
        return PromptPair(
            context.fill(f"{first.text} {relation} {second.text}"),
            context.fill(f"{first.class_text} {relation} {second.class_text}"),
        )


def _filled(context: Context, member: Member) -> PromptPair:
    return PromptPair(context.fill(member.text), context.fill(member.class_text))


def _is_style(member: Member) -> bool:
    return member.prompt_set.name == "style"
