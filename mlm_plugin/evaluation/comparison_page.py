"""The page with finished evaluations side by side. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mlm_plugin.evaluation.charts import Point, dot_chart, scatter_chart
from mlm_plugin.evaluation.page_parts import axis_title, position, shown, text_encoder_measures
from mlm_plugin.evaluation.rendering import letter, render
from mlm_plugin.evaluation.results import IMAGE_MEASURES, Measure, axes_of, measures_of, value_of

__all__ = ["comparison_page", "measure_rows"]

MAX_PICTURES = 4  # per run and prompt
Results = Mapping[str, Any]


class Cell(NamedTuple):
    """A measure of one run, and its difference to the first run."""

    value: float | None
    change: Mapping[str, Any] | None
    is_best: bool


class Row(NamedTuple):
    """A measure of all runs."""

    measure: Measure
    cells: list[Cell]


def comparison_page(
    runs: Sequence[Results],
    folders: Sequence[Path],
    differences: Sequence[Mapping[str, Any]],
    *,
    warning: str = "",
) -> str:
    """The page as HTML.

    Args:
        runs: the contents of each ``results.json``.
        folders: folders with their pictures.
        differences: difference of every other run to the first, by measure.
        warning: a sentence above the table.
    """
    common = _common_prompts(runs) if all(run["measures"] for run in runs) else []
    return render(
        "comparison.html",
        title=f"{' | '.join(run['label'] for run in runs)}: comparison",
        runs=runs,
        warning=warning,
        measure_rows=measure_rows(runs, differences),
        plane=_plane(runs) if common else None,
        by_prompt=_by_prompt(runs, common) if common else None,
        prompts=common,
        picture_paths=lambda i, row: [
            folders[i] / entry["file"] for entry in row["pictures"][:MAX_PICTURES]
        ],
        text_encoders=text_encoder_measures(runs),
        num_runs=len(runs),
        folders=folders,
        settings=_settings(runs),
    )


def measure_rows(runs: Sequence[Results], differences: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The table of measures: a row for each that any of the runs has.

    Args:
        runs: the contents of each ``results.json``.
        differences: difference of every other run to the first, by measure.
    """
    changes: list[Mapping[str, Any]] = [{}, *differences]
    rows = []
    for name, measure in measures_of(runs).items():
        values = [value_of(run, name) for run in runs]
        best = _best(values, measure)
        cells = [
            Cell(value, change.get(name), value is not None and value == best)
            for value, change in zip(values, changes, strict=True)
        ]
        if any(value is not None for value in values):
            rows.append(Row(measure, cells))
    return rows


def _best(values: Sequence[float | None], measure: Measure) -> float | None:
    """The best value; None if no direction is better or all are shown the same."""
    known = [value for value in values if value is not None]
    if not measure.better or len({shown(value, measure) for value in known}) < 2:
        return None
    return max(known, key=lambda value: measure.better * value)


def _common_prompts(runs: Sequence[Results]) -> list[list[Mapping[str, Any]]]:
    """The prompts that all runs have, each as a list in the order of the runs."""
    tables = [{row["template"]: row for row in run["prompts"]} for run in runs]
    return [
        [table[template] for table in tables]
        for template in tables[0]
        if all(template in table for table in tables)
    ]


def _plane(runs: Sequence[Results]) -> Markup | None:
    """A scatter plot of two measures: means with intervals, and every prompt."""
    axes = axes_of(runs)
    if axes is None:
        return None
    points = []
    for i, run in enumerate(runs):
        x, y = (run["measures"][name] for name in axes)
        mean = Point(x["mean"], y["mean"], run["label"], series=i, label=letter(i))
        points.append(mean._replace(x_interval=x["interval"], y_interval=y["interval"]))
        points += [
            Point(*place, row["prompt"], series=i, faint=True)
            for row in run["prompts"]
            if (place := position(row, axes))
        ]
    return scatter_chart(points, x_title=axis_title(axes[0]), y_title=axis_title(axes[1]))


def _by_prompt(
    runs: Sequence[Results], common: Sequence[Sequence[Mapping[str, Any]]]
) -> Markup | None:
    """Fidelity to every prompt, a dot for each run; None if it was not measured."""
    axes = axes_of(runs)
    measure = axes[0] if axes else "clip_t"
    rows = [(row[0]["text"], [entry["scores"].get(measure) for entry in row]) for row in common]
    if all(value is None for _, values in rows for value in values):
        return None
    names = [f"{letter(i)}, {run['label']}" for i, run in enumerate(runs)]
    return dot_chart(rows, title=IMAGE_MEASURES[measure].title, names=names)


def _settings(runs: Sequence[Results]) -> dict[str, list[str]]:
    """The value of every option in each run."""
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    return {name: [str(run["settings"].get(name)) for run in runs] for name in names}
