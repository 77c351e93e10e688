"""How the cost of the MLM term grows: prompts per step, their length, resolution, text encoders.

    python -m research.benchmarks.cost_curves --shape sd15 --tokenizer FOLDER --output FOLDER
    python -m research.benchmarks.cost_curves --shape sdxl --resolutions 512 768 1024 ...

One setting changes along each curve, the others stay at their first value. Every point is a run of
``step_time.py``, with steps with and without the term in turn. The output folder gets
``curves.json``, ``curves.md`` (a table) and ``curves.html`` (plots). Existing points are not
measured again, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.evaluation.charts import Point, scatter_chart
from mlm_plugin.evaluation.rendering import Figure, Section, Table, sections_page
from mlm_plugin.files import atomic_path

HERE = Path(__file__).resolve().parent
SHAPES = ("tiny", "sd15", "tiny_sdxl", "sdxl")
HEADINGS = ("", "", "time", "processor time", "memory", "s on", "s off")


class Axis(NamedTuple):
    """The x axis of a curve: an option of ``step_time.py``."""

    option: str
    title: str
    values: list[int]  # the first is used for the other curves


def axes_of(args: argparse.Namespace) -> list[Axis]:
    """The requested curves; an axis with one value is not a curve, but a fixed setting."""
    axes = [
        Axis("mlm_batch_size", "MLM prompts per step", args.mlm_batch_sizes),
        Axis("mlm_prompt_tokens", "tokens of a prompt", args.prompt_tokens),
        Axis("resolution", "resolution, pixels", args.resolutions),
    ]
    if args.shape.endswith("sdxl"):
        axes.append(Axis("num_text_encoders", "text encoders", args.text_encoders))
    return axes


def points_of(axes: Sequence[Axis]) -> Iterator[tuple[Axis, dict[str, int]]]:
    """Every axis with the settings of its points, in the order of the values."""
    base = {axis.option: axis.values[0] for axis in axes}
    for axis in axes:
        if len(axis.values) > 1:
            for value in sorted(axis.values):
                yield axis, base | {axis.option: value}


def measure(settings: Mapping[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """One point: from its file, or by running the benchmark."""
    name = "-".join(f"{option}_{value}" for option, value in settings.items())
    path = args.output / "points" / f"{args.shape}-{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = [f"--{option}={value}" for option, value in settings.items()]
        command = [HERE / "step_time.py", "--shape", args.shape, "--output", path, *flags]
        command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        subprocess.run(
            [sys.executable, *map(str, command), *args.more],
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    return json.loads(path.read_text())


def curve_rows(curves: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each point: what the term adds, and the seconds with and without."""
    rows = []
    for curve in curves:
        for point in curve["points"]:
            seconds = point["median_cpu_seconds"]
            rows.append(
                (
                    curve["title"],
                    str(point["x"]),
                    *(percent_added(point[key]) for key in RATIOS),
                    *(f"{seconds[name]:.2f}" for name in ("on", "off")),
                )
            )
    return rows


RATIOS = ("ratio_time", "ratio_cpu_time", "ratio_memory")


def percent_added(ratio: float) -> str:
    """``1.125`` as ``+12.5 %``."""
    return f"{100 * (ratio - 1):+.1f} %"


def markdown_table(curves: Sequence[Mapping[str, Any]]) -> str:
    """All curves, one line for each point."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *curve_rows(curves)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def html_page(result: Mapping[str, Any]) -> str:
    """One plot for each curve, then the settings."""
    sections = [Section(curve["title"], plot(curve)) for curve in result["curves"]]
    facts = [(name, str(value)) for name, value in result.items() if name != "curves"]
    sections.append(Section("Settings", Table(facts)))
    return sections_page("Cost of the MLM term", sections)


def plot(curve: Mapping[str, Any]) -> Figure:
    """Time and memory that the term adds, in percent of a step without it."""
    dots, last = [], curve["points"][-1]
    names = ("processor time", "memory") if curve["on_cpu"] else ("time", "memory")
    keys = ("ratio_cpu_time" if curve["on_cpu"] else "ratio_time", "ratio_memory")
    for series, (name, key) in enumerate(zip(names, keys, strict=True)):
        for point in curve["points"]:
            added = 100 * (point[key] - 1)
            title = f"{curve['title']} {point['x']}: {added:+.1f} % {name}"
            label = name if point is last else ""
            dots.append(Point(point["x"], added, title, series=series, label=label))
    chart = scatter_chart(dots, x_title=curve["title"], y_title="added by the term, %", joined=True)
    caption = "A step with the term against one without, medians; memory at its peak."
    return Figure(chart, caption)


def curves_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every point; shared points once."""
    curves: dict[str, dict[str, Any]] = {}
    for axis, settings in points_of(axes_of(args)):
        found = measure(settings, args)
        curve = curves.setdefault(
            axis.option,
            {
                "option": axis.option,
                "title": axis.title,
                "on_cpu": found["device"].startswith("cpu"),
                "others": {k: v for k, v in settings.items() if k != axis.option},
                "points": [],
            },
        )
        kept = ("median_seconds", "median_cpu_seconds", "peak_bytes", "mlm_tokens_per_prompt")
        is_length = (
            axis.option == "mlm_prompt_tokens"
        )  # may be more than requested, as prompts are not split
        x = round(found["mlm_tokens_per_prompt"]) if is_length else settings[axis.option]
        curve["points"].append({"x": x} | {key: found[key] for key in (*RATIOS, *kept)})
    return list(curves.values())


def parse(argv: Iterable[str]) -> argparse.Namespace:
    """Read the command line; unknown options are passed to ``step_time.py``."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Further options, such as --mixed_precision, are passed to step_time.py.",
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--tokenizer", type=Path, help="folder of the real CLIP tokenizer")
    for name, default, text in (
        ("mlm_batch_sizes", [8, 1, 2, 4, 16], "prompts per step"),
        ("prompt_tokens", [0, 24, 32, 48, 77], "minimum number of tokens per prompt; 0: as drawn"),
        ("resolutions", [512, 256, 768, 1024], "pixels"),
        ("text_encoders", [2, 1], "SDXL: both or CLIP-L alone"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs="+",
            default=default,
            help=f"{text}; the first stays where others change (default: %(default)s)",
        )
    args, args.more = parser.parse_known_args(list(argv))
    return args


def main() -> None:
    """Measure and write table, plots and numbers."""
    args = parse(sys.argv[1:])
    curves = curves_of(args)
    if not curves:
        raise SystemExit("nothing to measure: give at least one option two values")
    result = {
        "shape": args.shape,
        "command": shlex.join(["python", "-m", "research.benchmarks.cost_curves", *sys.argv[1:]]),
        "curves": curves,
    }
    for name, text in (
        ("curves.json", json.dumps(result, indent=2) + "\n"),
        ("curves.md", markdown_table(curves)),
        ("curves.html", html_page(result)),
    ):
        with atomic_path(args.output / name) as temporary:
            temporary.write_text(text)
    print(markdown_table(curves))


if __name__ == "__main__":
    main()
