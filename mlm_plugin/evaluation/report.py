"""The report of one evaluation: ``report.html`` from its results and pictures.

Every text from outside is escaped. Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlm_plugin.evaluation.charts import Bar, Line, Point, bar_chart, scatter_chart
from mlm_plugin.evaluation.page import details, page, picture, picture_grid, section, table
from mlm_plugin.evaluation.results import (
    IMAGE_MEASURES,
    Measure,
    axes_of,
    encoders_of,
    measure_key,
    measures_of,
    value_of,
)
from mlm_plugin.files import atomic_path

__all__ = [
    "REPORT_FILE",
    "axis_title",
    "marked_prompt",
    "place_of",
    "scores_line",
    "shown",
    "single_report",
    "text_section",
    "write_report",
]

REPORT_FILE = "report.html"
MAX_PHOTOS = 12
MAX_TILES = 6
TILES = ("prompt_fidelity", "identity", "clip_t", "clip_i", "dino", "dino_fg", "diversity_dino",
         "masked_accuracy", "text_collapse", "drift_everyday")  # fmt: skip
FILLERS = (("concept", "with the concept"), ("class", "with the class word"),
           ("random", "with a random word"))  # fmt: skip
ENCODER_TITLES = {
    "text_encoder": "The text encoder of Stable Diffusion 1 and 2",
    "clip_l": "clip_l, the first text encoder",
    "clip_g": "clip_g, the second text encoder",
}


def write_report(folder: Path, html: str) -> Path:
    """Write the page, all of it or nothing."""
    path = folder / REPORT_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def shown(value: float | None, measure: Measure) -> str:
    """A value as the report prints it; a dash where there is none."""
    if value is None:
        return "–"
    if measure.percent:
        return f"{100 * value:.{measure.digits}f} %"
    return f"{value:.{measure.digits}f}".replace("-", "−")


def single_report(results: Mapping[str, Any], folder: Path) -> str:
    """The page of one evaluation.

    Args:
        results: as ``results.json`` holds them.
        folder: where its pictures lie.
    """
    parts = [_head(results), _tiles(results)]
    if results["prompts"] and results["prompts"][0]["pictures"]:
        parts += [_gallery(results, folder), _table_of_prompts(results), _plane(results)]
    parts += [text_section([results]), _settings(results)]
    return page(f"{results['label']}: evaluation", "\n".join(parts))


def _head(results: Mapping[str, Any]) -> str:
    num_pictures = sum(len(row["pictures"]) for row in results["prompts"])
    facts = [
        f"{len(results['prompts'])} prompts",
        f"{num_pictures} pictures" if num_pictures else "text encoder only",
        f"seed {results['settings']['seed']}",
        results["created"],
    ]
    concept = results["concept"]
    name = f"{concept['placeholder_token']} {concept['class_token']}".strip()
    return (
        '<p class="eyebrow">mlm_plugin evaluation</p>\n'
        f"<h1>{escape(results['label'])}</h1>\n"
        f'<p class="lede">How <span class="concept">{escape(name)}</span> looks and reads on '
        f"{escape(results['settings']['pretrained_model_name_or_path'])}. "
        f"{escape(' · '.join(facts))}</p>"
    )


def _tiles(results: Mapping[str, Any]) -> str:
    tiles, measures = [], measures_of([results])
    encoders = encoders_of([results])
    names = [key for name in TILES
             for key in dict.fromkeys([name, *(measure_key(name, e) for e in encoders)])
             if key in measures]  # fmt: skip
    for name in names:
        value = value_of(results, name)
        if value is None:
            continue
        measure = measures[name]
        interval = results["measures"].get(name, {}).get("interval")
        small = f"<small>± {shown(interval, measure)}</small>" if interval is not None else ""
        arrow = {1: " ↑", -1: " ↓", 0: ""}[measure.better]
        tiles.append(
            f'<div class="tile"><div class="name">{escape(measure.title)}{arrow}</div>'
            f'<div class="value">{shown(value, measure)}{small}</div>'
            f'<div class="meaning">{escape(measure.meaning)}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles[:MAX_TILES])}</div>'


def marked_prompt(row: Mapping[str, Any]) -> str:
    """A prompt as HTML with the concept set apart."""
    before, _, after = row["template"].partition("{}")
    concept = row["prompt"][len(before) : len(row["prompt"]) - len(after)]
    if before + concept + after != row["prompt"]:  # an article was changed
        return escape(row["prompt"])
    return f'{escape(before)}<span class="concept">{escape(concept)}</span>{escape(after)}'


def _gallery(results: Mapping[str, Any], folder: Path) -> str:
    photos = results["photos"]
    strip = "".join(
        picture(Path(photo), alt="photo of the concept") for photo in photos[:MAX_PHOTOS]
    )
    figures = []
    for number, row in enumerate(results["prompts"], start=1):
        images = [picture(folder / entry["file"], alt=row["prompt"]) for entry in row["pictures"]]
        figures.append(
            f'<div class="prompt"><header><span class="number">{number}</span>'
            f'<span class="text">{marked_prompt(row)}</span>{scores_line(row["scores"])}</header>'
            f"{picture_grid(images)}</div>"
        )
    body = (
        f"<h3>The {len(photos)} photos"
        + (f" (first {MAX_PHOTOS})" if len(photos) > MAX_PHOTOS else "")
        + f'</h3><div class="strip">{strip}</div><h3>By prompt</h3>{"".join(figures)}'
    )
    return section("Pictures", body)


def place_of(row: Mapping[str, Any], axes: tuple[str, str]) -> tuple[float, float] | None:
    """Where a prompt stands on the plane of two measures; None where it lacks one."""
    x, y = (row["scores"].get(name) for name in axes)
    return None if x is None or y is None else (x, y)


def axis_title(name: str) -> str:
    """A measure as an axis calls it."""
    role = {"clip_t": " (prompt fidelity)", "dino": " (likeness)", "clip_i": " (likeness)"}
    return IMAGE_MEASURES[name].title + role.get(name, "")


def scores_line(scores: Mapping[str, float | None]) -> str:
    """The main scores of a prompt in one line."""
    shown_scores = [
        f"{escape(IMAGE_MEASURES[name].title)}<b>{shown(scores[name], IMAGE_MEASURES[name])}</b>"
        for name in ("prompt_fidelity", "identity", "clip_t", "clip_i", "dino")
        if scores.get(name) is not None
    ]
    return f'<span class="scores">{"".join(shown_scores)}</span>'


def _table_of_prompts(results: Mapping[str, Any]) -> str:
    names = [name for name in IMAGE_MEASURES if name in results["measures"]]
    rows = results["prompts"]
    spans = {name: _span([row["scores"].get(name) for row in rows]) for name in names}
    head = "".join(f'<th class="n">{escape(IMAGE_MEASURES[name].title)}</th>' for name in names)
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = "".join(_bar_cell(row["scores"].get(name), name, spans[name]) for name in names)
        lines.append(f'<tr><td class="n">{number}</td><td>{marked_prompt(row)}</td>{cells}</tr>')
    means = "".join(f'<td class="n">{_mean_cell(results, name)}</td>' for name in names)
    lines.append(f"<tr><td></td><td><b>Mean over prompts</b></td>{means}</tr>")
    body = (
        '<div class="scroll"><table><thead><tr><th class="n">#</th><th>Prompt</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    lead = "Bars run from the lowest to the highest value of a column. ± is the 95 % interval."
    return section("Per prompt", body, lead=lead)


def _mean_cell(results: Mapping[str, Any], name: str) -> str:
    entry, measure = results["measures"][name], IMAGE_MEASURES[name]
    interval = entry["interval"]
    delta = f'<span class="delta">± {shown(interval, measure)}</span>' if interval else ""
    return f"<b>{shown(entry['mean'], measure)}</b>{delta}"


def _span(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known), max(known)


def _bar_cell(value: float | None, name: str, span: tuple[float, float]) -> str:
    text = shown(value, IMAGE_MEASURES[name])
    if value is None or span[1] <= span[0]:
        return f'<td class="n">{text}</td>'
    share = (value - span[0]) / (span[1] - span[0])
    return f'<td class="n bar" style="--v:{share:.3f}">{text}</td>'


def _plane(results: Mapping[str, Any]) -> str:
    axes = axes_of([results])
    if axes is None:
        return ""
    points = [
        Point(*place, f"{number}. {row['prompt']}", label=str(number))
        for number, row in enumerate(results["prompts"], start=1)
        if (place := place_of(row, axes))
    ]
    ceiling = results["references"].get(axes[1])
    lines = [Line(ceiling, "photos among themselves")] if ceiling is not None else []
    titles = [axis_title(name) for name in axes]
    chart = scatter_chart(points, x_title=titles[0], y_title=titles[1], lines=lines)
    body = (
        f"<figure>{chart}<figcaption>One dot per prompt, numbered as above. High up on the left: "
        "the concept is there, but the prompt is not. Low on the right: the scene is there, but it "
        "is another one's.</figcaption></figure>"
    )
    return section("Fidelity and likeness", body)


def text_section(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the text encoders say, of one or several evaluations, one encoder after the other."""
    encoders = encoders_of(runs)
    parts = []
    for encoder in encoders:
        if len(encoders) > 1:
            parts.append(f"<h3>{escape(ENCODER_TITLES[encoder])}</h3>")
        texts = {i: run["text"][encoder] for i, run in enumerate(runs) if encoder in run["text"]}
        parts += [_masked_words(texts, len(runs)), _text_table(texts, len(runs))]
    title = "In the text encoder" if len(encoders) == 1 else "In the text encoders"
    lead = "No picture is needed for these."
    if len(encoders) > 1:
        lead += " Encoders differ in width and in the layer read: compare runs, not encoders."
    return section(title, "".join(parts), lead=lead)


