"""Concepts and captions of the data sets that the options of sd-scripts name, or that it built."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.data.captions import possible_captions
from mlm_plugin.data.sources import captions_in
from mlm_plugin.errors import UserError
from mlm_plugin.models.token_embeddings import placeholder_pattern

__all__ = [
    "LearnedData",
    "built_captions",
    "built_data",
    "built_datasets",
    "captions_of",
    "count_captions",
    "has_weighted_captions",
    "named_data",
    "named_datasets",
    "require_in_captions",
]

logger = logging.getLogger(__name__)

FIELDS = {field.name for field in dataclasses.fields(SubsetConfig)}
PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")


class LearnedData(NamedTuple):
    """Data sets, which may name concepts, and the captions of the pictures to learn from."""

    datasets: Sequence[DatasetConfig]
    captions: Sequence[str]


def named_data(args: argparse.Namespace) -> LearnedData:
    """The data that the options of sd-scripts name."""
    datasets = named_datasets(args)
    captions = captions_of(datasets)
    return LearnedData(datasets, _texts(captions, weighted=has_weighted_captions(args)))


def built_data(dataset_group: Any, *, weighted: bool = False) -> LearnedData:
    """The data that sd-scripts has built.

    Args:
        dataset_group: one data set, or a group of them.
        weighted: whether sd-scripts reads weights in the captions, as in ``(word:1.2)``.
    """
    datasets = list(getattr(dataset_group, "datasets", [dataset_group]))
    return LearnedData(
        built_datasets(datasets), _texts(built_captions(datasets), weighted=weighted)
    )


def has_weighted_captions(args: argparse.Namespace) -> bool:
    """Whether sd-scripts reads weights in the captions."""
    return bool(getattr(args, "weighted_captions", False))


def _texts(captions: Iterable[str], *, weighted: bool) -> list[str]:
    """Captions as the text encoder reads them: without weights, where sd-scripts reads those."""
    if not weighted:
        return list(captions)
    from library.custom_train_functions import parse_prompt_attention

    return ["".join(part for part, _ in parse_prompt_attention(text)) for text in captions]


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
    """What the captions of the pictures to learn from can become.

    Folders that are missing are left out, as sd-scripts does with a warning of its own.
    """
    for dataset in datasets:
        for subset in dataset.subsets:
            is_there = subset.metadata_file or subset.image_dir.is_dir()
            if is_there and not subset.is_reg:
                for caption in captions_in(subset):
                    yield from possible_captions(caption, subset)


def built_datasets(datasets: Sequence[Any]) -> list[DatasetConfig]:
    """The concepts of data sets that sd-scripts has built."""
    return [
        DatasetConfig(
            batch_size=1,
            resolution=(64, 64),  # not read
            subsets=tuple(
                SubsetConfig(
                    class_tokens=getattr(subset, "class_tokens", None),
                    is_reg=bool(getattr(subset, "is_reg", False)),
                )
                for subset in getattr(dataset, "subsets", ())
            ),
        )
        for dataset in datasets
    ]


def built_captions(datasets: Sequence[Any]) -> Iterator[str]:
    """:func:`captions_of` for data sets that sd-scripts has built; templates replace captions.

    Source: sd-scripts ``library/train_util.py``, ``process_caption``.
    """
    for dataset in datasets:
        if templates := getattr(dataset, "replacements", {}).get(""):
            yield from templates
            continue
        subsets = getattr(dataset, "image_to_subset", {})
        for key, info in getattr(dataset, "image_data", {}).items():
            caption = getattr(info, "caption", None) or ""
            if getattr(info, "is_reg", False):
                continue
            for text in [caption] if isinstance(caption, str) else caption:
                yield from (
                    possible_captions(text, _subset(subsets[key])) if key in subsets else [text]
                )


def count_captions(captions: Sequence[str], words: str) -> int:
    """How many captions hold these words."""
    return sum(bool(placeholder_pattern([words]).search(caption)) for caption in captions)


def require_in_captions(captions: Sequence[str], concepts: Sequence[Concept]) -> None:
    """Refuse a name that no caption holds; warn where some captions hold none of the names.

    Where captions exist, sd-scripts does not read ``class_tokens`` or the folder's name.

    Raises:
        UserError: names the placeholder and the first caption.
    """
    names = [concept.placeholder_token for concept in concepts]
    for name in names:
        if not count_captions(captions, name):
            raise UserError(
                f"placeholder_token = {name!r}: none of the {len(captions)} captions holds it (the "
                f"first is {captions[0]!r}; class_tokens and folder names are not read where "
                "captions exist), so nothing is learned under that name; write it into the "
                "captions or into caption_prefix, or set placeholder_token and class_token to the "
                "words that they hold"
            )
    pattern = placeholder_pattern(names)
    if missing := [caption for caption in captions if not pattern.search(caption)]:
        logger.warning(
            "%d of %d captions lack %s (the first is %r); those do not teach the concept",
            len(missing),
            len(captions),
            " and ".join(map(repr, names)),
            missing[0],
        )


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
