"""Prompts with the concept: sets of contexts, and drawing from them.

A set comes from a TOML file with word lists and families of templates, from a text file with one
context per line (``prompt_sets/files.py``), or from the captions of a data set. Several concepts
share prompts: one of them at a time, or two in one picture.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from mlm_plugin.errors import UserError
from mlm_plugin.prompt_sets.english import is_dreambench
from mlm_plugin.prompt_sets.files import (
    TAG_SETS,
    find_set_file,
    joint_prompt_tables,
    read_contexts,
    read_families,
)
from mlm_plugin.prompt_sets.grammar import SYNTAXES, Alternatives, Family, Template

__all__ = ["Context", "JointPrompts", "Member", "PromptPair", "PromptSet", "draw_relation"]

logger = logging.getLogger(__name__)

_MAX_REDRAWS = 1000
_JOINT = joint_prompt_tables()


class Context(NamedTuple):
    """A prompt with ``{}`` where the concept goes (exactly once), and the family it is from."""

    text: str
    family: str

    def fill(self, concept: str) -> str:
        """Put ``concept`` into the slot; other braces in the text are unchanged."""
        return self.text.replace("{}", concept)


class PromptSet:
    """A set of contexts for one concept.

    Families are drawn with probability proportional to ``weight * size ** (1 / temperature)``:
    1 draws every prompt with equal probability, larger values favour small families. Within a
    family every prompt is equally likely.

    Args:
        name: for messages.
        families: named grammars.
        temperature: of the draw among families.
        verbatim: the user's own lines; evaluation prompts among them are drawn too.

    Source of the rule: T5, arXiv 1910.10683, section 3.5.2 (temperature-scaled mixing).
    """

    def __init__(
        self,
        name: str,
        families: Sequence[Family],
        *,
        temperature: float = 1.0,
        verbatim: bool = False,
    ):
        self.name = name
        self._families = tuple(families)
        self._temperature = temperature
        self._verbatim = verbatim
        self._cumulative_shares = tuple(accumulate(_shares(families, temperature)))

    @classmethod
    def load(cls, name_or_path: str | Path, *, syntax: str = "natural") -> PromptSet:
        """Load a built-in set by name, or a ``.toml`` or ``.txt`` file by path.

        Args:
            name_or_path: one of ``BUILTIN`` and ``TAG_SETS``, or a file of the user's own.
            syntax: "natural" or "tags": which templates of a TOML file are used. ``TAG_SETS`` are
                tags always; a text file is used as written.

        Raises:
            UserError: an unknown name, a missing file, or a mistake in the file (with its place).
        """
        if syntax not in SYNTAXES:
            raise UserError(f"mlm_prompt_syntax: {syntax!r} is not one of {', '.join(SYNTAXES)}")
        path = find_set_file(name_or_path)
        if path.suffix == ".txt":
            return cls._from_lines(path.stem, read_contexts(path))
        if str(name_or_path) in TAG_SETS:
            syntax = "tags"
        families, temperature = read_families(path, syntax=syntax)
        return cls(path.stem, families, temperature=temperature)

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], *, concept: str, others: Sequence[str] = ()
    ) -> PromptSet:
        """Make contexts from the captions that contain ``concept`` and at least one more word.

        The concept is matched as whole words, ignoring case. If it occurs twice, the first one is
        the slot and the other stays as text. Captions that cannot be used are skipped; a warning
        says how many.

        Args:
            captions: those of all pictures, of all concepts.
            concept: what becomes the slot.
            others: the other concepts of the run. Captions that contain one of them instead
                belong to its set and cause no warning.

        Raises:
            UserError: if no caption is left.
        """
        pattern = _whole_words(concept)
        foreign = [_whole_words(other) for other in others]
        captions = list(captions)
        usable = [caption for caption in captions if pattern.search(caption)]
        texts = [pattern.sub("{}", " ".join(caption.split()), count=1) for caption in usable]
        texts = [text for text in texts if text.count("{}") == 1 and re.search(r"\w", text)]
        if not texts:
            raise UserError(
                f"mlm_prompt_set: none of the {len(captions)} captions holds {concept!r} and other "
                "words; write it into the captions or choose another prompt set"
            )
        rest = (caption for caption in captions if not pattern.search(caption))
        elsewhere = sum(any(other.search(caption) for other in foreign) for caption in rest)
        if skipped := len(captions) - elsewhere - len(texts):
            logger.warning(
                "%d of %d captions do not hold %r and other words: not used as prompts",
                skipped,
                len(captions),
                concept,
            )
        return cls._from_lines("captions", texts)

    @classmethod
    def _from_lines(cls, name: str, lines: Iterable[str]) -> PromptSet:
        # tokenizers split "'s" off, but the s after a typographic apostrophe is a word of its own
        lines = tuple(
            dict.fromkeys(line.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for line in lines)
        )
        if known := sum(map(is_dreambench, lines)):
            logger.warning(
                "%s: %d of %d prompts are DreamBench evaluation prompts; scores on that benchmark "
                "will not be held out",
                name,
                known,
                len(lines),
            )
        family = Family(name, Alternatives(Template((line,)) for line in lines), str)
        return cls(name, [family], verbatim=True)

    def draw(self, rng: random.Random) -> Context:
        """Draw a family by temperature, then one of its prompts; constant time.

        Never an evaluation prompt of DreamBench, unless the user's own lines hold one.
        """
        for _ in range(_MAX_REDRAWS):
            family = rng.choices(self._families, cum_weights=self._cumulative_shares)[0]
            text = family.text(rng.randrange(family.size))
            if self._verbatim or not is_dreambench(text):
                break
        else:
            raise UserError(f"prompt set {self.name}: it holds only DreamBench evaluation prompts")
        if family.prefixes:
            text = rng.choice(family.prefixes).replace("{}", text)
        return Context(text, family.name)

    def sample(self, rng: random.Random, concept: str) -> str:
        """Draw a context and put ``concept`` into it."""
        return self.draw(rng).fill(concept)

    def only(self, families: Collection[str]) -> PromptSet:
        """The set with only these families; the set itself if it has none of them."""
        chosen = [family for family in self._families if family.name in families]
        if not chosen:
            return self
        return PromptSet(self.name, chosen, temperature=self._temperature, verbatim=self._verbatim)

    def counts(self) -> dict[str, int]:
        """Prompts per family, neutral prefixes not counted.

        Computed from the sizes of the lists, not by enumeration: exact if no two combinations give
        the same text and none is an evaluation prompt, which holds for the built-in sets.
        """
        return {family.name: family.size for family in self._families}

    def shares(self) -> dict[str, float]:
        """The probability of each family in ``draw``."""
        total = self._cumulative_shares[-1]
        starts = (0.0, *self._cumulative_shares)
        pairs = zip(self._families, starts, self._cumulative_shares, strict=False)
        return {family.name: (end - start) / total for family, start, end in pairs}

    def all(self) -> Iterator[Context]:
        """Every context, family by family, without the neutral prefix."""
        for family in self._families:
            for text in map(family.text, range(family.size)):
                if self._verbatim or not is_dreambench(text):
                    yield Context(text, family.name)


def _whole_words(concept: str) -> re.Pattern:
    assert concept.strip(), "a concept without words"
    words = r"\s+".join(re.escape(word) for word in concept.split())
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def _shares(families: Sequence[Family], temperature: float) -> list[float]:
    """Relative shares of the families, scaled so that the largest is 1 and none overflows."""
    logs = [math.log(family.weight) + math.log(family.size) / temperature for family in families]
    return [math.exp(log - max(logs)) for log in logs]


class Member(NamedTuple):
    """A concept and the contexts it may appear in."""

    prompt_set: PromptSet
    text: str  # "sks dog"
    class_text: str = ""  # "dog"


class PromptPair(NamedTuple):
    """A prompt with its concepts, and the same prompt with their class words instead."""

    text: str
    class_text: str


class JointPrompts:
    """Prompts with one of several concepts, or with two of them.

    A joint prompt takes its context from the first concept's set, from the families that suit two.
    A style comes second: "sks dog in the style of zwx art". A context that names the other concept
    already, as a caption may, is filled with the first alone.

    Args:
        members: the concepts.
        joint_share: probability of two concepts in a prompt; without effect for a single member,
            whose prompts are drawn exactly as by its set.

    Source of the idea: two concepts in one prompt, as in Custom Diffusion, arXiv 2212.04488.
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
            for kind, families in _JOINT["families"].items()
        }

    def sample(self, rng: random.Random) -> PromptPair:
        """Draw a prompt."""
        if len(self._members) > 1 and rng.random() < self._joint_share:
            return self._sample_joint(rng, rng.sample(self._members, 2))
        member = rng.choice(self._members) if len(self._members) > 1 else self._members[0]
        return self._filled(member.prompt_set.draw(rng), member.text, member.class_text)

    def _sample_joint(self, rng: random.Random, pair: Sequence[Member]) -> PromptPair:
        first, second = sorted(pair, key=_is_style)  # stable: two of a kind stay as drawn
        kind = ("things", "thing_in_style", "styles")[sum(map(_is_style, pair))]
        context = self._joint_sets[first.text, kind].draw(rng)
        if _whole_words(second.text).search(context.text):
            return self._filled(context, first.text, first.class_text)
        relation = draw_relation(rng, kind=kind)
        return self._filled(
            context,
            f"{first.text} {relation} {second.text}",
            f"{first.class_text} {relation} {second.class_text}",
        )

    def _filled(self, context: Context, text: str, class_text: str) -> PromptPair:
        """Captions may name another concept, or this one again: the teacher knows neither."""
        of_teacher = context.text
        for member in self._members:
            pattern, words = _whole_words(member.text), member.class_text
            of_teacher = pattern.sub(lambda _found, words=words: words, of_teacher)
        return PromptPair(context.fill(text), context._replace(text=of_teacher).fill(class_text))


def draw_relation(rng: random.Random, *, kind: str = "things") -> str:
    """The words between two concepts, such as "next to".

    Args:
        rng: source of the draw.
        kind: "things", "thing_in_style" (the style is the second) or "styles".
    """
    return rng.choice(_JOINT["relations"][kind])


def _is_style(member: Member) -> bool:
    return member.prompt_set.name == "style"
