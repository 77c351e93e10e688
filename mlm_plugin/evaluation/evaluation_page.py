"""The page of one evaluation, from its results and pictures. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mlm_plugin.evaluation.charts import Line, Point, scatter_chart
from mlm_plugin.evaluation.page_parts import axis_title, position, text_encoder_measures
from mlm_plugin.evaluation.rendering import render
from mlm_plugin.evaluation.results import (
    IMAGE_MEASURES,
    Measure,
    axes_of,
    encoders_of,
    measure_key,
    measures_of,
    value_of,
)

__all__ = ["evaluation_page"]

MAX_TILES = 6
TILES = ("prompt_fidelity", "identity", "clip_t", "clip_i", "dino", "dino_fg", "diversity_dino",
         "masked_accuracy", "text_collapse", "drift_everyday")  # fmt: skip


class Tile(NamedTuple):
    """A headline number."""

    measure: Measure
    value: float
    interval: float | None


class Column(NamedTuple):
    """An image measure in the table of prompts; its bars run from ``low`` to ``high``."""

    name: str
    measure: Measure
    low: float
    high: float


def evaluation_page(results: Mapping[str, Any], folder: Path) -> str:
    """The page as HTML.

    Args:
        results: the contents of ``results.json``.
        folder: folder with its pictures.
    """
    return render(
        "evaluation.html",
        title=f"{results['label']}: evaluation",
        results=results,
        num_pictures=sum(len(row["pictures"]) for row in results["prompts"]),
        tiles=_tiles(results),
        photos=[Path(photo) for photo in results["photos"]],
        picture_paths=lambda row: [folder / entry["file"] for entry in row["pictures"]],
        columns=_columns(results),
        plane=_plane(results),
        text_encoders=text_encoder_measures([results]),
        num_runs=1,
    )


def _tiles(results: Mapping[str, Any]) -> list[Tile]:
    measures, encoders = measures_of([results]), encoders_of([results])
    keys = [key for name in TILES for key in [name, *(measure_key(name, e) for e in encoders)]]
    values = {key: value_of(results, key) for key in keys if key in measures}
    tiles = [
        Tile(measures[key], value, results["measures"].get(key, {}).get("interval"))
        for key, value in values.items()
        if value is not None
    ]
    return tiles[:MAX_TILES]


def _columns(results: Mapping[str, Any]) -> list[Column]:
    columns = []
    for name in (name for name in IMAGE_MEASURES if name in results["measures"]):
        values = [row["scores"].get(name) for row in results["prompts"]]
        known = [value for value in values if value is not None]
        columns.append(Column(name, IMAGE_MEASURES[name], min(known), max(known)))
    return columns


def _plane(results: Mapping[str, Any]) -> Markup | None:
    """A scatter plot of two measures, a dot per prompt; None if one is missing."""
    axes = axes_of([results])
    if axes is None:
        return None
    points = [
        Point(*place, f"{number}. {row['prompt']}", label=str(number))
        for number, row in enumerate(results["prompts"], start=1)
        if (place := position(row, axes))
    ]
    ceiling = results["references"].get(axes[1])
    lines = [Line(ceiling, "photos among themselves")] if ceiling is not None else []
    x_title, y_title = map(axis_title, axes)
    return scatter_chart(points, x_title=x_title, y_title=y_title, lines=lines)
