"""[MASK] without a vocabulary entry: a hook puts a vector where the ids say MASK_ID.

The vocabulary is not resized: added rows would move pooling, exports and frozen-row rules of the
hosts. The hook lives only inside the context manager.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mlm_plugin.mlm.masking import MASK_ID

__all__ = ["mask_embedding"]


@contextmanager
def mask_embedding(embedding: nn.Embedding, mask_vector_D: Tensor) -> Iterator[None]:
    """Let ``embedding`` answer MASK_ID with ``mask_vector_D`` while the block runs.

    Args:
        embedding: the text encoder's token embedding layer.
        mask_vector_D: the [MASK] vector, shape ``(D,)``; gradients reach it.
    """
    is_mask: list[Tensor] = []

    def hide(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        is_mask.append(args[0] == MASK_ID)
        return (args[0].clamp(min=0), *args[1:])

    def reveal(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where(is_mask.pop()[..., None], mask_vector_D.to(output), output)

    handles = [embedding.register_forward_pre_hook(hide), embedding.register_forward_hook(reveal)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
