"""From folders and metadata files to a list of usable, captioned pictures with their buckets.

Everything that is decided once, before training: which files are used, their captions and masks,
repeats, regularisation images, sizes. Knows no batches, epochs or latents.
Sizes are (width, height).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlm_plugin.data import buckets, captions, images
from mlm_plugin.errors import UserError
from mlm_plugin.files import parse_json

if TYPE_CHECKING:
    from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig

__all__ = ["ImageInfo", "Sources", "captions_in", "load_pixels", "read_dataset"]

logger = logging.getLogger(__name__)

Size = tuple[int, int]

MOST_PER_EPOCH = 10_000_000

NOTHING_RANDOM: dict[str, Any] = {
    "color_aug": False,
    "flip_aug": False,
    "scale_aug": False,
    "random_crop": False,
    "shuffle_caption": False,
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0,
    "token_warmup_step": 0.0,
}
"""Settings of a subset whose pictures, and captions without wildcards, never change."""

MAX_ASPECT_DIFFERENCE = 0.01
"""A mask may differ in size from its picture; its aspect ratio only by this share."""


@dataclass
class ImageInfo:
    """One picture of a data set.

    Attributes:
        path: the file.
        facts: size, digest and so on of the file.
        caption: text before any random change, lines joined by a line break with wildcards.
        caption_source: "file", "metadata", "class_tokens" or "none".
        caption_elsewhere: a caption file with another extension than the configured one.
        mask_path: the mask from ``conditioning_data_dir``.
        subset: settings of the folder it comes from.
        dataset_index: which [[datasets]] it belongs to; batches never mix them.
        repeats: how often it is drawn per epoch.
        bucket: training size.
        resized: size after scaling, before the crop.
    """

    path: Path
    facts: images.ImageFacts
    caption: str
    caption_source: str
    subset: SubsetConfig
    dataset_index: int
    repeats: int
    caption_elsewhere: Path | None = None
    mask_path: Path | None = None
    bucket: Size = (0, 0)
    resized: Size = (0, 0)

    @property
    def size(self) -> Size:
        """(width, height) of the upright picture."""
        return self.facts.size

    @property
    def is_reg(self) -> bool:
        """Whether it is a regularisation image."""
        return self.subset.is_reg

    @property
    def has_mask(self) -> bool:
        """Whether the loss of this picture is masked."""
        return self.subset.alpha_mask or self.mask_path is not None

    @property
    def is_scaled(self) -> bool:
        """Whether it is drawn at random scales; regularisation images never are."""
        return self.subset.scale_aug and not self.is_reg


class Sources(NamedTuple):
    """Result of :func:`read_dataset`."""

    images: list[ImageInfo]
    skipped: dict[Path, str]  # files that could not be used, and why
    held_out: list[ImageInfo]  # for validation, without repeats and augmentation


class _Found(NamedTuple):
    path: Path
    caption: str
    caption_source: str
    caption_elsewhere: Path | None = None


def read_dataset(config: DatasetConfig, *, dataset_index: int = 0, seed: int = 0) -> Sources:
    """Read every picture of one data set.

    Regularisation images come last, repeated until there are as many as training images; those
    beyond that number are left out. A file that cannot be used is named in a warning and skipped.

    Args:
        config: the data set.
        dataset_index: its number, kept in the pictures.
        seed: chooses what is held out for validation, unless the data set has its own.

    Raises:
        UserError: a folder or metadata file is missing, masks do not fit, sizes contradict, or
            nothing is left to validate.

    Source: sd-scripts library/train_util.py DreamBoothDataset and FineTuningDataset.
    """
    place = _placer(config)
    train: list[ImageInfo] = []
    regularisation: list[ImageInfo] = []
    held_out: list[ImageInfo] = []
    skipped: dict[Path, str] = {}
    for subset in config.subsets:
        infos, broken = _inspect(_find(subset), subset, dataset_index)
        skipped |= broken
        skipped |= _place(infos, place, keep_size=_crops_at_full_size(config, subset))
        usable = [info for info in infos if info.bucket != (0, 0)]
        if subset.is_reg:
            regularisation += usable
            continue
        trained, validated = split(
            usable,
            config.validation_split,
            seed=seed if config.validation_seed is None else config.validation_seed,
        )
        train += trained
        held_out += map(_as_they_are, validated)
    for path, reason in skipped.items():
        logger.warning("skipping %s: %s", path, reason)
    if skipped:
        logger.warning("unusable files, skipped: %d", len(skipped))
    _refuse_too_many(train + regularisation)
    if config.validation_split and train and not held_out:
        raise UserError(_nothing_held_out(config.validation_split, train))
    images = train + _balance(regularisation, sum(i.repeats for i in train))
    return Sources(images, skipped, held_out)


def split(
    infos: Sequence[ImageInfo], share: float, *, seed: int
) -> tuple[list[ImageInfo], list[ImageInfo]]:
    """Pictures that are trained on, ``ceil(n (1 - share))`` of them, and the rest; both in order.

    Source: sd-scripts ``library/train_util.py`` ``split_train_val``. Its second part has
    ``round(n share)`` pictures, so that one of them may be in the first as well; it is not held
    out, and is left out here.
    """
    shuffled = list(range(len(infos)))
    random.Random(seed).shuffle(shuffled)
    trained = set(shuffled[: math.ceil(len(infos) * (1 - share))])
    return (
        [info for number, info in enumerate(infos) if number in trained],
        [info for number, info in enumerate(infos) if number not in trained],
    )


def _as_they_are(info: ImageInfo) -> ImageInfo:
    """A picture without repeats and augmentation, its caption whole and in order."""
    subset = dataclasses.replace(info.subset, num_repeats=1, **NOTHING_RANDOM)
    return dataclasses.replace(info, subset=subset, repeats=1)


def _nothing_held_out(share: float, train: Sequence[ImageInfo]) -> str:
    largest = max(Counter(id(info.subset) for info in train).values())
    remedy = "add pictures"
    if largest > 1:
        remedy = f"give at least {math.ceil(1000 / largest) / 1000:g}"
    return (
        f"validation_split = {share:g}: none of {len(train)} picture(s) is held out, as the "
        f"largest folder has {largest}; {remedy}, or leave it out"
    )


def load_pixels(
    info: ImageInfo, *, rng: random.Random | None = None, size: Size | None = None
) -> np.ndarray:
    """Read a picture, scale it and crop it to its bucket; ``rng`` makes the crop random.

    Args:
        info: the picture.
        rng: source of the crop position.
        size: the same crop at another size than the bucket's.

    Returns:
        (H, W, 3) uint8, or (H, W, 4) with the loss mask as the last channel.

    Raises:
        UserError: the file changed or vanished since the data set was read.
    """
    try:
        pixels = images.open_image(info.path, alpha=info.subset.alpha_mask)
        mask = images.open_mask(info.mask_path) if info.mask_path else None
    except ValueError as error:
        raise UserError(f"{error}; it was readable before, restart the training") from error
    if (pixels.shape[1], pixels.shape[0]) != info.size:
        raise UserError(f"{info.path}: its size changed during the training; restart it")
    interpolation = info.subset.resize_interpolation
    if mask is not None:
        mask = images.resize_image(mask, info.size, interpolation=interpolation)
        pixels = np.concatenate([pixels, mask], axis=2)
    size = size or info.bucket
    pixels = images.resize_image(pixels, _covering(info, size), interpolation=interpolation)
    return images.crop(pixels, size, rng=rng)


def _covering(info: ImageInfo, size: Size) -> Size:
    """The size of the whole picture when its bucket has this size."""
    sides = zip(info.resized, info.bucket, size, strict=True)
    return tuple(math.ceil(resized * side / bucket) for resized, bucket, side in sides)


def captions_in(subset: SubsetConfig) -> list[str]:
    """The captions of a subset, one for each picture; empty where it has none.

    Raises:
        UserError: a folder or a metadata file is missing.
    """
    return [found.caption for found in _find(subset)]


def _find(subset: SubsetConfig) -> list[_Found]:
    found = _from_metadata(subset) if subset.metadata_file else _from_folder(subset)
    if not found:
        source = subset.metadata_file or subset.image_dir
        logger.warning("no pictures in %s%s", source, _hint(subset.image_dir))
    return found


def _from_folder(subset: SubsetConfig) -> list[_Found]:
    folder = subset.image_dir
    if not folder.is_dir():
        raise UserError(f"image_dir: {folder} is not a folder")
    found: list[_Found] = []
    unreadable: list[captions.NotUTF8] = []
    for path in images.list_images(folder):
        try:
            found.append(_with_caption(path, subset))
        except captions.NotUTF8 as error:
            unreadable.append(error)
    if len(unreadable) > 1:
        files = ", ".join(f"{error.path.name} (byte {error.byte})" for error in unreadable)
        raise UserError(
            f"{folder}: {len(unreadable)} captions are not UTF-8: {files}; save them as UTF-8"
        )
    if unreadable:
        raise unreadable[0]
    return found


def _with_caption(path: Path, subset: SubsetConfig) -> _Found:
    text, file, elsewhere = captions.read_captions(
        path, subset.caption_extension, subset.enable_wildcard
    )
    if text:
        return _Found(path, text, "file")
    if file is not None:
        instead = "class_tokens are used" if subset.class_tokens else "the caption stays empty"
        logger.warning("%s is empty: %s", file, instead)
    if subset.class_tokens is None:
        return _Found(path, "", "none", elsewhere)
    return _Found(path, subset.class_tokens, "class_tokens", elsewhere)


def _from_metadata(subset: SubsetConfig) -> list[_Found]:
    found = []
    for key, entry in _read_metadata(subset.metadata_file).items():
        caption = captions.metadata_caption(entry.get("caption"), entry.get("tags"), subset)
        path = _metadata_image(key, subset)
        found.append(_Found(path, caption, "metadata" if caption else "none"))
    return found


def _refuse_too_many(images: Sequence[ImageInfo]) -> None:
    """Every use of a picture has an entry in the order of an epoch."""
    total = sum(info.repeats for info in images)
    if total > MOST_PER_EPOCH:
        most = max(images, key=lambda info: info.repeats)
        raise UserError(
            f"{total} pictures per epoch, with repeats; at most {MOST_PER_EPOCH}: "
            f"lower num_repeats = {most.repeats} of {most.path.parent}"
        )


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"metadata_file: {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            lines = (parse_json(line, path) for line in text.split("\n") if line.strip())
            return {line["image_path"]: line for line in lines}
        metadata = parse_json(text, path)
    except UserError as error:
        raise UserError(f"metadata_file: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"metadata_file: {path} cannot be read: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(e, dict) for e in metadata.values()):
        raise UserError(f"metadata_file: {path} must map picture paths to tables with caption/tags")
    return metadata


def _metadata_image(key: str, subset: SubsetConfig) -> Path:
    path = Path(key)
    if not path.is_absolute():
        if subset.image_dir is None:
            raise UserError(
                f"image_dir: needed for {subset.metadata_file}, which names {key} relative to it"
            )
        path = subset.image_dir / path
    if path.suffix.lower() in images.IMAGE_EXTENSIONS:
        return path
    # Old metadata names pictures without their extension.
    named = (path.with_name(path.name + extension) for extension in images.IMAGE_EXTENSIONS)
    return next((candidate for candidate in sorted(named) if candidate.is_file()), path)


def _inspect(
    found: Sequence[_Found], subset: SubsetConfig, dataset_index: int
) -> tuple[list[ImageInfo], dict[Path, str]]:
    masks = _masks(subset, found)
    infos: list[ImageInfo] = []
    broken: dict[Path, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(_facts_or_reason, (item.path for item in found)))
    for item, facts in zip(found, results, strict=True):
        if isinstance(facts, str):
            broken[item.path] = facts
            continue
        infos.append(
            ImageInfo(
                path=item.path,
                facts=facts,
                caption=item.caption,
                caption_source=item.caption_source,
                caption_elsewhere=item.caption_elsewhere,
                mask_path=masks.get(item.path),
                subset=subset,
                dataset_index=dataset_index,
                repeats=subset.num_repeats,
            )
        )
    _check_mask_shapes(infos)
    return _without_empty_masks(infos, broken), broken


def _without_empty_masks(infos: list[ImageInfo], broken: dict[Path, str]) -> list[ImageInfo]:
    """The pictures from which something is learned; the others are added to ``broken``."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(_why_nothing_is_learned, infos))
    broken |= {i.path: reason for i, reason in zip(infos, reasons, strict=True) if reason}
    return [info for info, reason in zip(infos, reasons, strict=True) if not reason]


