"""Pictures of the plain class, drawn by the base model: DreamBooth's prior preservation.

A folder of them is an ordinary regularisation folder, with a caption beside each picture. Every
picture has its own seed, so the set does not depend on interruptions, and existing pictures are not
drawn again. Knows nothing about data sets or what the pictures are for.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mlm_plugin.data.images import list_images
from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, read_text, remove_temporaries, require_writable
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.conditioning import Conditioning, encode_captions
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.training.samples import (
    DenoiseSettings,
    create_sampler,
    decode_latents,
    denoise,
)

__all__ = ["SETTINGS_FILE", "ClassImageSettings", "draw_class_images", "missing_class_images"]

logger = logging.getLogger(__name__)

SETTINGS_FILE = "class_images.json"
ALWAYS_CHECKED = ("prompt", "model")  # a whole set may differ in the other settings
_CLASS_IMAGE = re.compile(r"class_(\d{6,})\.png")


@dataclass(frozen=True)
class ClassImageSettings:
    """Everything that determines the pictures. It is kept beside them, in ``SETTINGS_FILE``.

    Attributes:
        prompt: e.g. ``a photo of a dog``; also the caption.
        model: name of the model.
        seed: picture i gets its noise from (seed, i).
        size: height and width in pixels, multiples of 8.
        sampler: kohya's name, see ``SAMPLERS``.
        num_steps: of the sampler.
        scale: classifier-free guidance.
    """

    prompt: str
    model: str
    seed: int
    size: tuple[int, int]
    sampler: str = "ddim"
    num_steps: int = 50
    scale: float = 7.5


def missing_class_images(folder: str | os.PathLike, num_images: int) -> list[int]:
    """Numbers of the pictures missing from a folder, ascending; no file is opened.

    Other pictures in the folder, the user's own, count in place of the highest numbers.
    """
    pictures = _pictures(Path(folder))
    drawn = _drawn(pictures)
    num_own = len(pictures) - len(drawn)
    return [index for index in range(num_images - num_own) if index not in drawn]


@torch.no_grad()
def draw_class_images(
    folder: str | os.PathLike,
    settings: ClassImageSettings,
    *,
    num_images: int,
    caption_extension: str,
    load: Callable[[], StableDiffusion],
    accelerator: Accelerator,
) -> list[Path]:
    """Fill a folder up to ``num_images`` pictures: ``class_000000.png`` and so on, with captions.

    An interruption leaves complete files only, and the next call continues.

    Args:
        folder: existing pictures count, the user's own too.
        settings: what determines the pictures.
        num_images: how many pictures the folder should contain.
        caption_extension: extension of the caption files.
        load: returns the model, untrained and in eval mode; called only if a picture is missing.
        accelerator: device and mixed precision.

    Returns:
        The pictures drawn by this call.

    Raises:
        UserError: the folder was drawn with another prompt or model (with any other setting, if
            pictures are missing), cannot be written, or the VAE overflowed.

    Source: DreamBooth (arXiv 2208.12242) section 3.3; steps and scale as in diffusers'
    ``train_dreambooth.py``, whose pictures are nameless, uncaptioned and taken from any prompt.
    """
    folder = Path(folder)
    remove_temporaries(folder, lambda name: name == SETTINGS_FILE or name.startswith("class_"))
    missing = missing_class_images(folder, num_images)
    drawn = _drawn(_pictures(folder))
    known = _read_settings(folder) if drawn else None
    if known is not None:
        _refuse_others(folder, known, settings, keys=None if missing else ALWAYS_CHECKED)
        for index in drawn:
            _write_caption(_path(folder, index), settings.prompt, caption_extension)
    if not missing:
        return []
    require_writable(folder, "folder of class images")
    models = load()
    _write_settings(folder, settings)
    bar = tqdm(total=num_images, initial=num_images - len(missing), desc="class images")
    with bar, _on_device(models, accelerator.device), preserved_random_state(accelerator.device):
        with accelerator.autocast():
            prompts = encode_captions(models.text_encoders, ["", settings.prompt])
        for index in missing:
            path = _path(folder, index)
            # First, so that no picture is ever without a caption.
            _write_caption(path, settings.prompt, caption_extension)
            with accelerator.autocast():
                latents = _latents(models, prompts, settings, index)
            _save(path, decode_latents(models.vae, latents), models.vae.dtype)
            bar.update()
    return [_path(folder, index) for index in missing]


def _latents(
    models: StableDiffusion, prompts: Conditioning, settings: ClassImageSettings, index: int
) -> Tensor:
    scheduler = create_sampler(
        settings.sampler,
        models.noise_scheduler,
        prediction_type=models.prediction_type,
        zero_terminal_snr=models.zero_terminal_snr,
    )
    return denoise(
        models.unet,
        prompts,
        scheduler,
        DenoiseSettings(settings.size, settings.num_steps, settings.scale),
        generator=_generator(settings.seed, index),
    )


def _save(path: Path, picture: Image.Image, dtype: torch.dtype) -> None:
    if picture.getbbox() is None:  # all black: it would be trained on from now on
        raise UserError(
            f"{path}: the picture is black, the VAE overflowed in {dtype}; set no_half_vae"
        )
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _generator(seed: int, index: int) -> torch.Generator:
    """Noise of one picture; seed + index would give seed 1 all but one picture of seed 0."""
    number = random.Random(f"class images/{seed}/{index}").getrandbits(63)
    return torch.Generator().manual_seed(number)


@contextmanager
def _on_device(models: StableDiffusion, device: torch.device) -> Iterator[None]:
    modules = [*(te.model for te in models.text_encoders), models.unet, models.vae]
    origins = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, origin in zip(modules, origins, strict=True):
            module.to(origin)


def _pictures(folder: Path) -> list[Path]:
    return list_images(folder) if folder.is_dir() else []


def _drawn(pictures: list[Path]) -> set[int]:
    found = (_CLASS_IMAGE.fullmatch(path.name) for path in pictures)
    return {int(match[1]) for match in found if match}


def _path(folder: Path, index: int) -> Path:
    return folder / f"class_{index:06d}.png"


def _write_caption(picture: Path, prompt: str, extension: str) -> None:
    path = picture.with_suffix(extension if extension.startswith(".") else f".{extension}")
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(f"{prompt}\n", encoding="utf-8")


def _as_json(settings: ClassImageSettings) -> dict[str, Any]:
    """As read back from a JSON file, which has no tuples."""
    return {**asdict(settings), "size": list(settings.size), "scale": float(settings.scale)}


def _write_settings(folder: Path, settings: ClassImageSettings) -> None:
    text = json.dumps(_as_json(settings), indent=2, ensure_ascii=False)
    with atomic_path(folder / SETTINGS_FILE) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """What the pictures of a folder were drawn with; None if it is not recorded."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        known = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); delete it") from error
    if not isinstance(known, dict):
        raise UserError(f"{path}: expected a table of settings; delete it")
    return known


def _refuse_others(
    folder: Path, known: dict[str, Any], wanted: ClassImageSettings, *, keys: tuple[str, ...] | None
) -> None:
    """Raise if a setting of ``keys`` (None = all) differs; log it if another one does."""
    for key, value in _as_json(wanted).items():
        if known.get(key) == value:
            continue
        difference = (
            f"{folder}: its pictures were drawn with {key} {known.get(key)!r}, not {value!r}"
        )
        if keys is not None and key not in keys:
            logger.info("%s; they are used unchanged", difference)
            continue
        raise UserError(
            f"{difference}; choose another folder, delete this one to draw again, or delete its "
            f"{SETTINGS_FILE} to keep the pictures and only fill up"
        )
