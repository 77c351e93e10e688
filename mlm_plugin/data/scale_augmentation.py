"""Scale augmentation: a picture is shrunk on a blank canvas or enlarged, and its caption says so.

Two thirds of the scales are from [1/3, 1), the rest from [1.2, 1.4]. Below 0.6 the scaled picture
is at a random position on a blank canvas. From 0.6 to 1 the picture is unchanged. Above 1 the
enlarged picture is cropped. The caption of a small or enlarged picture says so.

Knows no files, buckets or latents, and no loss: blank parts must not be learned, and
:meth:`Scaling.valid_mask` marks them. Sizes are (width, height) in pixels. Shapes: C
channels, H x W pixels of the canvas, h x w of the scaled picture.

Source: Custom Diffusion, arXiv 2212.04488, and adobe-research/custom-diffusion (commit 31aa283),
src/finetune_data.py MaskBase. Deliberate differences: width and height scale together, so canvases
need not be square; sides and positions of small pictures are multiples of a latent, so that the
mask is exact in the latents; an article at the start of a caption moves before the added words.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_SIDE", "Scaling", "draw_scaling", "unscaled"]

Size = tuple[int, int]

LATENT_STRIDE = 8
"""Pixels per latent."""

SMALLER_SHARE = 2 / 3
SMALLER_RANGE = (1 / 3, 1.0)
LARGER_RANGE = (1.2, 1.4)
SMALL = 0.6
"""Below this scale a picture counts as small: it is pasted, and the caption says so."""

MIN_PASTED_SIDE = 3 * LATENT_STRIDE
"""One latent remains when the border is removed."""

MIN_SIDE = 40
"""Smallest canvas: scaled by SMALL it still has MIN_PASTED_SIDE."""

SMALL_WORDS = ("a far away ", "very small ")
LARGE_WORDS = ("zoomed in ", "close up ")

ARTICLE = re.compile(r"(an?|the) ", re.IGNORECASE)


class Scaling(NamedTuple):
    """Size and position of a scaled picture, and the words for it."""

    canvas: Size
    size: Size  # of the scaled picture
    left: int  # of the scaled picture on the canvas; negative where it is cropped
    top: int
    words: str = ""  # in front of the caption

    def place(self, picture: Tensor) -> Tensor:
        """Put a scaled picture ``(C, h, w)`` on zeros, ``(C, H, W)``; parts outside are cropped.

        Zero is mid grey for pixels in [-1, 1], and empty for a mask.
        """
        (width, height), (left, top) = self.canvas, (self.left, self.top)
        assert picture.shape[1:] == self.size[::-1], f"{picture.shape} is not {self.size}"
        if self.size == self.canvas:
            return picture
        placed = picture.new_zeros(len(picture), height, width)
        rows = slice(max(top, 0), top + self.size[1])
        columns = slice(max(left, 0), left + self.size[0])
        shown = picture[:, max(-top, 0) :, max(-left, 0) :][:, :height, :width]
        placed[:, rows, columns] = shown
        return placed

    def valid_mask(self) -> Tensor:
        """Where the picture is: ``(1, H, W)`` of 0 and 1.

        If a picture does not fill the canvas, a border of one latent is left out: latents there
        also see the blank part.
        """
        width, height = self.canvas
        if self.size[0] >= width and self.size[1] >= height:
            return torch.ones(1, height, width)
        mask = torch.zeros(1, height, width)
        inner_width, inner_height = (side - 2 * LATENT_STRIDE for side in self.size)
        left, top = self.left + LATENT_STRIDE, self.top + LATENT_STRIDE
        mask[:, top : top + inner_height, left : left + inner_width] = 1
        return mask

    def caption(self, text: str) -> str:
        """Add the scale: "a photo of sks dog" becomes "a far away photo of sks dog".

        A dropped caption stays empty.
        """
        if not (self.words and text):
            return text
        article = ARTICLE.match(text)
        return self.words + text[article.end() if article else 0 :]


def unscaled(canvas: Size) -> Scaling:
    """The unchanged picture."""
    return Scaling(canvas, size=canvas, left=0, top=0)


def draw_scaling(rng: random.Random, canvas: Size) -> Scaling:
    """Draw scale, position and words.

    Args:
        rng: source of every draw.
        canvas: size of the training picture, sides multiples of 8 and at least ``MIN_SIDE``.
    """
    is_smaller = rng.random() < SMALLER_SHARE
    scale = rng.uniform(*(SMALLER_RANGE if is_smaller else LARGER_RANGE))
    if SMALL <= scale <= 1:
        return unscaled(canvas)
    if is_smaller:
        size = tuple(_whole_latents(scale * side) for side in canvas)
        left = rng.randrange(0, canvas[0] - size[0] + 1, LATENT_STRIDE)
        top = rng.randrange(0, canvas[1] - size[1] + 1, LATENT_STRIDE)
        return Scaling(canvas, size, left, top, rng.choice(SMALL_WORDS))
    size = tuple(round(scale * side) for side in canvas)
    left, top = -rng.randint(0, size[0] - canvas[0]), -rng.randint(0, size[1] - canvas[1])
    return Scaling(canvas, size, left, top, rng.choice(LARGE_WORDS))


def _whole_latents(pixels: float) -> int:
    return max(MIN_PASTED_SIDE, int(pixels) // LATENT_STRIDE * LATENT_STRIDE)
