"""Batches of pictures as tensors. Shapes: B pictures, art pixels 32x32, pixels 64x64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from mlm_plugin.pocket.backgrounds import SIDE
from mlm_plugin.pocket.world import Scene, draw_scene, random_paint, render_art, things_in

__all__ = ["draw_any_scene", "scene_pixels", "to_pixels", "universal_art"]


def to_pixels(art: np.ndarray) -> Tensor:
    """Bytes ``(B, 32, 32, 3)`` to pixels in [-1, 1], ``(B, 3, 64, 64)``."""
    pixels = torch.from_numpy(art).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    return pixels.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def scene_pixels(scenes: Sequence[Scene]) -> Tensor:
    """The pictures of scenes, ``(B, 3, 64, 64)``."""
    return to_pixels(np.stack([render_art(scene) for scene in scenes]))


def draw_any_scene(rng: Generator, *, unnamed_share: float, held_out: bool | None) -> Scene:
    """A scene whose object has, with a given probability, two colours that no caption names."""
    scene = draw_scene(rng, held_out=held_out)
    return replace(scene, paint=random_paint(rng)) if rng.random() < unnamed_share else scene


def universal_art(rng: Generator, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures for the autoencoder, of the world and others, and where objects are in them.

    Returns bytes ``(B, 32, 32, 3)`` and booleans ``(B, 32, 32)``.

    More than half are scenes. The others have objects in any colours, are recoloured and shifted as
    a whole, or are patchworks of patterns: an autoencoder trained on scenes alone does not
    generalize to new objects.
    """
    art = np.empty((batch_size, SIDE, SIDE, 3), np.uint8)
    things = np.zeros((batch_size, SIDE, SIDE), bool)
    for index in range(batch_size):
        kind = rng.random()
        if kind < 0.95:
            scene = draw_any_scene(rng, unnamed_share=0.0 if kind < 0.55 else 1.0, held_out=False)
            art[index] = render_art(scene)
            if kind > 0.85:
                art[index] = _recoloured(art[index], rng)
            else:
                things[index] = things_in(scene, art[index])
        else:
            art[index] = _patchwork(rng)
    return art, things


def _recoloured(art: np.ndarray, rng: Generator) -> np.ndarray:
    shifted = np.roll(art, rng.integers(0, SIDE, 2), axis=(0, 1))[:, :: rng.choice([-1, 1])]
    mixed = shifted.astype(np.float32) @ rng.dirichlet((0.6, 0.6, 0.6), 3).T.astype(np.float32)
    if rng.random() < 0.3:
        mixed = 255 - mixed
    return mixed.clip(0, 255).astype(np.uint8)


def _patchwork(rng: Generator) -> np.ndarray:
    art = np.empty((SIDE, SIDE, 3), np.uint8)
    art[:] = rng.integers(0, 256, 3)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    for _ in range(rng.integers(2, 7)):
        top, left = rng.integers(-4, SIDE - 4, 2)
        height, width = rng.integers(4, 18, 2)
        inside = (
            (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        )
        if rng.random() < 0.4:
            middle = top + height / 2, left + width / 2
            inside &= (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (width / 2) ** 2
        art[inside] = rng.integers(0, 256, 3)
        period = int(rng.integers(2, 6))
        across = (rows, columns, rows + columns, rows - columns)[rng.integers(4)]
        texture = across % (2 * period // 2 + 1) < period // 2
        if rng.random() < 0.3:
            texture = rng.random((SIDE, SIDE)) < 0.15
        art[inside & texture] = rng.integers(0, 256, 3)
    return art
