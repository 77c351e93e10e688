"""All trials of a plan, one after the other; pages and results are written after each."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.compare.options import CompareOptions
from mlm_plugin.compare.pages import report, summary_of, write_blind_sheet
from mlm_plugin.compare.plan import Plan
from mlm_plugin.compare.subjects import find_subjects
from mlm_plugin.compare.summary import complete_runs
from mlm_plugin.compare.trials import Trial, checked_trials, score_trial, train_trial
from mlm_plugin.config.options import LogOptions
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.image_measures import Judges
from mlm_plugin.evaluation.metric_models import load_clip, load_dino
from mlm_plugin.evaluation.options import NO_MODEL
from mlm_plugin.evaluation.rendering import write_report
from mlm_plugin.evaluation.versions import library_versions
from mlm_plugin.files import atomic_path, require_writable
from mlm_plugin.pretraining.run import Interrupted
from mlm_plugin.setup.builtin_names import model_path
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.training.interrupt import Stopped

__all__ = ["run_compare"]

FORMAT = "mlm_plugin compare 1"
RESULTS_FILE = "results.json"


def run_compare(options: CompareOptions, plan: Plan) -> int:
    """Run the missing trials; returns the exit code.

    Raises:
        UserError: wrong subjects, options or judges, before anything is trained; or a trial fails.
    """
    setup_console(LogOptions(console_log_level="WARNING"))
    quiet_libraries()
    for handler in logging.getLogger("mlm_plugin").handlers:
        handler.addFilter(_Once())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("compare runs in one process; start it without `accelerate launch`")
    output = Path(options.output)
    subjects = find_subjects(Path(options.subjects))
    require_writable(output, "--output")
    model = model_path(options.pretrained_model_name_or_path)
    trials = checked_trials(plan, subjects, model=model, output=output, download=not options.check)
    print(_description(plan, trials), flush=True)
    if options.check:
        return 0
    comparison = _Comparison(options, plan, trials)
    try:
        for number in sorted(range(len(trials)), key=lambda i: not trials[i].is_done):
            comparison.run(number)
    except (Stopped, Interrupted) as stopped:
        print("stopped; the same command continues", file=sys.stderr)
        return stopped.exit_code
    write_blind_sheet(output, plan, trials)
    print(f"wrote {comparison.write()}, {RESULTS_FILE}, blind.html and key.csv")
    return 0


class _Once(logging.Filter):
    """Every message once: the arms have most of their options in common."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        text = record.getMessage()
        is_new = text not in self.seen
        self.seen.add(text)
        return is_new


def _description(plan: Plan, trials: Sequence[Trial]) -> str:
    folders = {
        trial.step_folder(step): len(trial.prompts)
        for trial in trials
        for step in plan.evaluation_steps
    }
    num_pictures = sum(folders.values()) * plan.pictures_per_prompt
    return (
        f"{len(trials)} trials (arms: {len(plan.arms)}, seeds: {len(plan.seeds)}, subjects: "
        f"{len(trials) // len(plan.arms) // len(plan.seeds)}), "
        f"{len(trials) * plan.evaluation_steps[-1]} "
        f"steps, {num_pictures} pictures; {sum(trial.is_done for trial in trials)} trials are done"
    )


class _Comparison:
    """What is known so far, and its files."""

    def __init__(self, options: CompareOptions, plan: Plan, trials: Sequence[Trial]):
        self.options, self.plan, self.trials = options, plan, trials
        self.by_trial: dict[int, list[dict[str, Any]]] = {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        names = {"CLIP": options.clip_model, "DINO": options.dino_model}
        self.judges = {judge: name for judge, name in names.items() if name != NO_MODEL}
        if not self.judges:
            raise UserError(
                "--clip_model and --dino_model are both 'none': nothing would be scored"
            )
        self.load()  # before hours of training, as they may be missing

    def load(self) -> Judges:
        """The judges on the device; they leave it with the last reference."""
        clip, dino = self.options.clip_model, self.options.dino_model
        return Judges(
            None if clip == NO_MODEL else load_clip(clip, device=self.device),
            None if dino == NO_MODEL else load_dino(dino, device=self.device),
        )

    def run(self, number: int) -> None:
        """Train, draw and score a trial, unless that is done."""
        trial, began = self.trials[number], time.monotonic()
        is_new = not trial.is_done
        if is_new:
            log = trial.folder / "log.txt"
            print(f"{number + 1}/{len(self.trials)} {trial.title}: log in {log}", flush=True)
            train_trial(trial)
        found = score_trial(trial, self.judges, load=functools.cache(self.load))
        self.by_trial[number] = found
        if is_new:
            last = found[-1]["measures"]
            shown = ", ".join(f"{name} {value:.3f}" for name, value in last.items())
            print(f"  {(time.monotonic() - began) / 60:.1f} min: {shown}", flush=True)
            self.write()

    def write(self) -> Path:
        """Write results and report of what is done; returns the report."""
        output = Path(self.options.output)
        facts, numbers = self._facts(), sorted(self.by_trial)
        all_records = [record for number in numbers for record in self.by_trial[number]]
        records = complete_runs(all_records, [arm.name for arm in self.plan.arms])
        content = {
            "format": FORMAT,
            "plan": dataclasses.asdict(self.plan),
            "facts": facts,
            "records": all_records,
            "summary": summary_of(self.plan, records),
        }
        with atomic_path(output / RESULTS_FILE) as temporary:
            text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
            temporary.write_text(f"{text}\n", encoding="utf-8")
        done = [self.trials[number] for number in numbers]
        return write_report(output, report(self.plan, done, records, facts))

    def _facts(self) -> Mapping[str, str]:
        drawing = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(self.plan.drawing).items())
        return {
            "model": self.options.pretrained_model_name_or_path,
            **self.judges,
            "evaluation steps": ", ".join(map(str, self.plan.evaluation_steps)),
            "seeds": ", ".join(map(str, self.plan.seeds)),
            "prompts": self.plan.prompts or "DreamBench's",
            "pictures per prompt": str(self.plan.pictures_per_prompt),
            "drawing": drawing,
            **library_versions(self.device),
        }
