"""Scale augmentation: a picture far away on a blank canvas, or seen from near, and told so.

Two draws of three take a scale from [1/3, 1), the third from [1.2, 1.4]. Below 0.6 the scaled
picture lies somewhere on a blank canvas; from 0.6 to 1 the picture stays as it is; above 1 a part
of the enlarged picture is cut out. The caption of a small or enlarged picture says so.

Knows no files, buckets or latents, and no loss: what is blank must not be learned, and
:meth:`Scaling.valid_mask` says where that is. Sizes are (width, height) in pixels. Shapes: C
channels, H x W pixels of the canvas, h x w of the scaled picture.

Source: Custom Diffusion, arXiv 2212.04488, and adobe-research/custom-diffusion (commit 31aa283),
src/finetune_data.py MaskBase. Different here, on purpose: width and height scale together, so
canvases need not be square; small pictures have sides and places that are multiples of a latent,
so that the mask is exact in the latents; a caption that begins with an article gives it up to the
words before it.
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
"""Below this scale a picture is small: pasted, and named so."""

MIN_PASTED_SIDE = 3 * LATENT_STRIDE
"""One latent is left of it when the border is taken off."""

MIN_SIDE = 40
"""Smallest canvas: SMALL of it still holds MIN_PASTED_SIDE."""

SMALL_WORDS = ("a far away ", "very small ")
LARGE_WORDS = ("zoomed in ", "close up ")

ARTICLE = re.compile(r"(an?|the) ", re.IGNORECASE)


class Scaling(NamedTuple):
    """Size and place of a scaled picture, and the words for it."""

    canvas: Size
    size: Size  # of the scaled picture
    left: int  # of the scaled picture on the canvas; negative where it is cut off
    top: int
    words: str = ""  # in front of the caption

    def place(self, picture: Tensor) -> Tensor:
        """Put a scaled picture ``(C, h, w)`` on zeros, ``(C, H, W)``; what lies outside is cut off.

        Zero is mid grey of pixels in [-1, 1], and nothing of a mask.
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

        Of a picture that does not fill the canvas, one latent is left out all around: latents at
        its border also see what is blank.
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
        """Tell the scale: "a photo of sks dog" becomes "a far away photo of sks dog".

        A dropped caption stays empty.
        """
        if not (self.words and text):
            return text
        article = ARTICLE.match(text)
        return self.words + text[article.end() if article else 0 :]


def unscaled(canvas: Size) -> Scaling:
    """The picture as it is."""
    return Scaling(canvas, size=canvas, left=0, top=0)


def draw_scaling(rng: random.Random, canvas: Size) -> Scaling:
    """Draw scale, place and words.

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
