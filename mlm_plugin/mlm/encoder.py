"""A handle on one text encoder: everything the regularizer needs from it, whatever the host.

The vocabulary is not resized for [MASK]: additional embeddings would shift pooling, exports and the
hosts' rules about frozen weights. A hook on the embedding layer puts the mask vector in place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.mlm.contextualizer import Contextualizer
from mlm_plugin.mlm.masking import MASK_ID, MaskingVocabulary

__all__ = ["EncoderHandle", "TeacherTarget", "mask_embedding"]


class TeacherTarget(NamedTuple):
    """A masked prompt with the class word, and the teacher's predictions at its masked tokens."""

    text: str  # with the concept
    class_ids: list[int]  # with the class word, up to its EOS
    masked_ids: list[int]  # the same with MASK_ID where a token was masked
    labels: list[int]  # masked ids, IGNORE_INDEX elsewhere
    teacher_ND: Tensor  # the contextualizer's features, in the order of the masked tokens


@dataclass
class EncoderHandle:
    """One text encoder of a host, as the regularizer sees it.

    Attributes:
        tokenize: prompts to ids ``(B, L)`` on the CPU, padded to the longest. The random stream is
            for encoders that encode a prompt in several ways (XTI); B may then be a multiple.
        encode: ids ``(B, L)`` to the states that the U-Net is conditioned on, ``(B, L, D)``.
        embedding: the encoder's token embedding layer, which gets the mask vector by a hook.
        contextualizer: pretrained for this encoder; frozen here.
        vocabulary: word ends, and the words that are never masked.
        token_table: ``(V, D)``, frozen output table; a copy where the host trains the embeddings.
        teacher_targets: predictions from the untrained encoder, with the class word. Without them
            the masked words themselves are the targets.
    """

    tokenize: Callable[[list[str], random.Random], Tensor]
    encode: Callable[[Tensor], Tensor]
    embedding: nn.Embedding
    contextualizer: Contextualizer
    vocabulary: MaskingVocabulary
    token_table: Tensor
    teacher_targets: Sequence[TeacherTarget] = ()

    def __post_init__(self):
        self.contextualizer.require_trained()
        self.contextualizer.requires_grad_(False).eval()
        assert not self.token_table.requires_grad, "the output table must be frozen"

    @property
    def device(self) -> torch.device:
        """Where the text encoder is."""
        return self.token_table.device

    def encode_masked(self, masked_ids_BL: Tensor) -> Tensor:
        """States ``(B, L, D)`` of ids that hold MASK_ID."""
        with mask_embedding(self.embedding, self.contextualizer.mask_vector):
            return self.encode(masked_ids_BL.to(self.device, non_blocking=True))


@contextmanager
def mask_embedding(embedding: nn.Embedding, mask_vector_D: Tensor) -> Iterator[None]:
    """Let ``embedding`` map MASK_ID to ``mask_vector_D`` inside the block.

    Args:
        embedding: the text encoder's token embedding layer.
        mask_vector_D: the [MASK] vector, shape ``(D,)``; gradients reach it.
    """
    is_mask: list[Tensor] = []

    def replace_mask_id(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        is_mask.append(args[0] == MASK_ID)
        return (args[0].clamp(min=0), *args[1:])

    def insert_mask_vector(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where(is_mask.pop()[..., None], mask_vector_D.to(output), output)

    handles = [
        embedding.register_forward_pre_hook(replace_mask_id),
        embedding.register_forward_hook(insert_mask_vector),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
