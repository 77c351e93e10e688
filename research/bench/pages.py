"""The tables of the pages, written from the committed records: ``python -m research.bench.pages``.

A page has a pair of markers, ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``, around every
table; what is between them is generated. Does not train anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from textwrap import indent
from typing import Any, NamedTuple

from mlm_plugin.evaluation.measures import Mean
from mlm_plugin.pocket.concepts import REPORTED
from research.bench.plan import (
    ARMS,
    CLAIMS,
    CONTROLS,
    FAMILIES,
    PLAN,
    RATES,
    RECOMMENDED,
    UNTRAINED,
    Arm,
    Claim,
    Flags,
    Trial,
    shorter,
    trials_to_report,
)
from research.bench.records import Record, Records, key_of
from research.bench.search import Search, first_search, search
from research.bench.summary import (
    Comparison,
    Curve,
    compare,
    curves_of,
    holm,
    num_before_first_evaluation,
)
from research.bench.text_score import (
    RECORD,
    SETTINGS,
    STEPS,
    correlations,
    intervals,
    read_evaluations,
)

__all__ = ["PAGES", "blocks", "rewritten"]

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs" / "experiments.md", ROOT / "README.md")
NOTHING = "No results of the current plan yet.\n"
SEARCHED_OPTIONS = (
    "unet_lr", "learning_rate", "text_encoder_lr", "learning_rate_te", "embedding_lr", "weight",
)  # fmt: skip
"""What searches choose, in the order of the tables."""


class Result(NamedTuple):
    """What is reported of an arm: setting, records, and the curve of every concept."""

    setting: Flags
    records: list[Record]
    curves: dict[str, Curve]


def main() -> int:
    """Write the tables of all pages."""
    found = blocks(Records())
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        print(f"wrote {page}")
    return 0


def rewritten(text: str, found: Mapping[str, str]) -> str:
    """A page with its blocks replaced, indented like their markers."""
    for name, block in found.items():
        pattern = rf"^( *)<!-- bench:{name} -->\n.*?<!-- /bench:{name} -->"
        marked = f"<!-- bench:{name} -->\n\n{block}\n<!-- /bench:{name} -->"
        text = re.sub(pattern, lambda match, m=marked: indent(m, match[1]), text, flags=re.S | re.M)
    return text


def blocks(records: Records) -> dict[str, str]:
    """The generated blocks by name."""
    results = _results(records, search)
    first = _results(records, first_search)
    found = {claim: _compared(claim, results) for claim in CLAIMS}
    return {
        "tuning": _tuning_table(records),
        "edges": _edges_table(records),
        "report": _report_table(results, first, records),
        "claims": _claims_table(found),
        "first": _first_table(first),
        "settled": _settled_table(results, first, records),
        "rates": _rates_table(first, records),
        "concepts": _concepts_tables(results, found),
        "readme": _readme_table(results),
        "text_score": _text_score_tables(records),
    }


def _text_score_tables(records: Records) -> str:
    """How the scores from text alone rank files, and the means that they rank."""
    evaluations = read_evaluations(records.folder.parent / RECORD.name)
    if not evaluations:
        return NOTHING
    without_term = [one for one in evaluations if ARMS[SETTINGS[one["setting"]][0]].form == "plain"]
    ranks = [*_ranks(evaluations, ""), *_ranks(without_term, ", plain settings")]
    means = []
    for setting in SETTINGS:
        for step in STEPS:
            members = [
                one for one in evaluations if (one["setting"], one["step"]) == (setting, step)
            ]
            shares = [
                f"{100 * mean(one[key] for one in members):.0f}"
                for key in ("cross_attention", "encoder", "fidelity", "identity")
            ]
            means.append([setting, str(step), *shares])
    runs = len({(one["concept"], one["setting"]) for one in evaluations})
    tables = (
        f"{len(evaluations)} evaluations of {runs} runs. Rank correlation with prompt fidelity:\n",
        _table(["among", "keys and values", "text encoder"], ranks),
        f"Means over concepts, in percent ({_text_score_rates()}):\n",
        _table(
            ["setting", "step", "kept, keys and values", "kept, text encoder", "fidelity",
             "identity"],
            means,
        ),
    )  # fmt: skip
    return "\n".join(tables)


def _ranks(evaluations: list[dict[str, Any]], of: str) -> list[list[str]]:
    names = ("cross_attention", "encoder")
    found = [(correlations(evaluations, name), intervals(evaluations, name)) for name in names]
    return [
        [kind + of, *(f"{value[kind]:.2f} ± {half[kind]:.2f}" for value, half in found)]
        for kind in found[0][0]
    ]


def _text_score_rates() -> str:
    """What the settings were trained with."""
    found = []
    for name, (arm, setting) in SETTINGS.items():
        flags = {**ARMS[arm].flags, **setting}
        rates = f"U-Net {flags['unet_lr']}, text encoder {flags['text_encoder_lr']}"
        weight = f", weight {flags['weight']}" if "weight" in flags else ""
        found.append(f"{name}: {rates}{weight}")
    return "; ".join(found)


def _results(
    records: Records, searched: Callable[[Arm, Mapping[str, Record]], Search]
) -> dict[str, Result]:
    """By name, the arms whose search is complete and whose setting found is reported."""
    found = {}
    for name, arm in ARMS.items():
        if arm in CONTROLS and searched is not first_search:
            continue
        winner = searched(arm, records.of("tuning", name)).winner
        if winner is not None and (result := _result(arm, winner, records)) is not None:
            found[name] = result
    return found


def _result(arm: Arm, setting: Flags, records: Records, *, stage: str = "report") -> Result | None:
    """The complete report of a setting, or ``None``."""
    reported = _all_of(trials_to_report(arm, setting), records, stage=stage)
    untrained = _all_of(trials_to_report(UNTRAINED, UNTRAINED.grid[0]), records)
    if reported is None or untrained is None:
        return None
    return Result(setting, reported, curves_of(reported, untrained))


def _all_of(
    trials: Sequence[Trial], records: Records, *, stage: str = "report"
) -> list[Record] | None:
    done = records.of_reports(stage, trials[0].arm.name)
    keys = [key_of(trial) for trial in trials]
    return [done[key] for key in keys] if all(key in done for key in keys) else None


def _compared(claim: Claim, results: Mapping[str, Result]) -> Comparison | None:
    if claim.ours not in results or claim.theirs not in results:
        return None
    return compare(results[claim.ours].curves, results[claim.theirs].curves)


def _tuning_table(records: Records) -> str:
    """What the searches found; where the second one found a better setting, the first one's too."""
    rows = []
    for arm in ARMS.values():
        done = records.of("tuning", arm.name)
        found, first = search(arm, done), first_search(arm, done)
        if found.winner is None:
            continue
        rows.append([arm.name, *_tuning_cells(arm, found, done)])
        if first.winner != found.winner:
            rows.append([f"{arm.name}, first search", *_tuning_cells(arm, first, done)])
    return _table(("arm", "setting found", "score", "prompt fidelity", "identity"), rows)


