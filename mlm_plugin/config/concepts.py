"""What is learned: each concept's name in prompts and its class, from options or the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlm_plugin.config.datasets import DatasetConfig
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError

__all__ = ["Concept", "concepts_of"]


class Concept(NamedTuple):
    """What is learned: its name in prompts and its class (``sks``, ``dog``)."""

    placeholder_token: str | None
    class_token: str | None

    @property
    def text(self) -> str:
        """The concept as in prompts and captions: ``"sks dog"``."""
        return " ".join(word for word in self if word)


def concepts_of(
    config: TrainConfig, datasets: Sequence[DatasetConfig], *, required: bool
) -> tuple[Concept, ...]:
    """Name and class of everything that is learned, from the options or from ``class_tokens``.

    ``"sks duck toy"`` means placeholder ``sks`` and class ``duck toy``. Every placeholder named by
    the subsets is a concept.

    Args:
        config: may name placeholders, classes or both.
        datasets: their subsets may name concepts by ``class_tokens``.
        required: whether the run needs complete concepts; else a class may be None, and a concept
            without a name is left out.

    Raises:
        UserError: A concept is unknown, ambiguous or named twice.
    """
    placeholders, classes = config.mlm.placeholder_token, config.mlm.class_token
    found = _class_tokens(datasets)
    if placeholders and classes:
        if len(placeholders) != len(classes):
            raise UserError(
                f"placeholder_token names {len(placeholders)} concepts, class_token "
                f"{len(classes)}; give one class for each (words that belong together in quotes)"
            )
        concepts = [Concept(*pair) for pair in zip(placeholders, classes, strict=True)]
    elif placeholders:
        concepts = [_by_placeholder(placeholder, found) for placeholder in placeholders]
    elif classes:
        concepts = [_by_class(class_token, found) for class_token in classes]
    else:
        concepts = [_by_first_word(text) for text in found]
    if required:
        _require_names(concepts, found)
    return tuple(concept for concept in concepts if concept.placeholder_token)


def _class_tokens(datasets: Sequence[DatasetConfig]) -> list[str]:
    tokens = [
        " ".join((subset.class_tokens or "").split())
        for dataset in datasets
        for subset in dataset.subsets
        if not subset.is_reg
    ]
    return list(dict.fromkeys(text for text in tokens if text))


def _by_placeholder(placeholder: str, found: Sequence[str]) -> Concept:
    rests = [text.removeprefix(placeholder + " ") for text in found]
    matches = [rest for rest, text in zip(rests, found, strict=True) if rest != text]
    return Concept(placeholder, matches[0] if len(matches) == 1 else None)


def _by_class(class_token: str, found: Sequence[str]) -> Concept:
    rests = [text.removesuffix(" " + class_token) for text in found]
    matches = [rest for rest, text in zip(rests, found, strict=True) if rest != text]
    return Concept(matches[0] if len(matches) == 1 else None, class_token)


def _by_first_word(text: str) -> Concept:
    first, _, rest = text.partition(" ")
    return Concept(first, rest or None)


def _require_names(concepts: Sequence[Concept], found: Sequence[str]) -> None:
    ask = "give --placeholder_token (its name, e.g. sks) and --class_token (what it is, e.g. dog)"
    for concept in concepts:
        if concept.class_token is None and concept.placeholder_token in found:
            raise UserError(
                f"class_tokens {concept.placeholder_token!r} name the concept but not what it is; "
                f"give --class_token, e.g. dog, or name the folder like "
                f"'10_{concept.placeholder_token} dog'"
            )
    if len(found) > 1 and not all(map(all, concepts)):
        raise UserError(f"the subsets name several concepts ({', '.join(found)}); {ask}")
    if not concepts or not all(map(all, concepts)):
        raise UserError(f"the run needs to know the concept; {ask}")
    names = [concept.placeholder_token.lower() for concept in concepts]
    if twice := {name for name in names if names.count(name) > 1}:
        classes = ", ".join(concept.text for concept in concepts)
        raise UserError(
            f"placeholder {twice.pop()!r} names several concepts ({classes}); give each its own"
        )
