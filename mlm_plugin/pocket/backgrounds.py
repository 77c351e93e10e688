"""The backgrounds of the pocket world: textured 32x32 pictures, slightly different each time.

Knows no subjects. A background is a function of a random generator that returns bytes of shape
``(32, 32, 3)``; the ground, on which objects stand, is in the lower third.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

__all__ = ["BACKGROUNDS", "SIDE"]

SIDE = 32
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
_DITHER = np.random.default_rng(0).random((SIDE, SIDE))  # thresholds of scattered pixels


def _canvas(*bands: tuple[int, tuple[int, int, int]]) -> np.ndarray:
    """Horizontal bands of (first row, colour), from the top."""
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    for row, colour in bands:
        canvas[row:] = colour
    return canvas


def _speckle(canvas: np.ndarray, where: np.ndarray, colour, rng: Generator, share: float) -> None:
    """Scatter single pixels: always the same ones, shifted by some art pixels.

    Independently scattered ones are noise, on which an autoencoder would waste its capacity.
    """
    shift = 8 * int(rng.integers(SIDE // 8))
    canvas[where & np.roll(_DITHER < share, shift, axis=1)] = colour


def _disc(canvas: np.ndarray, row: float, column: float, radius: float, colour) -> None:
    canvas[(ROWS - row) ** 2 + (COLUMNS - column) ** 2 <= radius**2] = colour


def _cloud(canvas: np.ndarray, rng: Generator, colour=(250, 252, 255)) -> None:
    row, column = rng.integers(3, 7), rng.integers(3, 27)
    canvas[row : row + 2, max(0, column - 4) : column + 5] = colour
    canvas[row - 1, max(0, column - 2) : column + 3] = colour


def _ridge(canvas: np.ndarray, peaks, slope: float, colour, *, down_to: int) -> np.ndarray:
    """Triangles below (row, column) peaks; returns the mask."""
    mask = np.zeros((SIDE, SIDE), bool)
    for row, column in peaks:
        mask |= np.abs(COLUMNS - column) * slope <= ROWS - row
    mask &= down_to > ROWS
    canvas[mask] = colour
    return mask


def beach(rng: Generator) -> np.ndarray:
    """Sun, sea with waves, and sand."""
    canvas = _canvas((0, (135, 206, 245)), (10, (38, 132, 199)), (17, (240, 217, 150)))
    _disc(canvas, 4, rng.choice([4, 27]), 2.6, (255, 226, 90))
    for row in (11, 13, 15):
        canvas[row, (COLUMNS[0] + rng.integers(8)) % 8 < 3] = (120, 200, 235)
    canvas[17, :] = (250, 250, 240)
    _speckle(canvas, ROWS > 18, (222, 192, 120), rng, 0.10)
    return canvas


def snow(rng: Generator) -> np.ndarray:
    """White ground, firs under snow, falling flakes."""
    canvas = _canvas((0, (176, 200, 222)), (18, (244, 248, 255)))
    offset = rng.integers(0, 8)
    firs = [(8, c) for c in range(int(offset) - 4, SIDE + 4, 9)]
    tree = _ridge(canvas, firs, 2.2, (92, 130, 138), down_to=18)
    canvas[tree & (ROWS < 12)] = (235, 243, 250)
    _speckle(canvas, ROWS < 18, (255, 255, 255), rng, 0.06)
    _speckle(canvas, ROWS > 19, (205, 220, 238), rng, 0.08)
    return canvas


def forest(rng: Generator) -> np.ndarray:
    """Trunks under a dark canopy."""
    canvas = _canvas((0, (44, 96, 58)), (20, (70, 82, 40)))
    _speckle(canvas, ROWS < 12, (28, 72, 44), rng, 0.35)
    _speckle(canvas, ROWS < 9, (78, 138, 72), rng, 0.12)
    for column in range(int(rng.integers(0, 7)) - 2, SIDE, 7):
        left = max(0, column)
        canvas[8:22, left : column + 3] = (92, 62, 40)
        canvas[8:22, left : left + 1] = (66, 44, 30)
    _speckle(canvas, ROWS > 21, (104, 112, 54), rng, 0.14)
    return canvas


def desert(rng: Generator) -> np.ndarray:
    """Dunes, a cactus, a hot sky."""
    canvas = _canvas((0, (250, 190, 120)), (15, (226, 150, 78)))
    _disc(canvas, 5, rng.integers(4, 28), 3.2, (255, 240, 190))
    phase = rng.random() * 2 * np.pi
    canvas[ROWS > 17 + 2 * np.sin(COLUMNS / 5 + phase)] = (214, 132, 62)
    canvas[ROWS > 23 + 1.5 * np.sin(COLUMNS / 4 - phase)] = (196, 112, 52)
    column = int(rng.choice([2, 28]))
    canvas[9:18, column : column + 2] = (58, 120, 70)
    canvas[11:14, max(0, column - 2) : column - 1] = (58, 120, 70)
    canvas[13, max(0, column - 2) : column] = (58, 120, 70)
    canvas[10:13, column + 3 : column + 4] = (58, 120, 70)
    canvas[12, column + 2 : column + 4] = (58, 120, 70)
    return canvas


def city(rng: Generator) -> np.ndarray:
    """Towers with lit windows, and a street."""
    canvas = _canvas((0, (196, 178, 206)), (22, (120, 120, 128)), (24, (74, 76, 86)))
    column = -4 * int(rng.integers(0, 2))
    while column < SIDE:
        width, top = 8, 3 + 4 * int(rng.integers(0, 3))
        shade = int(rng.integers(0, 3)) * 14
        left = max(0, column)
        canvas[top:22, left : column + width - 1] = (78 + shade, 84 + shade, 110 + shade)
        for row in range(top + 2, 20, 3):
            for window in (column + 2, column + 5):
                if 0 <= window < SIDE:
                    canvas[row, window] = (255, 224, 120)
        column += width
    canvas[28, COLUMNS[0] % 8 < 4] = (230, 226, 200)
    return canvas


def meadow(rng: Generator) -> np.ndarray:
    """Grass with flowers under a blue sky."""
    canvas = _canvas((0, (150, 216, 255)), (14, (126, 200, 80)), (19, (98, 178, 66)))
    _cloud(canvas, rng)
    _speckle(canvas, ROWS > 14, (72, 148, 52), rng, 0.10)
    _speckle(canvas, ROWS > 20, (255, 246, 120), rng, 0.03)
    _speckle(canvas, ROWS > 20, (250, 250, 250), rng, 0.03)
    return canvas


def sea(rng: Generator) -> np.ndarray:
    """Under water: light from above, bubbles, weed."""
    canvas = _canvas(
        (0, (70, 190, 214)), (5, (40, 160, 200)), (12, (26, 126, 178)), (20, (18, 96, 150)),
        (27, (196, 184, 130)),
    )  # fmt: skip
    for column in (int(rng.integers(0, 4)), int(rng.integers(27, 31))):
        rows = np.arange(14, 28)
        canvas[rows, np.clip(column + (rows // 2) % 2, 0, 31)] = (40, 150, 90)
        canvas[rows, np.clip(column + 1 + (rows // 2) % 2, 0, 31)] = (30, 120, 80)
    _speckle(canvas, ROWS < 26, (150, 225, 240), rng, 0.03)
    return canvas


def brick_wall(rng: Generator) -> np.ndarray:
    """Red bricks above a gray floor."""
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    canvas[:] = (172, 84, 66)
    shift = int(rng.integers(0, 8))
    course = ROWS // 4
    joints = (ROWS % 4 == 3) | ((COLUMNS + shift + 4 * (course % 2)) % 8 == 0)
    canvas[(ROWS % 4 == 0) & ~joints] = (196, 104, 82)
    canvas[joints] = (214, 196, 180)
    canvas[26:] = (134, 130, 132)
    canvas[26] = (100, 96, 100)
    return canvas


def night(rng: Generator) -> np.ndarray:
    """Stars, the moon, and a dark hill."""
    canvas = _canvas((0, (20, 22, 58)), (8, (30, 32, 78)), (15, (46, 44, 100)))
    _speckle(canvas, ROWS < 20, (240, 240, 200), rng, 0.035)
    column = rng.choice([5, 26])
    _disc(canvas, 5, column, 3.2, (246, 240, 200))
    _disc(canvas, 4, column + 2, 2.6, (20, 22, 58))
    phase = rng.random() * 2 * np.pi
    canvas[ROWS > 21 + 1.5 * np.sin(COLUMNS / 6 + phase)] = (22, 44, 52)
    return canvas


def mountains(rng: Generator) -> np.ndarray:
    """Gray peaks with white caps above a green valley."""
    canvas = _canvas((0, (206, 226, 240)), (20, (112, 152, 96)))
    shift = int(rng.integers(-3, 4))
    peaks = [(3, 8 + shift), (6, 24 + shift)]
    mountain = _ridge(canvas, peaks, 1.1, (122, 124, 146), down_to=20)
    canvas[mountain & (np.minimum(COLUMNS % 16, 99) > 8 + shift % 3)] = (98, 100, 124)
    _ridge(canvas, [(3, 8 + shift)], 1.1, (250, 252, 255), down_to=8)
    _ridge(canvas, [(6, 24 + shift)], 1.1, (250, 252, 255), down_to=10)
    _speckle(canvas, ROWS > 20, (88, 128, 78), rng, 0.14)
    return canvas


BACKGROUNDS: dict[str, Callable[[Generator], np.ndarray]] = {
    "beach": beach,
    "snow": snow,
    "forest": forest,
    "desert": desert,
    "city": city,
    "meadow": meadow,
    "sea": sea,
    "brick wall": brick_wall,
    "night": night,
    "mountains": mountains,
}
