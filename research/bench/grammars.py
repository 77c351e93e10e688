"""Two grammars of contexts: attributes that are independent, and attributes that go together.

In the free grammar, of the pocket world itself, nothing in a sentence tells what else it says. In
the linked grammar a place has its things, as in real sentences: "beach" comes with a ball, on the
left. A hidden word can then mostly be guessed from the others, which is what the target of the
paper (the masked word itself) asks for. Both have the same words. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from numpy.random import Generator

from mlm_plugin.pocket.world import ATTRIBUTES, Scene, draw_scene

__all__ = ["GRAMMARS", "LINK_SHARE", "draw_linked_scene"]

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


GRAMMARS: Mapping[str, Callable[..., Scene]] = {"free": draw_scene, "linked": draw_linked_scene}
"""By name, a function that draws the scene that a sentence is about."""
