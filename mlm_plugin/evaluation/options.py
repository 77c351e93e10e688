"""Options of `mlm-plugin evaluate`, declared once. Knows no torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.errors import UserError

__all__ = [
    "MOST_STEPS",
    "NO_MODEL",
    "TOKEN_LENGTHS",
    "EvaluateCommand",
    "EvaluateOptions",
    "check_drawing",
    "parse_evaluate",
]

MOST_STEPS = 999  # of samplers whose timesteps begin at 1 of 1000
TOKEN_LENGTHS = (None, 75, 150, 225)

NO_MODEL = "none"
"""Instead of a metric model or contextualizer: leave its measures out."""

PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def _option(default: Any, text: str, metavar: str = "X"):
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `mlm-plugin evaluate`."""

    pretrained_model_name_or_path: str | None = _option(
        None, "Base model: folder, hub id or file, as in training.", "MODEL"
    )
    lora: str | None = _option(None, "A LoRA to evaluate.", "FILE")
    lora_weight: float = _option(1.0, "Strength of the LoRA.")
    embedding: str | None = _option(
        None,
        "Token embeddings of the placeholder; for SDXL with clip_l and clip_g.",
        "FILE",
    )
    checkpoint: str | None = _option(
        None, "A whole trained model; the base stays the measure of drift.", "MODEL"
    )
    delta: str | None = _option(None, "Keys and values of Custom Diffusion (SD 1 and 2).", "FILE")
    xti: str | None = _option(
        None, "Token embeddings for every cross-attention layer (SD 1 and 2).", "FILE"
    )
    placeholder_token: str = _option(
        "sks", "Word that stands for the concept; '' draws the plain class.", "WORD"
    )
    class_token: str = _option("", "Class word; prompts say '<placeholder> <class>'.", "WORD")
    train_data_dir: str | None = _option(None, "Photos of the concept, also in sub-folders.", "DIR")
    output: str = _option("", "Folder of pictures, results and report.", "DIR")
    prompts: str | None = _option(
        None, "Text file, one prompt per line with {} for the concept; else DreamBench's.", "FILE"
    )
    num_images_per_prompt: int = _option(4, "Pictures of every prompt.", "N")
    steps: int = _option(50, "Steps of the sampler.", "N")
    scale: float = _option(7.5, "Classifier-free guidance; 1 = without.")
    seed: int = _option(0, "Random seed of the pictures.", "N")
    sampler: str = _option("ddim", "Sampler, by kohya's name.", "NAME")
    negative_prompt: str = _option("", "Negative prompt.", "TEXT")
    resolution: int | None = _option(
        None, "Side of the pictures in pixels; else the model's own, 1024 for SDXL.", "N"
    )
    batch_size: int = _option(4, "Pictures drawn at once.", "N")
    precision: str = _option(
        "auto",
        "Of U-Net and text encoders: auto (fp16 on a GPU, else fp32), fp32, fp16 or bf16; "
        "the VAE is fp32.",
        "NAME",
    )
    clip_skip: int | None = _option(None, "As in training; SDXL has its own.", "N")
    v_parameterization: bool = _option(
        False, "As in training: the model predicts v; for a file that does not say so."
    )
    zero_terminal_snr: bool = _option(
        False, "As in training: zero terminal SNR; for a file that does not say so."
    )
    max_token_length: int | None = _option(
        None, "As in training: 75, 150 or 225; longer prompts are cut (75 if not given).", "N"
    )
    tokenizer_cache_dir: str | None = _option(
        None, "As in training: where a checkpoint file's tokenizer is looked for.", "DIR"
    )
    clip_model: str = _option(
        "openai/clip-vit-base-patch32",
        "CLIP or SigLIP that scores: folder or hub id; none = without.",
        "NAME",
    )
    dino_model: str = _option(
        "facebook/dino-vits16", "DINO that scores: folder or hub id; none = without.", "NAME"
    )
    masks: str | None = _option(
        None, "Foreground masks, named as the photos and pictures they belong to.", "DIR"
    )
    mlm_contextualizer: str = _option(
        "auto",
        "As in training, for SDXL one of each text encoder with a comma between; none = without.",
        "FILE",
    )
    label: str | None = _option(None, "Name in reports; else that of the trained file.", "TEXT")


