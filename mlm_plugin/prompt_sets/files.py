"""The file of a prompt set: TOML with word lists and templates, or text with a context per line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError
from mlm_plugin.files import read_text
from mlm_plugin.prompt_sets.english import correct_articles, tag_style
from mlm_plugin.prompt_sets.grammar import SETS, Alternatives, Family, WordLists, merged_tables

__all__ = [
    "BUILTIN",
    "TAG_SETS",
    "FamilySet",
    "find_set_file",
    "joint_prompt_tables",
    "read_contexts",
    "read_families",
]

BUILTIN: tuple[str, ...] = ("living", "person", "object", "building", "style")
"""Sets by category of the concept; contextualizers are pretrained on them."""

TAG_SETS: tuple[str, ...] = ("illustration",)
"""Built-in sets that are always drawn as tags."""

_DEFAULT_TEMPERATURE = 4.0


class FamilySet(NamedTuple):
    """The contents of a TOML file for one syntax."""

    families: list[Family]
    temperature: float


def find_set_file(name_or_path: str | Path) -> Path:
    """The file of a built-in set, or the user's own.

    Raises:
        UserError: an unknown name, or no such file.
    """
    named = (*BUILTIN, *TAG_SETS)
    if str(name_or_path) in named:
        return SETS / f"{name_or_path}.toml"
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".toml", ".txt"):
        raise UserError(
            f"mlm_prompt_set: {str(name_or_path)!r} is neither a built-in set "
            f"({', '.join(named)}) nor a .toml or .txt file{did_you_mean(path.name, named)}"
        )
    if not path.is_file():
        raise UserError(f"mlm_prompt_set: there is no file {path}")
    return path


def read_families(path: Path, *, syntax: str) -> FamilySet:
    """Families of a TOML file (schema in ``grammar``) that have templates in this syntax.

    Raises:
        UserError: a mistake in the file, with its location.
    """
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
    return FamilySet(families, tables.get("temperature", _DEFAULT_TEMPERATURE))


def read_contexts(path: Path) -> list[str]:
    """Contexts of a text file: one per line, ``{}`` for the concept, ``#`` for comments.

    Raises:
        UserError: a line without exactly one slot, or no line at all.
    """
    contexts = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if (found := line.count("{}")) != 1:
            raise UserError(
                f"{path}, line {number}: {found} slots {{}} in {line!r}; "
                "write {} exactly once, where the concept goes"
            )
        contexts.append(line)
    if not contexts:
        raise UserError(f"{path}: no prompts; write one per line, with {{}} for the concept")
    return contexts


def joint_prompt_tables() -> dict[str, dict[str, list[str]]]:
    """Relations between two concepts, and the families of contexts that suit two."""
    return read_toml(SETS / "tables" / "joint_prompts.toml")
