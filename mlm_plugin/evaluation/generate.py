"""Draws the pictures of an evaluation into a folder; an interrupted run continues.

The seed of a picture depends only on its prompt and number, so the set is the same after any number
of interruptions. Knows no measures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import EvaluationPrompt, picture_seed
from mlm_plugin.evaluation.evaluated_model import EvaluatedModel
from mlm_plugin.evaluation.options import TOKEN_LENGTHS
from mlm_plugin.files import atomic_path, read_text, remove_temporaries
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.samples import decode_latents

__all__ = [
    "PICTURES",
    "SETTINGS_FILE",
    "DrawingSettings",
    "claim_folder",
    "draw",
    "draw_pictures",
    "forget_claim_without_pictures",
    "picture_name",
    "warn_of_cut_prompts",
]

logger = logging.getLogger(__name__)

PICTURES = "pictures"  # sub-folder
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class DrawingSettings:
    """How pictures are drawn.

    Attributes:
        num_images: pictures per prompt.
        seed: names the noise.
        steps: steps of the sampler.
        scale: classifier-free guidance.
        negative_prompt: used for all pictures.
        resolution: side in pixels; None = the model's own.
        batch_size: pictures drawn at once.
    """

    num_images: int
    seed: int
    steps: int
    scale: float
    negative_prompt: str = ""
    resolution: int | None = None
    batch_size: int = 4


def picture_name(prompt: int, number: int) -> str:
    """File of picture ``number`` of prompt ``prompt``, both from 0."""
    return f"{prompt:03d}_{number:02d}.png"


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a folder's pictures, or compare them with the existing record.

    Args:
        folder: the output folder.
        settings: what determines the pictures, as JSON values.

    Raises:
        UserError: the folder has pictures made with other settings.
    """
    path = folder / SETTINGS_FILE
    if path.is_file():
        known = _record(path)
        if known is None:
            raise UserError(f"{path}: is damaged; delete it, or choose another --output")
        for key, value in json.loads(json.dumps(settings)).items():
            if (known.get(key) or None) != (value or None):  # a newer option may be missing
                raise UserError(
                    f"{folder}: its pictures were made with {key} {_short(known.get(key))}, not "
                    f"{_short(value)}; choose another --output, or delete the folder"
                )
        return
    with atomic_path(path) as temporary:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def forget_claim_without_pictures(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remove the record of a command that failed before it drew; files of others stay."""
    path = folder / SETTINGS_FILE
    if not path.is_file() or any((folder / PICTURES).glob("*.png")):
        return
    known = _record(path)
    if known is not None and known.keys() == settings.keys():
        path.unlink()


def _record(path: Path) -> dict[str, Any] | None:
    """What a file of settings holds; ``None`` if it is damaged."""
    try:
        known = json.loads(read_text(path))
    except json.JSONDecodeError:
        return None
    return known if isinstance(known, dict) else None


def _short(value: Any, *, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


@torch.no_grad()
def draw_pictures(
    folder: Path,
    prompts: Sequence[EvaluationPrompt],
    settings: DrawingSettings,
    *,
    load: Callable[[], EvaluatedModel],
    show_progress: bool = True,
) -> list[list[Path]]:
    """Draw missing pictures; existing ones are kept.

    Args:
        folder: the output folder; pictures go to its ``pictures``.
        prompts: what to draw.
        settings: how to draw it.
        load: returns the model on its device; called only if a picture is missing.
        show_progress: whether to show a bar.

    Returns:
        the files, by prompt and number.

    Raises:
        UserError: the U-Net overflowed in half precision.
    """
    files = [
        [folder / PICTURES / picture_name(i, j) for j in range(settings.num_images)]
        for i in range(len(prompts))
    ]
    missing = [[j for j, file in enumerate(row) if not file.is_file()] for row in files]
    remove_temporaries(folder / PICTURES, {file.name for row in files for file in row}.__contains__)
    num_missing = sum(map(len, missing))
    if not num_missing:
        return files
    model = load()
    warn_of_cut_prompts(model, [*(prompt.prompt for prompt in prompts), settings.negative_prompt])
    total = len(prompts) * settings.num_images
    bar = tqdm(total=total, initial=total - num_missing, desc="pictures", disable=not show_progress)
    with bar:
        for prompt, row, numbers in zip(prompts, files, missing, strict=True):
            for start in range(0, len(numbers), settings.batch_size):
                batch = numbers[start : start + settings.batch_size]
                seeds = [picture_seed(settings.seed, prompt.template, number) for number in batch]
                pictures = draw(model, [prompt.prompt], seeds, settings)
                for j, picture in zip(batch, pictures, strict=True):
                    with atomic_path(row[j]) as temporary:
                        picture.save(temporary)
                bar.update(len(batch))
    return files


def warn_of_cut_prompts(model: EvaluatedModel, prompts: Sequence[str]) -> None:
    """Name how many prompts, negative ones included, are longer than the text encoders read."""
    cut = [text for text in prompts if any(one.is_cut(text) for one in model.text_encoders)]
    most = model.text_encoders[0].most_tokens
    if cut:
        logger.warning(
            "%d prompt(s) have more than %d tokens and are cut (the first begins with %r)%s",
            len(cut),
            most,
            cut[0][:60],
            "" if most >= TOKEN_LENGTHS[-1] else "; max_token_length = 150 or 225 reads more",
        )


@torch.no_grad()
def draw(
    model: EvaluatedModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: DrawingSettings,
) -> list[Image.Image]:
    """Draw pictures at once; noise is drawn on the CPU to be the same on every machine.

    SDXL gets the picture's own size and no crop. An empty negative prompt is encoded like any other
    text, as in training.

    Args:
        model: on its device.
        prompts: one for each seed, or one for all of them.
        seeds: of the pictures.
        settings: how to draw; number, seed and batch size are not read.

    Raises:
        UserError: the U-Net overflowed in half precision.
    """
    pipeline, side = model.pipeline, settings.resolution or model.resolution
    with model.autocast():
        latents_NChw = pipeline(
            **_pipeline_inputs(model.encode([settings.negative_prompt, *prompts])),
            num_images_per_prompt=len(seeds) // len(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=settings.steps,
            guidance_scale=settings.scale,
            height=side,
            width=side,
            output_type="latent",
        ).images
    if not latents_NChw.isfinite().all():
        raise UserError(
            f"the U-Net overflowed in {pipeline.unet.dtype}: set --precision bf16 or fp32 "
            "(mixed_precision in a plan)"
        )
    # one by one: at SDXL's size a picture needs gigabytes
    return [decode_latents(pipeline.vae, one_1Chw) for one_1Chw in latents_NChw.float().split(1)]


def _pipeline_inputs(conditioning: Conditioning) -> dict[str, Tensor]:
    """Arguments of a pipeline, for the negative prompt and the positive ones in this order."""
    inputs = {
        "negative_prompt_embeds": _repeated(conditioning.states),
        "prompt_embeds": conditioning.states[1:],
    }
    if conditioning.pooled is not None:
        inputs["negative_pooled_prompt_embeds"] = _repeated(conditioning.pooled)
        inputs["pooled_prompt_embeds"] = conditioning.pooled[1:]
    return inputs


def _repeated(negative_and_positive: Tensor) -> Tensor:
    """The negative prompt's row for each of the positive ones."""
    negative, positive = negative_and_positive[:1], negative_and_positive[1:]
    return negative.expand_as(positive)
