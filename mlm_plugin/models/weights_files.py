"""Weights files on disk: reading them without running code, and what kohya records of them.

Knows no model and no names inside a file.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlm_plugin.errors import UserError

__all__ = ["PICKLE_SUFFIXES", "WEIGHTS_SUFFIXES", "read_weights", "weights_file_facts"]

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHTS_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
POINTER_START = (
    b"version https://git-lfs"  # what a clone without git-lfs has instead of the weights
)


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or PyTorch file by name, mapped from disk where possible.

    Pickled files are read with ``weights_only=True``: code in them is refused, not run. A
    ``state_dict`` entry, as in Lightning checkpoints, is unwrapped.

    Raises:
        UserError: unknown suffix, damaged file, or a pickle that holds more than tensors.
    """
    path = Path(path)
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
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path)


def weights_file_facts(source: str | os.PathLike, *, part: str = "sd_model") -> dict[str, str]:
    """Name and hashes of a model as kohya writes them into LoRA metadata.

    The old hash is of 64 KiB at 1 MiB, the new one of the whole file (SHA-256, hex). A folder has
    the word ``IsADirectory`` in place of both; a hub id has only its name.

    Args:
        source: checkpoint file, diffusers folder or hub id, as the user gave it.
        part: ``sd_model`` or ``vae``: the middle of the names.

    Returns:
        ``ss_sd_model_name``, ``ss_sd_model_hash`` (8 hex digits) and ``ss_new_sd_model_hash``; with
        ``part="vae"`` ``ss_vae_name``, ``ss_vae_hash`` and ``ss_new_vae_hash``.

    Source: sd-scripts ``library/train_util.py`` ``model_hash``, ``calculate_sha256`` and
    ``train_network.py``.
    """
    assert part in ("sd_model", "vae"), part
    path = Path(source)
    if not path.exists():
        return {f"ss_{part}_name": str(source)}
    old = new = "IsADirectory"
    if path.is_file():
        old, new = _old_webui_hash(path), _sha256(path)
    return {f"ss_{part}_name": path.name, f"ss_{part}_hash": old, f"ss_new_{part}_hash": new}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({_one_line(error)}): is the download complete?"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(
            r"GLOBAL ([\w.]+)", str(error)
        )  # torch's own text advises to run the code
        if found is None:
            raise UserError(
                f"{path} is not a PyTorch weights file: is the download complete?"
            ) from error
        raise UserError(
            f"{path} holds {found[1]} besides tensors and is not loaded, because such a file can "
            "run code: convert it to .safetensors first"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} cannot be read as PyTorch weights ({_one_line(error)}): "
            "is the download complete?"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _one_line(error: Exception, *, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _old_webui_hash(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
