"""All trials of a plan, one after the other; results are kept after each, so that it resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.bench.plan import METHOD_FLAGS, Arm, BenchPlan
from mlm_plugin.bench.report import html_report, markdown_table
from mlm_plugin.bench.trial import Workshop, measure_base, run_trial
from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, require_writable
from mlm_plugin.pocket.build import facts_of_here
from mlm_plugin.pocket.concepts import Concept
from mlm_plugin.training.trainer import Stopped

__all__ = ["run_bench"]

logger = logging.getLogger(__name__)

RESULTS = "results.json"


def run_bench(plan: BenchPlan, *, model: Path, output: Path) -> int:
    """Run what is missing of a plan; returns the exit code.

    Raises:
        UserError: the folder holds another model's results, or cannot be written.
    """
    require_writable(output, "--output")
    results = _open_results(output, model)
    workshop = Workshop(model, output, plan)
    trials = [
        (concept, seed, arm) for seed in plan.seeds for concept in plan.concepts
        for arm in (None, *plan.arms)
    ]  # fmt: skip
    for number, (concept, seed, arm) in enumerate(trials, start=1):
        made_for = _fingerprint(plan, arm, concept, seed)
        if made_for in results["done"]:
            continue
        began = time.monotonic()
        try:
            records = (
                run_trial(arm, concept, seed, workshop)
                if arm
                else [measure_base(concept, seed, workshop)]
            )
        except Stopped as stopped:
            print(f"stopped: {stopped}; the same command goes on", file=sys.stderr)
            return stopped.exit_code
        results["records"] = _without(results["records"], records[-1]) + records
        results["done"].append(made_for)
        _write(output, results)
        last = records[-1]
        print(
            f"{number}/{len(trials)} {arm.name if arm else 'base'}, {concept.name}, seed {seed}: "
            f"fidelity {last['prompt_fidelity']:.0%}, identity {last['identity']:.0%} "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    print(f"wrote {output / RESULTS}, {output / 'table.md'} and {output / 'report.html'}")
    return 0


def _open_results(output: Path, model: Path) -> dict[str, Any]:
    weights = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()[:16]
    path = output / RESULTS
    if not path.exists():
        return {"format": 1, "model": digest, **facts_of_here(torch.device("cpu")),
                "records": [], "done": []}  # fmt: skip
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("model") != digest:
        raise UserError(f"--output {output}: holds results of another model; choose another folder")
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


def _fingerprint(plan: BenchPlan, arm: Arm | None, concept: Concept, seed: int) -> str:
    """Of everything that decides what a trial gives."""
    facts: list[Any] = [
        concept.name, seed, plan.num_pictures, plan.num_steps, plan.guidance,
    ]  # fmt: skip
    if arm:
        told = dataclasses.asdict(dataclasses.replace(arm, flags={})) | {"flags": dict(arm.flags)}
        facts += [told, dict(METHOD_FLAGS[arm.method]), plan.looks[arm.method]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _without(records: list[Mapping[str, Any]], like: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Records of other runs than that of ``like``."""
    names = ("method", "regularizer", "weight", "variant", "concept", "seed")
    return [r for r in records if any(r[name] != like[name] for name in names)]
