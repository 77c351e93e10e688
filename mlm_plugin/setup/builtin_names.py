"""``toy`` and ``pocket`` in place of a folder or file: built-in models, created on first use.

``toy`` has random weights and costs nothing; ``pocket`` is a small model that can draw.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlm_plugin.config.options import TrainConfig

__all__ = [
    "contexts_path",
    "contextualizer_path",
    "data_path",
    "model_path",
    "with_built_in_paths",
]


def _toy_model() -> Path:
    from mlm_plugin.toy import toy_model

    return toy_model()


def _toy_data() -> Path:
    from mlm_plugin.toy import toy_data

    return toy_data()


def _pocket_model() -> Path:
    from mlm_plugin.pocket.shipped import pocket_model

    return pocket_model()


def _pocket_contextualizer() -> Path:
    from mlm_plugin.pocket.shipped import CONTEXTUALIZER

    return _pocket_model() / CONTEXTUALIZER


def _pocket_data() -> Path:
    from mlm_plugin.pocket.shipped import pocket_concept

    return pocket_concept() / "train"


def _pocket_contexts() -> Path:
    from mlm_plugin.pocket.shipped import pocket_concept

    return pocket_concept() / "contexts.txt"


def model_path(name: str | None) -> str | None:
    """``pretrained_model_name_or_path``: ``toy`` and ``pocket`` become folders of models.

    A folder or file of the user with such a name takes precedence, here and below.

    Raises:
        UserError: the package does not include the pocket model; here and below.
    """
    return _path(name, toy=_toy_model, pocket=_pocket_model)


def data_path(name: str | None) -> str | None:
    """``train_data_dir``: pictures of a concept to learn."""
    return _path(name, toy=_toy_data, pocket=_pocket_data)


def contexts_path(name: str | None) -> str | None:
    """``mlm_prompt_set``: ``pocket`` means prompts in the pocket model's vocabulary."""
    return _path(name, pocket=_pocket_contexts)


def contextualizer_path(name: str | None) -> str | None:
    """``mlm_contextualizer``: ``pocket`` means that of the pocket model."""
    return _path(name, pocket=_pocket_contextualizer)


def with_built_in_paths(config: TrainConfig) -> TrainConfig:
    """The options with ``toy`` and ``pocket`` replaced by their paths."""
    return config.replace(
        pretrained_model_name_or_path=model_path(config.model.pretrained_model_name_or_path),
        train_data_dir=data_path(config.dataset.train_data_dir),
        mlm_prompt_set=contexts_path(config.mlm.mlm_prompt_set),
        mlm_contextualizer=contextualizer_path(config.mlm.mlm_contextualizer),
    )


def _path(name: str | None, **built_in: Callable[[], Path]) -> str | None:
    if name not in built_in or Path(name).exists():
        return name
    return str(built_in[name]())