def _masked_words(texts: Mapping[int, Mapping[str, Any]], num_runs: int) -> str:
    """Bars of one encoder in the runs that have it; nothing where no words were hidden."""
    bars = [
        Bar(
            label if num_runs == 1 else f"{_letter(i)}, {label}",
            text["masked_words"][key]["accuracy"],
            f"{100 * text['masked_words'][key]['accuracy']:.1f} %   "
            f"{text['masked_words'][key]['loss']:.2f} nats",
            series=i,
        )
        for key, label in FILLERS
        for i, text in texts.items()
        if text["masked_words"]
    ]
    if not bars:
        return ""
    chart = bar_chart(bars, title="hidden words named rightly")
    return (
        f"<h3>Hidden words named rightly</h3><figure>{chart}<figcaption>Words of the prompts "
        "are hidden and told from the text encoder's states. With the class word alone is the "
        "ceiling; a concept that drowns the prompt may fall below a random word."
        "</figcaption></figure>"
    )


def _text_table(texts: Mapping[int, Mapping[str, Any]], num_runs: int) -> str:
    head = "".join(f'<th class="n">{_run_name(i, num_runs)}</th>' for i in texts)
    lines = "".join(
        f"<tr><td>{escape(name)}<span class=delta>{escape(meaning)}</span></td>"
        + "".join(f'<td class="n">{value}</td>' for value in values)
        + "</tr>"
        for name, meaning, values in _text_rows(list(texts.values()))
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>Measure</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


TEXT_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("embedding", "norm", "Norm of the concept's input vectors", "mean length"),
    ("embedding", "class_norm", "Norm of the class word's", "the same of the class word"),
    ("embedding", "table_norm", "Norm of an average token", "mean over the whole table"),
    ("embedding", "cosine", "Cosine to the class word's input", "1: the same direction"),
    ("distances", "inter", "Distance of prompts to the class's",
     "1 − cos of the pooled states, concept against class word"),
    ("distances", "intra", "Distance among prompts with the concept", "1 − cos, all pairs"),
    ("distances", "intra_class", "Distance among prompts with the class word", "the same"),
    ("distances", "collapse", "Prompt collapse", "1 − the ratio of the two above"),
    ("drift", "everyday", "Drift on everyday prompts", "1 − cos to the base model's states"),
    ("drift", "class", "Drift on prompts with the class word", "1 − cos to the base model's"),
    ("projected", "inter", "Pooled text: distance to the class's",
     "the same of the one vector that SDXL also reads"),
    ("projected", "collapse", "Pooled text: prompt collapse", "1 − the ratio, concept to class"),
    ("projected", "drift", "Pooled text: drift", "on everyday prompts, to the base model's"),
)  # fmt: skip