def _tuning_cells(arm: Arm, found: Search, done: Mapping[str, Record]) -> list[str]:
    setting, score = found.scores[0]
    best = [record for record in done.values() if record["setting"] == setting]
    return [_setting(arm, setting), f"{score:.3f}", *_last_evaluation(best)]


def _edges_table(records: Records) -> str:
    """Which searches ended at the lowest or highest value that they tried."""
    rows = []
    for arm in ARMS.values():
        found = search(arm, records.of("tuning", arm.name)).winner
        if found is None or arm in CONTROLS:
            continue
        tried = [_searched(arm, setting) for setting in arm.settings]
        winner = _searched(arm, found)
        edges = []
        for name, value in winner.items():
            values = {float(one[name]) for one in tried}
            if len(values) > 1 and float(value) in (min(values), max(values)):
                side = "lowest" if float(value) == min(values) else "highest"
                edges.append(f"{side} {name} ({value})")
        if edges:
            rows.append([arm.name, ", ".join(edges)])
    return _table(("arm", "the setting found has the"), rows)


def _report_table(
    results: Mapping[str, Result], first: Mapping[str, Result], records: Records
) -> str:
    rows = []
    ceiling = _all_of(trials_to_report(UNTRAINED, UNTRAINED.grid[1]), records)
    if ceiling is not None:
        rows.append(["untrained model, class word", "–", *_last_evaluation(ceiling), "–"])
    rows += [[name, *_report_cells(name, result, results)] for name, result in results.items()]
    rows += [
        [f"{name}, first search", *_report_cells(name, result, first)]
        for name, result in first.items()
        if name not in results or results[name].setting != first[name].setting
    ]
    rows += [
        [f"{name}, another setting", *_report_cells(name, other, results)]
        for name, other in _other_reports(results, first, records)
    ]
    headings = (
        "arm", "setting", "prompt fidelity", "identity", "Δ fidelity to plain at matched identity",
    )  # fmt: skip
    return _table(headings, rows)


