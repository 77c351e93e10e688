"""Files of learned token embeddings: one for all layers (Textual Inversion) or one each (XTI).

Knows keys and shapes inside the files, but no models and not what the metadata means.
Shapes: K cross-attention layers, N vectors, D width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.weights_files import (
    PICKLE_SUFFIXES,
    for_file,
    read_weights,
    write_weights,
)

__all__ = [
    "EMBEDDING_KEY",
    "EMBEDDING_KEYS",
    "SD_LAYER_CODES",
    "all_layers_file",
    "layer_average",
    "read_embedding",
    "read_embeddings",
    "read_vectors",
    "read_xti",
    "save_embedding",
    "save_xti",
    "verify_embedding",
]

EMBEDDING_KEY = "emb_params"
"""Key of the vectors for a model with one text encoder."""

EMBEDDING_KEYS = {1: (EMBEDDING_KEY,), 2: ("clip_l", "clip_g")}
"""Keys of the vectors by number of text encoders; SDXL has two."""

SDXL_KEYS = set(EMBEDDING_KEYS[2])

ALL_LAYERS = "_xti"
"""What the name of an XTI file adds to that of its average."""

SD_LAYER_CODES = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08"),
    "MID",
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)
"""Keys of an XTI file of SD 1.x and 2.x in the order in which the layers run.

Source: sd-scripts ``train_textual_inversion_XTI.py``.
"""


# --- one embedding for all layers ---------------------------------------------------------------


def save_embedding(
    path: str | os.PathLike,
    vectors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Textual Inversion file, completely or not at all.

    A1111, Forge, ComfyUI, diffusers and kohya's scripts read it; the WebUIs take the file name as
    the word for the prompt.

    Args:
        path: final name, ``.safetensors``.
        vectors: ``(N, D)`` by key for each text encoder; ``{EMBEDDING_KEY: ...}`` for only one.
        metadata: strings.
        dtype: every tensor is cast to it; ``None`` keeps the dtypes.

    Source: sd-scripts ``train_textual_inversion.py`` and ``sdxl_train_textual_inversion.py``
    ``save_weights``.
    """
    assert all(vectors_ND.ndim == 2 for vectors_ND in vectors.values())
    # Cloned: vectors that are a part of a larger tensor would share its memory.
    tensors = {key: for_file(vectors_ND, dtype).clone() for key, vectors_ND in vectors.items()}
    write_weights(path, tensors, metadata=metadata)


def read_embedding(path: str | os.PathLike) -> Tensor:
    """Vectors ``(N, D)`` of an embedding for SD 1.x or 2.x, in float32.

    Reads what trainers of the ecosystem write: kohya's ``emb_params``, A1111's
    ``string_to_param``, diffusers' ``{token: vector or vectors}``, as ``.safetensors`` or a pickle.
    Code in a pickle is refused, not run.

    Raises:
        UserError: damaged or missing, not an embedding, or one for another architecture.

    Source: sd-scripts ``train_textual_inversion.py`` ``load_weights``; diffusers
    ``loaders/textual_inversion.py``.
    """
    tensors = _read(path)
    if tensors.keys() == SDXL_KEYS:
        raise UserError(
            f"{path} is an embedding for SDXL ({', '.join(sorted(tensors))}): "
            "use one for SD 1.x or 2.x"
        )
    if len(tensors) != 1:
        raise UserError(
            f"{path} holds {len(tensors)} tensors{_some(tensors)}, a Textual Inversion embedding "
            "holds one: use such a file"
        )
    ((key, vectors),) = tensors.items()
    return _checked_vectors(path, key, vectors)


def read_embeddings(path: str | os.PathLike) -> list[Tensor]:
    """Vectors ``(N, D)`` of each text encoder that an embedding is for, in float32.

    Raises:
        UserError: as :func:`read_embedding`, or another number of vectors for each text encoder.
    """
    tensors = _read(path)
    if tensors.keys() != SDXL_KEYS:
        return [read_embedding(path)]
    vectors = [_checked_vectors(path, key, tensors[key]) for key in EMBEDDING_KEYS[2]]
    if len(vectors[0]) != len(vectors[1]):
        raise UserError(
            f"{path} holds {len(vectors[0])} and {len(vectors[1])} vectors, not the same number"
        )
    return vectors


def verify_embedding(path: str | os.PathLike) -> int:
    """Read a saved file back, with one embedding or one for each layer.

    Returns:
        the number of vectors N.

    Raises:
        UserError: a value is not finite, a shape is not ``(N, D)``, or N differs inside the file.
    """
    counts = {len(_checked_vectors(path, key, vectors)) for key, vectors in _read(path).items()}
    if len(counts) != 1:
        raise UserError(
            f"{path} holds embeddings of {sorted(counts)} vectors, not of the same number"
        )
    return counts.pop()


# --- one embedding for each layer ---------------------------------------------------------------


