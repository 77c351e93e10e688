"""Files of Custom Diffusion: the cross-attention keys and values, whole or as a LoRA.

The whole matrices are in the format of diffusers' ``CustomDiffusionAttnProcessor``. They load by

    pipeline.unet.load_attn_procs(folder, weight_name=name, _pipeline=pipeline)

Without ``_pipeline`` diffusers (0.32 and 0.42) reads the file but does not apply it.
WebUIs do not support such files, but can use a LoRA of the change. Knows nothing about training and
the modifier token, whose embeddings are in a file of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mlm_plugin.errors import UserError
from mlm_plugin.models.key_values import MATRICES
from mlm_plugin.models.weights_files import for_file, read_weights, write_weights
from mlm_plugin.networks.kohya_names import unet_name

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "LowRankDelta",
    "LowRankFactors",
    "delta_to_lora",
    "low_rank_factors",
    "read_delta",
    "save_delta",
    "verify_delta",
]

PROCESSOR = ".processor"
_MATRIX_KEY = re.compile(r"(?P<layer>.+)\.processor\.(?P<matrix>to_[kv])_custom_diffusion\.weight")


class LowRankFactors(NamedTuple):
    """A matrix of low rank, ``up @ down``, that approximates another.

    Attributes:
        up: ``(O, R)``.
        down: ``(R, I)``.
        energy: share of the other's squared Frobenius norm that is kept; 1 if that norm is 0.
        squared_norm: that squared norm.
    """

    up: Tensor
    down: Tensor
    energy: float
    squared_norm: float


class LowRankDelta(NamedTuple):
    """The change made by a training, as a LoRA.

    Attributes:
        state: fp32 tensors under kohya's keys; alpha is the rank, so the scale is 1.
        energy: share of the squared Frobenius norm of all changes together that is kept.
        rank: rank of every matrix.
    """

    state: dict[str, Tensor]
    energy: float
    rank: int


def save_delta(
    path: str | os.PathLike,
    weights: Mapping[str, Tensor],
    *,
    unet: UNet2DConditionModel,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write trained keys and values for ``load_attn_procs``, completely or not at all.

    Args:
        path: final name, ``.safetensors``.
        weights: ``attn2.to_k.weight`` and ``attn2.to_v.weight`` of every cross-attention layer, by
            module name in the U-Net.
        unet: the U-Net they belong to; its layers are named in the file.
        metadata: strings.
        dtype: every tensor is cast to it; ``None`` keeps the dtypes.

    Source: diffusers ``loaders/unet.py`` ``_process_custom_diffusion``. It expects an entry for
    every attention layer, ``{}`` for one without its own weights; safetensors files of diffusers
    leave these out and cannot be read back. Here a tensor of length 0 replaces ``{}``.
    """
    layers = [name.removesuffix(PROCESSOR) for name in unet.attn_processors]
    assert weights.keys() == set(_matrix_names(layers)), "the weights are not those of this U-Net"
    tensors = {}
    for layer in layers:
        if not _is_cross_attention(layer):
            tensors[f"{layer}{PROCESSOR}"] = torch.empty(0, dtype=dtype)
    for name, tensor in weights.items():
        layer, matrix, _ = name.rsplit(".", 2)
        key = f"{layer}{PROCESSOR}.{matrix}_custom_diffusion.weight"
        tensors[key] = for_file(tensor, dtype)
    write_weights(path, tensors, metadata={"format": "pt", **metadata})