def _other_reports(
    results: Mapping[str, Result], first: Mapping[str, Result], records: Records
) -> Iterator[tuple[str, Result]]:
    """Complete reports of settings that no search has found."""
    for name, arm in ARMS.items():
        found = [one[name].setting for one in (results, first) if name in one]
        for setting in arm.settings:
            if setting not in found and (other := _result(arm, setting, records)):
                yield name, other


def _report_cells(name: str, result: Result, results: Mapping[str, Result]) -> list[str]:
    plain = results.get(f"{ARMS[name].family.name} plain")
    against = None
    if plain is not None and plain is not result:
        against = compare(result.curves, plain.curves)
    difference = _points(against.matched) if against else "–"
    setting = _setting(ARMS[name], result.setting)
    return [setting, *_last_evaluation(result.records), difference]


def _claims_table(found: Mapping[Claim, Comparison | None]) -> str:
    """Holm's correction is over all claims; those without results count as p = 1."""
    corrected = holm([c.p_value if c else 1.0 for c in found.values()])
    if not any(found.values()):
        return NOTHING
    rows = []
    for (claim, comparison), p in zip(found.items(), corrected, strict=True):
        cells = ["not run", *["–"] * 6]
        if comparison is not None:
            cells = [
                _points(comparison.matched),
                f"{100 * median(comparison.by_concept.values()):+.1f}",
                f"{comparison.p_value:.4f}",
                f"{p:.4f}",
                _points(comparison.fidelity),
                _points(comparison.identity),
                _points(comparison.score),
            ]
        rows.append([claim.ours, claim.theirs, *cells])
    headings = (
        "with the term", "against", "Δ fidelity at matched identity", "median", "p",
        f"p, Holm over {len(found)}", "Δ fidelity, last step", "Δ identity, last step",
        "Δ score, last step",
    )  # fmt: skip
    return _table(headings, rows)


def _first_table(first: Mapping[str, Result]) -> str:
    """The claims as they would be after the first search, where there is a second one, and the
    controls, which have no other.
    """
    rows = []
    for claim in (*CLAIMS, *_of_controls()):
        comparison = _compared(claim, first)
        if comparison is None or not any(ARMS[name].second_grid for name in claim):
            continue
        rows.append(
            [
                *(f"{name}: {_setting(ARMS[name], first[name].setting)}" for name in claim),
                _points(comparison.matched),
                f"{comparison.p_value:.4f}",
                _points(comparison.fidelity),
                _points(comparison.identity),
            ]
        )
    headings = (
        "with the term", "against", "Δ fidelity at matched identity", "p, uncorrected",
        "Δ fidelity, last step", "Δ identity, last step",
    )  # fmt: skip
    return _table(headings, rows)


def _of_controls() -> list[Claim]:
    """Controls against plain training and CoRe, and the recommended form against them."""
    found = []
    for control in CONTROLS:
        family = control.family.name
        found += [Claim(control.name, f"{family} {form}") for form in ("plain", "core")]
        found.append(Claim(f"{family} {RECOMMENDED[family]}", control.name))
    return found


def _settled_table(
    results: Mapping[str, Result], first: Mapping[str, Result], records: Records
) -> str:
    """The claims where both arms were also trained for fewer steps, to the end of a schedule; at
    the settings found, then at those of the first search where these are others.
    """
    rows = []
    for claim in CLAIMS:
        pairs = []
        for found, marked in ((results, ""), (first, ", first search")):
            if not found.keys() >= set(claim):
                continue
            pair = [found[name] for name in claim]
            settled = [_settled_curves(*one, records) for one in zip(claim, pair, strict=True)]
            if None in settled or [one.setting for one in pair] in pairs:
                continue
            pairs.append([one.setting for one in pair])
            row = [f"{name}{marked}" for name in claim]
            for curves in ([one.curves for one in pair], settled):
                both = (curves, curves[::-1])
                counts = [str(num_before_first_evaluation(*pair)) for pair in both]
                count = f"{' + '.join(counts)} of {len(curves[0])}"
                row += [_points(compare(*curves).matched), count]
            rows.append(row)
    headings = (
        "with the term", "against", "Δ, evaluations of one training",
        "concepts read before the first one, theirs + ours", "Δ, trainings of three lengths",
        "concepts read before the shortest, theirs + ours",
    )  # fmt: skip
    return _table(headings, rows)


