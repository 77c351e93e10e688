"""Metadata of trained files: kohya's ``ss_*``, ModelSpec's ``modelspec.*``, our ``ss_mlm_*``.

All values are strings, as safetensors requires. Knows options and facts about a run, but no
tensors.

Three decisions that go beyond kohya's trainer:

- ``modelspec.trigger_phrase`` and ``usage_hint`` say what one types where the file is loaded, as
  the sidecar does ("sks dog", or "my_dog_embedding dog"), unless the user gives others.
- ``ss_tag_frequency`` keeps kohya's counts and adds the trigger as a tag in each folder, with the
  number of captions that contain it, because WebUIs and trigger-word nodes read it there.
- ``modelspec.implementation_version`` names this package, ``ss_sd_scripts_commit_hash`` is
  "(unknown)", to distinguish these files from those of sd-scripts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_plugin import __version__
from mlm_plugin.config.datasets import Concept, DatasetConfig, SubsetConfig
from mlm_plugin.config.options import OutputOptions, TrainConfig
from mlm_plugin.export.thumbnails import thumbnail
from mlm_plugin.models.checkpoints import SDXL_VERSION
from mlm_plugin.networks.network_args import parse_network_args

if TYPE_CHECKING:
    from mlm_plugin.data.sources import ImageInfo

__all__ = [
    "DatasetFacts",
    "FileIdentity",
    "RunFacts",
    "dataset_facts",
    "file_identity",
    "file_metadata",
    "minimum_metadata",
    "names_in_prompts",
    "trigger_phrase",
]

logger = logging.getLogger(__name__)

MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000
TITLES = {
    "lora": "LoRA",
    "textual-inversion": "TextualInversion",
    "custom-diffusion": "CustomDiffusion",
    "checkpoint": "Checkpoint",
}
NO_FILE, FOLDER = "NOFILE", "IsADirectory"
STABILITY_AI = "https://github.com/Stability-AI/generative-models"
"""The naming scheme of SDXL's files in ModelSpec."""

SAME_NAME = (
    "learning_rate",
    "unet_lr",
    "output_name",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "mixed_precision",
    "full_fp16",
    "clip_skip",
    "max_token_length",
    "cache_latents",
    "seed",
    "lowram",
    "noise_offset",
    "multires_noise_iterations",
    "multires_noise_discount",
    "adaptive_noise_scale",
    "zero_terminal_snr",
    "training_comment",
    "max_grad_norm",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "face_crop_aug_range",
    "prior_loss_weight",
    "min_snr_gamma",
    "scale_weight_norms",
    "ip_noise_gamma",
    "noise_offset_random_strength",
    "ip_noise_gamma_random_strength",
    "loss_type",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "fp8_base",
    "fp8_base_unet",
    "validation_seed",
    "validation_split",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "resize_interpolation",
)
"""Options that kohya stores unchanged, as ``ss_<name>``."""

SAME_NAME_IN_FOLDER_MODE = (
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "keep_tokens",
)
"""The same for runs without ``--dataset_config``."""

MLM_OPTIONS = (
    "mlm_loss_weight",
    "mlm_batch_size",
    "mlm_probability",
    "mlm_replace",
    "mlm_every_n_steps",
    "mlm_start_step",
    "mlm_end_step",
    "mlm_prompt_syntax",
)
METHOD_OPTIONS = (
    "learning_rate_te",
    "embedding_lr",
    "num_vectors_per_token",
    "init_word",
    "directional_embedding",
    "directional_kappa",
    "stop_unet_training",
    "stop_text_encoder_training",
    "stop_embedding_training",
    "quantize_unet",
)
"""Stored if given; kohya's trainers have no names for most of them."""

MODELSPEC_EXTRAS = ("merged_from", "preprocessor", "is_negative_embedding")


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


def file_metadata(config: TrainConfig, facts: RunFacts, *, kind: str) -> dict[str, str]:
    """All metadata of a file, except the two hashes of a LoRA.

    With ``--no_metadata`` only what WebUIs need to recognize the base model.

    Args:
        config: options of the run.
        facts: facts about the run.
        kind: ``lora``, ``textual-inversion``, ``custom-diffusion`` or ``checkpoint``; ModelSpec's
            name of the architecture ends in it, except for a checkpoint.

    Source: sd-scripts ``train_network.py`` (``metadata = {...}``), ``library/sai_model_spec.py``.
    """
    training = _training_metadata(config, facts)
    if kind != "lora":
        training = {k: v for k, v in training.items() if not k.startswith("ss_network_")}
    if config.output.no_metadata:
        return minimum_metadata(training) | _modelspec(config, facts, kind=kind)
    return training | _mlm_metadata(config, facts) | _modelspec(config, facts, kind=kind)


