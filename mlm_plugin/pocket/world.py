"""Scenes of the pocket world and their pictures: equal scenes give bit-identical pictures.

A scene is one subject with a colour and a pattern, at a position, in front of a background, perhaps
with a hat or a companion. Some pairs of attributes are held out of the model's training, so that a
prompt with such a pair tests composition instead of memory. Knows no captions and does not import
torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from mlm_plugin.pocket.backgrounds import BACKGROUNDS, SIDE
from mlm_plugin.pocket.sprites import COMPANIONS, EMPTY, HATS, SUBJECTS, Sprite

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "HATS",
    "NO_COMPANION",
    "PICTURE_SIDE",
    "Paint",
    "Scene",
    "draw_scene",
    "generator_of",
    "held_out_pair",
    "held_out_pairs",
    "is_held_out",
    "labels",
    "named_paint",
    "random_paint",
    "render",
    "render_art",
    "thing_alone",
    "things_in",
]

PICTURE_SIDE = 2 * SIDE
"""Every art pixel is 2x2, so that an autoencoder with factor 8 has 8x8 latents."""

NO_COMPANION = "none"

RGB = tuple[int, int, int]


class Paint(NamedTuple):
    """Colour of the body and of the pattern on it."""

    main: RGB
    second: RGB


COLOURS: dict[str, Paint] = {
    "red": Paint((214, 48, 49), (255, 158, 148)),
    "yellow": Paint((247, 208, 56), (186, 132, 20)),
    "green": Paint((58, 168, 80), (176, 232, 150)),
    "blue": Paint((52, 104, 214), (150, 200, 255)),
    "purple": Paint((134, 70, 190), (214, 170, 250)),
    "pink": Paint((244, 130, 180), (255, 216, 232)),
    "white": Paint((240, 240, 244), (160, 164, 180)),
    "black": Paint((52, 52, 62), (142, 142, 158)),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = tuple(SUBJECTS)
POSITIONS = {"left": 8, "middle": 16, "right": 24}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS["large"]),
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "size": SIZES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
    "companion": (NO_COMPANION, *HATS, *COMPANIONS),
}
"""Every attribute and its values, in the order of the oracle's outputs."""

HELD_OUT_PAIRS = (("subject", "background"), ("subject", "colour"), ("colour", "companion"))
HELD_OUT_SHARE = 8  # one pair in eight
FIXED_PAINT: dict[str, RGB] = {
    "w": (250, 250, 250),
    "k": (24, 20, 30),
    "d": (84, 88, 100),
    "n": (128, 84, 52),
    "o": (245, 150, 50),
    "y": (255, 216, 70),
    "g": (178, 226, 244),
    "r": (220, 40, 46),
    "u": (44, 92, 210),
    "p": (250, 140, 180),
    "e": (60, 160, 70),
}
GROUND = 28  # the row below the feet


@dataclass(frozen=True)
class Scene:
    """The content of one picture.

    Attributes:
        seed: determines unlabelled details: clouds, stars, a shift of a pixel.
        paint: replaces the named colour's paint, for an object that no caption describes.
    """

    subject: str
    colour: str
    pattern: str
    size: str
    position: str
    background: str
    companion: str = NO_COMPANION
    seed: int = 0
    paint: Paint | None = None


def generator_of(name: str, seed: int = 0, step: int = 0) -> Generator:
    """The random stream with this name, seed and step."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed, step])


def named_paint(colour: str) -> Paint:
    """The paint of a colour that captions name."""
    return COLOURS[colour]


def random_paint(rng: Generator) -> Paint:
    """Any two colours."""
    main, second = rng.integers(20, 250, (2, 3)).tolist()
    return Paint(tuple(main), tuple(second))


def labels(scene: Scene) -> dict[str, int]:
    """Index of every attribute's value; -100, as losses ignore it, for a colour without a name."""
    found = {name: values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()}
    if scene.paint is not None:
        found["colour"] = -100
    return found


def held_out_pair(first: str, second: str) -> bool:
    """Whether the model is never trained on both values together (decided by a hash)."""
    return zlib.crc32(f"{first}+{second}".encode()) % HELD_OUT_SHARE == 0