def _settled_curves(name: str, result: Result, records: Records) -> dict[str, Curve] | None:
    """Curves of which every point is the end of a training of that length."""
    trials = trials_to_report(ARMS[name], result.setting)
    stages = map(shorter, PLAN.evaluation_steps[:-1])
    by_length = [*(_all_of(trials, records, stage=stage) for stage in stages), result.records]
    if None in by_length:
        return None
    ends = [
        {**trainings[-1], "evaluations": [one["evaluations"][-1] for one in trainings]}
        for trainings in zip(*by_length, strict=True)
    ]
    return curves_of(ends, _all_of(trials_to_report(UNTRAINED, UNTRAINED.grid[0]), records))


def _rates_table(first: Mapping[str, Result], records: Records) -> str:
    """The recommended form of LoRA against plain training at several rates of the U-Net."""
    names = tuple(RATES)
    pairs = {}
    if first.keys() >= set(names):
        pairs[FAMILIES["lora"].other_rates["unet_lr"]] = [first[name] for name in names]
    for settings in zip(*RATES.values(), strict=True):
        pair = [
            _result(ARMS[name], setting, records, stage="rates")
            for name, setting in zip(names, settings, strict=True)
        ]
        if None not in pair:
            pairs[settings[0]["unet_lr"]] = pair
    rows = []
    for rate in sorted(pairs, key=float):
        plain, ours = pairs[rate]
        found = compare(ours.curves, plain.curves)
        cells = [" / ".join(_last_evaluation(one.records)) for one in (plain, ours)]
        last = (found.fidelity, found.identity, found.score)
        rows.append([rate, *cells, _points(found.matched), *map(_points, last)])
    headings = (
        "U-Net's rate", *(f"{name}, fidelity / identity" for name in names),
        "Δ fidelity at matched identity", "Δ fidelity, last step", "Δ identity, last step",
        "Δ score, last step",
    )  # fmt: skip
    return _table(headings, rows)


def _concepts_tables(
    results: Mapping[str, Result], found: Mapping[Claim, Comparison | None]
) -> str:
    """Every arm's fidelity / identity after the last step, then the differences of the claims."""
    names = [concept.name for concept in REPORTED]
    values = [
        [name, *(_last_point(result.curves[n]) for n in names)] for name, result in results.items()
    ]
    differences = [
        [f"{claim.ours} – {claim.theirs}", *(f"{100 * c.by_concept[n]:+.1f}" for n in names)]
        for claim, c in found.items()
        if c is not None
    ]
    if not values:
        return NOTHING
    tables = [_table(("fidelity / identity, last step", *names), values)]
    if differences:
        tables.append(_table(("Δ fidelity at matched identity", *names), differences))
    return "\n".join(tables)


def _readme_table(results: Mapping[str, Result]) -> str:
    rows = []
    for family, form in RECOMMENDED.items():
        plain, ours = (results.get(f"{family} {name}") for name in ("plain", form))
        if plain is not None and ours is not None:
            difference = compare(ours.curves, plain.curves)
            cells = [
                "{} %, likeness {}".format(*_last_evaluation(r.records)) for r in (plain, ours)
            ]
            rows.append([FAMILIES[family].title, *cells, _points(difference.matched)])
    headings = ("", "best plain setting", "with the term", "difference at the same likeness")
    return _table(headings, rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOTHING
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    lines.insert(1, "|" + "---|" * len(headings))
    return "\n".join(lines) + "\n"


def _last_evaluation(records: Sequence[Record]) -> list[str]:
    """Mean prompt fidelity and identity after the last step, in percent."""
    return [f"{100 * mean(r['evaluations'][-1][column] for r in records):.1f}" for column in (1, 2)]


def _last_point(curve: Curve) -> str:
    identity, fidelity = 100 * curve[-1]
    return f"{fidelity:.0f} / {identity:.0f}"


def _searched(arm: Arm, setting: Flags) -> dict[str, str]:
    """Rates and weight that an arm is trained with at a setting."""
    values = {**arm.family.flags, **arm.flags, **setting}
    if "unet_lr" in values:
        del values["learning_rate"]  # every part has a rate of its own
    return {name: values[name] for name in SEARCHED_OPTIONS if name in values}


def _setting(arm: Arm, setting: Flags) -> str:
    return ", ".join(f"{name} {value}" for name, value in _searched(arm, setting).items())


def _points(value: Mean) -> str:
    """A difference in percentage points, with its 95 % interval."""
    half = "" if value.interval is None else f" ± {100 * value.interval:.1f}"
    return f"{100 * value.mean:+.1f}{half}"


if __name__ == "__main__":
    sys.exit(main())
