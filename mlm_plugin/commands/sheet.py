"""`mlm-plugin sheet`: a contact sheet of a finished LoRA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from mlm_plugin.config.options import LogOptions
from mlm_plugin.doctor.learned_file import LearnedFile, read_learned_file
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.evaluated_model import (
    EvaluatedModel,
    LearnedFiles,
    LoadSettings,
    drawing_dtype,
    load_evaluated_model,
)
from mlm_plugin.evaluation.generate import DrawingSettings, warn_of_cut_prompts
from mlm_plugin.files import atomic_path, require_writable
from mlm_plugin.models.weights_files import without_suffix
from mlm_plugin.setup.builtin_names import model_path
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.sheet.drawing import check_parts, draw_columns
from mlm_plugin.sheet.options import SheetOptions
from mlm_plugin.sheet.picture import contact_sheet
from mlm_plugin.sheet.prompts import sheet_prompts
from mlm_plugin.training.samples import SAMPLERS

__all__ = ["run_sheet"]


def run_sheet(options: SheetOptions) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: from any of the steps.
    """
    setup_console(LogOptions())
    quiet_libraries()
    file = read_learned_file(options.file)
    _check(options, file)
    prompts = sheet_prompts(options, trigger=file.trigger)
    output = Path(options.output)
    require_writable(output.parent, "--output")
    model = _load(options)
    check_parts(model.network, text_encoder_scale=options.text_encoder_scale)
    columns = _draw(options, model, prompts)
    side = columns[0][0].width
    sheet = contact_sheet(
        columns,
        titles=[_title(options, scale) for scale in options.scales],
        prompts=prompts,
        heading=Path(options.file).name,
        footing=_settings_line(options, side),
    )
    info = PngInfo()
    info.add_itxt("parameters", parameters(options, prompts, side=side))
    with atomic_path(output) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=info)
    print(f"wrote {output}")
    return 0


def _check(options: SheetOptions, file: LearnedFile) -> None:
    """Refuse before the model is loaded what can be refused."""
    if file.embeddings:
        raise UserError(
            f"{options.file}: is an embedding, which has no strength to vary; draw it with "
            "`mlm-plugin evaluate --embedding`"
        )
    if file.other_model:
        raise UserError(
            f"{options.file}: was made for {file.other_model}; sheets are drawn with Stable "
            "Diffusion 1, 2 and XL"
        )
    if options.sampler not in SAMPLERS:
        raise UserError(f"--sampler {options.sampler}: choose one of {', '.join(SAMPLERS)}")


def _load(options: SheetOptions) -> EvaluatedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = LoadSettings(
        clip_skip=options.clip_skip,
        sampler=options.sampler,
        dtype=drawing_dtype(options.precision, device),
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        v_parameterization=options.v_parameterization,
        zero_terminal_snr=options.zero_terminal_snr,
        max_token_length=options.max_token_length,
    )
    files = LearnedFiles(lora=options.file)
    model = load_evaluated_model(
        model_path(options.base), files, placeholder_token="", settings=settings
    )
    return model.to(device)


def _draw(options: SheetOptions, model: EvaluatedModel, prompts: Sequence[str]) -> list:
    settings = DrawingSettings(
        num_images=1,
        seed=options.seed,
        steps=options.steps,
        scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        resolution=options.resolution,
        batch_size=options.batch_size,
    )
    warn_of_cut_prompts(model, [*prompts, options.negative_prompt])
    with tqdm(total=len(prompts) * len(options.scales), desc="pictures") as bar:
        return list(
            draw_columns(
                model,
                prompts,
                options.scales,
                settings,
                text_encoder_scale=options.text_encoder_scale,
                on_picture=bar.update,
            )
        )


def _title(options: SheetOptions, scale: float) -> str:
    if scale == 0:
        return "base model"
    if options.text_encoder_scale is None:
        return f"strength {scale:g}"
    return f"strength {scale:g}, text encoder {options.text_encoder_scale:g}"


def _settings_line(options: SheetOptions, side: int) -> str:
    parts = [
        f"base model {Path(options.base).name}",
        f"seed {options.seed}",
        f"{options.steps} steps of {options.sampler}",
        f"guidance {options.guidance_scale:g}",
        f"{side} x {side} pixels",
    ]
    if options.negative_prompt:
        parts.append(f"negative prompt \u201c{options.negative_prompt}\u201d")
    return ", ".join(parts)


def parameters(options: SheetOptions, prompts: Sequence[str], *, side: int) -> str:
    """What the picture was made of, as WebUIs write it into a PNG's ``parameters``.

    The prompts, then the negative one, then names and values.

    Source: AUTOMATIC1111/stable-diffusion-webui ``modules/processing.py`` ``create_infotext``.
    """
    values = {
        "Steps": options.steps,
        "Sampler": options.sampler,
        "CFG scale": f"{options.guidance_scale:g}",
        "Seed": options.seed,
        "Size": f"{side}x{side}",
        "Model": without_suffix(options.base),
        "Clip skip": options.clip_skip,
        "Precision": options.precision,
        "Lora": Path(options.file).name,
        "Lora strengths": ", ".join(f"{scale:g}" for scale in options.scales),
        "Lora strength of text encoder": options.text_encoder_scale,
    }
    shown = ", ".join(f"{name}: {_quoted(v)}" for name, v in values.items() if v is not None)
    negative = [f"Negative prompt: {options.negative_prompt}"] if options.negative_prompt else []
    return "\n".join([*prompts, *negative, shown])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
