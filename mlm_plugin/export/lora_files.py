"""Writes a LoRA file as kohya's trainers do, and reads it back to see that WebUIs can use it.

Knows bytes, hashes and key names; knows nothing of models or of what the metadata means.
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
from mlm_plugin.files import atomic_path
from mlm_plugin.models.weights_files import for_file, write_weights
from mlm_plugin.networks.kohya_names import BUNDLE_PREFIX, is_known_key, part_of

__all__ = [
    "SAVE_DTYPES",
    "LoraCounts",
    "bundled_embeddings",
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
"""``save_precision`` and the dtype it stands for; None keeps what was trained."""

LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000


class LoraCounts(NamedTuple):
    """How many modules of each model a file adapts."""

    text_encoder: int
    unet: int


def save_lora(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA file, all of it or nothing.

    Args:
        path: final name; ``.safetensors``, or ``.ckpt`` / ``.pt`` for a pickle without metadata.
        state: tensors under kohya's keys.
        metadata: strings; the two ``sshs_*`` hashes are added, and replaced if they are there.
        dtype: every tensor is cast to it, alpha too; ``None`` keeps the dtypes.

    Source: sd-scripts ``networks/lora.py`` ``save_weights``. LyCORIS files get these same hashes,
    the ones WebUIs compute for themselves, and not LyCORIS' own.
    """
    path = Path(path)
    tensors = {key: for_file(tensor, dtype) for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        hashes = kohya_hashes(tensors, metadata)
        write_weights(path, tensors, metadata={**metadata, **hashes})
        return
    with atomic_path(path) as temporary:
        torch.save(tensors, temporary)


def bundled_embeddings(embeddings: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Embeddings ``(N, D)`` of each text encoder, by their word, as A1111 reads them out of a LoRA.

    Source: stable-diffusion-webui ``extensions-builtin/Lora/networks.py`` (``bundle_emb``).
    """
    keys = {1: ("string_to_param.*",), 2: EMBEDDING_KEYS[2]}
    return {
        f"{BUNDLE_PREFIX}{word.replace('.', '_')}.{key}": tensor_ND.detach().cpu()
        for word, tensors in embeddings.items()
        for key, tensor_ND in zip(keys[len(tensors)], tensors, strict=True)
    }


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of a file.

    Both are of the file as it would be with ``ss_*`` metadata only, so that later edits of the
    other fields do not change them: the first is SHA-256 of all bytes after the header, the second
    the first 8 digits of that of 64 KiB at 1 MiB (of nothing, if the file is shorter).

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
        UserError: If a value is not finite, or a key belongs to no layer that WebUIs know.
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
