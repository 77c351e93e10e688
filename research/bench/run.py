"""All trials of a plan, one after the other; results are saved after each, to resume from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.config.options import LogOptions
from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, require_writable
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.training.interrupt import Stopped
from research.bench.context import BenchContext
from research.bench.plan import METHOD_FLAGS, BenchPlan
from research.bench.report import html_report, markdown_table
from research.bench.trial import Trial, run_trial
from research.facts import facts_of_here

__all__ = ["run_bench"]

RESULTS = "results.json"


def run_bench(plan: BenchPlan, *, model: Path, output: Path, jobs: int = 1) -> int:
    """Run the missing trials of a plan; returns the exit code.

    Args:
        plan: settings, concepts, seeds.
        model: folder of a pocket model.
        output: folder for results, table, page and the pictures of every run.
        jobs: parallel trials, each in its own process.

    Raises:
        UserError: the folder has results of another model, or cannot be written.
    """
    require_writable(output, "--output")
    results = _open_results(output, model)
    done = set(results["done"])
    trials = [trial for trial in _trials(plan) if _fingerprint(plan, trial) not in done]
    context = BenchContext(model, output, plan)
    context.prepare((*plan.settings, *plan.ablations), plan.concepts)
    began = time.monotonic()
    with _Pool(context, jobs) as pool:
        for number, (trial, records) in enumerate(pool.outcomes(trials), start=1):
            if isinstance(records, int):
                print("stopped; the same command continues", file=sys.stderr)
                return records
            results["records"] = _without(results["records"], records[-1]) + records
            results["done"].append(_fingerprint(plan, trial))
            _write(output, results)
            last, minutes = records[-1], (time.monotonic() - began) / 60
            print(
                f"{number}/{len(trials)} {trial.setting.name if trial.setting else 'base'}, "
                f"{trial.concept.name}, seed {trial.seed}: fidelity {last['prompt_fidelity']:.0%}, "
                f"identity {last['identity']:.0%} ({minutes:.1f} min)",
                flush=True,
            )
    print(f"wrote {output / RESULTS}, {output / 'table.md'} and {output / 'report.html'}")
    return 0


def _trials(plan: BenchPlan) -> list[Trial]:
    """Seed by seed, so that an interrupted bench has complete pairs; ablations last."""
    rounds = [(seed, (None, *plan.settings)) for seed in plan.seeds]
    rounds.append((plan.seeds[0], plan.ablations))
    return [
        Trial(setting, concept, seed)
        for seed, settings in rounds
        for concept in plan.concepts
        for setting in settings
    ]


Outcome = list[dict[str, Any]] | int
"""Records, or the exit code of a signal."""


def run_one(trial: Trial, context: BenchContext) -> Outcome:
    """One trial in this process."""
    try:
        return run_trial(trial, context)
    except Stopped as stopped:
        return stopped.exit_code


class _Pool:
    """Runs trials one by one in this process, or in parallel in others."""

    def __init__(self, context: BenchContext, jobs: int):
        self.context = context
        self.executor = None
        if jobs > 1:
            self.executor = ProcessPoolExecutor(
                jobs,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(context.model, context.folder, context.plan, jobs),
            )

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.executor:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def outcomes(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Outcomes in the order in which they finish."""
        if not self.executor:
            for trial in trials:
                yield trial, run_one(trial, self.context)
            return
        running = {self.executor.submit(_run_in_worker, trial): trial for trial in trials}
        for future in as_completed(running):
            yield running[future], future.result()


_context: BenchContext | None = None  # of a worker process


def _start_worker(model: Path, folder: Path, plan: BenchPlan, jobs: int) -> None:
    global _context
    quiet_libraries()
    setup_console(LogOptions(console_log_level="ERROR"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _context = BenchContext(model, folder, plan)


def _run_in_worker(trial: Trial) -> Outcome:
    return run_one(trial, _context)


def _open_results(output: Path, model: Path) -> dict[str, Any]:
    weights = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()[:16]
    path = output / RESULTS
    if not path.exists():
        return {"format": 1, "model": digest, **facts_of_here(torch.device("cpu")),
                "records": [], "done": []}  # fmt: skip
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("model") != digest:
        raise UserError(f"--output {output}: has results of another model; choose another folder")
    return results


def _write(output: Path, results: Mapping[str, Any]) -> None:
    texts = {
        RESULTS: json.dumps(results, indent=1) + "\n",
        "table.md": markdown_table(results["records"]),
        "report.html": html_report({k: v for k, v in results.items() if k != "done"}),
    }
    for name, text in texts.items():
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _fingerprint(plan: BenchPlan, trial: Trial) -> str:
    """Fingerprint of everything that determines the results of a trial."""
    setting, concept, seed = trial
    facts: list[Any] = [concept.name, seed, plan.num_pictures, plan.num_steps, plan.guidance]
    if setting:
        described = dataclasses.asdict(dataclasses.replace(setting, flags={}))
        described["flags"] = dict(setting.flags)
        facts += [
            described,
            dict(METHOD_FLAGS[setting.method]),
            plan.evaluation_steps[setting.method],
        ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _without(records: list[Mapping[str, Any]], like: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Records of other runs than that of ``like``."""
    names = ("method", "regularizer", "weight", "variant", "concept", "seed")
    return [r for r in records if any(r[name] != like[name] for name in names)]
