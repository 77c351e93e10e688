"""What the page of a run tells of kohya's trainers: settings that were given, samples drawn."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.run_page import NOT_SHOWN, Samples
from mlm_plugin.sd_scripts.locate import config_file_values

__all__ = ["TIME", "drawn_samples", "given_settings"]

TIME = "%Y%m%d%H%M%S"
SAMPLE = re.compile(r"(e?)(\d{6,})_(\d{2,})_(\d{14})(_\d+)?\.png")
"""Step, or epoch with an e; number of the prompt; time; seed."""


def given_settings(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Values of the options on the command line and in the ``--config_file``."""
    names = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    names += config_file_values(getattr(args, "config_file", None))
    return {
        name: getattr(args, name)
        for name in dict.fromkeys(names)
        if name not in NOT_SHOWN and getattr(args, name, None) is not None
    }


def drawn_samples(args: argparse.Namespace, *, since: str) -> Samples | None:
    """The pictures that kohya's trainer has drawn in this run, in the order of their times.

    Args:
        args: options of the host.
        since: when the run began, as ``TIME``.

    Source: sd-scripts ``library/train_util.py``, ``sample_image_inference``.
    """
    folder = Path(args.output_dir or ".") / "sample"
    start = f"{args.output_name}_" if args.output_name else ""
    found = [
        (match[4], match, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.startswith(start) and (match := SAMPLE.fullmatch(path.name[len(start) :]))
    ]
    drawn: dict[Any, dict[int, Path]] = {}
    for drawn_at, match, path in sorted(found, key=lambda one: one[0]):
        if drawn_at >= since:
            when = f"epoch {int(match[2])}" if match[1] else int(match[2])
            drawn.setdefault(when, {})[int(match[3])] = path
    if not drawn:
        return None
    number = 1 + max(row for pictures in drawn.values() for row in pictures)
    rows = {when: [paths.get(row) for row in range(number)] for when, paths in drawn.items()}
    return Samples(_prompts(args, number), rows)


def _prompts(args: argparse.Namespace, number: int) -> list[str]:
    """Texts of the prompts; numbers where our reader refuses what kohya's takes."""
    from mlm_plugin.training.samples import parse_sample_prompts

    try:
        found = [prompt.prompt for prompt in parse_sample_prompts(args.sample_prompts)]
    except (UserError, OSError, TypeError):
        found = []
    return [*found, *(f"prompt {row + 1}" for row in range(len(found), number))][:number]
