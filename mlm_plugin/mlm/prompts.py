"""Prompt sets: contexts in which a concept may stand, drawn one at a time.

A set is data: a TOML file with word lists and families of templates (schema in ``grammar``), a text
file with one context per line, or the captions of a dataset. This file loads them and draws; it
knows no tokenizer and no masking.

"a" and "an" are corrected from the word that follows, so templates simply say "a". In tag syntax
every tag loses its leading article.
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

from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.errors import UserError
from mlm_plugin.files import read_text
from mlm_plugin.prompt_sets.english import (
    FUNCTION_WORDS,
    NEUTRAL_WORDS,
    category_of,
    correct_articles,
    dreambench_prompts,
    is_dreambench,
    normal_form,
    subjects,
    tag_style,
)
from mlm_plugin.prompt_sets.grammar import (
    SETS,
    SYNTAXES,
    Alternatives,
    Family,
    Template,
    WordLists,
    merged_tables,
)

__all__ = [
    "BUILTIN",
    "FUNCTION_WORDS",
    "NEUTRAL_WORDS",
    "SYNTAXES",
    "Context",
    "PromptSet",
    "category_of",
    "correct_articles",
    "dreambench_prompts",
    "is_dreambench",
    "normal_form",
    "subjects",
]

logger = logging.getLogger(__name__)

BUILTIN: tuple[str, ...] = ("living", "person", "object", "building", "style")

_DEFAULT_TEMPERATURE = 4.0
_MAX_REDRAWS = 1000


class Context(NamedTuple):
    """A prompt with ``{}`` where the concept goes (exactly once), and the family it is from."""

    text: str
    family: str

    def fill(self, concept: str) -> str:
        """Put ``concept`` into the slot; other braces in the text stay as they are."""
        return self.text.replace("{}", concept)


class PromptSet:
    """A set of contexts for one concept; see the module docstring for where they come from.

    Families are drawn with probability proportional to ``weight * size ** (1 / temperature)``:
    1 draws every prompt alike, larger values let small families be heard. Inside a family every
    prompt is equally likely. Source of the rule: T5, arXiv 1910.10683, section 3.5.2
    (temperature-scaled mixing).
    """

    def __init__(
        self,
        name: str,
        families: Sequence[Family],
        *,
        syntax: str,
        temperature: float = _DEFAULT_TEMPERATURE,
        verbatim: bool = False,
    ):
        self.name = name
        self.syntax = syntax
        self._families = tuple(families)
        self._temperature = temperature
        self._verbatim = verbatim
        self._cumulative_shares = tuple(accumulate(_shares(families, temperature)))

    @classmethod
    def load(cls, name_or_path: str | Path, *, syntax: str = "natural") -> PromptSet:
        """Load a built-in set by name, or a ``.toml`` or ``.txt`` file by path.

        Args:
            name_or_path: one of ``BUILTIN``; or a TOML file (schema in ``grammar``); or a text file
                with one context per line, ``{}`` for the concept, ``#`` for comments.
            syntax: "natural" or "tags"; which templates of a TOML file are used. A text file is
                taken as it is written.

        Raises:
            UserError: unknown name, missing file, or a mistake in the file (with its place).
        """
        if syntax not in SYNTAXES:
            raise UserError(f"mlm_prompt_syntax: {syntax!r} is not one of {', '.join(SYNTAXES)}")
        if str(name_or_path) in BUILTIN:
            return _from_toml(SETS / f"{name_or_path}.toml", syntax=syntax)
        path = Path(name_or_path).expanduser()
        if path.suffix not in (".toml", ".txt"):
            raise UserError(
                f"mlm_prompt_set: {str(name_or_path)!r} is neither a built-in set "
                f"({', '.join(BUILTIN)}) nor a .toml or .txt file{did_you_mean(path.name, BUILTIN)}"
            )
        if not path.is_file():
            raise UserError(f"mlm_prompt_set: there is no file {path}")
        return _from_toml(path, syntax=syntax) if path.suffix == ".toml" else _from_text(path)

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], *, concept: str, others: Sequence[str] = ()
    ) -> PromptSet:
        """Make contexts of the captions that hold ``concept`` and at least one word more.

        The concept is found as whole words, in any case. If a caption holds it twice, the first is
        the slot and the other stays as text. Captions that cannot be used are skipped; a warning
        says how many.

        Args:
            captions: of the pictures of all concepts.
            concept: what becomes the slot.
            others: the other concepts of the run: captions that hold one of them instead belong
                to its set and are no reason for a warning.

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
        lines = tuple(dict.fromkeys(lines))
        if known := sum(map(is_dreambench, lines)):
            logger.warning(
                "%s: %d of %d prompts are DreamBench evaluation prompts; scores on that benchmark "
                "will not be held out",
                name,
                known,
                len(lines),
            )
        family = Family(name, Alternatives(Template((line,)) for line in lines), str)
        return cls(name, [family], syntax="natural", verbatim=True)

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
        """The set with these families alone; the set itself if it has none of them."""
        chosen = [family for family in self._families if family.name in families]
        if not chosen:
            return self
        return PromptSet(
            self.name,
            chosen,
            syntax=self.syntax,
            temperature=self._temperature,
            verbatim=self._verbatim,
        )

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
    """Relative shares of the families; the largest is 1, so that none leaves a float's range."""
    logs = [math.log(family.weight) + math.log(family.size) / temperature for family in families]
    return [math.exp(log - max(logs)) for log in logs]


def _from_text(path: Path) -> PromptSet:
    lines = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if (found := line.count("{}")) != 1:
            raise UserError(
                f"{path}, line {number}: {found} slots {{}} in {line!r}; "
                "write {} exactly once, where the concept goes"
            )
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: no prompts; write one per line, with {{}} for the concept")
    return PromptSet._from_lines(path.stem, lines)


def _from_toml(path: Path, *, syntax: str) -> PromptSet:
    tables = merged_tables(path)
    lists = WordLists(tables["lists"], where=str(path))
    polish = correct_articles if syntax == "natural" else tag_style
    families = [
        Family(
            name,
            Alternatives(map(lists.template, family[syntax])),
            polish,
            weight=family.get("weight", 1.0),
            prefixes=tables["prefixes"].get(syntax, ()) if family.get("prefix", True) else (),
        )
        for name, family in tables["families"].items()
        if syntax in family
    ]
    if not families:
        raise UserError(f"{path}: no family has {syntax} templates; add `{syntax} = [...]` to one")
    temperature = tables.get("temperature", _DEFAULT_TEMPERATURE)
    return PromptSet(path.stem, families, syntax=syntax, temperature=temperature)
