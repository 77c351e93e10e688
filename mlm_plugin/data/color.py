"""Colours as a viewer shows them: ICC profiles converted to sRGB, which models are trained on.

Phones and cameras embed a profile (Display P3, Adobe RGB). Without the conversion their pictures
train with paler colours.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageCms

__all__ = ["ColorProfile", "profile_of", "to_srgb"]

SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile, and the mode of the pictures that it describes."""

BROKEN = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


class ColorProfile(NamedTuple):
    """What a file says about its colours.

    Attributes:
        name: description of the profile; empty without one.
        is_usable: whether it can be read and fits the kind of picture.
    """

    name: str = ""
    is_usable: bool = True

    @property
    def is_converted(self) -> bool:
        """Whether it changes the picture; models are trained on sRGB already."""
        return bool(self.name) and self.is_usable and not self.name.startswith("sRGB")


def profile_of(image: Image.Image) -> ColorProfile:
    """The embedded profile of an opened picture; pixels are not read."""
    data = image.info.get("icc_profile")
    if not data:
        return ColorProfile()
    try:
        profile = _read(data)
        name = ImageCms.getProfileDescription(profile).strip()
        fits = SPACES.get(profile.profile.xcolor_space.strip()) == _color_mode(image)
    except BROKEN:
        return ColorProfile("unreadable", False)
    return ColorProfile(name or "unnamed", fits)


def to_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB, transparency unchanged.

    It is returned as it is without a profile, with one that cannot be used, and with sRGB itself.
    Conversion is perceptual, Little CMS's default, as in viewers.

    Args:
        image: loaded, 8 bits per channel.
    """
    if not profile_of(image).is_converted:
        return image
    alpha = image.convert("RGBA").getchannel("A") if _has_alpha(image) else None
    mode = _color_mode(image)
    try:
        converted = ImageCms.applyTransform(
            image.convert(mode), _transform(image.info["icc_profile"], mode)
        )
    except BROKEN:
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _color_mode(image: Image.Image) -> str:
    """Mode of the colours alone: without palette and transparency."""
    if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _read(data: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(data))


@lru_cache(maxsize=8)
def _transform(data: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(_read(data), srgb, mode, "RGB")
