"""Latents computed once and cached in memory or beside the pictures.

Knows no VAE: ``encode`` and ``vae_id`` are arguments. Shapes: C = 4 latent channels,
h, w = picture size / 8.

A file has kohya's name and keys, so sd-scripts can use it, plus two keys of ours: the VAE's
identity and a key of everything else that shaped the latents (picture file, mask file, scaling).
A file of sd-scripts lacks them, so its VAE is unknown and it is computed again, once. The older
``{stem}.npz`` of sd-scripts is not used.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mlm_plugin.data.buckets import LATENT_STRIDE, crop_box
from mlm_plugin.data.images import image_tensor
from mlm_plugin.data.sources import ImageInfo, load_pixels
from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, remove_temporaries

__all__ = ["CachedLatents", "cache_latents", "latents_paths", "read_latents"]

logger = logging.getLogger(__name__)

SUFFIX = "_sd.npz"
SDXL_SUFFIX = "_sdxl.npz"
LATENT_CHANNELS = 4
VAE_KEY = "mlm_plugin_vae"
SOURCE_KEY = "mlm_plugin_source"
SOURCE_VERSION = "1"
"""Part of the source key: increase it when pictures are read or scaled differently."""

BROKEN_FILE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class CachedLatents(NamedTuple):
    """The cached data of one picture."""

    latents: Tensor  # (C, h, w) float32, a sample of the VAE's distribution, not scaled
    latents_flipped: Tensor | None  # (C, h, w) of the mirrored picture
    mask: Tensor | None  # (H, W) float32 in [0, 1], not mirrored


def cache_latents(
    infos: Sequence[ImageInfo],
    encode: Callable[[Tensor], Tensor],
    *,
    vae_id: str,
    to_disk: bool,
    batch_size: int = 1,
    skip_check: bool = False,
    is_sdxl: bool = False,
) -> list[CachedLatents | Path]:
    """Encode every picture without valid latents on disk.

    The VAE's distribution is sampled once: every epoch sees the same latents.

    Args:
        infos: the pictures.
        encode: (B, 3, H, W) in [-1, 1] to (B, C, h, w), a sample, not scaled.
        vae_id: changes whenever the VAE's weights do.
        to_disk: keep the latents in files and return their paths; in memory where no file can
            be written.
        batch_size: pictures per call of ``encode``, all of one size.
        skip_check: use every existing file without checks (``--skip_cache_check``).
        is_sdxl: use the file names of SDXL's VAE, so that both kinds fit into one folder.

    Returns:
        One entry per picture, in order.

    Raises:
        UserError: the VAE returns NaN.

    Source: sd-scripts library/strategy_base.py LatentsCachingStrategy.
    """
    paths = latents_paths(infos, suffix=SDXL_SUFFIX if is_sdxl else SUFFIX)
    entries: list[CachedLatents | Path] = list(paths)
    names = {path.name for path in paths}
    for folder in {path.parent for path in paths}:
        remove_temporaries(folder, names.__contains__)
    todo = list(range(len(infos)))
    if to_disk:
        problems = {i: _problem(paths[i], infos[i], vae_id, skip_check) for i in todo}
        todo = [i for i in todo if problems[i] is not None]
        for reason, count in Counter(problems[i] for i in todo).items():
            logger.info("encoding %d pictures: %s", count, reason)
    progress = tqdm(total=len(todo), desc="caching latents", disable=None)
    for group in _groups(infos, todo, batch_size):
        for i, cached in zip(group, _encode([infos[i] for i in group], encode), strict=True):
            if to_disk:
                to_disk = _try_to_write(paths[i], infos[i], cached, vae_id)
            if not to_disk:
                entries[i] = cached
        progress.update(len(group))
    progress.close()
    return entries


def latents_paths(infos: Sequence[ImageInfo], *, suffix: str = SUFFIX) -> list[Path]:
    """The cache file of each picture: ``{stem}_{width:04d}x{height:04d}{suffix}`` beside it.

    Two different entries may have the same name: the same stem, or one picture in data sets of
    different resolution, which sd-scripts mixes up. Then the names of the later ones also contain
    bucket, settings and extension.

    Source: sd-scripts library/strategy_sd.py SdSdxlLatentsCachingStrategy.get_latents_npz_path.
    """
    owners: dict[Path, tuple] = {}
    paths = []
    for info in infos:
        tail = f"_{info.size[0]:04d}x{info.size[1]:04d}{suffix}"
        owner = (info.path, info.bucket, _source_key(info))
        path = info.path.with_name(info.path.stem + tail)
        if owners.setdefault(path, owner) != owner:
            bucket = f"{info.bucket[0]}x{info.bucket[1]}"
            mark = f"{info.path.suffix[1:]}-{bucket}-{_source_key(info)[:8]}"
            path = info.path.with_name(f"{info.path.stem}.{mark}{tail}")
        paths.append(path)
    return paths


def read_latents(path: Path, info: ImageInfo) -> CachedLatents:
    """Read a file written by :func:`cache_latents`.

    Raises:
        UserError: it is broken or of the wrong shape (possible only after ``--skip_cache_check``
            or a change during the run).
    """
    try:
        with np.load(path) as file:
            _check_contents(file, info)
            flipped = file["latents_flipped"] if info.subset.flip_aug else None
            mask = file["alpha_mask"] if info.has_mask else None
            latents = file["latents"]
    except BROKEN_FILE as error:
        raise UserError(
            f"{path}: {_reason(error)}; delete it and train without skip_cache_check"
        ) from error
    return CachedLatents(_tensor(latents), _tensor(flipped), _tensor(mask))


def _problem(path: Path, info: ImageInfo, vae_id: str, skip_check: bool) -> str | None:
    """Why a file cannot be used; None if it can."""
    if not path.is_file():
        return "no file yet"
    if skip_check:
        return None
    try:
        with np.load(path) as file:
            _check_contents(file, info)
            if VAE_KEY not in file:
                return "the file does not tell its VAE (made by sd-scripts)"
            if str(file[VAE_KEY]) != vae_id:
                return "the file is of another VAE"
            if str(file[SOURCE_KEY]) != _source_key(info):
                return "the picture or its settings changed"
    except BROKEN_FILE as error:
        return _reason(error)
    return None


def _check_contents(file: np.lib.npyio.NpzFile, info: ImageInfo) -> None:
    width, height = info.bucket
    shape = (LATENT_CHANNELS, height // LATENT_STRIDE, width // LATENT_STRIDE)
    for key in ["latents", *(["latents_flipped"] if info.subset.flip_aug else [])]:
        if file[key].shape != shape:
            raise ValueError(f"{key} of the file has shape {file[key].shape}, needed is {shape}")
    if info.has_mask and file["alpha_mask"].shape != (height, width):
        raise ValueError("the mask in the file has another size")


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return "the file lacks a flipped version, a mask or another part"
    return str(error) or type(error).__name__


def _groups(infos: Sequence[ImageInfo], todo: list[int], batch_size: int) -> Iterator[list[int]]:
    """Split the work into batches of one size and one flip setting, smallest size first."""
    by_kind: dict[tuple, list[int]] = {}
    for i in todo:
        by_kind.setdefault((infos[i].bucket, infos[i].subset.flip_aug), []).append(i)
    for _, members in sorted(by_kind.items()):
        for start in range(0, len(members), max(1, batch_size)):
            yield members[start : start + max(1, batch_size)]


@torch.no_grad()
def _encode(
    infos: Sequence[ImageInfo], encode: Callable[[Tensor], Tensor]
) -> Iterator[CachedLatents]:
    pictures = [load_pixels(info) for info in infos]
    pixel_values = torch.stack([image_tensor(pixels[:, :, :3]) for pixels in pictures])
    latents = encode(pixel_values).float().cpu()
    flipped = [None] * len(infos)
    if infos[0].subset.flip_aug:
        flipped = encode(pixel_values.flip(3)).float().cpu()
    for info, pixels, plain, mirrored in zip(infos, pictures, latents, flipped, strict=True):
        if not plain.isfinite().all() or (mirrored is not None and not mirrored.isfinite().all()):
            raise UserError(
                f"{info.path}: the VAE gives NaN for it; use --no_half_vae or another VAE"
            )
        mask = torch.from_numpy(pixels[:, :, 3] / np.float32(255)) if info.has_mask else None
        # Clones: a slice would keep the memory of the whole batch alive.
        yield CachedLatents(plain.clone(), None if mirrored is None else mirrored.clone(), mask)


def _try_to_write(path: Path, info: ImageInfo, cached: CachedLatents, vae_id: str) -> bool:
    """Write a file, or warn and return false: what cannot be kept on disk is kept in memory."""
    try:
        _write(path, info, cached, vae_id)
    except OSError as error:
        logger.warning(
            "cache_latents_to_disk: cannot write %s (%s); the latents are kept in memory instead",
            path,
            error,
        )
        return False
    return True


def _write(path: Path, info: ImageInfo, cached: CachedLatents, vae_id: str) -> None:
    content = {
        "latents": cached.latents.numpy(),
        "original_size": np.array(info.size),
        "crop_ltrb": np.array(crop_box(info.bucket, info.size)),
        VAE_KEY: np.array(vae_id),
        SOURCE_KEY: np.array(_source_key(info)),
    }
    if cached.latents_flipped is not None:
        content["latents_flipped"] = cached.latents_flipped.numpy()
    if cached.mask is not None:
        content["alpha_mask"] = cached.mask.numpy()
    with atomic_path(path) as temporary:
        np.savez(temporary, **content)


def _source_key(info: ImageInfo) -> str:
    mask = hashlib.sha256(info.mask_path.read_bytes()).hexdigest() if info.mask_path else ""
    interpolation = info.subset.resize_interpolation
    parts = (SOURCE_VERSION, info.facts.digest, info.subset.alpha_mask, mask, interpolation)
    if info.facts.profile.is_converted:
        parts += ("sRGB",)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).float()
