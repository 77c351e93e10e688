"""Versions that decide about results."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from mlm_plugin import __version__

__all__ = ["library_versions"]

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "pillow", "numpy")


def library_versions(device: torch.device, *, also: Sequence[str] = ()) -> dict[str, str]:
    """Versions that decide about results, and the device.

    Args:
        device: of the run.
        also: further packages that a host runs with.
    """
    found = {"mlm_plugin": __version__, "python": platform.python_version()}
    for name in (*LIBRARIES, *also):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    is_cuda = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if is_cuda else device.type
    return found