def held_out_pairs(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names of the attributes whose values here are a held-out pair."""
    return [
        (first, second)
        for first, second in HELD_OUT_PAIRS
        if first in values
        and second in values
        and values[second] != NO_COMPANION
        and held_out_pair(values[first], values[second])
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether the model is never trained on this scene."""
    return bool(held_out_pairs({name: getattr(scene, name) for name in ATTRIBUTES}))


def draw_scene(rng: Generator, *, held_out: bool | None = False, **fixed: str) -> Scene:
    """A random scene with the given attributes.

    Args:
        rng: source of every draw.
        held_out: whether it has a held-out pair; ``None`` = either.
        fixed: attributes that are given.
    """
    while True:
        values = {
            name: fixed[name] if name in fixed else _choice(rng, name, options)
            for name, options in ATTRIBUTES.items()
        }
        scene = Scene(**values, seed=int(rng.integers(2**31)))
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def _choice(rng: Generator, name: str, options: tuple[str, ...]) -> str:
    if name == "companion" and rng.random() < 0.35:
        return NO_COMPANION
    return options[rng.integers(len(options))]


def render(scene: Scene) -> np.ndarray:
    """The picture: bytes of shape ``(64, 64, 3)``, every art pixel doubled."""
    return render_art(scene).repeat(2, axis=0).repeat(2, axis=1)


def render_art(scene: Scene) -> np.ndarray:
    """The picture in art pixels: bytes of shape ``(32, 32, 3)``."""
    rng = np.random.default_rng(scene.seed)
    canvas = BACKGROUNDS[scene.background](rng)
    sprite = SUBJECTS[scene.size][scene.subject]
    letters = sprite.letters
    height, width = letters.shape
    middle = POSITIONS[scene.position] + int(rng.integers(-1, 2))
    bottom = GROUND + int(rng.integers(-1, 2))
    left = int(np.clip(middle - width // 2, 1, SIDE - 1 - width))
    top = bottom - height
    paint = scene.paint or named_paint(scene.colour)
    if scene.companion in COMPANIONS:
        _put_beside(canvas, COMPANIONS[scene.companion], left, left + width, bottom, rng)
    _put(canvas, letters, top, left, _body(letters, paint, scene.pattern), outline=paint.main)
    if scene.companion in HATS:
        _put_on_head(canvas, HATS[scene.companion], sprite, top, left)
    return canvas


def things_in(scene: Scene, art: np.ndarray) -> np.ndarray:
    """Where its picture shows an object instead of the background: booleans ``(32, 32)``."""
    bare = BACKGROUNDS[scene.background](np.random.default_rng(scene.seed))
    return (art != bare).any(axis=-1)


def thing_alone(scene: Scene, size: str) -> tuple[np.ndarray, np.ndarray]:
    """The subject of a scene in one size: bytes ``(h, w, 3)``, and where no hat can cover it."""
    sprite = SUBJECTS[size][scene.subject]
    letters = sprite.letters
    pixels = _body(letters, scene.paint or named_paint(scene.colour), scene.pattern)
    height, width = letters.shape
    top, left = GROUND - height, (SIDE - width) // 2
    hatted = np.zeros((SIDE, SIDE), bool)
    for hat in HATS.values():
        canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
        _put_on_head(canvas, hat, sprite, top, left)
        hatted |= canvas.any(axis=-1)
    return pixels, (letters != EMPTY) & ~hatted[top : top + height, left : left + width]


def _put_on_head(canvas: np.ndarray, hat: Sprite, wearer: Sprite, top: int, left: int) -> None:
    letters = wearer.letters
    column = int(wearer.head * letters.shape[1])
    under = letters[:, max(0, column - 1) : column + 2]
    head_row = int((under != EMPTY).any(axis=1).argmax())
    height, width = hat.letters.shape
    row = top + head_row - height + 1
    _put_plain(canvas, hat.letters, row, int(np.clip(left + column - width // 2, 0, SIDE - width)))


def _put_beside(canvas, thing: Sprite, left: int, right: int, bottom: int, rng: Generator) -> None:
    height, width = thing.letters.shape
    space_left, space_right = left, SIDE - right
    on_right = space_right > space_left or (space_right == space_left and rng.random() < 0.5)
    column = right + (space_right - width) // 2 if on_right else (space_left - width) // 2
    column = int(np.clip(column, 0, SIDE - width))
    _put_plain(canvas, thing.letters, bottom - height + 1, column)


def _put_plain(canvas: np.ndarray, letters: np.ndarray, top: int, left: int) -> None:
    _put(canvas, letters, top, left, _fixed(letters), outline=(70, 60, 70))


def _put(canvas, letters, top: int, left: int, pixels, *, outline: RGB) -> None:
    solid = np.zeros((SIDE + 2, SIDE + 2), bool)
    rows, columns = np.nonzero(letters != EMPTY)
    solid[rows + top + 1, columns + left + 1] = True
    around = np.zeros_like(solid)
    around[1:] |= solid[:-1]
    around[:-1] |= solid[1:]
    around[:, 1:] |= solid[:, :-1]
    around[:, :-1] |= solid[:, 1:]
    around &= ~solid
    canvas[around[1:-1, 1:-1]] = (np.array(outline) * 0.28).astype(np.uint8)
    canvas[rows + top, columns + left] = pixels[rows, columns]


def _fixed(letters: np.ndarray) -> np.ndarray:
    pixels = np.zeros((*letters.shape, 3), np.uint8)
    for letter, colour in FIXED_PAINT.items():
        pixels[letters == letter] = colour
    return pixels


def _body(letters: np.ndarray, paint: Paint, pattern: str) -> np.ndarray:
    """Pixels of a sprite: its paint and pattern, lit from above."""
    pixels = _fixed(letters)
    main, second = (np.array(colour, float) for colour in paint)
    body = letters == "b"
    pixels[body] = main
    pixels[body & _pattern(pattern, letters.shape)] = second
    pixels[letters == "s"] = 0.72 * main
    pixels[letters == "l"] = 0.5 * main + 127
    lit = np.pad(letters, 1, constant_values=EMPTY)
    top_edge = body & (lit[:-2, 1:-1] == EMPTY)
    low_edge = body & (lit[2:, 1:-1] == EMPTY) & ~top_edge
    pixels[top_edge] = 0.75 * pixels[top_edge] + 0.25 * 255
    pixels[low_edge] = 0.8 * pixels[low_edge]
    return pixels


def _pattern(name: str, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    if name == "striped":
        return columns % 4 < 2
    if name == "dotted":
        return (rows % 4 == 1) & ((columns + 2 * (rows // 4 % 2)) % 4 == 1)
    if name == "checkered":
        return (rows // 2 + columns // 2) % 2 == 0
    return np.zeros(shape, bool)
