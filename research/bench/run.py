"""Runs the missing trials of a stage; a record is written after each, to resume from."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.config.options import LogOptions
from mlm_plugin.errors import UserError
from mlm_plugin.files import require_writable
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.training.interrupt import Stopped
from research.bench.context import BenchContext
from research.bench.plan import (
    ARMS,
    UNTRAINED,
    Arm,
    BenchPlan,
    Trial,
    trials_at_rates,
    trials_to_report,
)
from research.bench.records import Records, key_of
from research.bench.search import first_search, search
from research.bench.trial import run_trial

__all__ = ["Limits", "fingerprint_of_model", "run_stage"]

Outcome = dict[str, Any] | int
"""A record, or the exit code of a signal."""


@dataclass(frozen=True)
class Limits:
    """What a run may use.

    Attributes:
        jobs: parallel trials, each in its own process.
        minutes: no trial starts after them; ``None``: no limit.
    """

    jobs: int = 1
    minutes: float | None = None


def run_stage(
    stage: str,
    arms: Sequence[Arm],
    *,
    context: BenchContext,
    records: Records,
    limits: Limits = Limits(),
) -> int:
    """Run what is missing of some arms, one arm after the other; returns the exit code.

    Args:
        stage: ``tuning``, ``report``, ``rates`` or one of :func:`~research.bench.plan.shorter`.
        arms: arms of the plan.
        context: model, oracle, scratch folder.
        records: of earlier trials, to which new ones are added.
        limits: processes and time.

    Raises:
        UserError: an arm is to be reported before it is tuned, or its records are of another
            model.
    """
    require_writable(context.folder, "--output")
    ends = time.monotonic() + 60 * limits.minutes if limits.minutes is not None else float("inf")
    with _Pool(context, limits.jobs, ends) as pool:
        for arm in arms:
            while trials := missing_trials(stage, arm, records):
                context.prepare(trials)
                for trial, outcome in pool.outcomes(trials):
                    if isinstance(outcome, int):
                        print("stopped; the same command continues", file=sys.stderr)
                        return outcome
                    records.add(stage, arm.name, outcome)
                    print(_line(trial, outcome), flush=True)
                if time.monotonic() > ends:
                    print("out of time; the same command continues")
                    return 0
            print(f"{stage} of {arm.name}: complete", flush=True)
    return 0


def missing_trials(stage: str, arm: Arm, records: Records) -> list[Trial]:
    """The trials of an arm to run next; none where the stage is complete.

    Raises:
        UserError: the arm is to be reported before it is tuned, or tuned before plain training.
    """
    if stage == "tuning":
        _check_other_rates(arm, records)
        return search(arm, records.of(stage, arm.name)).missing
    trials = trials_at_rates(arm) if stage == "rates" else _reported_trials(arm, records)
    done = records.of_reports(stage, arm.name)
    return [trial for trial in trials if key_of(trial) not in done]


def _reported_trials(arm: Arm, records: Records) -> list[Trial]:
    if arm is UNTRAINED:
        settings = arm.grid
    else:
        winner = search(arm, records.of("tuning", arm.name)).winner
        if winner is None:
            raise UserError(f"{arm.name}: its search is incomplete; run --stage tuning first")
        settings = (winner,)
    return [trial for setting in settings for trial in trials_to_report(arm, setting)]


def _check_other_rates(arm: Arm, records: Records) -> None:
    """Refuse an arm whose plan does not take over what the best plain setting has."""
    family = arm.family
    if arm.form == "plain" or not family.other_rates:
        return
    plain = ARMS[f"{family.name} plain"]
    winner = first_search(plain, records.of("tuning", plain.name)).winner
    if winner is None:
        raise UserError(f"{arm.name}: takes over rates of {plain.name}; tune that first")
    if winner != {**winner, **family.other_rates}:
        raise UserError(
            f"{arm.name}: {plain.name} is best with {winner}; set other_rates in plan.py to it"
        )


def fingerprint_of_model(model: Path) -> str:
    """Fingerprint of a pocket model's U-Net."""
    weights = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:16]


def _line(trial: Trial, record: dict[str, Any]) -> str:
    setting = ", ".join(f"{name} {value}" for name, value in trial.setting.items())
    _step, fidelity, identity = record["evaluations"][-1]
    return (
        f"{trial.arm.name} ({setting}), {trial.concept.name}, seed {trial.seed}: "
        f"fidelity {fidelity:.0%}, identity {identity:.0%} ({record['seconds']:.0f} s)"
    )


def run_one(trial: Trial, context: BenchContext) -> Outcome:
    """One trial in this process."""
    try:
        return run_trial(trial, context)
    except Stopped as stopped:
        return stopped.exit_code


class _Pool:
    """Runs trials one by one in this process, or in parallel in others, until the time is up."""

    def __init__(self, context: BenchContext, jobs: int, ends: float):
        self.context, self.jobs, self.ends = context, jobs, ends
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
        waiting = iter(trials)
        if not self.executor:
            for trial in waiting:
                if time.monotonic() > self.ends:
                    return
                yield trial, run_one(trial, self.context)
            return
        running: dict[Any, Trial] = {}
        while True:
            while len(running) < self.jobs and time.monotonic() <= self.ends:
                if (trial := next(waiting, None)) is None:
                    break
                running[self.executor.submit(_run_in_worker, trial)] = trial
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


_context: BenchContext | None = None  # of a worker process


def _start_worker(model: Path, folder: Path, plan: BenchPlan, jobs: int) -> None:
    global _context
    quiet_libraries()
    setup_console(LogOptions(console_log_level="ERROR"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _context = BenchContext(model, folder, plan)


def _run_in_worker(trial: Trial) -> Outcome:
    return run_one(trial, _context)
