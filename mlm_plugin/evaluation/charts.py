"""Charts as SVG text: numbers in, one element out, coloured by the page's style sheet.

Knows no measures and no files. Series are numbered from 0 and take the page's colours ``s0``,
``s1``, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Bar", "Line", "Point", "bar_chart", "dot_chart", "nice_ticks", "scatter_chart"]

NUM_SERIES = 6  # colours of the page; further series begin anew
WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 14, 48
ROW = 30  # pixels of a bar or of a row of dots
CHARACTER = 6.9  # width of one, about, at the labels' size


class Point(NamedTuple):
    """A dot of a scatter chart; half widths of its intervals draw a cross, a label a text."""

    x: float
    y: float
    title: str
    series: int = 0
    label: str = ""
    x_interval: float | None = None
    y_interval: float | None = None
    faint: bool = False


class Line(NamedTuple):
    """A dashed line at a height of a scatter chart."""

    y: float
    label: str


class Bar(NamedTuple):
    """A bar from 0, with the text at its end."""

    label: str
    value: float
    text: str
    series: int = 0


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below ``low`` to above ``high``."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def scatter_chart(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    lines: Sequence[Line] = (),
    joined: bool = False,
) -> str:
    """Dots over two round axes; hovering a dot shows its title.

    ``joined`` draws a way through the dots of each series, in their order.
    """
    x_ticks = nice_ticks(*_extent([(p.x, p.x_interval) for p in points]))
    heights = [(p.y, p.y_interval) for p in points] + [(line.y, None) for line in lines]
    y_ticks = nice_ticks(*_extent(heights))

    def x_of(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(_line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick), "grid"))
        parts.append(_text(LEFT - 10, y_of(tick) + 4, _number(tick, y_ticks), "tick", "end"))
    for tick in x_ticks:
        parts.append(_line(x_of(tick), TOP, x_of(tick), HEIGHT - BOTTOM, "grid"))
        parts.append(
            _text(x_of(tick), HEIGHT - BOTTOM + 18, _number(tick, x_ticks), "tick", "middle")
        )
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "axis", "middle"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 '
        f'{(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)">{escape(y_title)}</text>'
    )
    for line in lines:
        parts.append(_line(LEFT, y_of(line.y), WIDTH - RIGHT, y_of(line.y), "reference"))
        parts.append(_text(WIDTH - RIGHT - 6, y_of(line.y) - 6, line.label, "tick", "end"))
    for series in dict.fromkeys(point.series for point in points) if joined else ():
        way = " ".join(
            f"{x_of(point.x):.1f},{y_of(point.y):.1f}" for point in points if point.series == series
        )
        parts.append(
            f'<polyline class="interval {_color(series)}" style="fill:none" points="{way}"/>'
        )
    for point in sorted(points, key=lambda p: not p.faint):
        x, y, color = x_of(point.x), y_of(point.y), _color(point.series)
        if point.x_interval is not None:
            ends = x_of(point.x - point.x_interval), x_of(point.x + point.x_interval)
            parts.append(_line(ends[0], y, ends[1], y, f"interval {color}"))
        if point.y_interval is not None:
            ends = y_of(point.y - point.y_interval), y_of(point.y + point.y_interval)
            parts.append(_line(x, ends[0], x, ends[1], f"interval {color}"))
        radius = 3 if point.faint else 5
        classes = f"dot {color}{' faint' if point.faint else ''}"
        parts.append(
            f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(point.title)}</title></circle>"
        )
        if point.label:
            parts.append(_text(x + radius + 3, y - radius + 1, point.label, "label"))
    return _svg(WIDTH, HEIGHT, parts, f"{y_title} against {x_title}")


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars on a common scale from 0; negative values have no bar."""
    left = 16 + CHARACTER * max(len(bar.label) for bar in bars)
    right = 16 + CHARACTER * max(len(bar.text) for bar in bars)
    top = max(max(bar.value for bar in bars), 1e-12)
    parts = []
    for row, bar in enumerate(bars):
        y = row * ROW
        length = max(0.0, bar.value) / top * (WIDTH - left - right)
        parts.append(_text(left - 12, y + 20, bar.label, "label", "end"))
        parts.append(
            f'<rect class="bar {_color(bar.series)}" x="{left:.1f}" y="{y + 7}" '
            f'width="{max(length, 1):.1f}" height="{ROW - 12}" rx="2"/>'
        )
        parts.append(_text(left + length + 8, y + 20, bar.text, "label"))
    return _svg(WIDTH, ROW * len(bars) + 4, parts, title)


def dot_chart(
    rows: Sequence[tuple[str, Sequence[float | None]]], *, title: str, names: Sequence[str]
) -> str:
    """One row per text, one dot per series, joined by a line: who is ahead where.

    Args:
        rows: label and a value for each series.
        title: of the axis.
        names: of the series, for hovering.
    """
    known = [value for _, values in rows for value in values if value is not None]
    ticks = nice_ticks(min(known), max(known))
    longest = max(len(label) for label, _ in rows)
    left = 18 + CHARACTER * min(longest, 52)
    height = ROW * 0.8

    def x_of(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH + 120 - left - RIGHT)

    bottom = height * len(rows) + 6
    parts = []
    for tick in ticks:
        parts.append(_line(x_of(tick), 0, x_of(tick), bottom, "grid"))
        parts.append(_text(x_of(tick), bottom + 18, _number(tick, ticks), "tick", "middle"))
    parts.append(_text((left + WIDTH + 120 - RIGHT) / 2, bottom + 38, title, "axis", "middle"))
    for row, (label, values) in enumerate(rows):
        y = height * (row + 0.5) + 3
        short = label if len(label) <= 52 else f"{label[:51]}…"
        parts.append(_text(left - 14, y + 4, short, "label", "end"))
        here = [value for value in values if value is not None]
        if here:
            parts.append(_line(x_of(min(here)), y, x_of(max(here)), y, "span"))
        for series, value in enumerate(values):
            if value is not None:
                parts.append(
                    f'<circle class="dot {_color(series)}" cx="{x_of(value):.1f}" cy="{y:.1f}" '
                    f'r="5"><title>{escape(f"{names[series]}: {value:.3f}")}</title></circle>'
                )
    return _svg(WIDTH + 120, bottom + 44, parts, title)


def _extent(values: Sequence[tuple[float, float | None]]) -> tuple[float, float]:
    low = min(value - (half or 0) for value, half in values)
    high = max(value + (half or 0) for value, half in values)
    return low, high


def _number(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}"


def _color(series: int) -> str:
    return f"s{series % NUM_SERIES}"


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, name: str, anchor: str = "start") -> str:
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
    )
