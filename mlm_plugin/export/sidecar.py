"""Files beside a LoRA that A1111 and Forge show: ``<name>.json`` and the preview ``<name>.png``.

An embedding has ``<name>.preview.png``: A1111 takes any other picture beside it for an embedding
inside a picture, and reports an error for some.

What a user has written into the JSON stays; the words that the run knows follow the file. A preview
follows it too, unless the user has put another picture in its place.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_plugin.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["is_own_preview", "own_preview", "write_preview", "write_sidecar"]

logger = logging.getLogger(__name__)

OWN_MARK = "mlm_plugin preview"
PREVIEW_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def write_sidecar(
    path: str | os.PathLike,
    *,
    base_model_version: str,
    activation_text: str,
    description: str = "",
) -> Path | None:
    """Write the JSON that A1111's user metadata editor reads.

    In an existing file only the trigger and the version are brought up to date: the old ones belong
    to a file that has been replaced.

    Args:
        path: the LoRA, checkpoint or embedding.
        base_model_version: ``ss_base_model_version``, e.g. ``sd_v1``.
        activation_text: the words that a click on its card adds to the prompt.
        description: shown on the card.

    Returns:
        The file, or ``None`` if one exists that is not such a JSON; it is left alone.

    Source: stable-diffusion-webui ``extensions-builtin/Lora/ui_edit_user_metadata.py``.
    """
    sidecar = Path(path).with_suffix(".json")
    old = _existing(sidecar)
    if old is None:
        logger.warning("%s is not a JSON object and is left unchanged", sidecar)
        return None
    known = {"sd version": _version(base_model_version), "activation text": activation_text}
    if description:
        known["description"] = description
    before = old.get("activation text", activation_text)
    if before != activation_text:
        logger.warning(
            "%s: the activation text is now %r, it was %r", sidecar, activation_text, before
        )
    new = {
        "description": "",
        "sd version": "",
        "activation text": "",
        "preferred weight": 0.0,  # the WebUI chooses
        "negative text": "",
        "notes": "",
    }
    content = new | old | known
    with atomic_path(sidecar) as temporary:
        temporary.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
    return sidecar


def _existing(path: Path) -> dict | None:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _version(base_model_version: str) -> str:
    if base_model_version.startswith("sdxl"):
        return "SDXL"
    return "SD2" if base_model_version.startswith("sd_v2") else "SD1"


def write_preview(
    path: str | os.PathLike, image: Image, *, is_embedding: bool = False
) -> Path | None:
    """Write the preview that WebUIs show for a file, ``<name>.png`` or ``<name>.preview.png``.

    One that an earlier run wrote is replaced: it shows what that run had learned.

    Args:
        path: the LoRA, checkpoint or embedding.
        image: the picture.
        is_embedding: of the latter name.

    Returns:
        The file, or ``None`` if the user has given it a preview of any kind.

    Source: stable-diffusion-webui ``modules/textual_inversion/textual_inversion.py``
    ``load_from_file``, ``modules/ui_extra_networks.py`` ``find_preview``.
    """
    from PIL.PngImagePlugin import PngInfo

    for found in _previews(Path(path)):
        if not is_own_preview(found):
            logger.info("%s exists already and is left unchanged", found)
            return None
    preview = own_preview(path, is_embedding=is_embedding)
    mark = PngInfo()
    mark.add_text("Software", OWN_MARK)
    with atomic_path(preview) as temporary:
        image.save(temporary, format="PNG", pnginfo=mark)
    return preview


def own_preview(path: str | os.PathLike, *, is_embedding: bool = False) -> Path:
    """Where :func:`write_preview` writes."""
    return Path(path).with_suffix(".preview.png" if is_embedding else ".png")


def _previews(path: Path) -> list[Path]:
    endings = [*PREVIEW_SUFFIXES, *(f".preview{suffix}" for suffix in PREVIEW_SUFFIXES)]
    return [found for ending in endings if (found := path.with_suffix(ending)).exists()]


def is_own_preview(path: Path) -> bool:
    """Whether an earlier run wrote this picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == OWN_MARK
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged pictures
        return False
