"""Measures of the pictures: prompt fidelity, likeness to the concept, diversity.

Applies the formulas of ``measures`` to features of metric models, and uses a pocket model's oracle.
Knows no model that draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlm_plugin.data.images import inspect_image, list_images, open_image, open_mask
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import EvaluationPrompt
from mlm_plugin.evaluation.measures import (
    custom_concept_score,
    intra_distance,
    mean_cosine_to,
    mean_with_interval,
    paired_cosine,
)
from mlm_plugin.evaluation.metric_models import Clip, Dino
from mlm_plugin.evaluation.oracle_judge import OracleJudge, oracle_columns
from mlm_plugin.evaluation.results import IMAGE_MEASURES

__all__ = ["Judges", "check_photos", "cut_out", "find_masks", "find_photos", "score_pictures"]


PartScorer = Callable[[Sequence[Path], Sequence[Image.Image]], list[float | None]]
"""Scores for files and their pictures; None for a file without a mask."""


class Judges(NamedTuple):
    """The models that score pictures; None = without its measures.

    Attributes:
        clip: for CLIP-T, CLIP-I and diversity.
        dino: for DINO and diversity.
        oracle: that of a pocket model, for prompt fidelity and identity.
    """

    clip: Clip | None = None
    dino: Dino | None = None
    oracle: OracleJudge | None = None


def find_photos(folder: str) -> list[Path]:
    """Photos of the concept, in the folder and its sub-folders (``10_sks dog``).

    Raises:
        UserError: the folder is missing or has no photos.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--train_data_dir: there is no folder {folder}")
    inside = (path for path in root.rglob("*") if path.is_dir())
    folders = [root, *sorted(path for path in inside if not _is_hidden(path.relative_to(root)))]
    photos = [photo for path in folders for photo in list_images(path)]
    if not photos:
        raise UserError(f"--train_data_dir: {folder} holds no pictures")
    return photos


def _is_hidden(path: Path) -> bool:
    """Whether a name in a path begins with a dot, as ``.ipynb_checkpoints`` does."""
    return any(part.startswith(".") for part in path.parts)


def check_photos(photos: Sequence[Path]) -> None:
    """Refuse photos that cannot be read, before anything is drawn.

    Raises:
        UserError: names the first one, and why.
    """
    for photo in photos:
        try:
            inspect_image(photo)
        except ValueError as error:
            raise UserError(f"--train_data_dir: {photo}: {error}") from error


def find_masks(folder: str | None) -> dict[str, Path]:
    """Masks by the name of their picture, without suffix.

    Raises:
        UserError: the folder is missing.
    """
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise UserError(f"--masks: there is no folder {folder}")
    return {path.stem: path for path in list_images(Path(folder))}


def cut_out(
    image: Image.Image, mask: np.ndarray, color: Sequence[float], *, keep: str
) -> Image.Image:
    """Keep the foreground or the background of a picture and fill the rest with one colour.

    Args:
        image: RGB.
        mask: (H, W) uint8, 255 = foreground; resized to the picture if need be.
        color: fill colour in [0, 1]: the mean colour, which is zero after normalization.
        keep: ``"foreground"`` or ``"background"``.
    """
    if mask.shape != (image.height, image.width):
        mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.BILINEAR))
    share = mask[..., None].astype(np.float32) / 255
    share = share if keep == "foreground" else 1 - share
    pixels = np.asarray(image, np.float32) * share + 255 * np.float32(color) * (1 - share)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def score_pictures(
    pictures: Sequence[Sequence[Path]],
    prompts: Sequence[EvaluationPrompt],
    photos: Sequence[Path],
    judges: Judges,
    *,
    masks: Mapping[str, Path],
) -> dict[str, Any]:
    """All image measures.

    DINO-FG (DINO-BG) is DINO on foregrounds (backgrounds) of both photos and pictures, over those
    with a mask; a high DINO-BG means that the photos' surroundings were learned too.

    Args:
        pictures: files by prompt.
        prompts: what they were drawn from.
        photos: photos of the concept.
        judges: the models that score.
        masks: from :func:`find_masks`.

    Returns:
        ``measures``: mean over prompts with its interval; ``per_prompt``; ``per_picture`` by
        prompt; ``references``: the photos among themselves; ``num_masked``: pictures and photos
        with a mask.

    Raises:
        UserError: a picture or mask cannot be read.
    """
    reference = _reference(photos, judges, masks)
    texts = [prompt.text for prompt in prompts]
    text_clip = judges.clip.text_features(texts) if judges.clip else [None] * len(texts)
    per_picture: list[list[dict[str, float | None]]] = []
    per_prompt: list[dict[str, float | None]] = []
    for files, prompt, text_D in zip(pictures, prompts, text_clip, strict=True):
        columns, diversity = _score_prompt(files, prompt, text_D, judges, reference)
        per_picture.append(
            [{name: column[j] for name, column in columns.items()} for j in range(len(files))]
        )
        per_prompt.append({name: _mean(column) for name, column in columns.items()} | diversity)
    return {
        "measures": _summary(per_prompt),
        "per_prompt": per_prompt,
        "per_picture": per_picture,
        "references": _references(reference.photo_clip, reference.photo_dino),
        "num_masked": {
            "pictures": sum(file.stem in masks for files in pictures for file in files),
            "photos": sum(photo.stem in masks for photo in photos),
        },
    }