def read_delta(path: str | os.PathLike) -> dict[str, Tensor]:
    """The trained keys and values of a file by module name, as :func:`save_delta` took them.

    Reads diffusers' ``pytorch_custom_diffusion_weights.bin`` too.

    Raises:
        UserError: the file is missing, damaged or has other weights, or a layer has only one of its
            two matrices.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the weights of a Custom Diffusion training"
        )
    weights = {}
    for key, tensor in read_weights(path).items():
        if tensor.numel() == 0:  # a layer without weights of its own
            continue
        found = _MATRIX_KEY.fullmatch(key)
        if found is None:
            raise UserError(
                f"{path}: {key} is not a key or value matrix of Custom Diffusion; "
                "expected a file with ...attn2.processor.to_k_custom_diffusion.weight and to_v only"
            )
        weights[f"{found['layer']}.{found['matrix']}.weight"] = tensor
    layers = {name.rsplit(".", 2)[0] for name in weights}
    missing = sorted(
        f"{layer}.{matrix}.weight"
        for layer in layers
        for matrix in MATRICES
        if f"{layer}.{matrix}.weight" not in weights
    )
    if missing or not weights:
        lacks = missing[0] if missing else "any matrix"
        raise UserError(f"{path}: lacks {lacks}; use another save of the training")
    return weights


def verify_delta(path: str | os.PathLike) -> int:
    """Read a saved file back and check it.

    Returns:
        The number of cross-attention layers.

    Raises:
        UserError: a value is not finite, or as for :func:`read_delta`.
    """
    weights = read_delta(path)
    _refuse_broken(weights, place=str(path))
    return len(weights) // len(MATRICES)


def low_rank_factors(matrix_OI: Tensor, rank: int) -> LowRankFactors:
    """The nearest matrix of a rank (Eckart and Young): ``U_R S_R V_R^T``, as two factors.

    Both factors get the square roots of the singular values. If the matrix has fewer than ``rank``
    of them, the factors are padded with zeros.
    """
    left, values, right = torch.linalg.svd(matrix_OI.float(), full_matrices=False)
    roots = values[:rank].sqrt()
    fill = rank - len(roots)
    squares = values.double().square()
    squared_norm = squares.sum().item()
    return LowRankFactors(
        up=F.pad(left[:, :rank] * roots, (0, fill)),
        down=F.pad(roots[:, None] * right[:rank], (0, 0, 0, fill)),
        energy=squares[:rank].sum().item() / squared_norm if squared_norm else 1.0,
        squared_norm=squared_norm,
    )


@torch.no_grad()
def delta_to_lora(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor], *, rank: int
) -> LowRankDelta:
    """The change of every matrix as a LoRA, by truncated singular value decomposition in fp32.

    Args:
        base: matrices before training, by module name with ``.weight``; others are ignored.
        trained: the same matrices after it.
        rank: rank of every matrix in the file, limited to the maximum of the largest matrix. It is
            the same for all because diffusers 0.32 scales files of mixed ranks wrongly.

    Raises:
        UserError: ``rank`` below 1, or values that are not finite.

    Source: Custom Diffusion (arXiv 2212.04488) compresses its weights by the same decomposition
    and keeps a share of the singular values; here the rank is given and the energy reported.
    """
    if rank < 1:
        raise UserError(f"rank = {rank}: expected 1 or more")
    _refuse_broken(trained, place="the trained keys and values")
    rank = min(rank, max(min(matrix.shape) for matrix in trained.values()))
    state: dict[str, Tensor] = {}
    total = kept = 0.0
    for name, matrix in trained.items():
        module = name.removesuffix(".weight")
        delta = matrix.float() - base[name].to(matrix.device).float()
        factors = low_rank_factors(delta, rank)
        total += factors.squared_norm
        kept += factors.energy * factors.squared_norm
        lora = unet_name(module)
        state[f"{lora}.alpha"] = torch.tensor(float(rank))
        state[f"{lora}.lora_down.weight"] = factors.down.contiguous()
        state[f"{lora}.lora_up.weight"] = factors.up.contiguous()
    return LowRankDelta(state=state, energy=kept / total if total else 1.0, rank=rank)


def _is_cross_attention(layer: str) -> bool:
    return layer.endswith(".attn2")


def _matrix_names(layers: list[str]) -> Iterator[str]:
    for layer in filter(_is_cross_attention, layers):
        for matrix in MATRICES:
            yield f"{layer}.{matrix}.weight"


def _refuse_broken(weights: Mapping[str, Tensor], *, place: str) -> None:
    broken = sorted(name for name, tensor in weights.items() if not tensor.isfinite().all())
    if broken:
        raise UserError(
            f"{place}: {len(broken)} of {len(weights)} matrices hold NaN or infinity, "
            f"e.g. {broken[0]}; use an earlier save and train again with a lower learning rate"
        )