def save_xti(
    path: str | os.PathLike,
    vectors_KND: Tensor,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    codes: Sequence[str] = SD_LAYER_CODES,
) -> None:
    """Write an XTI file: one key for each cross-attention layer, with vectors ``(N, D)``.

    kohya's generation scripts read it. WebUIs do not, and get :func:`layer_average`; ComfyUI would
    take the first layer's vectors for all.

    Args:
        path: final name, as for :func:`save_embedding`.
        vectors_KND: the layers' vectors in the order in which the layers run.
        metadata: strings.
        dtype: every tensor is cast to it; ``None`` keeps the dtype.
        codes: a key for each layer, ``layer_codes`` of the U-Net.

    Source: sd-scripts ``train_textual_inversion_XTI.py`` ``save_weights``.
    """
    vectors = dict(zip(codes, vectors_KND, strict=True))
    save_embedding(path, vectors, metadata=metadata, dtype=dtype)


def read_xti(path: str | os.PathLike, *, codes: Sequence[str] = SD_LAYER_CODES) -> Tensor:
    """Vectors ``(K, N, D)`` of an XTI file in the order of ``codes``, in float32.

    Args:
        path: ``.safetensors``, or a pickle as kohya writes it.
        codes: the layers of the U-Net, from ``layer_codes``.

    Raises:
        UserError: damaged or missing, or the file's layers are not those of the U-Net.

    Source: sd-scripts ``gen_img_diffusers.py``, option ``--XTI_embeddings``.
    """
    tensors = _read(path)
    if tensors.keys() != set(codes):
        beside = all_layers_file(Path(path))
        raise UserError(
            f"{path} holds {len(tensors)} tensors{_some(tensors)}, an XTI file for this U-Net has "
            f"one for each of its {len(codes)} cross-attention layers ({', '.join(codes)}): "
            f"use {beside if beside.is_file() else 'such a file'}"
        )
    vectors = [_checked_vectors(path, code, tensors[code]) for code in codes]
    if len({vectors_ND.shape for vectors_ND in vectors}) != 1:
        raise UserError(f"{path}: its layers differ in shape: is the file complete?")
    return torch.stack(vectors)


def read_vectors(path: str | os.PathLike, *, codes: Sequence[str] = ()) -> Tensor:
    """Vectors of an ordinary embedding ``(N, D)``, or ``(K, N, D)`` of a file with several tensors.

    Args:
        path: of either kind.
        codes: layers of the U-Net; where they are not known yet, the file's own.

    Raises:
        UserError: as :func:`read_embedding` and :func:`read_xti`.
    """
    tensors = _read(path)
    if len(tensors) == 1 or tensors.keys() == SDXL_KEYS:
        return read_embedding(path)
    return read_xti(path, codes=codes or list(tensors))


def all_layers_file(average: Path) -> Path:
    """The XTI file that belongs to an average: ``my_dog_xti.safetensors`` beside ``my_dog``."""
    return average.with_name(f"{average.stem}{ALL_LAYERS}{average.suffix}")


def layer_average(vectors_KND: Tensor) -> Tensor:
    """One embedding for all layers, ``(K, N, D) -> (N, D)``, which WebUIs can use."""
    return vectors_KND.mean(dim=0)


# --- tensors of any of these files --------------------------------------------------------------


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors by key; those of A1111's files by token."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of an embedding file")
    with _parameter_dicts_allowed():
        tensors = read_weights(path)
        if not tensors and path.suffix.lower() in PICKLE_SUFFIXES:
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors = _string_to_param(content)
    if not tensors:
        raise UserError(f"{path} holds no tensors: use an embedding file")
    return tensors


def _parameter_dicts_allowed():
    """Embeddings of 2022 are in a ``ParameterDict``, which runs no code when read."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    return safe_globals([nn.ParameterDict]) if safe_globals else nullcontext()


def _string_to_param(content: Mapping) -> dict[str, Tensor]:
    vectors = content.get("string_to_param")
    if isinstance(vectors, nn.ParameterDict):
        # Not items(): those written by old versions of PyTorch lack the list of keys.
        vectors = dict(vectors.named_parameters(recurse=False))
    if not isinstance(vectors, dict):
        return {}
    return {str(key): value for key, value in vectors.items() if isinstance(value, Tensor)}


def _checked_vectors(path: str | os.PathLike, key: str, vectors: Tensor) -> Tensor:
    if vectors.ndim not in (1, 2) or not vectors.numel() or not vectors.is_floating_point():
        raise UserError(
            f"{path}: {key} has shape {tuple(vectors.shape)} and dtype {vectors.dtype}, "
            "an embedding has (vectors, width) and floating point values: use an embedding file"
        )
    if not torch.isfinite(vectors).all():
        raise UserError(
            f"{path}: {key} holds NaN or infinity; "
            "use an earlier save and train again with a lower learning rate"
        )
    return torch.atleast_2d(vectors.detach()).float()


def _some(tensors: Mapping[str, Tensor], *, limit: int = 3) -> str:
    names = ", ".join(list(tensors)[:limit])
    return f" ({names}{', ...' if len(tensors) > limit else ''})" if tensors else ""
