"""Pictures: any file to upright 8-bit RGB, then scaled, cropped, mirrored, recoloured.

Knows no buckets, captions or data sets: sizes and positions are arguments, sizes always (width,
height). Arrays are (height, width, channels) uint8.

Differences from sd-scripts (commit 48d368fa), all on purpose: EXIF rotation is applied;
transparent parts become white, unless the alpha channel is requested; ICC profiles are converted to
sRGB; 16-bit greys are scaled, not clipped; resampling is antialiased for every filter.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import random
import struct
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mlm_plugin.data.color import ColorProfile, profile_of, to_srgb

__all__ = [
    "IMAGE_EXTENSIONS",
    "RESIZE_INTERPOLATIONS",
    "ImageFacts",
    "color_augment",
    "crop",
    "image_tensor",
    "inspect_image",
    "list_images",
    "open_image",
    "open_mask",
    "resize_image",
]

IMAGE_EXTENSIONS = frozenset(
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .avif .jxl .heic .heif".split()
)
"""Files that count as pictures. One that Pillow cannot read is reported, not ignored."""

PIL_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}

RESIZE_INTERPOLATIONS = (*PIL_FILTERS, "area")

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of an EXIF orientation is turned; those from 5 on lie on their side."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)
"""What Pillow raises on broken files (PNG chunks: SyntaxError)."""

MAX_PIXELS = 500_000_000
"""Of a picture; decoded it takes 1.5 GB. Phones make up to 200 million."""

_LIMIT = Lock()

PLUGINS = {
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
"""Module and package that read a format which Pillow does not know."""

COLOR_AUGMENT_RATE = 0.33
MAX_HUE_SHIFT = 8 / 180
GAMMA_RANGE = (0.95, 1.05)


class ImageFacts(NamedTuple):
    """What a data set needs to know about a file before training."""

    size: tuple[int, int]  # (width, height), upright
    digest: str  # SHA-256 of the file
    num_frames: int
    has_alpha: bool
    profile: ColorProfile = ColorProfile()


def list_images(folder: Path) -> list[Path]:
    """List the pictures of a folder by name; hidden files and sub-folders are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not path.name.startswith(".")
        and path.is_file()
    )


def inspect_image(path: Path) -> ImageFacts:
    """Decode a file once, to check that it is complete.

    Raises:
        ValueError: the file is not a picture, is truncated, or its format needs a missing plug-in.
    """
    try:
        data = path.read_bytes()
        with _opened(io.BytesIO(data), path.suffix) as image:
            width, height = image.size
            if _orientation(image) >= 5:
                width, height = height, width
            facts = ImageFacts(
                size=(width, height),
                digest=hashlib.sha256(data).hexdigest(),
                num_frames=getattr(image, "n_frames", 1),
                has_alpha=_has_transparency(image),
                profile=profile_of(image),
            )
            image.seek(0)
            image.draft("RGB", (1, 1))  # JPEG: read every byte, but decode at an eighth of the size
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError(_why_unidentified(path)) from error
    except UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return facts


def open_image(path: Path, *, alpha: bool = False) -> np.ndarray:
    """Read the first frame upright.

    Args:
        path: the file.
        alpha: keep transparency as a fourth channel, with the colours below it; a file
            without transparency gets 255. Otherwise transparent parts become white.

    Returns:
        (H, W, 3) or, with ``alpha``, (H, W, 4), uint8.

    Raises:
        ValueError: the file cannot be read.
    """
    return _pixels(to_srgb(_upright(path)), alpha=alpha)


def _upright(path: Path) -> Image.Image:
    """The first frame, turned as EXIF says, in 8 bits."""
    try:
        with _opened(path, path.suffix) as image:
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            return _eight_bit(image if turn is None else image.transpose(turn))
    except UNREADABLE as error:
        raise ValueError(f"{path}: {error}") from error


def _orientation(image: Image.Image) -> int:
    """As EXIF says; 1, upright, where that is damaged.

    ``ImageOps.exif_transpose`` writes the other tags again and fails on those of a wrong type.
    """
    try:
        found = image.getexif().get(EXIF_ORIENTATION, 1)
    except (*UNREADABLE, TypeError, struct.error):
        return 1
    return found if found in UPRIGHT else 1


def _opened(source: Path | io.BytesIO, suffix: str) -> Image.Image:
    """A picture whose pixels are not read yet."""
    _register_plugin(suffix.lower())
    with _LIMIT:  # Pillow's own, of the whole process; pictures are inspected in several threads
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"{width} x {height} is more than {MAX_PIXELS // 10**6} million pixels; "
            "save a smaller copy"
        )
    return image


