"""Anchors: distances of the text encoder's states from the untrained ones, as published.

Symbols: ``h`` states of the encoder being trained, ``g`` of the untrained one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_anchor", "context_anchor", "encoder_anchor", "positions_outside"]

PositionPairs = tuple[list[int], list[int]]


def context_anchor(
    states_BLD: Tensor, frozen_BMD: Tensor, positions: Sequence[PositionPairs]
) -> Tensor:
    """``mean_i 1 - cos(h_i, g_i)`` over the tokens around the concept.

    Args:
        states_BLD: h of prompts with the concept.
        frozen_BMD: g of the same prompts with the class word.
        positions: for each prompt the positions i in h and in g, from
            :func:`positions_outside`.

    Source: CoRe, arXiv 2408.15914, equation 3, with the cosine over the width.
    """
    parts = [
        1 - F.cosine_similarity(states_LD[ours], frozen_MD[theirs], dim=-1)
        for states_LD, frozen_MD, (ours, theirs) in zip(
            states_BLD, frozen_BMD, positions, strict=True
        )
    ]
    return torch.cat(parts).mean()


def encoder_anchor(states_BLD: Tensor, frozen_BLD: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """``mean_i 1 - cos(h_i, g_i)`` over all tokens of prompts without the concept.

    Source: TextBoost, arXiv 2409.08248, knowledge preservation loss.
    """
    return (1 - F.cosine_similarity(states_BLD, frozen_BLD, dim=-1))[attention_mask_BL].mean()


def class_anchor(pooled_BD: Tensor, frozen_BD: Tensor) -> Tensor:
    """``mean 1 - cos(h_EOS, g_EOS)``: whole prompts with the concept against the class word.

    Source: ClassDiffusion, arXiv 2405.17532, semantic preservation loss.
    """
    return (1 - F.cosine_similarity(pooled_BD, frozen_BD, dim=-1)).mean()


def positions_outside(
    ids_L: Sequence[int], concept_ids: Sequence[int], num_class_tokens: int
) -> PositionPairs:
    """Positions of the tokens outside the concept, in its prompt and in that of the class word.

    Args:
        ids_L: the prompt with the concept, up to its EOS.
        concept_ids: the concept, without BOS and EOS.
        num_class_tokens: length of the class word, which replaces the concept in the other prompt.
    """
    length = len(concept_ids)
    starts = range(len(ids_L) - length + 1)
    start = next(i for i in starts if list(ids_L[i : i + length]) == list(concept_ids))
    ours = [*range(start), *range(start + length, len(ids_L))]
    shift = num_class_tokens - length
    return ours, [i if i < start else i + shift for i in ours]
