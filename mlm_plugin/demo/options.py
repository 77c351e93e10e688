"""The trainer's options for a concept on a pocket model. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["BATCH_SIZE", "FOUND_RATES", "LORA", "MLM_BATCH_SIZE", "MLM_WEIGHT", "RECOMMENDED_TERM",
           "RESOLUTION", "Paths", "as_argv", "mlm_options", "run_options"]  # fmt: skip

RESOLUTION = 64
BATCH_SIZE = 4
MLM_BATCH_SIZE = 16
MLM_WEIGHT = 0.1
LORA: Mapping[str, str] = {
    "network_dim": "8",
    "network_alpha": "8",
    "learning_rate": "5e-3",
    "lr_scheduler": "cosine",  # so that the weights have settled at the last evaluation
}
FOUND_RATES: Mapping[str, str] = {"unet_lr": "2.5e-3", "text_encoder_lr": "1.5e-4"}
"""Of a LoRA, by the first search of ``research/bench``, without the term and with it.

The second search found half the U-Net's rate better without it, where little is left to show.
"""
RECOMMENDED_TERM: Mapping[str, str] = {"mlm_read_at": "both", "mlm_target": "states"}


class Paths(NamedTuple):
    """What a run reads and writes.

    Attributes:
        model: folder of a pocket model.
        data: kohya data folder.
        output: folder of the trained files.
    """

    model: Path
    data: Path
    output: Path


def run_options(paths: Paths, *, method: str, num_steps: int, seed: int) -> dict[str, str]:
    """Options common to all runs, without the MLM term."""
    return {
        "pretrained_model_name_or_path": str(paths.model),
        "train_data_dir": str(paths.data),
        "resolution": str(RESOLUTION),
        "output_dir": str(paths.output),
        "method": method,
        "train_batch_size": str(BATCH_SIZE),
        "max_train_steps": str(num_steps),
        "max_data_loader_n_workers": "0",
        "cache_latents": "true",
        "seed": str(seed),
        "mlm_loss_weight": "0",
    }


def mlm_options(
    weight: float, *, prompts: Path, contextualizer: Path | None = None
) -> dict[str, str]:
    """Options of the MLM term.

    Args:
        weight: weight of the term.
        prompts: text file with ``{}`` for the concept.
        contextualizer: its file; ``None`` where states are compared, which needs none.
    """
    options = {
        "mlm_loss_weight": str(weight),
        "mlm_batch_size": str(MLM_BATCH_SIZE),
        "mlm_prompt_set": str(prompts),
    }
    return (
        options if contextualizer is None else options | {"mlm_contextualizer": f"{contextualizer}"}
    )


def as_argv(options: Mapping[str, str]) -> list[str]:
    """The command line; ``"true"`` stands for a flag without a value."""
    argv = []
    for name, value in options.items():
        argv += [f"--{name}"] if value == "true" else [f"--{name}", value]
    return argv
