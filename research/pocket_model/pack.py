"""Copies the parts of a built model that ship with the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlm_plugin.pocket.shipped import CONTEXTUALIZER, TOKENIZER_FILES

__all__ = ["pack"]

LEFT_OUT = ("stages", "text_encoder", *(f"clip/{name}" for name in TOKENIZER_FILES))
"""Parts that ``mlm_plugin.pocket.shipped.unpack`` restores from the rest."""


def pack(built: Path, target: Path) -> int:
    """Copy the parts of a built model that ship; returns their size in bytes.

    Args:
        built: folder that :func:`research.pocket_model.build.build` wrote.
        target: new folder.
    """
    size = 0
    for path in sorted(built.rglob("*")):
        name = path.relative_to(built).as_posix()
        if path.is_dir() or any(name == out or name.startswith(f"{out}/") for out in LEFT_OUT):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name == CONTEXTUALIZER:
            _copy_in_half(path, target / name)
        else:
            shutil.copyfile(path, target / name)
        size += (target / name).stat().st_size
    return size


def _copy_in_half(source: Path, target: Path) -> None:
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: value.half() for name, value in load_file(source).items()}, target, metadata)
