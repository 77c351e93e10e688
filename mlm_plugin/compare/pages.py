"""The pages of a comparison: the report, and the sheet for blind votes with its key."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mlm_plugin.compare.plan import Plan
from mlm_plugin.compare.summary import (
    axes_of,
    by_subject,
    differences,
    last_evaluation,
    matched_difference,
    means,
)
from mlm_plugin.compare.trials import Trial
from mlm_plugin.evaluation.charts import Point, scatter_chart
from mlm_plugin.evaluation.comparison_page import Cell, Row, measure_rows
from mlm_plugin.evaluation.page_parts import axis_title
from mlm_plugin.evaluation.rendering import letter, render
from mlm_plugin.evaluation.results import IMAGE_MEASURES
from mlm_plugin.files import atomic_path

__all__ = ["report", "summary_of", "write_blind_sheet"]

BLIND_PAGE, BLIND_KEY = "blind.html", "key.csv"
MAX_PICTURES = 400  # in the grids; fewer prompts are shown where there would be more
Record = Mapping[str, Any]


class Grid(NamedTuple):
    """Pictures of one subject.

    Attributes:
        trials: one of each arm, by its number; same seed.
        prompts: numbers of the prompts shown.
    """

    trials: dict[int, Trial]
    prompts: Sequence[int]


class Pair(NamedTuple):
    """Two pictures of the same prompt and noise, left and right."""

    left: Trial
    right: Trial
    prompt: int
    number: int


def summary_of(plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """Means of each arm at the last evaluation, and the differences of the others to the first."""
    of_arm = {arm.name: [r for r in records if r["arm"] == arm.name] for arm in plan.arms}
    arms = [name for name, found in of_arm.items() if found]
    last = {name: last_evaluation(of_arm[name]) for name in arms}
    axes = axes_of(records)
    return {
        "means": {name: means(last[name]) for name in arms},
        "differences_to_first": {name: differences(last[arms[0]], last[name]) for name in arms[1:]},
        "text_at_equal_likeness": {
            name: matched_difference(of_arm[arms[0]], of_arm[name], axes)
            for name in (arms[1:] if axes else ())
        },
    }


def report(
    plan: Plan, trials: Sequence[Trial], records: Sequence[Record], facts: Mapping[str, str]
) -> str:
    """The report as HTML.

    Args:
        plan: what is compared.
        trials: those that are done.
        records: the measures of those that are compared.
        facts: model, judges, versions and so on, shown at the end.
    """
    summary = summary_of(plan, records)
    names = list(summary["means"])
    done = {record["subject"] for record in records}
    return render(
        "arms.html",
        title=f"{' | '.join(names)}: comparison of trainings",
        names=names,
        num_subjects=len(done),
        plan=plan,
        curves=_curves(plan, records),
        curves_of_subjects=_curves(plan, records, thin=True) if len(done) > 1 else None,
        rows=_rows(summary),
        grids=_grids(plan, trials),
        options={arm.name: arm.options for arm in plan.arms},
        facts=facts,
    )


def _rows(summary: Mapping[str, Any]) -> list[Row]:
    """The table of measures, led by the text score at equal likeness."""
    runs = [
        {"measures": found, "text": {}, "text_headline": {}} for found in summary["means"].values()
    ]
    rows = measure_rows(runs, list(summary["differences_to_first"].values()))
    matched = list(summary["text_at_equal_likeness"].values())
    if any(matched):
        measure = IMAGE_MEASURES["clip_t"]._replace(
            title="Text at equal likeness",
            meaning="difference to A in text score, at the lower of both last likenesses",
        )
        cells = [Cell(None, found, False) for found in (None, *matched)]
        rows.insert(0, Row(measure, cells))
    return rows


def _curves(plan: Plan, records: Sequence[Record], *, thin: bool = False) -> Markup | None:
    """Likeness against text score: a line per arm and, if ``thin``, one per arm and subject."""
    axes = axes_of(records)
    if axes is None:
        return None
    points = []
    for series, arm in enumerate(plan.arms):
        for step in plan.evaluation_steps:
            found = [r for r in records if r["arm"] == arm.name and r["step"] == step]
            xs, ys = (by_subject(found, name) for name in axes)
            title = f"{arm.name}, step {step}"
            points += [
                Point(xs[name], ys[name], f"{title}, {name}", series, faint=True, curve=name)
                for name in (xs if thin else ())
            ]
            if xs:
                x, y = (sum(values.values()) / len(values) for values in (xs, ys))
                label = letter(series) if step == plan.evaluation_steps[-1] else ""
                points.append(Point(x, y, title, series, label=label))
    x_title, y_title = map(axis_title, axes)
    return scatter_chart(points, x_title=x_title, y_title=y_title, joined=True)


def _grids(plan: Plan, trials: Sequence[Trial]) -> list[Grid]:
    """One per subject with the first seed; as many prompts as fit, evenly chosen."""
    numbers = {arm.name: number for number, arm in enumerate(plan.arms)}
    by_name: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        if trial.seed == plan.seeds[0]:
            by_name.setdefault(trial.subject.name, {})[numbers[trial.arm]] = trial
    room = max(1, MAX_PICTURES // (max(1, len(by_name)) * len(plan.arms)))
    grids = []
    for found in by_name.values():
        num_prompts = len(next(iter(found.values())).prompts)
        num_shown = min(room, num_prompts)
        chosen = [i * num_prompts // num_shown for i in range(num_shown)]
        grids.append(Grid(dict(sorted(found.items())), chosen))
    return grids


# --- the blind sheet ------------------------------------------------------------------------


def write_blind_sheet(folder: Path, plan: Plan, trials: Sequence[Trial]) -> None:
    """Write pairs of the first arm and another in random order, and the key to them.

    The pairs are the same at every call.
    """
    pairs = _pairs(plan, trials)
    step = plan.evaluation_steps[-1]
    page = render(
        "blind.html",
        title="Which picture is better?",
        pairs=[
            (pair.left, [trial.picture(step, pair.prompt, pair.number) for trial in pair[:2]])
            for pair in pairs
        ],
        prompts=[pair.left.prompts[pair.prompt].text for pair in pairs],
    )
    with atomic_path(folder / BLIND_PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_path(folder / BLIND_KEY) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["pair", "A", "B", "subject", "seed", "prompt", "A_file", "B_file"])
            for number, pair in enumerate(pairs, start=1):
                files = [trial.picture(step, pair.prompt, pair.number) for trial in pair[:2]]
                names = [file.relative_to(folder).as_posix() for file in files]
                left, right = pair[:2]
                facts = [left.subject.name, left.seed, left.prompts[pair.prompt].prompt]
                writer.writerow([number, left.arm, right.arm, *facts, *names])


def _pairs(plan: Plan, trials: Sequence[Trial]) -> list[Pair]:
    """As many of each arm as of the others, with subjects, seeds and prompts mixed."""
    rng = random.Random(f"compare/blind/{plan.seeds}/{plan.evaluation_steps}")
    of_run = {(trial.arm, trial.subject.name, trial.seed): trial for trial in trials}
    first, *others = (arm.name for arm in plan.arms)
    by_arm = []
    for other in others:
        found = [
            Pair(trial, of_run[other, name, seed], prompt, number)
            for (arm, name, seed), trial in of_run.items()
            if arm == first and (other, name, seed) in of_run
            for prompt in range(len(trial.prompts))
            for number in range(plan.pictures_per_prompt)
        ]
        share = -(-plan.blind_pairs // len(others))
        by_arm += rng.sample(found, min(share, len(found)))
    rng.shuffle(by_arm)
    return [
        pair if rng.random() < 0.5 else pair._replace(left=pair.right, right=pair.left)
        for pair in by_arm[: plan.blind_pairs]
    ]
