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
from mlm_plugin.mlm.losses import divergence
from mlm_plugin.mlm.masking import MASK_ID, MaskingVocabulary
from mlm_plugin.mlm.next_word import NextWordHead

__all__ = ["EncoderHandle", "PromptTarget", "Variants", "mask_embedding"]


class PromptTarget(NamedTuple):
    """A prompt with the concept, and what the untrained model makes of the words around it."""

    ids: list[int]  # up to EOS, MASK_ID where a token is masked
    labels: list[int]  # ids of the N tokens that are compared, IGNORE_INDEX elsewhere
    # on the CPU: states, or the features that a contextualizer or a language model's head makes
    teacher_ND: Tensor | None = None
    # before training, for each of K starts: states (K, N, D), or the divergence (K, N)
    starts: Tensor | None = None
    states_LD: Tensor | None = None  # of this prompt, where the encoder is frozen; on the CPU


class Variants(NamedTuple):
    """Prompts as a method encodes them.

    Attributes:
        ids_BL: B prompts, or several times as many.
        layers_B: the cross-attention layer that each is for; ``None`` = for all of them.
    """

    ids_BL: Tensor
    layers_B: Tensor | None = None


def _as_they_are(ids_BL: Tensor, _rng: random.Random) -> Variants:
    return Variants(ids_BL)


def _alone(ids_BL: Tensor) -> Sequence[Tensor]:
    return (ids_BL,)


@dataclass
class EncoderHandle:
    """One text encoder of a host, as the regularizer sees it.

    Attributes:
        tokenize: prompts to ids ``(B, L)`` on the CPU, padded to the longest.
        encode: ids ``(B, L)`` to the states that the U-Net is conditioned on, ``(B, L, D)``.
        embedding: the encoder's token embedding layer, which gets the mask vector by a hook.
        vocabulary: word ends, and the words that are never masked.
        pad_token_id: what prompts are padded with.
        device: where the term is computed.
        contextualizer: pretrained for this encoder, frozen here. Without it and without ``head``
            states are compared (``mlm_target = states``).
        token_table: ``(V, D)``, frozen output table of the contextualizer.
        head: of a causal language model, which reads itself.
        targets: prompts with what the untrained model makes of them. Without them fresh prompts
            are drawn, and the masked words themselves are the targets.
        vary: variants of encoded prompts (XTI), drawn from the given stream.
        starts: ids of the variants that differ before training, by layer; one where none do.
        is_trained: whether anything before this encoder's output is trained.
        is_read: whether the term reads that output itself, besides what the U-Net makes of it.
        is_in_image_model: whether its output is a state inside the image model.
    """

    tokenize: Callable[[list[str]], Tensor]
    encode: Callable[[Tensor], Tensor]
    embedding: nn.Embedding
    vocabulary: MaskingVocabulary
    pad_token_id: int
    device: torch.device
    contextualizer: Contextualizer | None = None
    token_table: Tensor | None = None
    head: NextWordHead | None = None
    targets: Sequence[PromptTarget] = ()
    vary: Callable[[Tensor, random.Random], Variants] = _as_they_are
    starts: Callable[[Tensor], Sequence[Tensor]] = _alone
    is_trained: bool = True
    is_read: bool = True
    is_in_image_model: bool = False

    def __post_init__(self):
        if self.contextualizer is not None:
            self.contextualizer.require_trained()
            self.contextualizer.requires_grad_(False).eval()
            assert not self.token_table.requires_grad, "the output table must be frozen"

    @property
    def reader(self) -> Contextualizer | NextWordHead | None:
        """What turns states into words; ``None`` where the states themselves are compared."""
        return self.head or self.contextualizer

    def divergence(self, features_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        """``KL(q_i || p_i)`` of the reader, ``(N,)``; q from the teacher's features."""
        if self.head is not None:
            return self.head.divergence(features_ND, teacher_ND)
        logits = (
            self.contextualizer.logits(x, self.token_table) for x in (features_ND, teacher_ND)
        )
        return divergence(*logits)

    def encode_masked(self, masked_ids_BL: Tensor) -> Tensor:
        """States ``(B, L, D)`` of ids that may hold MASK_ID."""
        ids_BL = masked_ids_BL.to(self.device, non_blocking=True)
        if self.contextualizer is None:
            return self.encode(ids_BL)
        with mask_embedding(self.embedding, self.contextualizer.mask_vector):
            return self.encode(ids_BL)


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
