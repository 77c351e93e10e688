"""What every text of a prompts file asks for, as JSON beside it: ``test_prompts.json``.

Labels come from the attributes that the captions were made from, so that scoring parses no text. A
text without labels is not guessed at. Knows no pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, read_text
from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.world import ATTRIBUTES

__all__ = ["PromptLabels", "labels_path", "read_labels", "write_labels"]

COMMAND = "`mlm-plugin pocket concept`"


class PromptLabels(NamedTuple):
    """The labels of a prompts file.

    Attributes:
        concept: its name, "sks dog".
        captions: captions by text, with ``{}`` for the concept.
    """

    concept: str
    captions: Mapping[str, Caption]


def labels_path(prompts: str | Path) -> Path:
    """The file with the labels of a prompts file: beside it, with the same stem."""
    return Path(prompts).with_suffix(".json")


def write_labels(path: Path, concept: str, captions: Sequence[Caption]) -> None:
    """Write what each text asks for, by text; completely or not at all."""
    content = {
        "concept": concept,
        "prompts": {caption.text: dict(caption.said) for caption in captions},
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_labels(path: Path) -> PromptLabels:
    """Read the labels.

    Raises:
        UserError: the file cannot be read, has another form, or asks for what is not in the
            world.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not valid JSON; write it again by {COMMAND}") from error
    if not isinstance(content, dict) or not isinstance(content.get("concept"), str):
        raise UserError(f'{path}: names no "concept"; write it again by {COMMAND}')
    prompts = content.get("prompts")
    if not isinstance(prompts, dict):
        raise UserError(f'{path}: has no table of "prompts"; write it again by {COMMAND}')
    captions = {text: Caption(text, _checked(said, text, path)) for text, said in prompts.items()}
    return PromptLabels(content["concept"], captions)


def _checked(said: Any, text: str, path: Path) -> dict[str, str]:
    if not isinstance(said, dict):
        raise UserError(f"{path}: {text!r} has {said!r} in place of a table of what it asks for")
    for name, value in said.items():
        if name not in ATTRIBUTES:
            raise UserError(f"{path}: {text!r} asks for {name!r}; allowed: {', '.join(ATTRIBUTES)}")
        if value not in ATTRIBUTES[name]:
            raise UserError(
                f"{path}: {text!r} asks for {name} {value!r}; "
                f"allowed: {', '.join(ATTRIBUTES[name])}"
            )
    return said
