"""``generate_class_images``: one regularization folder per class, filled before training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import (
    LATENT_STRIDE,
    DatasetConfig,
    folder_name,
    resolve_datasets,
)
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.prompt_sets.english import correct_articles
from mlm_plugin.training.draw_class_images import ClassImageSettings, draw_class_images

__all__ = ["prepare_class_images", "with_class_images"]

logger = logging.getLogger(__name__)

FOLDER = "class_images"  # in output_dir, where reg_data_dir is not given
SEED = 0  # of the pictures; the same in every run, so that runs share them


def with_class_images(
    config: TrainConfig, concepts: Sequence[Concept]
) -> tuple[TrainConfig, tuple[DatasetConfig, ...]]:
    """The options with ``reg_data_dir``, and the data sets with the pictures that are there.

    The folder in ``output_dir`` is shared by runs, so those of other classes are left out of it.

    Raises:
        UserError: no class is known, or its name cannot be a folder name.
    """
    root = _root(config)
    folders = _folders(root, config, concepts).values()
    config = config.replace(reg_data_dir=str(root))
    datasets = resolve_datasets(config)
    if root == Path(config.output.output_dir or "") / FOLDER:
        datasets = tuple(
            replace(
                dataset,
                subsets=tuple(s for s in dataset.subsets if not s.is_reg or s.image_dir in folders),
            )
            for dataset in datasets
        )
    return config, datasets


def prepare_class_images(
    config: TrainConfig,
    concepts: Sequence[Concept],
    *,
    models: Callable[[], StableDiffusion],
    accelerator: Accelerator,
) -> None:
    """Fill the regularization folder of every class.

    Args:
        config: number, prompt, size and folder of the pictures.
        concepts: whose classes are drawn.
        models: loads the base model; called only if pictures are missing.
        accelerator: device and precision; the main process draws, the others wait.

    Raises:
        UserError: no class is known, its name cannot be a folder name, or a folder belongs to
            other settings.
    """
    folders = _folders(_root(config), config, concepts)
    if accelerator.is_main_process:
        load = functools.cache(models)  # once for all classes, and only to draw
        for name, folder in folders.items():
            settings = _settings(config, name)
            logger.info("class images: %s, prompt %r", folder, settings.prompt)
            draw_class_images(
                folder,
                settings,
                num_images=config.finetune.generate_class_images,
                caption_extension=config.dataset.caption_extension,
                load=load,
                accelerator=accelerator,
            )
    accelerator.wait_for_everyone()


def _root(config: TrainConfig) -> Path:
    return Path(config.dataset.reg_data_dir or Path(config.output.output_dir or "") / FOLDER)


def _folders(root: Path, config: TrainConfig, concepts: Sequence[Concept]) -> dict[str, Path]:
    """The folder of every class, by its name."""
    classes = list(dict.fromkeys(concept.class_token for concept in concepts))
    if not all(classes) or not classes:
        raise UserError(
            "generate_class_images: what to draw is not known; give --placeholder_token and "
            "--class_token, or name the folder like '10_sks dog'"
        )
    if config.finetune.class_prompt and len(classes) > 1:
        raise UserError(
            f"class_prompt serves one class, here are {', '.join(classes)}; leave it out"
        )
    return {name: _folder(root, name) for name in classes}


def _settings(config: TrainConfig, class_token: str) -> ClassImageSettings:
    return ClassImageSettings(
        prompt=config.finetune.class_prompt or correct_articles(f"a photo of a {class_token}"),
        model=config.model.pretrained_model_name_or_path,
        seed=SEED,
        size=_size(config.dataset.resolution),
    )


def _folder(root: Path, class_token: str) -> Path:
    """The folder of a class: the first existing one by name, whatever its repeats.

    Else ``1_<class>``.
    """
    if separators := [letter for letter in "/\\" if letter in class_token]:
        raise UserError(
            f"generate_class_images: class {class_token!r} cannot name a folder, it holds "
            f"{separators[0]!r}; give --class_token without it"
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for folder in folders:
        parts = folder_name(folder.name)
        if parts and parts.class_tokens.split() == class_token.split():
            return folder
    return root / f"1_{class_token}"


def _size(resolution: str | None) -> tuple[int, int]:
    """Height and width of ``512`` or ``width,height``, down to multiples of 8."""
    sides = [int(side) for side in (resolution or "512").split(",")]
    return sides[-1] // LATENT_STRIDE * LATENT_STRIDE, sides[0] // LATENT_STRIDE * LATENT_STRIDE