@cache
def _register_plugin(suffix: str) -> None:
    """Let Pillow read a format by a package, where that is installed."""
    if suffix not in PLUGINS:
        return
    try:
        plugin = importlib.import_module(PLUGINS[suffix][0])
    except ImportError:
        return
    if suffix != ".jxl":  # that one registers itself
        plugin.register_heif_opener()


def _why_unidentified(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in PLUGINS or importlib.util.find_spec(PLUGINS[suffix][0]):
        return "Pillow knows no picture format for it"
    return f"{suffix} files need the package {PLUGINS[suffix][1]}: pip install {PLUGINS[suffix][1]}"


def _pixels(picture: Image.Image, *, alpha: bool = False) -> np.ndarray:
    if not alpha and not _has_transparency(picture):
        return np.asarray(picture.convert("RGB"))
    rgba = picture.convert("RGBA")
    if alpha:
        return np.asarray(rgba)
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def open_mask(path: Path) -> np.ndarray:
    """Read a mask picture, white = learn: its red channel, as (H, W, 1) uint8.

    Source: sd-scripts library/custom_train_functions.py apply_masked_loss, which takes red.
    """
    return _pixels(_upright(path))[:, :, :1]


def resize_image(
    pixels: np.ndarray, size: tuple[int, int], *, interpolation: str | None = None
) -> np.ndarray:
    """Scale to (width, height): area average when no side grows, else Lanczos, unless named.

    Transparency is scaled separately from the colours, not premultiplied, as in sd-scripts.

    Source: sd-scripts library/utils.py resize_image.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if width >= size[0] and height >= size[1] else "lanczos"
    if interpolation == "area" and width >= size[0] and height >= size[1]:
        rows = _average_rows(pixels, size[1])
        columns = _average_rows(rows.swapaxes(0, 1), size[0]).swapaxes(0, 1)
        return np.rint(columns).astype(np.uint8)
    pil_filter = PIL_FILTERS.get(interpolation, Image.Resampling.BILINEAR)
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[:, :, i])).resize(size, pil_filter))
        for i in range(pixels.shape[2])
    ]
    return np.stack(channels, axis=2)


def crop(
    pixels: np.ndarray, size: tuple[int, int], *, rng: random.Random | None = None
) -> np.ndarray:
    """Crop to (width, height) at the centre or, with ``rng``, at a random position (x before y).

    Source: sd-scripts library/train_util.py trim_and_resize_if_required.
    """
    width, height = size
    spare_x, spare_y = pixels.shape[1] - width, pixels.shape[0] - height
    assert min(spare_x, spare_y) >= 0, f"{pixels.shape} does not cover {size}"
    left = _start(spare_x, rng)
    top = _start(spare_y, rng)
    return pixels[top : top + height, left : left + width]


def color_augment(pixels: np.ndarray, *, rng: random.Random) -> np.ndarray:
    """Shift the hue by up to 16 degrees or change the gamma, in a third of the calls.

    The gamma of sd-scripts acts on byte values, which changes the brightness by up to a third. Here
    it acts on values in [0, 1].

    Args:
        pixels: (H, W, 3) uint8, not changed.
        rng: source of the draws.

    Source: sd-scripts library/train_util.py AugHelper.color_aug.
    """
    if rng.random() > COLOR_AUGMENT_RATE:
        return pixels
    if rng.random() > 0.5:
        shift = round(256 * rng.uniform(-MAX_HUE_SHIFT, MAX_HUE_SHIFT))
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        hsv[:, :, 0] = (hsv[:, :, 0].astype(np.int16) + shift) % 256
        return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    gamma = rng.uniform(*GAMMA_RANGE)
    curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return curve[pixels]


def image_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, C) uint8 to (C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Bring 16-bit and floating point greys to 8 bits; leave every other mode alone."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) / 257
    elif image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        values = values * 255 if values.max(initial=0) <= 1 else values
    else:
        return image
    eight_bit = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    eight_bit.info.update(image.info)  # its profile
    return eight_bit


def _has_transparency(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _average_rows(values: np.ndarray, num_rows: int) -> np.ndarray:
    """Average over rows, each weighted by the share of it that an output row covers.

    Pillow's box filter uses a row completely or not at all. This differs from OpenCV's area filter
    by up to 50 of 255 at edges when the factor is not an integer.
    """
    height = values.shape[0]
    if height == num_rows:
        return values
    edges = np.arange(num_rows + 1) * (height / num_rows)
    whole = np.minimum(edges.astype(int), height - 1)
    shares = (edges - whole).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    at_edges = shares * values[whole]  # the part of each edge row before the edge
    between = np.add.reduceat(values, whole, axis=0, dtype=np.float32)[:-1]
    return (between + np.diff(at_edges, axis=0)) * np.float32(num_rows / height)


def _start(spare: int, rng: random.Random | None) -> int:
    if spare == 0:
        return 0
    return spare // 2 if rng is None else rng.randint(0, spare)
