"""Readable results of the benchmark: a table in Markdown, and a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlm_plugin.evaluation.charts import Point, scatter_chart
from mlm_plugin.evaluation.measures import Mean, mean_with_interval
from mlm_plugin.evaluation.rendering import Figure, Section, Table, sections_page
from research.bench.summary import (
    Difference,
    Record,
    Row,
    SettingKey,
    comparisons,
    curves,
    summarize,
)

__all__ = ["html_report", "markdown_table"]

HEADINGS = (
    "setting", "runs", "prompt fidelity", "identity", "CLIP-T", "CLIP-I", "ms / step",
    "Δ fidelity", "Δ identity", "Δ fidelity at equal identity",
)  # fmt: skip
RIVAL_HEADINGS = (
    "MLM setting", "rival", "runs", "Δ fidelity", "Δ identity", "Δ fidelity at equal identity",
)  # fmt: skip
RIVAL_LEAD = "The MLM term minus the rival, same concepts and seeds; positive: the term is better."
LEAD = (
    "At the last evaluation, mean ± 95 % interval over concepts x seeds. Differences are to the "
    "plain run of the same method with the same seed, with p of a paired sign-flip test."
)


def markdown_table(records: Sequence[Record]) -> str:
    """One line per setting, then one per rival, if any."""
    text = _markdown(HEADINGS, [_cells(row) for row in summarize(records)])
    rivals = _rival_rows(records)
    return f"{text}\n{RIVAL_LEAD}\n\n{_markdown(RIVAL_HEADINGS, rivals)}" if rivals else text


def html_report(results: Mapping[str, Any]) -> str:
    """The page: tables, plots, settings."""
    records = results["records"]
    rows = summarize(records)
    sections = [
        Section("Methods and regularizers", Table([_cells(row) for row in rows], HEADINGS), LEAD)
    ]
    if rivals := _rival_rows(records):
        table = Table(rivals, RIVAL_HEADINGS)
        sections.append(Section("The term against its rivals", table, RIVAL_LEAD))
    for method in dict.fromkeys(row.setting.method for row in rows if row.setting.method != "base"):
        sections.append(Section(f"{method}: fidelity against identity", _plane(method, records)))
    facts = [(name, str(value)) for name, value in results.items() if name != "records"]
    return sections_page("Pocket bench", [*sections, Section("Settings", Table(facts))])


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    lines.insert(1, "|" + "---|" * len(headings))
    return "\n".join(lines) + "\n"


def _rival_rows(records: Sequence[Record]) -> list[list[str]]:
    return [
        [
            duel.ours.title,
            duel.theirs.title,
            str(duel.num_runs),
            *(_points(found) for found in (duel.fidelity, duel.identity, duel.matched)),
        ]
        for duel in comparisons(records)
    ]


def _cells(row: Row) -> list[str]:
    means = row.means
    return [
        row.setting.title,
        str(means["identity"].n),
        _percent(means["prompt_fidelity"]),
        _percent(means["identity"]),
        _plain(means["clip_t"]),
        _plain(means["clip_i"]),
        f"{1000 * row.seconds_per_step:.0f}" if row.seconds_per_step else "–",
        *(_points(found) for found in (row.fidelity, row.identity, row.matched)),
    ]


def _plane(method: str, records: Sequence[Record]) -> Figure:
    """One dot per setting and step; the last one is labelled."""
    points = []
    settings = [item for item in curves(records).items() if item[0].method == method]
    for series, (setting, runs) in enumerate(settings):
        steps = sorted({record["step"] for curve in runs.values() for record in curve})
        for step in steps:
            points.append(_point(setting, runs, step, series, is_last=step == steps[-1]))
    chart = scatter_chart(points, x_title="identity", y_title="prompt fidelity", joined=True)
    caption = (
        "Means over concepts x seeds; one dot per evaluation, joined in the order of steps, the "
        "last one of each setting with its name. Up and to the right is better."
    )
    return Figure(chart, caption)


def _point(
    setting: SettingKey,
    runs: Mapping[Any, Sequence[Record]],
    step: int,
    series: int,
    *,
    is_last: bool,
) -> Point:
    found = [record for curve in runs.values() for record in curve if record["step"] == step]

    def mean(name: str) -> float:
        return mean_with_interval(torch.tensor([record[name] for record in found])).mean

    title = f"{setting.title}, step {step}"
    label = setting.title.removeprefix(f"{setting.method} + ") if is_last else ""
    x, y = mean("identity"), mean("prompt_fidelity")
    return Point(x, y, title, series=series, label=label, faint=not is_last)


def _percent(mean: Mean) -> str:
    half = "" if mean.interval is None else f" ± {100 * mean.interval:.1f}"
    return f"{100 * mean.mean:.1f}{half}"


def _plain(mean: Mean) -> str:
    return f"{mean.mean:.3f}"


def _points(found: Difference | None) -> str:
    if found is None:
        return "–"
    half = "" if found.value.interval is None else f" ± {100 * found.value.interval:.1f}"
    sign = "+" if found.value.mean > 0 else ""
    return f"{sign}{100 * found.value.mean:.1f}{half} (p {found.p_value:.3f})"
