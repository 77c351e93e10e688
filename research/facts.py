"""Where results come from: hardware, commit and versions."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from mlm_plugin import __version__

__all__ = ["facts_of_here"]


def facts_of_here(device: torch.device) -> dict[str, Any]:
    """Hardware, commit and versions."""
    return {
        "hardware": _hardware(device),
        "commit": _commit(),
        "versions": {
            "mlm_plugin": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of this checkout; None without a history."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
