"""Evaluation prompts: with the concept for drawing, and without its placeholder for scoring.

Knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlm_plugin.errors import UserError
from mlm_plugin.files import read_text
from mlm_plugin.prompt_sets.english import category_of, correct_articles, dreambench_prompts

__all__ = [
    "EvaluationPrompt",
    "evaluation_prompts",
    "load_templates",
    "picture_seed",
    "with_class",
    "with_concept",
]

LIVING = ("living", "person")  # categories with DreamBench's prompts for live subjects


class EvaluationPrompt(NamedTuple):
    """One prompt.

    Attributes:
        template: with ``{}`` for the concept.
        prompt: the prompt to draw, "a sks dog in the jungle".
        text: what CLIP-T compares with, "a dog in the jungle".
    """

    template: str
    prompt: str
    text: str


def evaluation_prompts(
    templates: Sequence[str], *, placeholder_token: str, class_token: str
) -> list[EvaluationPrompt]:
    """Fill templates for drawing ("sks dog") and for scoring ("dog").

    The placeholder is left out of the text for scoring: no CLIP knows it, and a rare word would
    lower the score of every picture.

    Source: Textual Inversion's and Custom Diffusion's evaluations, which leave it out too.
    """
    return [
        EvaluationPrompt(
            template,
            with_concept(template, placeholder_token, class_token),
            with_class(template, class_token),
        )
        for template in templates
    ]


def with_concept(template: str, placeholder_token: str, class_token: str) -> str:
    """Put "sks dog" into the slot; the article is not adapted, as in training."""
    if not placeholder_token:
        return with_class(template, class_token)
    return template.replace("{}", f"{placeholder_token} {class_token}".strip())


def with_class(template: str, class_token: str) -> str:
    """Put "dog" into the slot; "a" and "an" agree with it."""
    return correct_articles(template.replace("{}", class_token))


def load_templates(path: str | Path | None, *, class_token: str) -> list[str]:
    """Templates of a text file, or DreamBench's 25 for the class.

    Args:
        path: one template per line, ``{}`` once, ``#`` in column 0 = comment; None = DreamBench.
        class_token: decides which of DreamBench's two lists is used.

    Raises:
        UserError: the file is missing or empty, or a line has not exactly one slot.

    Source: google/dreambooth dataset/prompts_and_classes.txt.
    """
    if path is None:
        kind = "living" if category_of(class_token) in LIVING else "object"
        return list(dreambench_prompts(kind))
    templates = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.count("{}") != 1:
            raise UserError(
                f"--prompts {path}, line {number}: {line.strip()!r} has {line.count('{}')} slots; "
                "write {} exactly once, where the concept goes"
            )
        templates.append(" ".join(line.split()))
    if not templates:
        raise UserError(f"--prompts {path}: no prompts; write one per line, with {{}} in each")
    if double := {text for text in templates if templates.count(text) > 1}:
        raise UserError(f"--prompts {path}: {min(double)!r} is there twice; remove one")
    return templates


def picture_seed(seed: int, template: str, number: int) -> int:
    """Noise of picture ``number`` of a template.

    Derived from the template, not from the concept or the position in a list, so that two models
    draw the same prompt from the same noise, whatever they call the concept.
    """
    name = f"evaluate/{seed}/{template}/{number}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
