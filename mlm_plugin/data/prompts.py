"""Prompt sets: contexts in which a concept may stand, drawn one at a time.

A set is data: a TOML file with word lists and families of templates, a text file with one context
per line, or the captions of a dataset. This file holds the grammar that turns a TOML file into
prompts (schema below) and the draw; it knows no category, no tokenizer and no masking.

Schema of a prompt set::

    include = ["words.toml"]     # merged first; beside this file, else one of the package's
    temperature = 4.0            # P(family) ~ weight * size ** (1 / temperature)

    [prefixes]                   # neutral frames for the families that are only phrases
    natural = ["{}", "a photo of {}"]
    tags = ["{}", "photo, {}"]

    [lists]                      # a slot {thing} takes one entry of the list `thing`
    thing = ["chair", "lamp"]
    where = ["next to a {thing}", "on mars"]   # lists may hold other lists, never the concept

    [families.relations]
    weight = 1.0                 # default 1
    prefix = true                # default true; false for texts that need no "a photo of"
    natural = ["{} {where}"]     # {} is the concept, once in every template
    tags = ["{}, {where}"]

"a" and "an" are corrected from the word that follows, so templates simply say "a". In tag syntax
every tag loses its leading article. Entries of the own file replace included ones of that name.
"""

from __future__ import annotations

import difflib
import logging
import random
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
SYNTAXES: tuple[str, ...] = ("natural", "tags")

_DATA = Path(__file__).parent
_SETS = _DATA / "prompt_sets"
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
        families: Sequence[_Family],
        *,
        syntax: str,
        temperature: float = _DEFAULT_TEMPERATURE,
        verbatim: bool = False,
    ):
        self.name = name
        self.syntax = syntax
        self._families = tuple(families)
        self._verbatim = verbatim
        shares = [family.weight * family.size ** (1 / temperature) for family in families]
        self._cumulative_shares = tuple(accumulate(shares))

    @classmethod
    def load(cls, name_or_path: str | Path, *, syntax: str = "natural") -> PromptSet:
        """Load a built-in set by name, or a ``.toml`` or ``.txt`` file by path.

        Args:
            name_or_path: one of ``BUILTIN``; or a TOML file of the schema above; or a text file
                with one context per line, ``{}`` for the concept, ``#`` for comments.
            syntax: "natural" or "tags"; which templates of a TOML file are used. A text file is
                taken as it is written.

        Raises:
            UserError: unknown name, missing file, or a mistake in the file (with its place).
        """
        if syntax not in SYNTAXES:
            raise UserError(f"mlm_prompt_syntax: {syntax!r} is not one of {', '.join(SYNTAXES)}")
        if str(name_or_path) in BUILTIN:
            return _from_toml(_SETS / f"{name_or_path}.toml", syntax=syntax)
        path = Path(name_or_path).expanduser()
        if path.suffix not in (".toml", ".txt"):
            raise UserError(
                f"mlm_prompt_set: {str(name_or_path)!r} is neither a built-in set "
                f"({', '.join(BUILTIN)}) nor a .toml or .txt file{_nearest(path.name, BUILTIN)}"
            )
        if not path.is_file():
            raise UserError(f"mlm_prompt_set: there is no file {path}")
        return _from_toml(path, syntax=syntax) if path.suffix == ".toml" else _from_text(path)

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, concept: str) -> PromptSet:
        """Make contexts of the captions that hold ``concept`` and at least one word more.

        The concept is found as whole words, in any case. If a caption holds it twice, the first is
        the slot and the other stays as text. Captions that cannot be used are skipped; a warning
        says how many.

        Raises:
            UserError: if no caption is left.
        """
        assert concept.strip(), "a concept without words"
        captions = list(captions)
        words = r"\s+".join(re.escape(word) for word in concept.split())
        pattern = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
        usable = (caption for caption in captions if pattern.search(caption))
        texts = [pattern.sub("{}", " ".join(caption.split()), count=1) for caption in usable]
        texts = [text for text in texts if text.count("{}") == 1 and re.search(r"\w", text)]
        if not texts:
            raise UserError(
                f"mlm_prompt_set: none of the {len(captions)} captions holds {concept!r} and other "
                "words; write it into the captions or choose another prompt set"
            )
        if skipped := len(captions) - len(texts):
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
        family = _Family(name, _Alternatives(_Sequence((line,)) for line in lines), str)
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


# --- The grammar: sizes are known, and the n-th text is computed without the ones before it.


class _Sequence:
    """Literal text and slots in a row; its size is the product of the slots' sizes."""

    def __init__(self, parts: Iterable[str | _Alternatives]):
        self.parts = tuple(parts)
        self.size = 1
        for part in self.parts:
            self.size *= 1 if isinstance(part, str) else part.size

    def text(self, index: int) -> str:
        pieces = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
            else:
                index, choice = divmod(index, part.size)
                pieces.append(part.text(choice))
        return "".join(pieces)


