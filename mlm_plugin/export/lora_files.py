"""Writes a LoRA file like kohya's trainers, and reads it back to check that WebUIs can use it.

Knows bytes, hashes and key names, but nothing about models or the meaning of the metadata.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import EMBEDDING_KEYS
from mlm_plugin.files import atomic_path, disk_errors
from mlm_plugin.models.weights_files import for_file, write_weights
from mlm_plugin.networks.kohya_names import BUNDLE_PREFIX, is_known_key, part_of

__all__ = [
    "LEGACY_LENGTH",
    "LEGACY_OFFSET",
    "SAVE_DTYPES",
    "LoraCounts",
    "bundled_embeddings",
    "bundled_word",
    "kohya_hashes",
    "save_lora",
    "verify_lora",
]

SAVE_DTYPES: dict[str | None, torch.dtype | None] = {
    None: None,
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""``save_precision`` and its dtype; None keeps that of the training."""

LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000
"""Bytes of a file that its legacy hash is made of."""


class LoraCounts(NamedTuple):
    """Number of modules of each model that a file adapts."""

    text_encoder: int
    unet: int


def save_lora(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA file, completely or not at all.

    Args:
        path: final name; ``.safetensors``, or ``.ckpt`` / ``.pt`` for a pickle without metadata.
        state: tensors under kohya's keys.
        metadata: strings; the two ``sshs_*`` hashes are added or replaced.
        dtype: every tensor is cast to it, alpha too; ``None`` keeps the dtypes.

    Source: sd-scripts ``networks/lora.py`` ``save_weights``. LyCORIS files get the same hashes,
    which WebUIs compute themselves, and not LyCORIS' own.
    """
    path = Path(path)
    tensors = {key: for_file(tensor, dtype) for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        hashes = kohya_hashes(tensors, metadata)
        write_weights(path, tensors, metadata={**metadata, **hashes})
        return
    with atomic_path(path) as temporary, disk_errors(path):
        torch.save(tensors, temporary)


def bundled_embeddings(embeddings: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Embeddings ``(N, D)`` of each text encoder by word, in the form that A1111 reads from a LoRA.

    SD.Next reads it too. ComfyUI does if the file is in its folder of embeddings; it then joins all
    embeddings of the file to one, called by the file's name.

    Source: stable-diffusion-webui ``extensions-builtin/Lora/networks.py`` (``bundle_emb``).
    """
    keys = {1: ("string_to_param.*",), 2: EMBEDDING_KEYS[2]}
    return {
        f"{BUNDLE_PREFIX}{bundled_word(word)}.{key}": tensor_ND.detach().cpu()
        for word, tensors in embeddings.items()
        for key, tensor_ND in zip(keys[len(tensors)], tensors, strict=True)
    }


def bundled_word(word: str) -> str:
    """What A1111 calls a bundled embedding: a dot would end its name in the key."""
    return word.replace(".", "_")


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of a file.

    Both are computed as if the file had only ``ss_*`` metadata, so that later edits of other fields
    do not change them. The first is the SHA-256 of all bytes after the header. The second is the
    first 8 digits of the SHA-256 of 64 KiB at 1 MiB (of nothing, if the file is shorter).

    Source: sd-scripts ``library/train_util.py`` ``precalculate_safetensors_hashes``.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = save(dict(tensors), training)
    body = 8 + int.from_bytes(content[:8], "little")
    legacy = content[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_LENGTH]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(content)[body:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def verify_lora(path: str | os.PathLike) -> LoraCounts:
    """Read a saved file back and check what WebUIs need.

    Raises:
        UserError: a value is not finite, or WebUIs do not know the layer of a key.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    adapters = {key for key in state if not key.startswith(BUNDLE_PREFIX)}
    unknown = sorted(key for key in adapters if not is_known_key(key))
    if unknown:
        raise UserError(
            f"{path}: WebUIs will not use {len(unknown)} of {len(state)} tensors, "
            f"e.g. {unknown[0]}; leave those layers out in network_args (preset, algo)"
        )
    broken = sorted(key for key, tensor in state.items() if not torch.isfinite(tensor).all())
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of {len(state)} tensors hold NaN or infinity, "
            f"e.g. {broken[0]}; use an earlier save and train again with a lower learning rate"
        )
    names = {key.partition(".")[0] for key in adapters}
    num_unet = sum(part_of(name) == "unet" for name in names)
    return LoraCounts(text_encoder=len(names) - num_unet, unet=num_unet)
