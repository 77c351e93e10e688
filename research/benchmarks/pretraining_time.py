"""How long a contextualizer of SD 1.5's text encoder takes to pretrain on this machine.

    OMP_NUM_THREADS=1 python -m research.benchmarks.pretraining_time --tokenizer CLIP_FOLDER

A random text encoder of the real size takes as long as the real one. Prints the median seconds of a
step and of an evaluation, and what they make of the whole default recipe (an extrapolation).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mlm_plugin.config.pretraining import PretrainOptions
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.run import PretrainingRun

__all__ = ["main", "seconds_of"]


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="Folder of CLIP's.")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    config = CLIPTextConfig.from_pretrained(ARCHITECTURES / "sd_v1" / "text_encoder")
    model = CLIPTextModel(config).eval().requires_grad_(False)
    text_encoder = TextEncoder(CLIPTokenizer.from_pretrained(given.tokenizer), model)
    recipe = PretrainOptions()
    run = PretrainingRun(text_encoder, Path("unused.safetensors"), options=recipe)
    run.train_step()  # warm-up
    steps = [seconds_of(run.train_step) for _ in range(given.steps)]
    evaluations = seconds_of(run.evaluate)
    num_evaluations = recipe.max_train_steps // recipe.eval_every_n_steps
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {given.steps} steps")
    for name, column, evaluation in zip(
        ("wall", "processor"), zip(*steps, strict=True), evaluations, strict=True
    ):
        step = statistics.median(column)
        hours = (recipe.max_train_steps * step + num_evaluations * evaluation) / 3600
        print(
            f"{name}: step {step:.2f} s, evaluation {evaluation:.1f} s; "
            f"{recipe.max_train_steps} steps and {num_evaluations} evaluations: {hours:.1f} h"
        )


if __name__ == "__main__":
    main()
