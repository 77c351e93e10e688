"""Runs any trainer's script and records time and memory of its optimizer steps.

    python research/benchmarks/probe.py REPORT.json [--num_steps N] [--num_warmup W] -- SCRIPT [...]

A step is the time between the ends of two calls of ``optimizer.step``: fetching the batch, both
passes, the optimizer, and logging. After step N the process ends at once, so nothing is saved;
without N the script runs to its end.

Memory has two peaks, one up to the end of warm-up (loading, caching latents) and one for the steps
after it. On a GPU it is ``torch.cuda.max_memory_allocated``, else the resident set of the process
(``VmHWM``), which includes code and memory-mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Notes:
    """Times of the ends of steps and peaks of memory, written after every step.

    Args:
        path: JSON file.
        num_steps: the process ends after this many steps; 0 = never.
        num_warmup: steps before the second peak starts.
    """

    def __init__(self, path: Path, *, num_steps: int, num_warmup: int):
        self.path, self.num_steps, self.num_warmup = path, num_steps, num_warmup
        self.wall = [time.perf_counter()]
        self.cpu = [time.process_time()]
        self.loading_peak: int | None = None

    def after_step(self, *_: object) -> None:
        """Called by PyTorch after every step of any optimizer."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        number = len(self.wall) - 1
        if number == self.num_warmup:
            self.loading_peak = peak_bytes()
            reset_peak()
        if number > self.num_warmup:
            self.write()
        if number == self.num_steps:
            sys.stdout.flush()
            os._exit(0)

    def write(self) -> None:
        """Write the results so far."""
        report = {
            "seconds": differences(self.wall)[self.num_warmup :],
            "cpu_seconds": differences(self.cpu)[self.num_warmup :],
            "seconds_to_first_step": self.wall[1] - self.wall[0],
            "peak_bytes": peak_bytes(),
            "loading_peak_bytes": self.loading_peak,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "num_threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "versions": {"python": platform.python_version()} | versions(),
        }
        self.path.write_text(json.dumps(report, indent=2) + "\n")


def differences(times: list[float]) -> list[float]:
    """Differences of neighbours."""
    return [after - before for before, after in pairwise(times)]


def peak_bytes() -> int:
    """The peak since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return kilobytes("VmHWM", STATUS.read_text()) * 1024


def reset_peak() -> None:
    """Reset the peak to the current level."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_REFS.write_text("5")


def kilobytes(field: str, status: str) -> int:
    """A field of ``/proc/PID/status``."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise ValueError(f"no {field} in the status of the process")


def versions() -> dict[str, str]:
    """Versions of the installed libraries."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def allow_any_diffusers() -> None:
    """Disable the version check of examples that require a development version."""
    import diffusers.utils

    diffusers.utils.check_min_version = lambda _version: None


def adapt_to_kohyas_modules(modules: dict[str, list[str]]) -> None:
    """Make the examples adapt the same modules as kohya's trainers.

    Args:
        modules: new ``target_modules`` by a name among the old ones.
    """
    import peft

    class LoraConfig(peft.LoraConfig):
        def __init__(self, *args, target_modules, **kwargs):
            chosen = (new for name, new in modules.items() if name in target_modules)
            super().__init__(*args, target_modules=next(chosen, target_modules), **kwargs)

    peft.LoraConfig = LoraConfig


def run(script: Path, arguments: list[str], before: list[Callable[[], None]]) -> None:
    """Run the script as the main program."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    for change in before:
        change()
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    """Run the script and record its steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--num_steps", type=int, default=0, help="end after this many; 0: never")
    parser.add_argument("--num_warmup", type=int, default=1)
    parser.add_argument("--any_diffusers", action="store_true", help="skip the examples' check")
    parser.add_argument("--modules", type=json.loads, help="JSON: target_modules of peft by name")
    parser.add_argument("script", type=Path)
    own, theirs = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, theirs = [*own[:cut], own[cut + 1]], own[cut + 2 :]
    args = parser.parse_args(own)
    notes = Notes(args.report, num_steps=args.num_steps, num_warmup=args.num_warmup)
    register_optimizer_step_post_hook(notes.after_step)
    changes: list[Callable[[], None]] = [allow_any_diffusers] if args.any_diffusers else []
    if args.modules:
        changes.append(lambda: adapt_to_kohyas_modules(args.modules))
    run(args.script, theirs, changes)


if __name__ == "__main__":
    main()
