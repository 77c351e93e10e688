"""Weights files on disk: written completely or not at all, read without running code.

Knows no model and no names inside a file.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.files import atomic_path, disk_errors

__all__ = [
    "PICKLE_SUFFIXES",
    "WEIGHTS_SUFFIXES",
    "for_file",
    "read_weights",
    "without_suffix",
    "write_weights",
]

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHTS_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# A clone without git-lfs has a file that starts with this instead of the weights.
POINTER_START = b"version https://git-lfs"


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or PyTorch file by name.

    A ``.safetensors`` file is memory-mapped: values are read from disk when they are used.
    Pickled files are read with ``weights_only=True``: code in them is refused, not run. A
    ``state_dict`` entry, as in Lightning checkpoints, is unwrapped.

    Raises:
        UserError: unknown suffix, damaged file, or a pickle that contains more than tensors.
    """
    path = _readable(Path(path))
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path)


def without_suffix(name: str | os.PathLike) -> str:
    """The last part of a path or hub id, without the suffix of a weights file; dots stay."""
    path = Path(name)
    return path.stem if path.suffix.lower() in WEIGHTS_SUFFIXES else path.name


def for_file(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor ready for a file: on the CPU, contiguous, in ``dtype`` if one is given."""
    return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()


def write_weights(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Write a ``.safetensors`` file, completely or not at all.

    Args:
        path: final name.
        tensors: from :func:`for_file`; no two may share memory.
        metadata: strings.

    Raises:
        OSError: the disk is full or cannot be written, as for any other file.
    """
    with atomic_path(path) as temporary, disk_errors(path):
        save_file(dict(tensors), temporary, dict(metadata))


def _readable(path: Path) -> Path:
    if path.suffix.lower() not in WEIGHTS_SUFFIXES:
        raise UserError(
            f"{path}: unknown kind of weights file {path.suffix!r}; "
            f"allowed: {', '.join(WEIGHTS_SUFFIXES)}"
        )
    with path.open("rb") as file:
        if file.read(len(POINTER_START)) == POINTER_START:
            raise UserError(
                f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"
            )
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({shown_error(error)}): "
            "is the download complete?"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Only the name is quoted: torch's own message advises running the code.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise UserError(
                f"{path} is not a PyTorch weights file: is the download complete?"
            ) from error
        raise UserError(
            f"{path} holds {found[1]} besides tensors and is not loaded, because such a file can "
            "run code: convert it to .safetensors first"
        ) from error
    except Exception as error:  # a damaged pickle can fail with any exception
        raise UserError(
            f"{path} cannot be read as PyTorch weights ({shown_error(error)}): "
            "is the download complete?"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
