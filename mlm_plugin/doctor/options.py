"""Options of `mlm-plugin doctor`. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.errors import UserError

__all__ = ["DoctorOptions", "parse_doctor"]


@dataclass(frozen=True)
class DoctorOptions:
    """What is asked of the doctor.

    Attributes:
        file: the LoRA, LyCORIS or embedding.
        base: the model it was trained on; without it only the file itself is examined.
        qwen3: in place of it, Anima's text encoder.
        trigger: what is typed for the concept; ``None`` = as the file says.
        class_token: what kind of thing it is.
        prompts: text file of contexts with ``{}``; ``None`` = DreamBench's.
        clip_skip: as in training.
        page: where the page is written, if anywhere.
        json: where the numbers are written, if anywhere.
        rescale: strength to write into the text encoders' part.
        fit: whether that strength is found.
        output: the mended file.
    """

    file: str
    base: str | None = None
    qwen3: str | None = None
    trigger: str | None = None
    class_token: str = ""
    prompts: str | None = None
    clip_skip: int | None = None
    page: str | None = None
    json: str | None = None
    rescale: float | None = None
    fit: bool = False
    output: str | None = None


def parse_doctor(argv: Sequence[str]) -> DoctorOptions:
    """Read the command line of `mlm-plugin doctor`.

    Raises:
        UserError: an unknown flag, or options that contradict each other.
    """
    given = vars(_parser().parse_args(list(argv)))
    options = DoctorOptions(**{name: value for name, value in given.items() if value is not None})
    _check(options)
    return options


def _check(options: DoctorOptions) -> None:
    if not Path(options.file).is_file():
        raise UserError(f"{options.file}: there is no such file")
    if options.fit and options.rescale is not None:
        raise UserError("--fit finds the strength that --rescale_text_encoder gives: drop one")
    mends = options.fit or options.rescale is not None
    if mends and options.output is None:
        raise UserError("--output: name the mended file")
    if options.output is not None and not mends:
        raise UserError("--output is for the mended file: add --fit or --rescale_text_encoder S")
    if options.output and Path(options.output).suffix != ".safetensors":
        raise UserError(f"--output {options.output}: must end in .safetensors")
    if options.rescale is not None and not 0 <= options.rescale <= 10:
        raise UserError(f"--rescale_text_encoder {options.rescale}: must be from 0 to 10")
    if options.clip_skip is not None and options.clip_skip < 1:
        raise UserError(f"--clip_skip {options.clip_skip}: must be at least 1")
    _check_model(options)


def _check_model(options: DoctorOptions) -> None:
    """What the file is read with."""
    if options.base is None and options.qwen3 is None and (options.fit or options.page):
        wanted = "--fit" if options.fit else "--page"
        raise UserError(
            f"{wanted} needs --base, the model that the file was trained on, or for Anima --qwen3"
        )
    if options.base is not None and options.qwen3 is not None:
        raise UserError("--qwen3 is for files of Anima, --base for all others: drop one")
    if options.clip_skip is not None and options.qwen3 is not None:
        raise UserError("--clip_skip is for CLIP, --qwen3 is another text encoder: drop one")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mlm-plugin doctor",
        description="Examine a LoRA, LyCORIS or embedding of Stable Diffusion 1, 2 or XL, or the "
        "text encoder part of one of Anima, from whatever trainer: what is in it, and how much of "
        "the context around its concept the model still reads. No picture is drawn.",
    )
    add = parser.add_argument  # fmt: skip
    add("file", metavar="FILE", help="The trained file.")
    add(
        "--base",
        metavar="MODEL",
        help="The model it was trained on: folder, hub id or file. "
        "Only its text encoders and the keys and values of its cross-attention are read.",
    )
    add(
        "--qwen3",
        metavar="PATH",
        help="For Anima, in place of --base: its text encoder, as in sd-scripts; a folder with "
        "config.json, tokenizer and weights, or a file of weights.",
    )
    add(
        "--trigger",
        metavar="WORDS",
        help="What is typed for the concept, such as 'sks dog' "
        "(default: as the file's metadata say).",
    )
    add("--class_token", metavar="WORD", help="What kind of thing it is, such as dog.")
    add(
        "--prompts",
        metavar="FILE",
        help="Contexts, one per line, with {} for the concept (default: DreamBench's 25).",
    )
    add("--clip_skip", type=int, metavar="N", help="As in training; SDXL has its own.")
    add("--page", metavar="F.html", help="Write a page with the findings.")
    add("--json", metavar="F.json", help="Write the numbers.")
    add(
        "--rescale_text_encoder",
        dest="rescale",
        type=float,
        metavar="S",
        help="Write a file whose text encoder part is S times as strong.",
    )
    add(
        "--fit",
        action="store_true",
        help="The same, with the largest strength at which the context is kept.",
    )
    add("--output", metavar="F", help="The mended file.")
    return parser
