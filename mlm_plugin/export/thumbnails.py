"""Small pictures in file headers, as ModelSpec has them: data URLs of at most 256 pixels."""

from __future__ import annotations

import base64
import os
from io import BytesIO

__all__ = ["thumbnail"]

SIDE = 256  # pixels
QUALITY = 75  # of JPEG: about 10 KB for a photo, 40 KB for noise


def thumbnail(picture: str | os.PathLike) -> str:
    """A picture file as data URL of a JPEG, shrunk where it is larger than 256 pixels.

    Raises:
        OSError: the file is missing or not a picture.

    Source: Stability AI, ModelSpec 1.0, key ``thumbnail``.
    """
    from PIL import Image

    content = BytesIO()
    with Image.open(picture) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(content, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
