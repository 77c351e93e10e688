"""Neutral captions with a slot for the concept, as used in Textual Inversion.

The texts are data (``templates.toml``). Knows no pictures and no random draws.

Source of the idea: Textual Inversion, arXiv 2208.01618; ``--use_object_template`` and
``--use_style_template`` of sd-scripts. The texts are our own.
"""

from __future__ import annotations

from pathlib import Path

from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError
from mlm_plugin.prompt_sets.english import correct_articles

__all__ = ["fill_template", "load_templates"]

_FILE = Path(__file__).parent / "templates.toml"


def load_templates(kind: str) -> tuple[str, ...]:
    """The templates for "object" or "style", ``{}`` for the concept.

    Raises:
        UserError: another kind.
    """
    templates = read_toml(_FILE)
    if kind not in templates:
        raise UserError(f"templates: {kind!r} is not one of {', '.join(templates)}")
    return tuple(templates[kind])


def fill_template(template: str, concept: str) -> str:
    """Put the concept into the slot; "a" or "an" before it agrees with its first word."""
    return correct_articles(template.replace("{}", concept))
