"""Writes a safetensors file tensor by tensor, so that saving a model takes no second copy of it.

Knows the format, not what the tensors are. The safetensors library wants all tensors in their final
dtype at once, and its older versions copy them once more.

Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from mlm_plugin.files import atomic_path

__all__ = ["write_tensors"]

# In the order in which the library lays tensors out: wide ones first, so that all lie aligned.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
LAYOUT = list(DTYPE_NAMES)
HEADER_ALIGNMENT = 8


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write floating-point tensors as one ``.safetensors`` file, all of it or nothing.

    Only one tensor at a time is cast or brought to the CPU.

    Args:
        path: final name.
        tensors: of any device and memory layout; they may share memory.
        metadata: strings, written as given.
        dtype: of every tensor in the file; ``None`` keeps the dtypes.
    """
    assert all(isinstance(value, str) for value in metadata.values()), metadata
    names = sorted(tensors, key=lambda name: (LAYOUT.index(dtype or tensors[name].dtype), name))
    header = _header({name: tensors[name] for name in names}, metadata=metadata, dtype=dtype)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(_content(tensors[name], dtype))


def _header(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], dtype: torch.dtype | None
) -> bytes:
    """Dtype, shape and place of each tensor as JSON, padded so that the tensors lie aligned."""
    entries: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        stored = dtype or tensor.dtype
        start, end = end, end + tensor.numel() * stored.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[stored],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % HEADER_ALIGNMENT)


def _content(tensor: Tensor, dtype: torch.dtype | None) -> memoryview:
    """The values in row-major order; a view if the tensor already has them so on the CPU."""
    stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    return memoryview(stored.reshape(-1).view(torch.uint8).numpy())
