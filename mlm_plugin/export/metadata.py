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

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_plugin import __version__
from mlm_plugin.config.datasets import SubsetConfig
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.export.modelspec import given_sides, modelspec
from mlm_plugin.export.run_facts import DatasetFacts, FileIdentity, RunFacts, folder_name
from mlm_plugin.networks.network_args import parse_network_args

__all__ = ["file_metadata", "minimum_metadata"]

MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
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
    "mlm_joint_share",
)
METHOD_OPTIONS = (
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    "embedding_lr",
    "num_vectors_per_token",
    "init_word",
    "directional_embedding",
    "directional_kappa",
    "xti_mlm_layers",
    "stop_unet_training",
    "stop_text_encoder_training",
    "stop_text_encoder1_training",
    "stop_text_encoder2_training",
    "stop_embedding_training",
    "quantize_unet",
)
"""Stored if given; kohya's trainers have no names for most of them."""


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
        return minimum_metadata(training) | modelspec(config, facts, kind=kind)
    return training | _mlm_metadata(config, facts) | modelspec(config, facts, kind=kind)


def minimum_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that kohya keeps with ``--no_metadata``."""
    return {key: metadata[key] for key in MINIMUM_KEYS if key in metadata}


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
        "ss_v2": facts.is_v2,
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
        folders[subset.is_reg][folder_name(subset)] = entry
    batch_size = options["train_batch_size"]
    return {
        **{f"ss_{name}": options[name] for name in SAME_NAME_IN_FOLDER_MODE},
        "ss_batch_size_per_device": batch_size,
        "ss_total_batch_size": (
            batch_size * facts.num_processes * options["gradient_accumulation_steps"]
        ),
        "ss_resolution": given_sides(options["resolution"]),
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
                name = _unused_name(folder_name(subset), folders)
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


def _one_or_list(rates: Sequence[float] | None) -> float | list[float] | None:
    """The rate of the text encoders as kohya's trainers store it: a list if they differ."""
    if not rates:
        return None
    return rates[0] if len(rates) == 1 else list(rates)
