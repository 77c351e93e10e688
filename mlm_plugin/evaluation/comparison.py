"""Finished evaluations side by side: paired numbers, and one report of them all.

Every run is compared with the first, prompt by prompt: both drew a prompt from the same noise if
their seeds are the same. Knows no models.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.charts import Point, dot_chart, scatter_chart
from mlm_plugin.evaluation.measures import mean_with_interval, sign_flip_p_value
from mlm_plugin.evaluation.page import page, picture, picture_grid, section, table
from mlm_plugin.evaluation.report import (
    axis_title,
    marked_prompt,
    place_of,
    scores_line,
    shown,
    text_section,
    write_report,
)
from mlm_plugin.evaluation.results import (
    FORMAT,
    IMAGE_MEASURES,
    axes_of,
    measures_of,
    read_results,
    value_of,
)
from mlm_plugin.files import atomic_path

__all__ = ["compare", "paired_differences"]

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"
MAX_PICTURES = 4  # of a run and prompt


def compare(folders: Sequence[str], output: Path) -> Path:
    """Write ``comparison.json`` and ``report.html``; returns the report.

    Raises:
        UserError: fewer than two folders, one without results, or scores of different judges.
    """
    if len(folders) < 2:
        raise UserError("--compare: name at least two folders of finished evaluations")
    runs = [read_results(folder) for folder in folders]
    _refuse_other_judges(folders, runs)
    if {Path(folder).resolve() for folder in folders} & {output.resolve()}:
        raise UserError(f"--output {output}: is one of the folders compared; choose another")
    if reason := _unlike_text_encoders(runs):
        logger.warning("--compare: %s", reason)
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
    html = _report(runs, [Path(folder) for folder in folders], differences)
    return write_report(output, html)


def paired_differences(
    first: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """``other - first`` over the prompts of both, for every image measure that both took.

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


def _unlike_text_encoders(runs: Sequence[Mapping[str, Any]]) -> str:
    """One sentence where runs have text encoders that others lack; else nothing."""
    groups: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(" and ".join(run["text"]), []).append(_letter(i))
    if len(groups) == 1:
        return ""
    shown = "; ".join(f"{', '.join(letters)}: {names}" for names, letters in groups.items())
    return (
        f"the runs have unlike text encoders ({shown}), so measures of the text stand in rows of "
        "their own and are not compared between them"
    )


def _report(
    runs: Sequence[Mapping[str, Any]],
    folders: Sequence[Path],
    differences: Sequence[Mapping[str, Any]],
) -> str:
    parts = [_head(runs), _table(runs, differences)]
    common = _common_prompts(runs)
    if common and all(run["measures"] for run in runs):
        parts += [_plane(runs), _by_prompt(runs, common), _gallery(runs, folders, common)]
    parts += [text_section(runs), _settings(runs, folders)]
    return page(f"{' | '.join(run['label'] for run in runs)}: comparison", "\n".join(parts))


def _head(runs: Sequence[Mapping[str, Any]]) -> str:
    names = "".join(
        f"<li>{_key(i)}<b>{_letter(i)}</b> &nbsp;{escape(run['label'])}</li>"
        for i, run in enumerate(runs)
    )
    return (
        '<p class="eyebrow">mlm_plugin comparison</p>\n'
        f"<h1>{len(runs)} runs side by side</h1>\n"
        f'<ul style="list-style:none;margin:18px 0 0;padding:0">{names}</ul>'
    )