def minimum_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that kohya keeps with ``--no_metadata``."""
    return {key: metadata[key] for key in MINIMUM_KEYS if key in metadata}


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
        counts = frequency.setdefault(_folder(subset), Counter())
        counts.update(_count_tags([image.caption for image in members], triggers=triggers))
    return DatasetFacts(
        config=dataset,
        img_counts=tuple(map(len, by_subset)),
        num_train_images=sum(image.repeats for image in images if not image.is_reg),
        num_reg_images=sum(image.subset.num_repeats for image in images if image.is_reg),
        tag_frequency=frequency,
        bucket_info=_bucket_info(images) if dataset.enable_bucket else None,
    )


def _folder(subset: SubsetConfig) -> str:
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


def _training_metadata(config: TrainConfig, facts: RunFacts) -> dict[str, str]:
    options = config.to_flat()
    metadata: dict[str, Any] = {f"ss_{name}": options[name] for name in SAME_NAME}
    metadata |= {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_text_encoder_lr": _one_or_list(options["text_encoder_lr"]),
        "ss_num_train_images": sum(d.num_train_images for d in facts.datasets),
        "ss_num_validation_images": facts.num_validation_images,
        "ss_num_reg_images": sum(d.num_reg_images for d in facts.datasets),
        "ss_num_batches_per_epoch": facts.num_batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_v2": _is_v2(facts),
        "ss_base_model_version": facts.base_model_version,
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_optimizer": facts.optimizer,
        "ss_debiased_estimation": options["debiased_estimation_loss"],
    }
    if options["dataset_config"] is None:
        metadata |= _folder_metadata(options, facts)
    else:
        metadata |= _dataset_config_metadata(facts.datasets)
    if options["network_args"]:
        metadata["ss_network_args"] = json.dumps(_stored_network_args(options))
    metadata |= _file_metadata("sd_model", facts.model) | _file_metadata("vae", facts.vae)
    for key, value in (
        ("ss_training_finished_at", facts.finished_at),
        ("ss_steps", facts.steps),
        ("ss_epoch", facts.epoch),
    ):
        if value is not None:
            metadata[key] = value
    return {key: str(value) for key, value in metadata.items()}


def _stored_network_args(options: Mapping[str, Any]) -> dict[str, Any]:
    """What kohya passes to the network module, including the ``dropout`` that it adds."""
    args = parse_network_args(options["network_args"])
    if options["dim_from_weights"]:
        return args
    return {"dropout": options["network_dropout"], **args}


def _folder_metadata(options: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """What kohya writes for a run without ``--dataset_config``, which has one data set."""
    (dataset,) = facts.datasets
    folders: dict[bool, dict[str, dict[str, int]]] = {True: {}, False: {}}
    for subset, img_count in zip(dataset.config.subsets, dataset.img_counts, strict=True):
        entry = {"n_repeats": subset.num_repeats, "img_count": img_count}
        folders[subset.is_reg][_folder(subset)] = entry
    batch_size = options["train_batch_size"]
    return {
        **{f"ss_{name}": options[name] for name in SAME_NAME_IN_FOLDER_MODE},
        "ss_batch_size_per_device": batch_size,
        "ss_total_batch_size": (
            batch_size * facts.num_processes * options["gradient_accumulation_steps"]
        ),
        "ss_resolution": _resolution(options["resolution"]),
        "ss_enable_bucket": dataset.config.enable_bucket,
        "ss_bucket_no_upscale": dataset.config.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.config.min_bucket_reso,
        "ss_max_bucket_reso": dataset.config.max_bucket_reso,
        "ss_dataset_dirs": json.dumps(folders[False]),
        "ss_reg_dataset_dirs": json.dumps(folders[True]),
        "ss_tag_frequency": json.dumps(dataset.tag_frequency),
        "ss_bucket_info": json.dumps(dataset.bucket_info),
    }


def _dataset_config_metadata(datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    tag_frequency: dict[str, Mapping[str, int]] = {}
    folders: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for subset, img_count in zip(dataset.config.subsets, dataset.img_counts, strict=True):
            if not subset.is_reg:
                name = _unused_name(_folder(subset), folders)
                folders[name] = {"n_repeats": subset.num_repeats, "img_count": img_count}
        for folder, counts in dataset.tag_frequency.items():
            tag_frequency.setdefault(folder, counts)
    return {
        "ss_datasets": json.dumps([_dataset_entry(dataset) for dataset in datasets]),
        "ss_tag_frequency": json.dumps(tag_frequency),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _unused_name(name: str, taken: Mapping[str, Any]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name} ({number})", number + 1
    return candidate


def _dataset_entry(dataset: DatasetFacts) -> dict[str, Any]:
    config = dataset.config
    interpolations = {subset.resize_interpolation for subset in config.subsets}
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in config.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": config.resolution,
        "enable_bucket": config.enable_bucket,
        "min_bucket_reso": config.min_bucket_reso,
        "max_bucket_reso": config.max_bucket_reso,
        "tag_frequency": dataset.tag_frequency,
        "bucket_info": dataset.bucket_info,
        "resize_interpolation": interpolations.pop() if len(interpolations) == 1 else None,
        "subsets": [
            _subset_entry(subset, img_count)
            for subset, img_count in zip(config.subsets, dataset.img_counts, strict=True)
        ],
    }


def _subset_entry(subset: SubsetConfig, img_count: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "img_count": img_count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir is not None:
        entry["image_dir"] = Path(subset.image_dir).name
    if subset.metadata_file is not None:
        entry["metadata_file"] = Path(subset.metadata_file).name
    else:
        entry |= {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return entry


def _file_metadata(kind: str, file: FileIdentity | None) -> dict[str, str]:
    if file is None:
        return {}
    metadata = {f"ss_{kind}_name": file.name}
    if file.hash is not None:
        metadata |= {f"ss_{kind}_hash": file.hash, f"ss_new_{kind}_hash": file.new_hash}
    return metadata


def _mlm_metadata(config: TrainConfig, facts: RunFacts) -> dict[str, str]:
    options = config.to_flat()
    if options["mlm_loss_weight"] == 0:
        metadata: dict[str, Any] = {"ss_mlm_loss_weight": options["mlm_loss_weight"]}
    else:
        metadata = {f"ss_{name}": options[name] for name in MLM_OPTIONS} | {
            "ss_mlm_read_at": facts.mlm_read_at,
            "ss_mlm_target": facts.mlm_target,
            "ss_mlm_prompt_set": facts.mlm_prompt_set,
            "ss_mlm_contextualizer": facts.mlm_contextualizer,
            "ss_mlm_seed": facts.mlm_seed,
        }
    changed = config.changed()
    for name in METHOD_OPTIONS:
        if name in changed:
            value = changed[name]
            metadata[f"ss_mlm_{name}"] = _joined(value) if isinstance(value, tuple) else value
    metadata |= {
        "ss_mlm_version": __version__,
        "ss_mlm_method": options["method"],
        "ss_mlm_placeholder_token": _joined(c.placeholder_token for c in facts.concepts),
        "ss_mlm_class_token": _joined(c.class_token for c in facts.concepts),
    }
    return {key: str(value) for key, value in metadata.items()}


def _joined(words: Iterable[str | None]) -> str | None:
    return ", ".join(word for word in words if word) or None


def _modelspec(config: TrainConfig, facts: RunFacts, *, kind: str) -> dict[str, str]:
    """ModelSpec 1.0.1. Source: sd-scripts ``library/sai_model_spec.py`` ``build_metadata``."""
    output, loss = config.output, config.loss
    timestamp = facts.started_at if facts.finished_at is None else facts.finished_at
    fields: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        "architecture": _architecture(facts) + ("" if kind == "checkpoint" else f"/{kind}"),
        "implementation": STABILITY_AI if _is_sdxl(facts) else "diffusers",
        "title": output.metadata_title or output.output_name or f"{TITLES[kind]}@{timestamp}",
        "resolution": "{}x{}".format(*_modelspec_resolution(config, facts)),
        "date": datetime.fromtimestamp(int(timestamp)).isoformat(),
        "implementation_version": f"mlm-plugin/{__version__}",
        "prediction_type": "v" if facts.prediction_type == "v_prediction" else "epsilon",
        "encoder_layer": config.model.clip_skip,
        "author": output.metadata_author,
        "description": output.metadata_description,
        "license": output.metadata_license,
        "tags": output.metadata_tags,
        "thumbnail": _thumbnail(output.metadata_thumbnail) or facts.thumbnail,
        "trigger_phrase": _trigger(output, facts),
        "usage_hint": output.metadata_usage_hint or _usage_hint(output, facts, kind=kind),
    }
    fields |= {name: getattr(output, f"metadata_{name}") for name in MODELSPEC_EXTRAS}
    if loss.min_timestep is not None or loss.max_timestep is not None:
        last = 1000 if loss.max_timestep is None else loss.max_timestep
        fields["timestep_range"] = f"{loss.min_timestep or 0},{last}"
    return {f"modelspec.{key}": str(value) for key, value in fields.items() if value is not None}


def _architecture(facts: RunFacts) -> str:
    if _is_sdxl(facts):
        return "stable-diffusion-xl-v1-base"
    if not _is_v2(facts):
        return "stable-diffusion-v1"
    is_v = facts.prediction_type == "v_prediction"
    return "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"


def _modelspec_resolution(config: TrainConfig, facts: RunFacts) -> tuple[int, int]:
    given = _resolution(config.dataset.resolution)
    if given is not None:
        return given
    if _is_sdxl(facts):
        side = 1024
    else:
        side = 768 if _is_v2(facts) and facts.prediction_type == "v_prediction" else 512
    return side, side


def trigger_phrase(
    options: OutputOptions, concepts: Iterable[Concept], words: Mapping[str, str]
) -> str | None:
    """What one types for the concepts in a file: the user's phrase, or :func:`names_in_prompts`."""
    return options.metadata_trigger_phrase or names_in_prompts(concepts, words)


