"""Captions that name some attributes of a scene, together with what they name.

A caption is written from labels and never parsed: :class:`Caption` carries the labels of its
contents. Knows no pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from numpy.random import Generator

from mlm_plugin.pocket.world import ATTRIBUTES, HATS, NO_COMPANION, Scene

__all__ = ["RARE_WORDS", "Caption", "all_words", "caption_scene", "draw_said", "write_caption"]

RARE_WORDS = ("sks", "zwx", "ohwx", "ktn", "vvq", "qxj", "hta", "mje")
"""Words without meaning: names for concepts to be learned later."""

BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach"),
    "snow": ("in the snow", "on snow", "in a snowy landscape"),
    "forest": ("in the forest", "in the woods", "in a dark forest"),
    "desert": ("in the desert", "on the sand dunes", "with a desert in the background"),
    "city": ("in the city", "on a city street", "with a city in the background"),
    "meadow": ("in a meadow", "on the grass", "in a field of flowers"),
    "sea": ("under water", "in the sea", "in the ocean"),
    "brick wall": (
        "in front of a brick wall", "before a brick wall", "with a brick wall in the background",
    ),
    "night": ("at night", "under the stars", "under a starry sky"),
    "mountains": (
        "in the mountains", "with mountains in the background", "with a mountain in the background",
    ),
}  # fmt: skip
BACKGROUND_TAGS = {"sea": "ocean", "night": "night sky", "meadow": "grass"}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side", "at the left"),
    "middle": ("in the middle", "in the center", "at the center"),
    "right": ("on the right", "on the right side", "at the right"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain",),
    "striped": ("striped",),
    "dotted": ("dotted", "polka dot"),
    "checkered": ("checkered",),
}
HAT_PHRASES = ("wearing a {}", "with a {}", "in a {}")
BESIDE_PHRASES = ("with a {}", "next to a {}", "beside a {}")
OPENINGS = (
    "{}", "{}", "{}", "a photo of {}", "a picture of {}", "an image of {}", "a rendering of {}",
    "pixel art of {}", "a drawing of {}",
)  # fmt: skip
SAID_SHARE = {"colour": 0.7, "pattern": 0.5, "size": 0.5, "position": 0.6, "background": 0.75}
COMPANION_SHARE = 0.9  # so that without a mention there is mostly none
TAG_SHARE = 0.1
EXTRA_WORD_SHARE = 0.08


@dataclass(frozen=True)
class Caption:
    """A text and what it names."""

    text: str
    said: Mapping[str, str]

    def labels(self) -> dict[str, int]:
        """Index of every named value; -100 for what is not named."""
        return {
            name: values.index(self.said[name]) if name in self.said else -100
            for name, values in ATTRIBUTES.items()
        }


def caption_scene(
    scene: Scene, rng: Generator, *, extra_words: tuple[str, ...] = RARE_WORDS
) -> Caption:
    """A caption of a scene that names a random part of it.

    Sometimes there is a meaningless word before the subject, as real captions contain words that
    the picture does not explain. Otherwise a name for a concept would be out of distribution.
    """
    said = draw_said(scene, rng)
    extra = ""
    if extra_words and rng.random() < EXTRA_WORD_SHARE:
        extra = extra_words[rng.integers(len(extra_words))] + " "
    return write_caption(said, rng, subject=extra + scene.subject)


def draw_said(scene: Scene, rng: Generator) -> dict[str, str]:
    """Which attributes a caption names: always the subject, the others at random."""
    said = {"subject": scene.subject}
    for name, share in SAID_SHARE.items():
        if rng.random() < share * (0.3 if getattr(scene, name) == "plain" else 1.0):
            said[name] = getattr(scene, name)
    if scene.paint is not None:
        said.pop("colour", None)
    if scene.companion != NO_COMPANION and rng.random() < COMPANION_SHARE:
        said["companion"] = scene.companion
    return said


def write_caption(
    said: Mapping[str, str], rng: Generator, *, subject: str | None = None
) -> Caption:
    """A text that names exactly these attributes.

    Args:
        said: attribute -> value; includes ``subject``.
        rng: chooses the wording.
        subject: words for the subject, such as ``"sks dog"``.
    """
    subject = subject or said["subject"]
    write = _tags if rng.random() < TAG_SHARE else _sentence
    return Caption(write(said, subject, rng), dict(said))


def _sentence(said: Mapping[str, str], subject: str, rng: Generator) -> str:
    words = [*_adjectives(said, rng), subject]
    thing = " ".join(words)
    article = "an" if thing[0] in "aeiou" else "a"
    parts = _phrases(said, rng)
    rng.shuffle(parts)
    return _pick(OPENINGS, rng).format(" ".join([article, thing, *parts]))


def _tags(said: Mapping[str, str], subject: str, rng: Generator) -> str:
    tags = [" ".join([*_adjectives(said, rng), subject])]
    if "companion" in said:
        tags.append(said["companion"])
    if "background" in said:
        tags.append(BACKGROUND_TAGS.get(said["background"], said["background"]))
    if "position" in said:
        tags.append(_pick(POSITION_PHRASES[said["position"]], rng))
    return ", ".join(tags)


def _adjectives(said: Mapping[str, str], rng: Generator) -> list[str]:
    words = []
    if "size" in said:
        words.append(_pick(SIZE_WORDS[said["size"]], rng))
    rest = []
    if "colour" in said:
        rest.append(said["colour"])
    if "pattern" in said:
        rest.append(_pick(PATTERN_WORDS[said["pattern"]], rng))
    if rng.random() < 0.3:
        rest.reverse()
    return words + rest


def _phrases(said: Mapping[str, str], rng: Generator) -> list[str]:
    phrases = []
    if "companion" in said:
        forms = HAT_PHRASES if said["companion"] in HATS else BESIDE_PHRASES
        phrases.append(_pick(forms, rng).format(said["companion"]))
    if "background" in said:
        phrases.append(_pick(BACKGROUND_PHRASES[said["background"]], rng))
    if "position" in said:
        phrases.append(_pick(POSITION_PHRASES[said["position"]], rng))
    return phrases


def _pick(options: tuple[str, ...], rng: Generator) -> str:
    return options[rng.integers(len(options))]


def all_words() -> set[str]:
    """Every word that can occur in a caption."""
    phrases = [
        *OPENINGS, *HAT_PHRASES, *BESIDE_PHRASES, *BACKGROUND_TAGS.values(), *RARE_WORDS, "an",
        *(value for values in ATTRIBUTES.values() for value in values),
        *(
            phrase
            for table in (BACKGROUND_PHRASES, POSITION_PHRASES, SIZE_WORDS, PATTERN_WORDS)
            for options in table.values()
            for phrase in options
        ),
    ]  # fmt: skip
    return {word for phrase in phrases for word in phrase.replace("{}", " ").split()}