class _Alternatives:
    """One of several sequences; its size is their sum."""

    def __init__(self, sequences: Iterable[_Sequence]):
        self.sequences = tuple(sequences)
        ends = tuple(accumulate(sequence.size for sequence in self.sequences))
        self.starts = (0, *ends[:-1])
        self.size = ends[-1]

    def text(self, index: int) -> str:
        which = bisect_right(self.starts, index) - 1
        return self.sequences[which].text(index - self.starts[which])


class _Family:
    """A named grammar with its share in the draw and the last touch on its texts."""

    def __init__(
        self,
        name: str,
        grammar: _Alternatives,
        polish: Callable[[str], str],
        *,
        weight: float = 1.0,
        prefixes: Sequence[str] = (),
    ):
        self.name, self.weight, self.prefixes = name, weight, tuple(prefixes)
        self.size = grammar.size
        self._grammar, self._polish = grammar, polish

    def text(self, index: int) -> str:
        return self._polish(self._grammar.text(index))


class _Lists:
    """The word lists of a file, compiled when a template first asks for them."""

    def __init__(self, entries: Mapping[str, Sequence[str]], *, where: str):
        self._entries, self._where = entries, where
        self._compiled: dict[str, _Alternatives] = {}
        self._open: list[str] = []

    def sequence(self, template: str) -> _Sequence:
        parts = re.split(r"\{(\w+)\}", template)
        return _Sequence(
            self._list(part) if place % 2 else part for place, part in enumerate(parts) if part
        )

    def _list(self, name: str) -> _Alternatives:
        if name in self._open:
            raise UserError(f"{self._where}: list {name!r} contains itself")
        if name not in self._entries:
            raise UserError(
                f"{self._where}: there is no list {name!r}{_nearest(name, self._entries)}"
            )
        if name not in self._compiled:
            self._open.append(name)
            self._compiled[name] = _Alternatives(map(self.sequence, self._entries[name]))
            self._open.pop()
        return self._compiled[name]


# --- Files


