"""Facts about a run that its files' metadata need and that are not in the options.

Knows no keys of metadata and no tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.export.lora_files import LEGACY_LENGTH, LEGACY_OFFSET
from mlm_plugin.models.checkpoints import SDXL_VERSION

if TYPE_CHECKING:
    from mlm_plugin.data.sources import ImageInfo

__all__ = [
    "DatasetFacts",
    "FileIdentity",
    "RunFacts",
    "dataset_facts",
    "file_identity",
    "folder_name",
]

FOLDER = "IsADirectory"


@dataclass(frozen=True)
class FileIdentity:
    """How kohya identifies a model file in metadata."""

    name: str
    hash: str | None = None  # 8 digits of the old WebUI hash
    new_hash: str | None = None  # SHA-256


@dataclass(frozen=True)
class DatasetFacts:
    """One data set as found on disk."""

    config: DatasetConfig
    img_counts: tuple[int, ...]  # one per subset, without repeats
    num_train_images: int  # with repeats
    num_reg_images: int  # with repeats
    tag_frequency: Mapping[str, Mapping[str, int]]  # folder -> tag -> captions
    bucket_info: Mapping[str, Any] | None


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that are not in the options.

    ``steps``, ``epoch``, ``finished_at`` and ``thumbnail`` change from save to save, ``words`` and
    ``needs`` from file to file: ``dataclasses.replace``.
    """

    session_id: int
    started_at: float  # Unix time, seconds
    datasets: tuple[DatasetFacts, ...]
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    base_model_version: str  # sd_v1, sd_v2, sd_v2_v, sdxl_base_v1-0
    prediction_type: str  # epsilon, v_prediction
    optimizer: str  # module.Class(name=value,...)
    model: FileIdentity
    vae: FileIdentity | None = None
    num_processes: int = 1
    num_validation_images: int = 0
    finished_at: float | None = None
    steps: int | None = None
    epoch: int | None = None
    concepts: tuple[Concept, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)  # as ``Method.webui_files`` says
    needs: tuple[str, ...] = ()  # names of the embeddings that a LoRA is used with
    thumbnail: str | None = None  # data URL of a sample
    mlm_read_at: str | None = None  # encoder, cross_attention, both
    mlm_target: str | None = None  # class, word, states
    mlm_prompt_set: str | None = None
    mlm_contextualizer: str | None = None  # fingerprint
    mlm_seed: int | None = None

    @property
    def is_v2(self) -> bool:
        """Whether the base model is SD 2."""
        return self.base_model_version.startswith("sd_v2")

    @property
    def is_sdxl(self) -> bool:
        """Whether the base model is SDXL."""
        return self.base_model_version == SDXL_VERSION


def file_identity(path: str | os.PathLike) -> FileIdentity:
    """Name and hashes of a model; reads the whole file, so call it once per run.

    A folder has no hashes, a hub id only a name.

    Source: sd-scripts ``library/train_util.py`` ``model_hash``, ``calculate_sha256``.
    """
    path = Path(path)
    if path.is_dir():
        return FileIdentity(path.resolve().name, FOLDER, FOLDER)
    if not path.exists():
        return FileIdentity(str(path))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(LEGACY_OFFSET)
        old = hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]
        file.seek(0)
        while chunk := file.read(LEGACY_OFFSET):
            digest.update(chunk)
    return FileIdentity(path.name, old, digest.hexdigest())


def dataset_facts(
    datasets: Sequence[DatasetConfig], images: Iterable[ImageInfo], *, triggers: Sequence[str] = ()
) -> tuple[DatasetFacts, ...]:
    """Count images, tags and buckets of each data set.

    Args:
        datasets: the configured data sets.
        images: all pictures of the training, each with its ``dataset_index`` and bucket.
        triggers: phrases that are counted as an additional tag each.
    """
    images = list(images)
    return tuple(
        _facts_of(dataset, [i for i in images if i.dataset_index == index], triggers=triggers)
        for index, dataset in enumerate(datasets)
    )


def _facts_of(
    dataset: DatasetConfig, images: list[ImageInfo], *, triggers: Sequence[str]
) -> DatasetFacts:
    by_subset = [[i for i in images if i.subset == subset] for subset in dataset.subsets]
    frequency: dict[str, Counter[str]] = {}
    for subset, members in zip(dataset.subsets, by_subset, strict=True):
        counts = frequency.setdefault(folder_name(subset), Counter())
        counts.update(_count_tags([image.caption for image in members], triggers=triggers))
    return DatasetFacts(
        config=dataset,
        img_counts=tuple(map(len, by_subset)),
        num_train_images=sum(image.repeats for image in images if not image.is_reg),
        num_reg_images=sum(image.subset.num_repeats for image in images if image.is_reg),
        tag_frequency=frequency,
        bucket_info=_bucket_info(images) if dataset.enable_bucket else None,
    )


def folder_name(subset: SubsetConfig) -> str:
    """What kohya calls a subset in metadata: its folder, or its metadata file."""
    return Path(subset.metadata_file or subset.image_dir).name


def _count_tags(captions: Sequence[str], *, triggers: Sequence[str]) -> Counter[str]:
    """Count comma-separated tags per caption in lower case, and captions with a trigger."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tag.strip().lower() for tag in caption.split(",") if tag.strip())
    for trigger in map(str.lower, triggers):
        pattern = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")
        num_with_trigger = sum(bool(pattern.search(caption.lower())) for caption in captions)
        if num_with_trigger and trigger not in counts:
            counts[trigger] = num_with_trigger
    return counts


def _bucket_info(images: Sequence[ImageInfo]) -> dict[str, Any]:
    """Images with repeats per bucket, and the mean change of the aspect ratio by cropping."""
    counts: Counter[tuple[int, int]] = Counter()
    for image in images:
        counts[tuple(image.bucket)] += image.repeats
    errors = [
        abs(image.bucket[0] / image.bucket[1] - image.size[0] / image.size[1]) for image in images
    ]
    buckets = {
        index: {"resolution": bucket, "count": counts[bucket]}
        for index, bucket in enumerate(sorted(counts))
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors) if errors else 0}
