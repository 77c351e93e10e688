"""The grammar of prompt sets: word lists and families of templates that expand to texts.

Sizes are known without enumeration, and the n-th text is computed without the ones before it. Knows
no English, no random draws and no evaluation prompts.

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

Entries of a file replace included ones of the same name.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError

__all__ = [
    "SETS",
    "SYNTAXES",
    "Alternatives",
    "Family",
    "Template",
    "WordLists",
    "check_schema",
    "merged_tables",
]

SYNTAXES: tuple[str, ...] = ("natural", "tags")
SETS = Path(__file__).parent  # the package's own

_KEYS = ("include", "temperature", "prefixes", "lists", "families")
_FAMILY_KEYS = ("weight", "prefix", *SYNTAXES)
_SLOT = re.compile(r"\{(\w+)\}")


class Template:
    """A sequence of literal text and slots; its size is the product of the slots' sizes."""

    def __init__(self, parts: Iterable[str | Alternatives]):
        self.parts = tuple(parts)
        self.size = 1
        for part in self.parts:
            self.size *= 1 if isinstance(part, str) else part.size

    def text(self, index: int) -> str:
        """The ``index``-th text of ``size``."""
        pieces = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
            else:
                index, choice = divmod(index, part.size)
                pieces.append(part.text(choice))
        return "".join(pieces)


class Alternatives:
    """One of several templates; its size is the sum of theirs."""

    def __init__(self, templates: Iterable[Template]):
        self.templates = tuple(templates)
        ends = tuple(accumulate(template.size for template in self.templates))
        self.starts = (0, *ends[:-1])
        self.size = ends[-1]

    def text(self, index: int) -> str:
        """The ``index``-th text of ``size``."""
        which = bisect_right(self.starts, index) - 1
        return self.templates[which].text(index - self.starts[which])


class Family:
    """A named grammar with its weight and the final correction of its texts."""

    def __init__(
        self,
        name: str,
        grammar: Alternatives,
        polish: Callable[[str], str],
        *,
        weight: float = 1.0,
        prefixes: Sequence[str] = (),
    ):
        self.name, self.weight, self.prefixes = name, weight, tuple(prefixes)
        self.size = grammar.size
        self._grammar, self._polish = grammar, polish

    def text(self, index: int) -> str:
        """The ``index``-th text of ``size``, without a prefix."""
        return self._polish(self._grammar.text(index))


class WordLists:
    """The word lists of a file, compiled when a template first needs them."""

    def __init__(self, entries: Mapping[str, Sequence[str]], *, where: str):
        self._entries, self._where = entries, where
        self._compiled: dict[str, Alternatives] = {}
        self._open: list[str] = []

    def template(self, text: str) -> Template:
        """Compile a text with slots ``{name}``; ``{}`` is left unchanged.

        Raises:
            UserError: a list is missing or contains itself.
        """
        parts = _SLOT.split(text)
        return Template(
            self._list(part) if place % 2 else part for place, part in enumerate(parts) if part
        )

    def _list(self, name: str) -> Alternatives:
        if name in self._open:
            raise UserError(f"{self._where}: list {name!r} contains itself")
        if name not in self._entries:
            raise UserError(
                f"{self._where}: there is no list {name!r}{did_you_mean(name, self._entries)}"
            )
        if name not in self._compiled:
            self._open.append(name)
            self._compiled[name] = Alternatives(map(self.template, self._entries[name]))
            self._open.pop()
        return self._compiled[name]


def merged_tables(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a prompt set and what it includes; the file itself takes precedence.

    Args:
        path: a TOML file of the schema above.
        including: the files that included this one.

    Raises:
        UserError: a mistake in one of the files.
    """
    path = path.resolve()
    if path in including:
        raise UserError(f"{path}: includes itself")
    own = read_toml(path)
    check_schema(own, where=str(path))
    merged: dict[str, Any] = {"prefixes": {}, "lists": {}, "families": {}}
    included = [
        merged_tables(_find(name, path), (*including, path)) for name in own.get("include", ())
    ]
    for tables in (*included, own):
        for key, value in tables.items():
            if key in ("prefixes", "lists", "families"):
                merged[key] |= value
            elif key == "temperature":
                merged[key] = value
    return merged


def _find(name: str, includer: Path) -> Path:
    for folder in (includer.parent, SETS):
        if (folder / name).is_file():
            return folder / name
    shipped = ", ".join(sorted(file.name for file in SETS.glob("*.toml")))
    raise UserError(f"{includer}: include {name!r} is neither beside it nor one of {shipped}")


def check_schema(tables: Mapping[str, Any], *, where: str) -> None:
    """Refuse everything that is not in the schema above.

    Args:
        tables: content of one file, before it is merged with others.
        where: the file, for the error.

    Raises:
        UserError: an unknown key or a wrong value, with its location.
    """
    _check_keys(tables, _KEYS, where=where)
    for name in ("lists", "families"):
        _check_table(tables.get(name, {}), where=f"{where}: [{name}]")
    _check_texts(tables.get("include", ["-"]), where=f"{where}: include")
    _check_positive(tables.get("temperature", 1), where=f"{where}: temperature")
    _check_keys(tables.get("prefixes", {}), SYNTAXES, where=f"{where}: [prefixes]")
    for name, texts in tables.get("prefixes", {}).items():
        _check_texts(texts, where=f"{where}: prefixes.{name}", slots=1, takes_lists=False)
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
                f"{did_you_mean(key, allowed)}"
            )


def _check_table(table: Any, *, where: str) -> None:
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: expected a table, got {table!r}")


def _check_positive(value: Any, *, where: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value < float("inf")):
        raise UserError(f"{where}: {value!r} is not a finite number above 0")


def _check_texts(
    texts: Any, *, where: str, slots: int | None = None, takes_lists: bool = True
) -> None:
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: expected a list of texts, got {texts!r}")
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise UserError(f"{where}: {text!r} is there twice; prompts would be counted twice")
        seen.add(text)
        if slots is not None:
            _check_slots(text, where=f"{where}: {text!r}", slots=slots, takes_lists=takes_lists)


def _check_slots(text: str, *, where: str, slots: int, takes_lists: bool) -> None:
    if text.count("{}") != slots:
        rule = "exactly once" if slots else "in templates only, not in lists"
        raise UserError(f"{where}: write {{}} (the concept) {rule}")
    if not takes_lists and _SLOT.search(text):
        raise UserError(f"{where}: a prefix takes no lists, only {{}}")
    if re.search(r"[{}]", _SLOT.sub("", text).replace("{}", "")):
        raise UserError(f"{where}: a slot is {{name}} with letters, digits and _ in the name")
