"""Aspect-ratio buckets: which training size a picture gets, and how it is scaled and cropped to it.

Pure functions over sizes, always (width, height) in pixels. Knows no files, no pixels and no
batches. The numbers are those of sd-scripts (commit 48d368fa), so the same folder gets the same
buckets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from mlm_plugin.errors import UserError

__all__ = [
    "LATENT_STRIDE",
    "Placement",
    "check_steps",
    "crop_box",
    "crop_top_left",
    "make_bucket_resolutions",
    "place_in_bucket",
    "place_without_upscale",
    "usable_bucket_range",
]

logger = logging.getLogger(__name__)

Size = tuple[int, int]

LATENT_STRIDE = 8
"""Pixels per latent: every training size is a multiple of it."""


class Placement(NamedTuple):
    """Where a picture goes: it is scaled to ``resized`` and cropped to ``bucket``."""

    bucket: Size  # (width, height) of the training picture
    resized: Size  # (width, height) after scaling, covers the bucket


def check_steps(steps: int) -> None:
    """Refuse steps that do not fit the latents.

    Raises:
        UserError: not a multiple of the latents' stride.
    """
    if steps < 1 or steps % LATENT_STRIDE:
        raise UserError(
            f"bucket_reso_steps: {steps} is not a multiple of {LATENT_STRIDE}; 64 is usual"
        )


def usable_bucket_range(
    resolution: Size, *, min_bucket_reso: int, max_bucket_reso: int, steps: int
) -> tuple[int, int]:
    """Round the bucket limits to ``steps`` (down, up) and check that they enclose the resolution.

    Raises:
        UserError: the limits exclude the resolution, or ``steps`` does not fit the latents.

    Source: sd-scripts library/train_util.py adjust_min_max_bucket_reso_by_steps.
    """
    check_steps(steps)
    smallest = min_bucket_reso - min_bucket_reso % steps
    largest = max_bucket_reso + -max_bucket_reso % steps
    for name, given, used in (
        ("min_bucket_reso", min_bucket_reso, smallest),
        ("max_bucket_reso", max_bucket_reso, largest),
    ):
        if given != used:
            logger.warning("%s %d is not a multiple of %d, using %d", name, given, steps, used)
    if smallest < 1:
        raise UserError(
            f"min_bucket_reso: {min_bucket_reso} is below bucket_reso_steps ({steps}); raise it"
        )
    if min(resolution) < smallest:
        raise UserError(
            f"min_bucket_reso: {smallest} is above the resolution {_text(resolution)}; "
            "lower min_bucket_reso or raise resolution"
        )
    if max(resolution) > largest:
        raise UserError(
            f"max_bucket_reso: {largest} is below the resolution {_text(resolution)}; "
            "raise max_bucket_reso or lower resolution"
        )
    return smallest, largest


def make_bucket_resolutions(
    resolution: Size, min_bucket_reso: int = 256, max_bucket_reso: int = 1024, steps: int = 64
) -> list[Size]:
    """List the sizes whose area is at most that of ``resolution``, in steps, both orientations.

    Args:
        resolution: (width, height) whose area is the budget.
        min_bucket_reso: shortest side, a multiple of ``steps``.
        max_bucket_reso: longest side, a multiple of ``steps``.
        steps: every side is a multiple of this number of pixels.

    Returns:
        (width, height) pairs in ascending order.

    Source: sd-scripts library/model_util.py make_bucket_resolutions.
    """
    area = resolution[0] * resolution[1]
    side = _floor(int(math.sqrt(area)), steps)
    sizes = {(side, side)}
    for width in range(min_bucket_reso, max_bucket_reso + 1, steps):
        height = min(max_bucket_reso, _floor(area // width, steps))
        if height >= min_bucket_reso:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def place_in_bucket(size: Size, buckets: Sequence[Size]) -> Placement:
    """Choose the bucket of the picture's own size, else the one of the nearest aspect ratio.

    The picture is scaled, up or down, until it just covers the bucket. Among equally near buckets
    the first one is used.

    Source: sd-scripts library/train_util.py BucketManager.select_bucket.
    """
    width, height = size
    ratio = width / height
    bucket = size if size in buckets else min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))
    scale = bucket[1] / height if ratio > bucket[0] / bucket[1] else bucket[0] / width
    return Placement(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))


def place_without_upscale(size: Size, resolution: Size, steps: int) -> Placement:
    """Shrink the picture to the area of ``resolution`` if it is larger; never enlarge it.

    One side is rounded to ``steps``: the one that keeps the aspect ratio better. The bucket is what
    remains after both sides are floored to ``steps``; the bucket limits are not used.

    Raises:
        ValueError: a side of the bucket would be zero.

    Source: sd-scripts library/train_util.py BucketManager.select_bucket, ``no_upscale``.
    """
    area = resolution[0] * resolution[1]
    resized = size if size[0] * size[1] <= area else _shrink(size[0] / size[1], area, steps)
    bucket = (_floor(resized[0], steps), _floor(resized[1], steps))
    if 0 in bucket:
        raise ValueError(f"{_text(size)} is too small or too narrow for steps of {steps} pixels")
    return Placement(bucket, resized)


def crop_box(bucket: Size, size: Size) -> tuple[float, float, float, float]:
    """Compute (left, top, right, bottom) for SDXL's conditioning, from aspect ratios alone.

    Not the pixels that are cropped: with random crops sd-scripts passes SDXL the same values.

    Source: sd-scripts library/train_util.py BucketManager.get_crop_ltrb.
    """
    bucket_width, bucket_height = bucket
    ratio = size[0] / size[1]
    if bucket_width / bucket_height > ratio:
        width, height = bucket_height * ratio, bucket_height
    else:
        width, height = bucket_width, bucket_width / ratio
    left, top = (bucket_width - width) // 2, (bucket_height - height) // 2
    return left, top, left + width, top + height


def crop_top_left(bucket: Size, size: Size, *, flipped: bool) -> tuple[int, int]:
    """Compute SDXL's (top, left); a mirrored picture counts its left from the other edge.

    Source: sd-scripts library/train_util.py BaseDataset.__getitem__.
    """
    left, top, right, _ = crop_box(bucket, size)
    return int(top), int(bucket[0] - right if flipped else left)


def _shrink(ratio: float, area: int, steps: int) -> Size:
    exact_width = math.sqrt(area * ratio)
    width = _round_half_up_then_floor(exact_width, steps)
    height = _round_half_up_then_floor(area / exact_width, steps)
    height_for_width = _round_half_up_then_floor(width / ratio, steps)
    width_for_height = _round_half_up_then_floor(height * ratio, steps)
    if 0 in (height_for_width, height):
        raise ValueError(f"an aspect ratio of {ratio:.3g} leaves no bucket in steps of {steps}")
    if abs(width / height_for_width - ratio) < abs(width_for_height / height - ratio):
        return width, int(width / ratio + 0.5)
    return int(height * ratio + 0.5), height


def _round_half_up_then_floor(value: float, steps: int) -> int:
    return _floor(int(value + 0.5), steps)


def _floor(value: int, steps: int) -> int:
    return value - value % steps


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