def names_in_prompts(concepts: Iterable[Concept], words: Mapping[str, str]) -> str | None:
    """What the concepts in a file are called: ``"my_dog dog"``, several separated by commas.

    Args:
        concepts: those of the run.
        words: as ``Method.webui_files`` says; empty for all concepts by their placeholders.
    """
    return _joined(
        concept._replace(placeholder_token=words.get(concept.placeholder_token) or concept[0]).text
        for concept in concepts
        if not words or concept.placeholder_token in words
    )


def _trigger(output: OutputOptions, facts: RunFacts) -> str | None:
    if output.no_metadata:
        return output.metadata_trigger_phrase
    return trigger_phrase(output, facts.concepts, facts.words)


def _usage_hint(output: OutputOptions, facts: RunFacts, *, kind: str) -> str | None:
    """One line for people: what to type, at which strength, with which other files."""
    if output.no_metadata:
        return None
    trigger = _trigger(output, facts)
    hints = [f"Trigger: {trigger}."] if trigger else []
    if kind == "lora":
        hints.append("Strength: 1, as trained.")
    if kind == "textual-inversion" and not facts.words:  # WebUIs have no word for XTI's layers
        hints.append("Holds an embedding for each cross-attention layer: not for WebUIs.")
    if facts.needs:
        hints.append(f"Needs the embedding {', '.join(facts.needs)}.")
    return " ".join(hints) or None


def _thumbnail(value: str | None) -> str | None:
    """A picture as data URL; a file that is gone costs the thumbnail, not the training."""
    if value is None or value.startswith("data:"):
        return value
    try:
        return thumbnail(value)
    except OSError as error:
        logger.warning("metadata_thumbnail: %s is left out: %s", value, error)
        return None


def _is_v2(facts: RunFacts) -> bool:
    return facts.base_model_version.startswith("sd_v2")


def _is_sdxl(facts: RunFacts) -> bool:
    return facts.base_model_version == SDXL_VERSION


def _resolution(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = [int(side) for side in str(text).split(",")]
    return sides[0], sides[-1]


def _one_or_list(rates: Sequence[float] | None) -> float | list[float] | None:
    """The rate of the text encoders as kohya's trainers store it: a list if they differ."""
    if not rates:
        return None
    return rates[0] if len(rates) == 1 else list(rates)