def _from_text(path: Path) -> PromptSet:
    lines = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
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
    tables = _merged(path)
    lists = _Lists(tables["lists"], where=str(path))
    polish = correct_articles if syntax == "natural" else _tag_style
    families = [
        _Family(
            name,
            _Alternatives(map(lists.sequence, family[syntax])),
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


def _merged(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a prompt set and what it includes; the file itself wins over what it includes."""
    path = path.resolve()
    if path in including:
        raise UserError(f"{path}: includes itself")
    own = _read_toml(path)
    _check_schema(own, where=str(path))
    merged: dict[str, Any] = {"prefixes": {}, "lists": {}, "families": {}}
    included = [_merged(_find(name, path), (*including, path)) for name in own.get("include", ())]
    for tables in (*included, own):
        for key, value in tables.items():
            if key in ("prefixes", "lists", "families"):
                merged[key] |= value
            elif key == "temperature":
                merged[key] = value
    return merged


def _find(name: str, includer: Path) -> Path:
    for folder in (includer.parent, _SETS):
        if (folder / name).is_file():
            return folder / name
    shipped = ", ".join(sorted(file.name for file in _SETS.glob("*.toml")))
    raise UserError(f"{includer}: include {name!r} is neither beside it nor one of {shipped}")


_KEYS = ("include", "temperature", "prefixes", "lists", "families")
_FAMILY_KEYS = ("weight", "prefix", *SYNTAXES)


def _check_schema(tables: Mapping[str, Any], *, where: str) -> None:
    _check_keys(tables, _KEYS, where=where)
    for name in ("lists", "families"):
        _check_table(tables.get(name, {}), where=f"{where}: [{name}]")
    _check_texts(tables.get("include", ["-"]), where=f"{where}: include")
    _check_positive(tables.get("temperature", 1), where=f"{where}: temperature")
    _check_keys(tables.get("prefixes", {}), SYNTAXES, where=f"{where}: [prefixes]")
    for name, texts in tables.get("prefixes", {}).items():
        _check_texts(texts, where=f"{where}: prefixes.{name}", slots=1)
    for name, texts in tables.get("lists", {}).items():
        _check_texts(texts, where=f"{where}: lists.{name}", slots=0)
    for name, family in tables.get("families", {}).items():
        place = f"{where}: [families.{name}]"
        _check_keys(family, _FAMILY_KEYS, where=place)
        _check_positive(family.get("weight", 1), where=f"{place} weight")
        if not isinstance(family.get("prefix", True), bool):
            raise UserError(f"{place} prefix: {family['prefix']!r} is neither true nor false")
        if not any(syntax in family for syntax in SYNTAXES):
            raise UserError(f"{place}: no templates; add natural = [...] or tags = [...]")
        for syntax in SYNTAXES:
            if syntax in family:
                _check_texts(family[syntax], where=f"{place} {syntax}", slots=1)


def _check_keys(table: Any, allowed: Sequence[str], *, where: str) -> None:
    _check_table(table, where=where)
    for key in table:
        if key not in allowed:
            raise UserError(
                f"{where}: unknown key {key!r}; allowed: {', '.join(allowed)}"
                f"{_nearest(key, allowed)}"
            )


def _check_table(table: Any, *, where: str) -> None:
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: expected a table, got {table!r}")


def _check_positive(value: Any, *, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UserError(f"{where}: {value!r} is not a number above 0")


def _check_texts(texts: Any, *, where: str, slots: int | None = None) -> None:
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: expected a list of texts, got {texts!r}")
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise UserError(f"{where}: {text!r} is there twice; prompts would be counted twice")
        seen.add(text)
        if slots is not None and text.count("{}") != slots:
            rule = "exactly once" if slots else "in templates only, not in lists"
            raise UserError(f"{where}: {text!r}: write {{}} (the concept) {rule}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file; save it as UTF-8") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- English

_ENGLISH = _read_toml(_DATA / "english.toml")
FUNCTION_WORDS: frozenset[str] = frozenset(_ENGLISH["function_words"])
NEUTRAL_WORDS: frozenset[str] = frozenset(_ENGLISH["neutral_words"])
_SOUND_EXCEPTIONS = {
    word: article for article, words in _ENGLISH["articles"].items() for word in words
}


def correct_articles(text: str) -> str:
    """Make every "a" or "an" fit the word that follows; before the slot it stays as written."""
    return re.sub(r"\ban? (?=(\w+))", _fitting_article, text)


def _fitting_article(match: re.Match) -> str:
    word = match[1]
    article = _SOUND_EXCEPTIONS.get(word) or ("an" if word[0] in "aeiou" else "a")
    return f"{article} "


def _tag_style(text: str) -> str:
    return correct_articles(re.sub(r"(^|, )(?:an?|the) ", r"\1", text))


# --- DreamBench, categories, subjects


def normal_form(text: str) -> str:
    """The content words of a prompt in alphabetical order, with the slot ``{}``.

    Function words ("a", "on", "with") and neutral words ("photo") are dropped, punctuation and case
    too, so that a prompt is recognised behind any prefix and in both syntaxes.
    """
    words = re.findall(r"\{\}|[\w']+", text.lower())
    return " ".join(sorted(w for w in words if w not in FUNCTION_WORDS and w not in NEUTRAL_WORDS))


def is_dreambench(text: str) -> bool:
    """Whether a context (with ``{}``) is one of the DreamBench evaluation prompts."""
    return normal_form(text) in _dreambench_forms()


def dreambench_prompts(kind: str) -> tuple[str, ...]:
    """The 25 DreamBench evaluation prompts for "living" or "object", ``{}`` for the concept.

    Source: google/dreambooth dataset/prompts_and_classes.txt.
    """
    prompts = _dreambench()
    if kind not in prompts:
        raise UserError(f"DreamBench prompts: {kind!r} is not one of {', '.join(prompts)}")
    return prompts[kind]


@cache
def _dreambench() -> dict[str, tuple[str, ...]]:
    return {kind: tuple(prompts) for kind, prompts in _read_toml(_DATA / "dreambench.toml").items()}


@cache
def _dreambench_forms() -> frozenset[str]:
    return frozenset(normal_form(text) for prompts in _dreambench().values() for text in prompts)


def subjects(category: str) -> tuple[str, ...]:
    """Generic subjects of a built-in category ("golden retriever"), without article.

    They stand in for the concept where none is learned, as when a contextualizer is pretrained.
    """
    table = _subject_table()["subjects"]
    if category not in table:
        raise UserError(f"subjects: {category!r} is not one of {', '.join(table)}")
    return tuple(table[category])


def category_of(class_token: str) -> str:
    """The built-in prompt set that fits a class word; "object" for words it does not know.

    The whole class is looked up first ("rubber duck"), then its last word ("duck toy"), each also
    without a plural "s".
    """
    categories = _category_of_word()
    words = class_token.lower().replace("_", " ").split()
    for candidate in (" ".join(words), *words[-1:]):
        for form in (candidate, candidate.removesuffix("s"), candidate.removesuffix("es")):
            if form in categories:
                return categories[form]
    return "object"


@cache
def _subject_table() -> dict[str, dict[str, list[str]]]:
    return _read_toml(_DATA / "subjects.toml")


@cache
def _category_of_word() -> dict[str, str]:
    tables = _subject_table()
    return {
        word: category
        for table in ("subjects", "classes")  # the second wins: it holds the exceptions
        for category, words in tables[table].items()
        for word in words
    }