def _text_rows(texts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    rows = []
    for group, key, name, meaning in TEXT_ROWS:
        values = [(text[group] or {}).get(key) for text in texts]
        if any(value is not None for value in values):
            rows.append((name, meaning, ["–" if v is None else _signed(v) for v in values]))
    return rows


def _signed(value: float) -> str:
    return f"{value:.4f}".replace("-", "−")


def _run_name(index: int, num_runs: int) -> str:
    if num_runs == 1:
        return "Value"
    return f'<span class="key s{index % 6}"></span>{_letter(index)}'


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26)


def _settings(results: Mapping[str, Any]) -> str:
    chosen = [
        (f"--{name}", str(value))
        for name, value in results["settings"].items()
        if value not in (None, "")
    ]
    files = [(name, f"{file['path']} (sha256 {file['sha256'][:16]})")
             for name, file in results["files"].items()]  # fmt: skip
    judges = list(results["judges"].items())
    seeds = "".join(
        f"<tr><td>{escape(entry['file'])}</td><td class=n>{entry['seed']}</td></tr>"
        for row in results["prompts"]
        for entry in row["pictures"]
    )
    parts = [
        "<h3>Options</h3>",
        table(chosen),
        *(["<h3>Files judged</h3>", table(files)] if files else []),
        "<h3>How it was measured</h3>",
        table(judges),
        "<h3>Versions</h3>",
        table(list(results["versions"].items())),
    ]
    if seeds:
        parts.append(
            details(
                "Seeds of the pictures",
                '<div class="scroll"><table><thead><tr><th>File</th><th class="n">Seed</th></tr>'
                f"</thead><tbody>{seeds}</tbody></table></div>",
            )
        )
    return section("Settings", "".join(parts))
