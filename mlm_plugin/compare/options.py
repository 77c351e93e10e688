"""Options of `mlm-plugin compare`. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlm_plugin.config.commands import CommandParser
from mlm_plugin.evaluation.options import EvaluateOptions

__all__ = ["CompareOptions", "parse_compare"]

_DEFAULTS = EvaluateOptions()


@dataclass(frozen=True)
class CompareOptions:
    """The command line of `mlm-plugin compare`."""

    pretrained_model_name_or_path: str
    subjects: str
    plan: str
    output: str
    clip_model: str
    dino_model: str
    check: bool


def parse_compare(argv: Sequence[str]) -> CompareOptions:
    """Read the command line of `mlm-plugin compare`.

    Raises:
        UserError: an unknown flag, or a missing one.
    """
    parser = CommandParser(
        prog="mlm-plugin compare",
        allow_abbrev=False,
        description="Train every arm of a plan on every subject with every seed, draw the same "
        "prompts from the same noise, and score the pictures. Writes report.html, results.json, "
        "and blind.html with key.csv for votes; the same command continues where it stopped.",
    )

    def add(name: str, metavar: str, text: str, **settings) -> None:
        parser.add_argument(f"--{name}", metavar=metavar, help=text, **settings)

    add("pretrained_model_name_or_path", "MODEL", "Base model, as in training.", required=True)
    add("subjects", "DIR", "One folder per subject: kohya's '10_sks dog' in it, or photos and a "
        "subject.toml with class_token.", required=True)  # fmt: skip
    add("output", "DIR", "Folder of everything that is written.", required=True)
    add("plan", "PLAN", "TOML file, or one of the package: sd15, sdxl (default: sd15).",
        default="sd15")  # fmt: skip
    add("clip_model", "NAME", "As in `evaluate` (default: %(default)s).",
        default=_DEFAULTS.clip_model)  # fmt: skip
    add("dino_model", "NAME", "As in `evaluate`, such as facebook/dinov2-base "
        "(default: %(default)s).", default=_DEFAULTS.dino_model)  # fmt: skip
    parser.add_argument("--check", action="store_true",
                        help="Check everything, say how much there is to do, and end.")  # fmt: skip
    return CompareOptions(**vars(parser.parse_args(list(argv))))
