"""Charts as SVG elements, drawn by matplotlib: numbers in, markup out.

Knows no measures and no files.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

__all__ = ["Bar", "Line", "Point", "bar_chart", "dot_chart", "line_chart", "scatter_chart"]

STYLE = Path(__file__).with_name("charts.mplstyle")
SOFT, RULE = "#63636a", "#e3e0d9"  # as in the style sheet
MAX_LABEL = 52  # characters
MAX_POINTS = 400  # of a line
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Point(NamedTuple):
    """A dot in a scatter chart.

    Attributes:
        x: horizontal position.
        y: vertical position.
        title: tooltip.
        series: number of its colour.
        label: printed beside it.
        x_interval: half width of a horizontal error bar.
        y_interval: half height of a vertical error bar.
        faint: whether it is small and pale.
        curve: within a series, dots of the same name are joined.
    """

    x: float
    y: float
    title: str
    series: int = 0
    label: str = ""
    x_interval: float | None = None
    y_interval: float | None = None
    faint: bool = False
    curve: str = ""


class Line(NamedTuple):
    """A dashed horizontal line across a scatter chart."""

    y: float
    label: str


class Bar(NamedTuple):
    """A bar that starts at 0, with a text at its end."""

    label: str
    value: float
    text: str
    series: int = 0


@matplotlib.rc_context(fname=STYLE)
def scatter_chart(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    lines: Sequence[Line] = (),
    joined: bool = False,
) -> Markup:
    """A scatter plot; ``joined`` connects the dots of each curve in order, faint ones thinly."""
    chart = _Chart()
    chart.axes.set(xlabel=x_title, ylabel=y_title)
    for line in lines:
        chart.axes.axhline(line.y, color=SOFT, linewidth=0.8, linestyle=(0, (4, 4)))
        across = chart.axes.get_yaxis_transform()
        chart.text(line.label, (1, line.y), (-4, 3), xycoords=across, ha="right", color=SOFT)
    for series, curve in dict.fromkeys((p.series, p.curve) for p in points) if joined else ():
        members = [point for point in points if (point.series, point.curve) == (series, curve)]
        xy = zip(*[(point.x, point.y) for point in members], strict=True)
        is_thin = all(point.faint for point in members)
        style = {"alpha": 0.35, "linewidth": 0.7} if is_thin else {"alpha": 0.7}
        chart.mark("curve", *xy, color=f"C{series}", title=curve, **style)
    for point in sorted(points, key=lambda point: not point.faint):
        x, y, title, series, label, x_interval, y_interval, faint, _ = point
        halves = y_interval, x_interval
        chart.axes.errorbar(x, y, *halves, fmt="none", ecolor=f"C{series}", alpha=0.7)
        chart.dot(x, y, series, title, **({"markersize": 5, "alpha": 0.35} if faint else {}))
        chart.text(label, (x, y), (4, 4))
    return chart.svg(f"{y_title} against {x_title}")


@matplotlib.rc_context(fname=STYLE)
def line_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, x_title: str, y_title: str
) -> Markup:
    """Noisy curves ``(x, y)`` by name: raw and pale, and a running mean over a tenth on top.

    Long curves are thinned out to ``MAX_POINTS``.
    """
    chart = _Chart()
    chart.axes.set(xlabel=x_title, ylabel=y_title)
    for series, (name, points) in enumerate(curves.items()):
        xs, ys = (list(values) for values in zip(*points, strict=True))
        smooth = _running_mean(ys, window=max(1, len(ys) // 10))
        step = max(1, len(xs) // MAX_POINTS)
        color = f"C{series}"
        chart.mark("raw", xs[::step], ys[::step], title=name, color=color, alpha=0.3, lw=0.7)
        chart.mark("curve", xs[::step], smooth[::step], title=name, color=color)
        chart.text(name, (xs[-1], smooth[-1]), (-2, 5), ha="right", color=color)
    return chart.svg(f"{y_title} by {x_title}")


def _running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Mean of the last ``window`` values at each of them."""
    sums = [0.0, *accumulate(values)]
    return [
        (sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(values) + 1)
    ]


@matplotlib.rc_context(fname=STYLE)
def bar_chart(bars: Sequence[Bar], *, title: str) -> Markup:
    """Horizontal bars on a common scale from 0; negative values have no bar."""
    chart = _Chart(rows=[bar.label for bar in bars])
    chart.axes.grid(visible=False)
    chart.axes.set_xticks([])
    chart.axes.set_xlim(0, max(1e-12, *(bar.value for bar in bars)))
    for row, bar in enumerate(bars):
        length = max(0.0, bar.value)
        chart.axes.barh(row, length, height=0.66, color=f"C{bar.series}")
        chart.text(bar.text, (length, row), (6, 0), va="center")
    return chart.svg(title)


@matplotlib.rc_context(fname=STYLE)
def dot_chart(
    rows: Sequence[tuple[str, Sequence[float | None]]], *, title: str, names: Sequence[str]
) -> Markup:
    """One row per label with one dot per series, joined by a line.

    Args:
        rows: label and a value for each series.
        title: title of the axis.
        names: names of the series, shown as tooltips.
    """
    chart = _Chart(rows=[label for label, _ in rows])
    chart.axes.grid(visible=False, axis="y")
    chart.axes.set_xlabel(title)
    for row, (_, values) in enumerate(rows):
        known = {series: value for series, value in enumerate(values) if value is not None}
        if known:
            chart.axes.hlines(row, min(known.values()), max(known.values()), color=RULE, lw=2.4)
        for series, value in known.items():
            chart.dot(value, row, series, f"{names[series]}: {value:.3f}")
    return chart.svg(title)


class _Chart:
    """One plot without pyplot's global state; with ``rows``, one labelled row each."""

    def __init__(self, rows: Sequence[str] = ()):
        self.figure = Figure()
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.groups: dict[str, str] = {}
        if rows:
            self.figure.set_figheight(0.27 * len(rows))
            labels = [text if len(text) <= MAX_LABEL else f"{text[:51]}…" for text in rows]
            self.axes.set_yticks(range(len(rows)), labels, color=matplotlib.rcParams["text.color"])
            self.axes.set_ylim(len(rows) - 0.5, -0.5)

    def mark(self, kind: str, *values: Any, title: str = "", **style: Any) -> None:
        """Plot a curve or dot as an SVG group of the class ``kind``, with a title."""
        name = f"{kind}-{len(self.groups)}"
        self.groups[name] = Markup('<g class="{}"><title>{}</title>').format(kind, title)
        self.axes.plot(*values, gid=name, **style)

    def dot(self, x: float, y: float, series: int, title: str, **style: Any) -> None:
        self.mark("dot", x, y, "o", title=title, color=f"C{series}", zorder=3, **style)

    def text(self, text: str, xy: tuple[float, float], offset: tuple[int, int], **style) -> None:
        style = {"xycoords": "data", **style}
        self.axes.annotate(text, xy, offset, textcoords="offset points", **style)

    def svg(self, title: str) -> Markup:
        """The SVG element, without ids, which would not be unique in a page."""
        for artist in self.figure.findobj():
            artist.set_clip_on(False)  # dots on an edge are not clipped
        file = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the browser has fonts for other scripts
            self.figure.savefig(file, format="svg", metadata=NO_METADATA)
        _, start, rest = file.getvalue().partition("<svg ")
        label = Markup('role="img" aria-label="{}" ').format(title)
        groups = re.compile(r'<g id="([^"]*)"(/?)>')
        body = groups.sub(lambda group: self.groups.get(group[1], f"<g{group[2]}>"), rest)
        return Markup(f"{start}{label}{body}")
