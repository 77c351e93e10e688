"""Three grammars of contexts: independent attributes, linked ones, and those that no test asks for.

In the free grammar, of the pocket world itself, nothing in a sentence tells what else it says. In
the linked grammar a place has its things, as in real sentences: "beach" comes with a ball, on the
left. A hidden word can then mostly be guessed from the others, which is what the target of the
paper (the masked word itself) asks for. Both have the same words. The disjoint grammar has none of
the words that test prompts ask for: its contexts name sizes, colours and patterns alone. Knows no
models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from numpy.random import Generator

from mlm_plugin.pocket.captions import write_caption
from mlm_plugin.pocket.concepts import CONTEXT_SHARE, NUM_CONTEXTS, Concept, contexts
from mlm_plugin.pocket.world import ATTRIBUTES, HATS, Scene, draw_scene, generator_of

__all__ = ["GRAMMARS", "LINK_SHARE", "disjoint_contexts", "draw_linked_scene"]

LINK_SHARE = 0.9
"""Probability that an attribute is the one of its place."""

LINKS: Mapping[str, tuple[str, str, str]] = {
    "beach": ("ball", "left", "large"),
    "snow": ("blue hat", "middle", "large"),
    "forest": ("flower", "left", "small"),
    "desert": ("red hat", "right", "small"),
    "city": ("crown", "middle", "large"),
    "meadow": ("flower", "right", "large"),
    "sea": ("duckling", "middle", "small"),
    "brick wall": ("ball", "right", "small"),
    "night": ("crown", "left", "small"),
    "mountains": ("blue hat", "right", "large"),
}
"""By background: companion, position, size. No two places have the same."""


def draw_linked_scene(rng: Generator, *, held_out: bool | None = False) -> Scene:
    """A random scene whose companion, position and size mostly follow from its background.

    Args:
        rng: source of every draw.
        held_out: whether it has a held-out pair; ``None`` = either.
    """
    backgrounds = ATTRIBUTES["background"]
    background = backgrounds[rng.integers(len(backgrounds))]
    linked = zip(("companion", "position", "size"), LINKS[background], strict=True)
    fixed = {name: value for name, value in linked if rng.random() < LINK_SHARE}
    return draw_scene(rng, held_out=held_out, background=background, **fixed)


def disjoint_contexts(concept: Concept) -> list[str]:
    """Texts with ``{}`` for the concept that share no place, position or thing with a test prompt.

    Colours of hats, which test prompts ask for, are left out.
    """
    rng = generator_of(f"disjoint contexts {concept.name}")
    asked = {word for hat in HATS for word in hat.split()}
    values = {
        name: [value for value in ATTRIBUTES[name] if value not in asked]
        for name in ("size", "colour", "pattern")
    }
    found: dict[str, None] = {}
    while len(found) < NUM_CONTEXTS:
        said = {
            name: options[rng.integers(len(options))]
            for name, options in values.items()
            if rng.random() < CONTEXT_SHARE
        }
        if said:
            caption = write_caption({"subject": concept.scene.subject, **said}, rng, subject="{}")
            found.setdefault(caption.text)
    return list(found)


GRAMMARS: Mapping[str, Callable[[Concept], list[str]]] = {
    "free": contexts,
    "linked": partial(contexts, draw=draw_linked_scene),
    "disjoint": disjoint_contexts,
}
"""By name, a function that writes the contexts of a concept."""