def _table(runs: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th class="n">{_key(i)}{_letter(i)}</th>' for i in range(len(runs)))
    lines = []
    for name, measure in measures_of(runs).items():
        values = [value_of(run, name) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        alike = not measure.better or len({shown(value, measure) for value in known}) == 1
        best = max(known, key=lambda value: measure.better * value)
        cells = []
        for i, value in enumerate(values):
            change = differences[i - 1].get(name) if i else None
            emphasis = " best" if value is not None and value == best and not alike else ""
            cells.append(
                f'<td class="n{emphasis}">{shown(value, measure)}{_change(change, measure)}</td>'
            )
        arrow = {1: " ↑", -1: " ↓", 0: ""}[measure.better]
        lines.append(
            f'<tr><td>{escape(measure.title)}{arrow}<span class="delta">'
            f"{escape(measure.meaning)}</span></td>{''.join(cells)}</tr>"
        )
    body = (
        f'<div class="scroll"><table><thead><tr><th>Measure</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    lead = (
        "Below a value: its difference to A over the prompts of both, with the 95 % interval and "
        "the chance of a difference as large if the runs were alike (sign flips). Several measures "
        "are tested at once, so take one small p with care."
    )
    if reason := _unlike_text_encoders(runs):
        lead += f" {reason[0].upper()}{reason[1:]}."
    return section("Measures", body, lead=lead)


def _change(change: Mapping[str, Any] | None, measure) -> str:
    if change is None:
        return ""
    sign = "+" if change["mean"] >= 0 else ""
    text = f"{sign}{shown(change['mean'], measure)}"
    if change["interval"] is not None:
        text += f" ± {shown(change['interval'], measure)}"
    if change["p"] is not None:
        text += f", p {'< 0.001' if change['p'] < 0.001 else format(change['p'], '.3f')}"
    return f'<span class="delta">{text}</span>'


def _common_prompts(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of the prompts that all runs have, one list per prompt in the order of the runs."""
    tables = [{row["template"]: row for row in run["prompts"]} for run in runs]
    return [
        [rows[template] for rows in tables]
        for template in tables[0]
        if all(template in rows for rows in tables)
    ]


def _plane(runs: Sequence[Mapping[str, Any]]) -> str:
    axes = axes_of(runs)
    if axes is None:
        return ""
    points = []
    for i, run in enumerate(runs):
        x, y = (run["measures"][name] for name in axes)
        points.append(
            Point(
                x["mean"],
                y["mean"],
                run["label"],
                series=i,
                label=_letter(i),
                x_interval=x["interval"],
                y_interval=y["interval"],
            )  # fmt: skip
        )
        points += [
            Point(*place, row["prompt"], i, faint=True)
            for row in run["prompts"]
            if (place := place_of(row, axes))
        ]
    chart = scatter_chart(points, x_title=axis_title(axes[0]), y_title=axis_title(axes[1]))
    body = (
        f"<figure>{chart}<figcaption>Large dots: means with 95 % intervals over prompts. Small "
        "dots: single prompts. Better is up and to the right.</figcaption></figure>"
    )
    return section("Fidelity and likeness", body)


def _by_prompt(
    runs: Sequence[Mapping[str, Any]], common: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
    names = [f"{_letter(i)}, {run['label']}" for i, run in enumerate(runs)]
    axes = axes_of(runs)
    measure = axes[0] if axes else "clip_t"
    rows = [(row[0]["text"], [entry["scores"].get(measure) for entry in row]) for row in common]
    if not any(value is not None for _, values in rows for value in values):
        return ""
    chart = dot_chart(rows, title=IMAGE_MEASURES[measure].title, names=names)
    keys = " &nbsp; ".join(f"{_key(i)}{escape(name)}" for i, name in enumerate(names))
    return section("Prompt by prompt", f"<figure>{chart}<figcaption>{keys}</figcaption></figure>")


def _gallery(
    runs: Sequence[Mapping[str, Any]],
    folders: Sequence[Path],
    common: Sequence[Sequence[Mapping[str, Any]]],
) -> str:
    figures = []
    for number, rows in enumerate(common, start=1):
        columns = []
        for i, row in enumerate(rows):
            images = [
                picture(folders[i] / entry["file"], alt=f"{_letter(i)}: {row['prompt']}")
                for entry in row["pictures"][:MAX_PICTURES]
            ]
            columns.append(
                f'<div><div class="head"><span>{_key(i)}{_letter(i)}</span>'
                f"{scores_line(row['scores'])}</div>{picture_grid(images, at_least=1)}</div>"
            )
        figures.append(
            f'<div class="prompt"><header><span class="number">{number}</span>'
            f'<span class="text">{marked_prompt(rows[0])}</span></header>'
            f'<div class="runs">{"".join(columns)}</div></div>'
        )
    return section("Pictures", "".join(figures), lead=_how_pictures_correspond(runs))


def _how_pictures_correspond(runs: Sequence[Mapping[str, Any]]) -> str:
    if len({run["settings"]["seed"] for run in runs}) > 1:
        return "The runs have different seeds, so pictures do not correspond."
    if len({run["model"]["resolution"] for run in runs}) > 1:
        return "The runs drew at different sizes, so pictures do not correspond."
    return "Pictures in one place come from the same noise."


def _settings(runs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> str:
    """What differs between the runs, then what is the same."""
    names = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    values = {name: [str(run["settings"].get(name)) for run in runs] for name in names}
    differing = {name: row for name, row in values.items() if len(set(row)) > 1}
    head = "".join(f"<th>{_key(i)}{_letter(i)}</th>" for i in range(len(runs)))
    lines = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>"
        for name, row in {"folder": [str(f) for f in folders], **differing}.items()
    )
    same = [
        (f"--{name}", row[0])
        for name, row in values.items()
        if name not in differing and row[0] not in ("None", "")
    ]
    body = (
        f'<h3>Different</h3><div class="scroll"><table class="facts"><thead><tr><th></th>{head}'
        f"</tr></thead><tbody>{lines}</tbody></table></div><h3>The same in all</h3>{table(same)}"
        f"<h3>How it was measured</h3>{table(list(runs[0]['judges'].items()))}"
        f"<h3>Versions, of A</h3>{table(list(runs[0]['versions'].items()))}"
    )
    return section("Settings", body)


def _key(index: int) -> str:
    return f'<span class="key s{index % 6}"></span>'


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26)
