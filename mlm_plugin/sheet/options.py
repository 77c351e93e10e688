"""Options of `mlm-plugin sheet`. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mlm_plugin.config.commands import LARGEST_SEED, CommandParser
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.options import PRECISIONS, check_drawing

__all__ = ["SheetOptions", "parse_sheet"]


@dataclass(frozen=True)
class SheetOptions:
    """What is drawn, and how.

    Attributes:
        file: the LoRA or LyCORIS.
        base: the model it was trained on.
        output: the PNG.
        prompts: text file, one prompt per line.
        prompt: prompts in place of a file.
        trigger: replaces ``{}`` in prompts; ``None`` = as the file says.
        scales: strengths of the columns; 0 = the base model.
        text_encoder_scale: strength of the text encoders' part in every column but 0; ``None`` =
            that of the column.
        steps: steps of the sampler.
        guidance_scale: classifier-free guidance; 1 = without.
        seed: of the noise of every picture.
        sampler: kohya's name.
        negative_prompt: what is not wanted.
        resolution: side of the pictures in pixels; ``None`` = the model's own.
        batch_size: pictures drawn at once.
        precision: of U-Net and text encoders.
        clip_skip: as in training.
        v_parameterization: as in training.
        zero_terminal_snr: as in training.
        max_token_length: as in training.
        tokenizer_cache_dir: where a checkpoint file's tokenizer is looked for.
    """

    file: str
    base: str = ""
    output: str = ""
    prompts: str | None = None
    prompt: tuple[str, ...] = ()
    trigger: str | None = None
    scales: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0)
    text_encoder_scale: float | None = None
    steps: int = 30
    guidance_scale: float = 7.5
    seed: int = 0
    sampler: str = "ddim"
    negative_prompt: str = ""
    resolution: int | None = None
    batch_size: int = 4
    precision: str = "auto"
    clip_skip: int | None = None
    tokenizer_cache_dir: str | None = None
    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    max_token_length: int | None = None


def parse_sheet(argv: Sequence[str]) -> SheetOptions:
    """Read the command line of `mlm-plugin sheet`.

    Raises:
        UserError: an unknown flag, a missing one, or a value that cannot be used.
    """
    given = vars(_parser().parse_args(list(argv)))
    given = {name: value for name, value in given.items() if value is not None}
    if "scales" in given:
        given["scales"] = _scales(given["scales"])
    if "prompt" in given:
        given["prompt"] = tuple(given["prompt"])
    options = SheetOptions(**given)
    _check(options)
    return options


def _scales(text: str) -> tuple[float, ...]:
    """``0,0.7,1`` as numbers.

    Raises:
        UserError: one of them is no number, or there twice.
    """
    scales: list[float] = []
    for word in text.split(","):
        try:
            scale = float(word)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(
                f"--scales {text}: {word.strip()!r} is not a number; write strengths with commas "
                "between, such as 0,0.4,0.7,1"
            )
        if scale in scales:
            raise UserError(f"--scales {text}: {scale:g} is there twice; remove one")
        scales.append(scale)
    return tuple(scales)


def _check(options: SheetOptions) -> None:
    if not Path(options.file).is_file():
        raise UserError(f"{options.file}: there is no such file")
    for name in ("base", "output"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing; see `mlm-plugin sheet --help`")
    if Path(options.output).suffix.lower() != ".png" or Path(options.output).is_dir():
        raise UserError(f"--output {options.output}: name a file that ends in .png")
    if bool(options.prompts) == bool(options.prompt):
        raise UserError("give either --prompts FILE or --prompt TEXT, one of the two")
    _check_numbers(options)


def _check_numbers(options: SheetOptions) -> None:
    check_drawing(options.steps, options.max_token_length)
    for name in ("steps", "batch_size", "clip_skip"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not 0 <= options.seed <= LARGEST_SEED:
        raise UserError(f"--seed {options.seed}: must be 0 to {LARGEST_SEED}")
    for name in ("guidance_scale", "text_encoder_scale"):
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a number")
    if options.resolution is not None and (options.resolution < 64 or options.resolution % 8):
        raise UserError(
            f"--resolution {options.resolution}: must be a multiple of 8, at least 64 pixels"
        )
    if options.precision not in PRECISIONS:
        raise UserError(f"--precision {options.precision}: choose one of {', '.join(PRECISIONS)}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mlm-plugin sheet",
        allow_abbrev=False,
        description="Draw a contact sheet of a finished LoRA or LyCORIS of Stable Diffusion 1, 2 "
        "or XL: a row for each prompt, a column for each strength, the same noise in all of them.",
    )
    defaults = {field.name: field.default for field in fields(SheetOptions)}

    def add(name: str, metavar: str, text: str, **settings) -> None:
        default = defaults[name]
        shown = "" if default in (None, "", ()) else f" (default: {default})"
        parser.add_argument(f"--{name}", metavar=metavar, help=text + shown, **settings)

    parser.add_argument("file", metavar="FILE", help="The LoRA or LyCORIS.")
    add("base", "MODEL", "The model it was trained on: folder, hub id or file.")
    add("output", "F.png", "The picture.")
    add("prompts", "FILE", "Prompts, one per line; # in column 0 = comment.")
    add("prompt", "TEXT", "Prompts on the command line, each in quotes.", nargs="+")
    add("trigger", "WORDS", "Replaces {} in prompts (default: as the file's metadata say).")
    parser.add_argument(
        "--scales",
        metavar="S,S,...",
        help="Strengths, one for each column; 0 = the base model (default: 0,0.4,0.7,1). Write "
        "--scales=-1,0,1 where the first is negative.",
    )
    add(
        "text_encoder_scale",
        "S",
        "Strength of the text encoders' part in all columns but that of the base model, so that "
        "--scales are of the U-Net alone (default: the same as the U-Net's).",
        type=float,
    )
    _add_drawing(add)
    parser.add_argument(
        "--v_parameterization",
        action="store_true",
        help="As in training: the model predicts v; for a file that does not say so.",
    )
    parser.add_argument(
        "--zero_terminal_snr",
        action="store_true",
        help="As in training: zero terminal SNR; for a file that does not say so.",
    )
    return parser


def _add_drawing(add) -> None:
    """Options that mean the same in `mlm-plugin evaluate`."""
    add("steps", "N", "Steps of the sampler.", type=int)
    add("guidance_scale", "X", "Classifier-free guidance; 1 = without.", type=float)
    add("seed", "N", "Seed of every picture, as in WebUIs and sample prompts.", type=int)
    add("sampler", "NAME", "Sampler, by kohya's name.")
    add("negative_prompt", "TEXT", "Negative prompt.")
    add(
        "resolution",
        "N",
        "Side of the pictures in pixels; else the model's own, 1024 for SDXL.",
        type=int,
    )
    add("batch_size", "N", "Pictures drawn at once.", type=int)
    add("precision", "NAME", "Of U-Net and text encoders: auto, fp32, fp16 or bf16.")
    add("clip_skip", "N", "As in training; SDXL has its own.", type=int)
    add(
        "max_token_length",
        "N",
        "As in training: 75, 150 or 225; longer prompts are cut (75 if not given).",
        type=int,
    )
    add(
        "tokenizer_cache_dir",
        "DIR",
        "As in training: where a checkpoint file's tokenizer is looked for.",
    )
