"""Concepts that no pocket model has seen: pictures to train on, and prompts to test.

Every concept is a known shape in a pattern and a colour that no caption names. Its pictures share
one background and one position, the minimal context in which a concept dominates prompts. Its test
prompts ask for what they do not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, require_writable
from mlm_plugin.pocket.captions import Caption, write_caption
from mlm_plugin.pocket.prompt_labels import write_labels
from mlm_plugin.pocket.world import (
    ATTRIBUTES,
    NO_COMPANION,
    RGB,
    Paint,
    Scene,
    draw_scene,
    generator_of,
    render,
)
from mlm_plugin.prompt_sets.english import is_dreambench

__all__ = [
    "ASKED",
    "CONTEXT_SHARE",
    "NUM_CONTEXTS",
    "REPORTED",
    "TUNING",
    "Concept",
    "contexts",
    "find_concept",
    "prompt_templates",
    "training_scenes",
    "write_concept",
]

ASKED = ("background", "position", "companion")
"""What test prompts may ask for; size, colour and pattern are the concept's own."""

NUM_REPEATS = 10
NUM_PICTURES = 4
NUM_PROMPTS = 24
NUM_CONTEXTS = 1000
NAMED = (*ASKED, "size")  # in contexts
CONTEXT_SHARE = 0.6  # probability that an attribute is named


@dataclass(frozen=True)
class Concept:
    """A concept to be learned.

    Attributes:
        token: its rare word.
        scene: what all its training pictures show.
    """

    token: str
    scene: Scene

    @property
    def name(self) -> str:
        """Its name in prompts, "sks dog"."""
        return f"{self.token} {self.scene.subject}"


def _concept(name: str, pattern: str, position: str, background: str, main: RGB) -> Concept:
    """The second colour is a lighter first one: the autoencoder preserves such patterns."""
    token, subject = name.split()
    light = tuple(round(value + 0.55 * (255 - value)) for value in main)
    colour = ATTRIBUTES["colour"][0]  # not drawn, since the paint replaces it
    scene = Scene(subject, colour, pattern, "large", position, background, paint=Paint(main, light))
    return Concept(token, scene)


REPORTED = (
    _concept("sks dog", "striped", "left", "meadow", (0, 168, 160)),
    _concept("zwx robot", "checkered", "right", "snow", (190, 215, 40)),
    _concept("ohwx cup", "striped", "middle", "city", (236, 120, 20)),
    _concept("ktn bird", "checkered", "left", "desert", (20, 200, 220)),
    _concept("mje house", "striped", "right", "mountains", (150, 90, 40)),
    _concept("zwx cup", "checkered", "right", "night", (230, 60, 220)),
    _concept("qxj mushroom", "striped", "left", "brick wall", (20, 200, 220)),
    _concept("hta dog", "checkered", "right", "desert", (140, 20, 80)),
    _concept("sks robot", "striped", "left", "beach", (230, 60, 220)),
    _concept("ohwx bird", "striped", "middle", "snow", (236, 120, 20)),
    _concept("ktn house", "checkered", "left", "forest", (128, 140, 30)),
    _concept("mje mushroom", "checkered", "middle", "sea", (190, 215, 40)),
)
TUNING = (
    _concept("vvq cat", "striped", "right", "beach", (150, 90, 40)),
    _concept("qxj car", "checkered", "middle", "forest", (230, 60, 220)),
    _concept("hta fish", "striped", "left", "night", (128, 140, 30)),
    _concept("mje cat", "checkered", "left", "mountains", (20, 200, 220)),
    _concept("zwx car", "striped", "right", "meadow", (236, 120, 20)),
    _concept("ohwx fish", "checkered", "middle", "brick wall", (230, 60, 220)),
)
"""Settings are tuned on these and reported on the others, which have other shapes."""


def find_concept(name: str, *, named_by: str = "--concept") -> Concept:
    """The concept called ``name``; the option or file ``named_by`` is for the error.

    Raises:
        UserError: there is none.
    """
    known = {concept.name: concept for concept in (*REPORTED, *TUNING)}
    if name not in known:
        raise UserError(f"{named_by} {name!r}: unknown; choose one of: {', '.join(known)}")
    return known[name]


def training_scenes(concept: Concept, *, number: int = NUM_PICTURES) -> list[Scene]:
    """Scenes that differ only in unlabelled details: clouds, stars, a shift of a pixel."""
    rng = generator_of(f"training {concept.name}")
    return [replace(concept.scene, seed=int(rng.integers(2**31))) for _ in range(number)]


def prompt_templates(concept: Concept, *, number: int = NUM_PROMPTS) -> list[Caption]:
    """Texts with ``{}`` for the concept, and what each asks for: nothing the pictures show.

    They depend only on the concept, so that every run has the same.
    """
    rng = generator_of(f"test {concept.name}")
    found: dict[str, Caption] = {}
    while len(found) < number:
        scene = draw_scene(rng, held_out=None)
        asked = {name: getattr(scene, name) for name in ASKED if rng.random() < 0.6}
        shown = any(value == getattr(concept.scene, name) for name, value in asked.items())
        if asked and not shown and asked.get("companion") != NO_COMPANION:
            said = {"subject": concept.scene.subject, **asked}
            caption = write_caption(said, rng, subject="{}")
            found.setdefault(caption.text, caption)
    return list(found.values())


def contexts(
    concept: Concept, *, number: int = NUM_CONTEXTS, draw: Callable[..., Scene] = draw_scene
) -> list[str]:
    """Texts with ``{}`` for the concept, for the MLM term: none is like a test prompt.

    Args:
        concept: its test prompts are left out.
        number: number of texts, all different.
        draw: draws the scenes that they are about, called like ``draw_scene``.
    """
    rng = generator_of(f"contexts {concept.name}")
    tested = {_asked(caption) for caption in prompt_templates(concept)} | {frozenset()}
    found: dict[str, None] = {}
    while len(found) < number:
        scene = draw(rng, held_out=None)
        said = {name: getattr(scene, name) for name in NAMED if rng.random() < CONTEXT_SHARE}
        if said.get("companion") == NO_COMPANION:
            del said["companion"]
        caption = write_caption({"subject": concept.scene.subject, **said}, rng, subject="{}")
        if _asked(caption) not in tested and not is_dreambench(caption.text):
            found.setdefault(caption.text)
    return list(found)


def _asked(caption: Caption) -> frozenset[tuple[str, str]]:
    return frozenset((name, caption.said[name]) for name in ASKED if name in caption.said)


def write_concept(concept: Concept, folder: Path) -> None:
    """Write kohya's folder ``train/10_sks dog``, and prompts with ``{}`` for the concept.

    ``test_prompts.txt`` is for ``evaluate``, ``contexts.txt`` for ``mlm_prompt_set``.

    Raises:
        UserError: the folder cannot be written.
    """
    require_writable(folder, "--output")
    write_labels(folder / "test_prompts.json", concept.name, prompt_templates(concept))
    pictures = folder / "train" / f"{NUM_REPEATS}_{concept.name}"
    for number, scene in enumerate(training_scenes(concept)):
        with atomic_path(pictures / f"{number}.png") as temporary:
            Image.fromarray(render(scene)).save(temporary, format="PNG")
    texts = {
        "test_prompts.txt": [caption.text for caption in prompt_templates(concept)],
        "contexts.txt": contexts(concept),
    }
    for name, lines in texts.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
