"""Charts are safe to put into a page: escaped, the same every time, and free of outside files."""

import re
import warnings

import pytest

from mlm_plugin.evaluation.charts import Bar, Line, Point, bar_chart, dot_chart, scatter_chart

NASTY = "<script>alert('$x$')</script> & \"quoted\" \N{HIRAGANA LETTER A}"
ESCAPED = "&lt;script&gt;alert("
POINTS = [
    Point(0.3, 0.4, NASTY, label=NASTY, x_interval=0.05, y_interval=0.02),
    Point(0.5, 0.6, "second", series=1),
    Point(0.5, 0.6, "third", series=1, faint=True),
]


def scatter():
    lines = [Line(0.7, NASTY)]
    return scatter_chart(POINTS, x_title=NASTY, y_title=NASTY, lines=lines, joined=True)


def bars():
    return bar_chart([Bar(NASTY, 0.5, NASTY), Bar("negative", -0.1, "", series=1)], title=NASTY)


def dots():
    rows = [(NASTY[:50], [0.1, 0.2]), ("half", [None, 0.5]), ("empty", [None, None])]
    return dot_chart(rows, title=NASTY, names=["A", NASTY])


@pytest.mark.parametrize("chart", [scatter, bars, dots])
def test_texts_are_escaped_and_nothing_comes_from_outside(chart, page_of, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = chart()
    (tmp_path / "chart.html").write_text(svg, encoding="utf-8")
    page = page_of(tmp_path / "chart.html")  # tags close; no script, url() or @import
    assert page.tags[0] == "svg"
    assert NASTY in page.text or NASTY[:50] in page.text
    assert ESCAPED in svg
    assert all(link.startswith("#") for link in re.findall(r'xlink:href="([^"]*)"', svg))
    assert len(re.findall(r'<g id="', svg)) == 0, "ids of one chart would be those of another"


@pytest.mark.parametrize("chart", [scatter, bars, dots])
def test_the_same_numbers_give_the_same_file(chart):
    assert chart() == chart()


def test_every_mark_has_its_title():
    svg = scatter()
    assert svg.count('<g class="dot"><title>') == 3
    assert svg.count('<g class="curve">') == 2
    assert "<title>second</title>" in svg
    assert "0.100" in dots()


def test_dots_of_a_series_are_joined_curve_by_curve():
    mean = [Point(x, 0.5, "") for x in (0.1, 0.2)]
    thin = [Point(x, y, "", faint=True, curve=f"dog {y}") for y in (0.3, 0.4) for x in (0.1, 0.2)]
    svg = scatter_chart([*mean, *thin], x_title="x", y_title="y", joined=True)
    assert svg.count('<g class="curve">') == 3
    assert svg.count("stroke-width: 0.7") == 2
    assert "<title>dog 0.3</title>" in svg


def test_a_single_point_has_axes():
    assert "1.0" in scatter_chart([Point(1.0, 1.0, "only")], x_title="x", y_title="y")
