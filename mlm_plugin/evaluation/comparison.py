"""Finished evaluations side by side: paired differences, and one report for all.

Every run is compared with the first, prompt by prompt: with equal seeds, both drew a prompt from
the same noise. Knows no models.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.comparison_page import comparison_page
from mlm_plugin.evaluation.measures import mean_with_interval, sign_flip_p_value
from mlm_plugin.evaluation.rendering import letter, write_report
from mlm_plugin.evaluation.results import (
    FORMAT,
    IMAGE_MEASURES,
    measures_of,
    read_results,
    value_of,
)
from mlm_plugin.files import atomic_path

__all__ = ["compare", "paired_differences"]

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"


def compare(folders: Sequence[str], output: Path) -> Path:
    """Write ``comparison.json`` and ``report.html``; returns the report.

    Raises:
        UserError: fewer than two folders, one without results, or scores from different models.
    """
    if len(folders) < 2:
        raise UserError("--compare: name at least two folders of finished evaluations")
    runs = [read_results(folder) for folder in folders]
    _refuse_other_judges(folders, runs)
    if {Path(folder).resolve() for folder in folders} & {output.resolve()}:
        raise UserError(f"--output {output}: is one of the folders compared; choose another")
    if warning := _different_text_encoders(runs):
        logger.warning("--compare: %s", warning)
    differences = [paired_differences(runs[0], run) for run in runs[1:]]
    content = {
        "format": FORMAT.replace("evaluation", "comparison"),
        "runs": [
            {
                "folder": str(folder),
                "label": run["label"],
                "model": run["model"],
                "values": {name: value_of(run, name) for name in measures_of(runs)},
            }
            for folder, run in zip(folders, runs, strict=True)
        ],
        "differences_to_first": differences,
    }
    with atomic_path(output / COMPARISON_FILE) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
    html = comparison_page(runs, list(map(Path, folders)), differences, warning=warning)
    return write_report(output, html)


def paired_differences(
    first: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """``other - first`` over common prompts, for every image measure that both have.

    Returns:
        by measure ``mean``, ``interval`` (95 %), ``n`` and ``p`` (sign flips; None for
        a single prompt).
    """
    ours = {row["template"]: row["scores"] for row in other["prompts"]}
    differences = {}
    for name in IMAGE_MEASURES:
        values = [
            ours[row["template"]][name] - row["scores"][name]
            for row in first["prompts"]
            if row["scores"].get(name) is not None
            and ours.get(row["template"], {}).get(name) is not None
        ]
        if values:
            tensor = torch.tensor(values, dtype=torch.float64)
            p = sign_flip_p_value(tensor) if len(values) > 1 else None
            differences[name] = {**mean_with_interval(tensor)._asdict(), "p": p}
    return differences


def _refuse_other_judges(folders: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> None:
    for name in ("CLIP", "DINO", "Oracle"):
        judges = {run["judges"].get(name) for run in runs if run["measures"]} - {None}
        if len(judges) > 1:
            raise UserError(
                f"--compare: {' and '.join(folders)} were scored by different models of {name} "
                f"({', '.join(sorted(judges))}); evaluate them by one"
            )


def _different_text_encoders(runs: Sequence[Mapping[str, Any]]) -> str:
    """A warning if the runs have different text encoders; else an empty string."""
    groups: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(" and ".join(run["text"]), []).append(letter(i))
    if len(groups) == 1:
        return ""
    shown = "; ".join(f"{', '.join(letters)}: {names}" for names, letters in groups.items())
    return (
        f"the runs have different text encoders ({shown}), so measures of the text are in "
        "separate rows and are not compared between them"
    )
