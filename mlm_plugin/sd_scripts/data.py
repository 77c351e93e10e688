"""The data sets that the options of sd-scripts name, read by its own code before they are built."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.data.sources import captions_in

__all__ = ["captions_of", "named_datasets"]

FIELDS = {field.name for field in dataclasses.fields(SubsetConfig)}
PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")


def named_datasets(args: argparse.Namespace) -> list[DatasetConfig]:
    """Concepts, folders and caption files of the data; none where a class of the user reads them.

    Source: sd-scripts ``train_network.py`` and ``library/config_util.py``.
    """
    if getattr(args, "dataset_class", None) is not None:
        return []
    from library.config_util import BlueprintGenerator, ConfigSanitizer

    masked_loss = bool(getattr(args, "masked_loss", False))
    generator = BlueprintGenerator(ConfigSanitizer(True, True, masked_loss, True))
    blueprint = generator.generate(_user_config(args), args)
    return [
        DatasetConfig(
            batch_size=1,
            resolution=(64, 64),  # not read
            subsets=tuple(_subset(subset.params) for subset in dataset.subsets),
        )
        for dataset in blueprint.dataset_group.datasets
    ]


def captions_of(datasets: Sequence[DatasetConfig]) -> Iterator[str]:
    """Captions of the pictures to learn from, as they are in their files."""
    for dataset in datasets:
        for subset in dataset.subsets:
            if not subset.is_reg:
                yield from captions_in(subset)


def _user_config(args: argparse.Namespace) -> dict[str, Any]:
    from library import config_util

    if args.dataset_config is not None:
        return config_util.load_user_config(args.dataset_config)
    if args.in_json is not None:
        subsets = [{"image_dir": args.train_data_dir, "metadata_file": args.in_json}]
    else:
        subsets = config_util.generate_dreambooth_subsets_config_by_subdirs(
            args.train_data_dir, args.reg_data_dir
        )
    return {"datasets": [{"subsets": subsets}]}


def _subset(params: Any) -> SubsetConfig:
    values = {name: value for name, value in vars(params).items() if name in FIELDS}
    values |= {name: Path(values[name]) for name in PATHS if values.get(name)}
    return SubsetConfig(**values)
