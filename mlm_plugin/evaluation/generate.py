"""Draws the pictures of an evaluation into a folder, and goes on where it was stopped.

Every picture has its own seed, named by prompt and number, so the set is the same however often the
drawing was interrupted. Knows no measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import EvaluationPrompt, picture_seed
from mlm_plugin.evaluation.evaluated_model import Subject
from mlm_plugin.files import atomic_path, read_text
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.samples import decode_latents

__all__ = ["PICTURES", "SETTINGS_FILE", "claim_folder", "draw_pictures", "picture_name"]

PICTURES = "pictures"  # sub-folder
SETTINGS_FILE = "settings.json"


def picture_name(prompt: int, number: int) -> str:
    """File of picture ``number`` of prompt ``prompt``, both from 0."""
    return f"{prompt:03d}_{number:02d}.png"


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down what the pictures of a folder are made with, or hold it to what it says.

    Args:
        folder: the output folder.
        settings: what decides how pictures look, JSON values.

    Raises:
        UserError: pictures are there that were made with other settings.
    """
    path = folder / SETTINGS_FILE
    if path.is_file():
        try:
            known = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: is not valid JSON; choose another --output") from error
        for key, value in json.loads(json.dumps(settings)).items():
            if known.get(key) != value:
                raise UserError(
                    f"{folder}: its pictures were made with {key} {_short(known.get(key))}, not "
                    f"{_short(value)}; choose another --output, or delete the folder"
                )
        return
    with atomic_path(path) as temporary:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def _short(value: Any, *, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


@torch.no_grad()
def draw_pictures(
    folder: Path,
    prompts: Sequence[EvaluationPrompt],
    *,
    load: Callable[[], Subject],
    num_images: int,
    seed: int,
    steps: int,
    scale: float,
    negative_prompt: str = "",
    resolution: int | None = None,
    batch_size: int = 4,
    show_progress: bool = True,
) -> list[list[Path]]:
    """Draw what is missing; existing pictures stay.

    Args:
        folder: the output folder; pictures go to its ``pictures``.
        prompts: what to draw.
        load: gives the model on its device; called only if a picture is missing.
        num_images: pictures per prompt.
        seed: names the noise.
        steps: of the sampler.
        scale: classifier-free guidance.
        negative_prompt: for all.
        resolution: side in pixels; None = the model's own.
        batch_size: pictures drawn at once.
        show_progress: whether to show a bar.

    Returns:
        the files, by prompt and number.

    Raises:
        UserError: the U-Net overflowed in half precision.
    """
    files = [
        [folder / PICTURES / picture_name(i, j) for j in range(num_images)]
        for i in range(len(prompts))
    ]
    missing = [[j for j, file in enumerate(row) if not file.is_file()] for row in files]
    num_missing = sum(map(len, missing))
    if not num_missing:
        return files
    subject = load()
    total = len(prompts) * num_images
    bar = tqdm(total=total, initial=total - num_missing, desc="pictures", disable=not show_progress)
    with bar:
        for i, numbers in enumerate(missing):
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                seeds = [picture_seed(seed, prompts[i].template, j) for j in batch]
                pictures = _draw(
                    subject,
                    prompts[i].prompt,
                    seeds,
                    steps=steps,
                    scale=scale,
                    negative_prompt=negative_prompt,
                    resolution=resolution,
                )
                for j, picture in zip(batch, pictures, strict=True):
                    with atomic_path(files[i][j]) as temporary:
                        picture.save(temporary)
                bar.update(len(batch))
    return files


def _draw(
    subject: Subject,
    prompt: str,
    seeds: Sequence[int],
    *,
    steps: int,
    scale: float,
    negative_prompt: str,
    resolution: int | None,
) -> list[Image.Image]:
    """Pictures of one prompt; noise comes from the CPU, so that a seed holds on every machine.

    SDXL is told the picture's own size and no crop, and an empty negative prompt is encoded as any
    other, as in training.
    """
    pipeline, side = subject.pipeline, resolution or subject.resolution
    latents_NChw = pipeline(
        **_pipeline_inputs(subject.encode([negative_prompt, prompt])),
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        guidance_scale=scale,
        height=side,
        width=side,
        output_type="latent",
    ).images
    if not latents_NChw.isfinite().all():
        raise UserError(
            f"the U-Net overflowed in {pipeline.unet.dtype}: set --precision bf16 or fp32"
        )
    # one by one: at SDXL's size a picture needs gigabytes
    return [decode_latents(pipeline.vae, one_1Chw) for one_1Chw in latents_NChw.float().split(1)]


def _pipeline_inputs(conditioning: Conditioning) -> dict[str, Tensor]:
    """Arguments of a pipeline, for the negative and the positive prompt in this order."""
    inputs = {
        "negative_prompt_embeds": conditioning.states[:1],
        "prompt_embeds": conditioning.states[1:],
    }
    if conditioning.pooled is not None:
        inputs["negative_pooled_prompt_embeds"] = conditioning.pooled[:1]
        inputs["pooled_prompt_embeds"] = conditioning.pooled[1:]
    return inputs