class _Reference(NamedTuple):
    """What the pictures of all prompts are compared with."""

    photo_clip: Tensor | None
    photo_dino: Tensor | None
    parts: dict[str, PartScorer]


def _reference(photos: Sequence[Path], judges: Judges, masks: Mapping[str, Path]) -> _Reference:
    images = _open_all(photos)
    return _Reference(
        photo_clip=judges.clip.image_features(images) if judges.clip else None,
        photo_dino=judges.dino.image_features(images) if judges.dino else None,
        parts=_part_scorers(judges.dino, photos, images, masks) if judges.dino else {},
    )


def _score_prompt(
    files: Sequence[Path],
    prompt: EvaluationPrompt,
    text_D: Tensor | None,
    judges: Judges,
    reference: _Reference,
) -> tuple[dict[str, list[float | None]], dict[str, float | None]]:
    """Scores of every picture of a prompt, and how varied the pictures are."""
    images = _open_all(files)
    columns: dict[str, list[float | None]] = {}
    diversity: dict[str, float | None] = {}
    if judges.clip:
        features = judges.clip.image_features(images)
        columns["clip_t"] = paired_cosine(features, text_D.expand_as(features)).tolist()
        columns["clip_i"] = mean_cosine_to(features, reference.photo_clip).tolist()
        diversity["diversity_clip"] = intra_distance(features)
    if judges.dino:
        features = judges.dino.image_features(images)
        columns["dino"] = mean_cosine_to(features, reference.photo_dino).tolist()
        diversity["diversity_dino"] = intra_distance(features)
    for name, score in reference.parts.items():
        columns[name] = score(files, images)
    if judges.oracle:
        columns |= oracle_columns(judges.oracle, prompt, images)
    return columns, diversity


def _part_scorers(
    dino: Dino,
    photos: Sequence[Path],
    originals: Sequence[Image.Image],
    masks: Mapping[str, Path],
) -> dict[str, PartScorer]:
    """DINO inside and outside the masks; empty if no photo has a mask."""
    if not any(photo.stem in masks for photo in photos):
        return {}

    def scorer(keep: str):
        def features(files: Sequence[Path], images: Sequence[Image.Image]) -> Tensor:
            return dino.image_features(
                [
                    cut_out(image, _open_mask(masks[file.stem]), dino.how.mean, keep=keep)
                    for file, image in zip(files, images, strict=True)
                    if file.stem in masks
                ]
            )

        of_photos = features(photos, originals)

        def score(files: Sequence[Path], images: Sequence[Image.Image]) -> list[float | None]:
            if not any(file.stem in masks for file in files):
                return [None] * len(files)
            scores = iter(mean_cosine_to(features(files, images), of_photos).tolist())
            return [next(scores) if file.stem in masks else None for file in files]

        return score

    return {"dino_fg": scorer("foreground"), "dino_bg": scorer("background")}


def _references(photo_clip: Tensor | None, photo_dino: Tensor | None) -> dict[str, float | None]:
    """Scores of the photos among themselves: those of a perfect likeness."""
    found = {}
    for name, features in (("clip_i", photo_clip), ("dino", photo_dino)):
        distance = None if features is None else intra_distance(features)
        found[name] = None if distance is None else 1 - distance
    return found


def _summary(per_prompt: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Mean over prompts and its interval, for every measure that some prompt has."""
    summary: dict[str, Any] = {}
    for name in IMAGE_MEASURES:
        values = [row[name] for row in per_prompt if row.get(name) is not None]
        if values:
            summary[name] = mean_with_interval(torch.tensor(values, dtype=torch.float64))._asdict()
    if "clip_t" in summary:
        summary["clip_t"]["custom_concept_101"] = custom_concept_score(summary["clip_t"]["mean"])
    return summary


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _open_all(files: Sequence[Path]) -> list[Image.Image]:
    try:
        return [Image.fromarray(open_image(file)) for file in files]
    except ValueError as error:
        raise UserError(f"{error}; if it was drawn, delete it and run the command again") from error


def _open_mask(file: Path) -> np.ndarray:
    try:
        return open_mask(file)[..., 0]
    except ValueError as error:
        raise UserError(f"--masks: {error}") from error