def _why_nothing_is_learned(info: ImageInfo) -> str | None:
    try:
        if info.mask_path and not images.open_mask(info.mask_path).any():
            return f"its mask {info.mask_path} is black everywhere, so nothing of it is learned"
        if info.subset.alpha_mask and info.facts.has_alpha:
            if not images.open_image(info.path, alpha=True)[:, :, 3].any():
                return "it is transparent everywhere, so nothing of it is learned with alpha_mask"
    except ValueError as error:
        return str(error)
    return None


def _facts_or_reason(path: Path) -> images.ImageFacts | str:
    try:
        return images.inspect_image(path)
    except ValueError as error:
        return str(error)


def _masks(subset: SubsetConfig, found: Sequence[_Found]) -> dict[Path, Path]:
    folder = subset.conditioning_data_dir
    if folder is None:
        return {}
    if not folder.is_dir():
        raise UserError(f"conditioning_data_dir: {folder} is not a folder")
    by_stem = {path.stem: path for path in images.list_images(folder)}
    missing = [item.path.name for item in found if item.path.stem not in by_stem]
    if missing:
        raise UserError(
            f"conditioning_data_dir: {folder} lacks masks for {len(missing)} of {len(found)} "
            f"pictures ({', '.join(missing[:5])}); every picture needs a mask of the same name"
        )
    extra = sorted(set(by_stem) - {item.path.stem for item in found})
    if extra:
        logger.warning("%s: %d masks without a picture: %s", folder, len(extra), ", ".join(extra))
    return {item.path: by_stem[item.path.stem] for item in found}


