"""What tells files of the same name apart, so that a trial is done again when one has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["with_contents"]

READ = (
    "pretrained_model_name_or_path", "vae", "network_weights", "weights", "conditioning_data_dir",
    "mlm_prompt_set", "mlm_contextualizer",
)  # fmt: skip
"""Options that may name a file or folder that a training reads."""
END = 2**20
"""Bytes that are read at each end of a file: a model has gigabytes."""


def with_contents(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose files are told apart by their contents, not by name alone."""
    return {
        name: [value, _contents(value)] if name in READ else value
        for name, value in options.items()
    }


def _contents(value: Any) -> list[str]:
    """Digests of the files that a value names; none where it is a hub id or a built-in name."""
    names = value if isinstance(value, (list, tuple)) else [value]
    return [digest for name in names for digest in _digests(Path(str(name)))]


def _digests(path: Path) -> list[str]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [_digest(file) for file in files if file.is_file()]


def _digest(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as content:
        ends = content.read(END)
        content.seek(max(END, size - END))
        ends += content.read()
    return hashlib.sha256(f"{size}/".encode() + ends).hexdigest()
