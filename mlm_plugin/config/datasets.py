"""``--dataset_config`` or the folder convention -> data sets with every value resolved.

A value is taken from the subset, its data set, ``[general]``, the options or the defaults, in this
order. This module only checks that folders exist; images and captions are read by ``data``.

Source: sd-scripts library/config_util.py (order of resolution, folder names).
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.config.dataset_schema import (
    IMAGES,
    KEYS,
    check_caption_extension,
    check_table,
    is_kind,
)
from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.options import LARGEST_SIDE, TrainConfig, ValidationOptions
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError
from mlm_plugin.files import parse_json, read_text

__all__ = [
    "DatasetConfig",
    "FolderName",
    "SubsetConfig",
    "folder_name",
    "given_resolution",
    "require_bucket_steps",
    "resolve_datasets",
]

logger = logging.getLogger(__name__)

BUCKET_STEP = 64
"""SD U-Nets halve the latents three times: image sides must be multiples of 8 * 2**3."""

SDXL_BUCKET_STEP = 32
"""SDXL's halves them twice."""

LATENT_STRIDE = 8
"""Pixels per latent."""


@dataclass(frozen=True)
class SubsetConfig:
    """Images of one folder, or of one metadata file, and how their captions are made."""

    image_dir: Path | None = None  # None only with metadata_file
    class_tokens: str | None = None
    is_reg: bool = False
    num_repeats: int = 1
    caption_extension: str = ".caption"
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    caption_separator: str = ","
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    scale_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    conditioning_data_dir: Path | None = None
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    metadata_file: Path | None = None


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a batch size, a resolution and buckets."""

    batch_size: int
    resolution: tuple[int, int]  # width, height
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = BUCKET_STEP
    validation_split: float = 0.0  # share of each subset's pictures that is held out
    validation_seed: int | None = None  # None = the run's
    subsets: tuple[SubsetConfig, ...] = ()


def resolve_datasets(config: TrainConfig) -> tuple[DatasetConfig, ...]:
    """The data sets of a run, each with at least one subset that is not for regularization.

    If ``generate_class_images`` will fill it, ``reg_data_dir`` may be missing or empty.

    Raises:
        UserError: Unknown key, wrong type, missing folder, nothing to train on.
    """
    place, user = _user_config(config)
    general = user.get("general", {})
    check_table(general, "general", place=f"{place} [general]")
    options = _option_values(config)
    check_caption_extension(config.dataset.caption_extension, place="options")
    datasets = tuple(
        _resolve_dataset(
            table, number, general=general, options=options, config=config, place=place
        )
        for number, table in enumerate(user["datasets"], start=1)
    )
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if all(subset.is_reg for subset in subsets):
        raise UserError(f"{place}: nothing to train on besides regularization images")
    has_masks = any(subset.conditioning_data_dir or subset.alpha_mask for subset in subsets)
    if config.dataset.masked_loss and not has_masks:
        raise UserError(f"{place}: masked_loss needs conditioning_data_dir or alpha_mask")
    _check_validation(config, datasets)
    return datasets


def _check_validation(config: TrainConfig, datasets: Sequence[DatasetConfig]) -> None:
    """Refuse options of a validation that never happens; a seed alone is only named."""
    if any(dataset.validation_split for dataset in datasets):
        return
    given = [item.name for item in dataclasses.fields(ValidationOptions)]
    given = [name for name in given if name in config.changed() and name != "validation_seed"]
    if "validation_split" in given:
        raise UserError(
            f"validation_split = {config.validation.validation_split:g} has no effect, as every "
            f"data set of {config.dataset.dataset_config} sets 0; keep one of the two"
        )
    if given:
        value = getattr(config.validation, given[0])
        raise UserError(
            f"{given[0]} = {value} needs validation_split, the share of pictures that is held out, "
            "such as 0.2"
        )
    if any(dataset.validation_seed is not None for dataset in datasets):
        logger.warning("validation_seed has no effect without validation_split")


def given_resolution(config: TrainConfig) -> tuple[int, int]:
    """Width and height from the options, if there is no data set.

    Raises:
        UserError: it is missing or not a size.
    """
    values = _option_values(config) | {"enable_bucket": config.dataset.enable_bucket}
    return _resolution(values, place="options")


# --- where values come from -----------------------------------------------------------------


def _user_config(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Name of the source for errors, and its ``general`` and ``datasets``."""
    path = config.dataset.dataset_config
    if path is None:
        return "--train_data_dir", {"datasets": [{"subsets": list(_folder_subsets(config))}]}
    for name in ("train_data_dir", "reg_data_dir"):
        if getattr(config.dataset, name) is not None:
            logger.warning("%s has no effect: dataset_config %s names the folders", name, path)
    user = _read_dataset_config(path)
    if unknown := [name for name in user if name not in ("general", "datasets")]:
        hint = did_you_mean(unknown[0], ("general", "datasets"))
        raise UserError(f"{path}: unknown key {unknown[0]!r}{hint}; allowed: general, datasets")
    datasets = user.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{path}: has no [[datasets]]")
    return path, user