def _check_mask_shapes(infos: Sequence[ImageInfo]) -> None:
    for info in infos:
        if info.mask_path is None:
            continue
        try:
            width, height = images.inspect_image(info.mask_path).size
        except ValueError as error:
            raise UserError(f"mask {info.mask_path}: {error}") from error
        ratio = (width / height) / (info.size[0] / info.size[1])
        if abs(ratio - 1) > MAX_ASPECT_DIFFERENCE:
            raise UserError(
                f"mask {info.mask_path}: {width}x{height} does not have the shape of its picture "
                f"({info.size[0]}x{info.size[1]}); make the two the same size"
            )


def _placer(config: DatasetConfig):
    resolution = config.resolution
    if not config.enable_bucket:
        if any(side < 1 or side % buckets.LATENT_STRIDE for side in resolution):
            raise UserError(
                f"resolution: {resolution[0]},{resolution[1]} must be multiples of "
                f"{buckets.LATENT_STRIDE} when enable_bucket is off"
            )
        return lambda size: buckets.place_in_bucket(size, [resolution])
    steps = config.bucket_reso_steps
    if config.bucket_no_upscale:
        buckets.check_steps(steps)  # the limits are not used here
        if min(resolution) < steps:
            raise UserError(
                f"resolution: {resolution[0]},{resolution[1]} is below bucket_reso_steps ({steps})"
            )
        return lambda size: buckets.place_without_upscale(size, resolution, steps)
    smallest, largest = buckets.usable_bucket_range(
        resolution,
        min_bucket_reso=config.min_bucket_reso,
        max_bucket_reso=config.max_bucket_reso,
        steps=steps,
    )
    sizes = buckets.make_bucket_resolutions(resolution, smallest, largest, steps)
    return lambda size: buckets.place_in_bucket(size, sizes)