class EvaluateCommand(NamedTuple):
    """Options, and which of the three jobs: draw and score, text encoder only, or compare."""

    options: EvaluateOptions
    text_only: bool
    compare: tuple[str, ...]  # folders; empty = one evaluation


def parse_evaluate(argv: Sequence[str]) -> EvaluateCommand:
    """Read the command line of `mlm-plugin evaluate`.

    Raises:
        UserError: an unknown flag, a missing one, or values that contradict each other.
    """
    given = vars(_parser().parse_args(list(argv)))
    compare, text_only = given.pop("compare"), given.pop("text_only")
    options = EvaluateOptions(**given)
    if not options.output:
        raise UserError("--output: name the folder for results and report")
    if compare is None:
        _check(options, text_only=text_only)
    else:
        _refuse_beside_compare(options, text_only=text_only)
    return EvaluateCommand(options, text_only, tuple(compare or ()))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="mlm-plugin evaluate",
        allow_abbrev=False,
        description="Draw pictures of a learned concept, score them and the text encoder, and "
        "write results.json, results.csv, text.csv and report.html. An interrupted run continues.",
    )
    types = {"int": int, "float": float}
    for item in dataclasses.fields(EvaluateOptions):
        default = item.default
        if default is False:
            parser.add_argument(f"--{item.name}", action="store_true", help=item.metadata["help"])
            continue
        shown = "" if default in (None, "") else f" (default: {default})"
        parser.add_argument(
            f"--{item.name}",
            type=types.get(str(item.type).split(" |")[0], str),
            default=default,
            metavar=item.metadata["metavar"],
            help=item.metadata["help"].replace("%", "%%") + shown,
        )
    parser.add_argument(
        "--text_only", action="store_true", help="Measure the text encoders alone, no pictures."
    )
    parser.add_argument(
        "--compare", nargs="+", metavar="DIR", help="Finished evaluations to show side by side."
    )
    return parser


def _refuse_beside_compare(options: EvaluateOptions, *, text_only: bool) -> None:
    given = [
        item.name
        for item in dataclasses.fields(options)
        if item.name != "output" and getattr(options, item.name) != item.default
    ]
    if given := [*given, *(["text_only"] if text_only else [])]:
        raise UserError(f"--{given[0]} has no effect with --compare; leave it out")


def check_drawing(steps: int, max_token_length: int | None) -> None:
    """Limits that `evaluate` and `sheet` share.

    Raises:
        UserError: a value that no sampler or text encoder has.
    """
    if steps > MOST_STEPS:
        raise UserError(f"--steps {steps}: at most {MOST_STEPS}; 20 to 50 are usual")
    if max_token_length not in TOKEN_LENGTHS:
        raise UserError(f"--max_token_length {max_token_length}: must be 75, 150 or 225")


def _check(options: EvaluateOptions, *, text_only: bool) -> None:
    required = ["pretrained_model_name_or_path", "class_token"]
    if not text_only:
        required.append("train_data_dir")
    for name in required:
        if not getattr(options, name):
            raise UserError(f"--{name} is missing; see `mlm-plugin evaluate --help`")
    for name in ("num_images_per_prompt", "steps", "batch_size", "clip_skip"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} = {value}: must be at least 1")
    check_drawing(options.steps, options.max_token_length)
    if options.resolution is not None and (options.resolution < 8 or options.resolution % 8):
        raise UserError(f"--resolution = {options.resolution}: must be a multiple of 8")
    if options.precision not in PRECISIONS:
        raise UserError(
            f"--precision = {options.precision!r}: expected one of {', '.join(PRECISIONS)}"
        )
    if options.lora_weight != EvaluateOptions.lora_weight and not options.lora:
        raise UserError("--lora_weight has no effect without --lora; leave it out")
    for one, other in (("xti", "embedding"), ("xti", "delta"), ("lora", "delta")):
        if getattr(options, one) and getattr(options, other):
            raise UserError(f"--{one} and --{other} change the same layers or words: give one")
    if (options.embedding or options.xti) and not options.placeholder_token:
        raise UserError(
            "--placeholder_token is empty: name the word that the embeddings were learned for"
        )