def _read_dataset_config(path: str) -> dict[str, Any]:
    suffix = Path(path).suffix.lower()
    if suffix == ".toml":
        return read_toml(path)
    if suffix != ".json":
        raise UserError(f"dataset_config {path}: must be a .toml or .json file")
    user = parse_json(read_text(path), path)
    if not isinstance(user, dict):
        raise UserError(f"{path}: must hold an object with general and datasets")
    return user


def _folder_subsets(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Subsets by folder name ``<repeats>_<class tokens>``."""
    data = config.dataset
    if data.train_data_dir is None:
        raise UserError("no data: give train_data_dir or dataset_config")
    yield from _subsets_in("train_data_dir", data.train_data_dir, is_reg=False)
    if data.reg_data_dir is not None and not _is_still_to_be_filled(config):
        yield from _subsets_in("reg_data_dir", data.reg_data_dir, is_reg=True)


def _is_still_to_be_filled(config: TrainConfig) -> bool:
    """Whether ``generate_class_images`` has not yet made the first folder in ``reg_data_dir``."""
    if not config.finetune.generate_class_images:
        return False
    parent = Path(config.dataset.reg_data_dir)
    entries = parent.iterdir() if parent.is_dir() else ()
    return not any(folder_name(entry.name) for entry in entries if entry.is_dir())


class FolderName(NamedTuple):
    """``10_sks dog``."""

    num_repeats: int
    class_tokens: str


REPEATS = re.compile(r"[+-]?\d+_")


def folder_name(name: str) -> FolderName | None:
    """The parts of ``<repeats>_<class tokens>``; None if a name does not start with repeats."""
    repeats, _, tokens = name.partition("_")
    if not repeats.isdecimal() or int(repeats) < 1:
        return None
    return FolderName(int(repeats), tokens)


def _subsets_in(name: str, path: str, *, is_reg: bool) -> Iterator[dict[str, Any]]:
    parent = Path(path)
    if not parent.is_dir():
        raise UserError(f"{name} {path}: there is no such folder")
    form = "10_dog" if is_reg else "10_sks dog"
    found = False
    for folder in sorted(entry for entry in parent.iterdir() if entry.is_dir()):
        parts = folder_name(folder.name)
        if parts is None:
            reason = "must be 1 or more" if REPEATS.match(folder.name) else "must come first"
            logger.warning(
                "%s: folder %r is skipped: the number of repeats %s in its name, like %r",
                name,
                str(folder),
                reason,
                form,
            )
            continue
        found = True
        subset = {"image_dir": str(folder), "num_repeats": parts.num_repeats, "is_reg": is_reg}
        yield subset | ({"class_tokens": parts.class_tokens} if parts.class_tokens.strip() else {})
    if not found:
        remedy = "put the images into one"
        if folder_name(parent.resolve().name):
            remedy = f"give {parent.resolve().parent}, the folder that holds this one"
        raise UserError(
            f"{name} {path}: holds no folder named like {form!r} "
            f"(number of repeats, _, words); {remedy}"
        )


def _option_values(config: TrainConfig) -> dict[str, Any]:
    """Defaults from the options, under the keys of the schema."""
    values = {name: getattr(config.dataset, name, None) for name in KEYS}
    values["batch_size"] = config.schedule.train_batch_size
    values["num_repeats"] = config.dataset.dataset_repeats
    values["validation_split"] = config.validation.validation_split
    values["validation_seed"] = config.validation.validation_seed
    values["resolution"] = _parse_pair("resolution", config.dataset.resolution)
    values["face_crop_aug_range"] = _parse_pair(
        "face_crop_aug_range", config.dataset.face_crop_aug_range
    )
    return {name: value for name, value in values.items() if value is not None}


def _parse_pair(name: str, text: str | None) -> Any:
    if text is None:
        return None
    kind = KEYS[name].kind
    convert = int if kind == "size" else float
    try:
        numbers = [convert(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        numbers = []
    value = numbers[0] if kind == "size" and len(numbers) == 1 else numbers
    if not is_kind(kind, value):
        form = f"`512` or `width,height`, at most {LARGEST_SIDE}" if kind == "size" else "`min,max`"
        raise UserError(f"{name} = {text!r} is not allowed; it must be {form}")
    return value


# --- resolution -----------------------------------------------------------------------------


def _resolve_dataset(
    table: Any,
    number: int,
    *,
    general: dict[str, Any],
    options: dict[str, Any],
    config: TrainConfig,
    place: str,
) -> DatasetConfig:
    if config.dataset.dataset_config is not None:
        place = f"{place} [[datasets]] {number}"
    if not isinstance(table, dict):
        raise UserError(f"{place}: must be a table of key = value")
    own = {name: value for name, value in table.items() if name != "subsets"}
    check_table(own, "dataset", place=place)
    tables = table.get("subsets")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"{place}: holds no [[datasets.subsets]]")
    kind = _subset_kind(tables, place=place, masked_loss=config.dataset.masked_loss)
    check_table(own, "dataset", kind, place=place)
    values = options | general | own
    _note_unused(values, place=place)
    subsets = []
    for position, subset in enumerate(tables, start=1):
        where = f"{place} subset {position}"
        check_table(subset, "subset", kind, place=where)
        inherited = dict(values)
        if subset.get("is_reg") or kind == "metadata":  # masks of the option are for the concept
            inherited.pop("conditioning_data_dir", None)
        if subset.get("is_reg"):
            if subset.get("scale_aug"):
                raise UserError(
                    f"{where}: scale_aug = true has no effect on regularization images, which are "
                    "never scaled; remove it"
                )
            inherited.pop("scale_aug", None)
        subsets.append(_make_subset(inherited | subset, where, is_cached=_is_cached(config)))
    dataset = DatasetConfig(
        batch_size=int(values["batch_size"]),
        resolution=_resolution(values, place=place),
        subsets=tuple(_without_duplicates(subsets, place=place)),
        **{name: values[name] for name in _VALIDATION if name in values},
        **{name: values[name] for name in ("enable_bucket", "bucket_no_upscale")},
        **{name: int(values[name]) for name in _BUCKET_SIDES},
    )
    return _with_valid_buckets(dataset, place=place)


_BUCKET_SIDES = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
_VALIDATION = ("validation_split", "validation_seed")


def _is_cached(config: TrainConfig) -> bool:
    return config.dataset.cache_latents or config.dataset.cache_latents_to_disk


def _subset_kind(tables: Sequence[Mapping[str, Any]], *, place: str, masked_loss: bool) -> str:
    """``metadata`` or ``images``; all subsets of a data set are of one kind."""
    for name in ("metadata_file", "conditioning_data_dir"):
        count = sum(name in table for table in tables)
        if 0 < count < len(tables):
            raise UserError(
                f"{place}: subsets with and without {name} cannot be mixed; "
                "put them into separate [[datasets]]"
            )
        if name == "conditioning_data_dir" and count and not masked_loss:
            raise UserError(f"{place}: conditioning_data_dir holds masks; add --masked_loss")
    return "metadata" if "metadata_file" in tables[0] else IMAGES


def _note_unused(values: Mapping[str, Any], *, place: str) -> None:
    if values.get("network_multiplier", 1) != 1:
        logger.warning("%s: network_multiplier has no effect: kohya does not read it either", place)
    if values.get("batch_size") == 0:
        raise UserError(f"{place}: batch_size = 0 is not allowed; it must be at least 1")


def _make_subset(values: Mapping[str, Any], place: str, *, is_cached: bool) -> SubsetConfig:
    names = {item.name for item in dataclasses.fields(SubsetConfig)}
    chosen = {name: value for name, value in values.items() if name in names}
    for name in ("image_dir", "conditioning_data_dir"):
        if name in chosen:
            chosen[name] = _existing(chosen[name], name, place, is_folder=True)
    if "metadata_file" in chosen:
        chosen["metadata_file"] = _existing(
            chosen["metadata_file"], "metadata_file", place, is_folder=False
        )
    elif "image_dir" not in chosen:
        raise UserError(f"{place}: image_dir is missing")
    for name in ("color_aug", "random_crop", "scale_aug"):
        if is_cached and chosen.get(name):
            raise UserError(
                f"{place}: {name} changes images at every use and cannot be combined with "
                "cache_latents"
            )
    if "face_crop_aug_range" in chosen:
        low, high = chosen["face_crop_aug_range"]
        chosen["face_crop_aug_range"] = (float(low), float(high))
    extension = chosen.get("caption_extension", "")
    if extension and not extension.startswith("."):
        chosen["caption_extension"] = "." + extension
    for name, key in KEYS.items():
        if key.kind == "int" and name in chosen:
            chosen[name] = int(chosen[name])
    return SubsetConfig(**chosen)


def _existing(path: str, name: str, place: str, *, is_folder: bool) -> Path:
    found = Path(path)
    if not (found.is_dir() if is_folder else found.is_file()):
        raise UserError(
            f"{place}: {name} {path}: there is no such {'folder' if is_folder else 'file'}"
        )
    return found


def _without_duplicates(subsets: Sequence[SubsetConfig], *, place: str) -> Iterator[SubsetConfig]:
    """Drop repeated folders and subsets with no repeats, as kohya does, with a warning."""
    seen = set()
    for subset in subsets:
        source = subset.metadata_file or subset.image_dir
        if subset.num_repeats < 1:
            logger.warning("%s: %s is skipped: num_repeats = 0", place, source)
        elif source in seen:
            logger.warning("%s: %s is named twice, only the first entry is used", place, source)
        else:
            seen.add(source)
            yield subset


def _resolution(values: Mapping[str, Any], *, place: str) -> tuple[int, int]:
    value = values.get("resolution")
    if value is None:
        raise UserError(f"{place}: resolution is missing; give e.g. --resolution 512")
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    width, height = (int(side) for side in sides)
    if values["enable_bucket"] or not (width % LATENT_STRIDE or height % LATENT_STRIDE):
        return width, height
    used = (width - width % LATENT_STRIDE, height - height % LATENT_STRIDE)
    if min(used) < 1:
        raise UserError(f"{place}: resolution = {width},{height} is too small")
    logger.warning(
        "%s: resolution = %d,%d is rounded down to %d,%d, multiples of %d",
        place,
        width,
        height,
        *used,
        LATENT_STRIDE,
    )
    return used


def _with_valid_buckets(dataset: DatasetConfig, *, place: str) -> DatasetConfig:
    if not dataset.enable_bucket:
        return dataset
    steps = max(1, -(-dataset.bucket_reso_steps // SDXL_BUCKET_STEP)) * SDXL_BUCKET_STEP
    if steps != dataset.bucket_reso_steps:
        logger.warning(
            "%s: bucket_reso_steps = %d is rounded up to %d, a multiple of %d",
            place,
            dataset.bucket_reso_steps,
            steps,
            SDXL_BUCKET_STEP,
        )
    return dataclasses.replace(dataset, bucket_reso_steps=steps)


def require_bucket_steps(datasets: Sequence[DatasetConfig], *, is_sdxl: bool) -> None:
    """Refuse steps that are for SDXL alone, once the model is known.

    Raises:
        UserError: ``bucket_reso_steps`` is no multiple of 64, and the model is not SDXL.

    Source: sd-scripts ``train_network.py`` and ``sdxl_train_network.py``, assert_extra_args.
    """
    for dataset in datasets:
        if dataset.enable_bucket and not is_sdxl and dataset.bucket_reso_steps % BUCKET_STEP:
            raise UserError(
                f"bucket_reso_steps = {dataset.bucket_reso_steps}: Stable Diffusion 1 and 2 need a "
                f"multiple of {BUCKET_STEP}, as in sd-scripts; {SDXL_BUCKET_STEP} is for SDXL"
            )