def _place(infos: Iterable[ImageInfo], place, *, keep_size: bool) -> dict[Path, str]:
    failed = {}
    for info in infos:
        try:
            info.bucket, info.resized = place(info.size)
        except ValueError as error:
            failed[info.path] = str(error)
            continue
        if keep_size and all(s >= b for s, b in zip(info.size, info.bucket, strict=True)):
            info.resized = info.size
    return failed


def _crops_at_full_size(config: DatasetConfig, subset: SubsetConfig) -> bool:
    """Without buckets a random crop is taken from the unscaled picture, as in sd-scripts."""
    return subset.random_crop and not config.enable_bucket


def _balance(infos: list[ImageInfo], num_train_images: int) -> list[ImageInfo]:
    """Use and repeat regularisation images until there are as many as training images.

    Source: sd-scripts library/train_util.py DreamBoothDataset.__init__, end.
    """
    count, used = 0, []
    for info in infos:
        if count >= num_train_images:
            break
        used.append(info)
        count += info.repeats
    if len(used) < len(infos):
        logger.warning(
            "%d of %d regularisation images are not used: there are only %d training images",
            len(infos) - len(used),
            len(infos),
            num_train_images,
        )
    for i in range(max(0, num_train_images - count) if used else 0):
        used[i % len(used)].repeats += 1
    return used


def _hint(folder: Path | None) -> str:
    """A hint where pictures are if they are one folder deeper."""
    if folder is None or not folder.is_dir():
        return ""
    deeper = [f.name for f in sorted(folder.iterdir()) if f.is_dir() and images.list_images(f)]
    return f"; there are some in its sub-folders {', '.join(deeper[:3])}" if deeper else ""
