"""Readings: what the untouched text encoder tells the contextualizer about a hidden word.

The word that was hidden is one of many that fit, and no text encoder can tell which; asked for it,
the term mostly passes on this noise. A reading is the question without the noise: the same prompt
with the class word in the concept's place, the same words hidden, and the distribution that the
contextualizer then gives for each. The term compares distributions (``mlm_target = class``), so it
is zero while the concept leaves its sentence alone.

Readings are taken before anything is trained, and kept as vectors: the training holds no second
text encoder. Shapes: B prompts, L tokens, D width, N hidden tokens.

Source of soft targets: Hinton et al. 2015, arXiv 1503.02531; that a class word is what a concept
should behave like among other words: CoRe, arXiv 2408.15914.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_plugin.mlm.contextualizer import Contextualizer, places_of
from mlm_plugin.mlm.joint_prompts import PromptPair
from mlm_plugin.mlm.mask_token import mask_embedding
from mlm_plugin.mlm.masking import (
    IGNORE_INDEX,
    MaskedTokens,
    MaskingVocabulary,
    mask_tokens,
    tokens_before_padding,
)
from mlm_plugin.models.text_encoder import TextEncoder

__all__ = ["Reading", "moved_onto", "take_readings"]

BATCH_SIZE = 32


class Reading(NamedTuple):
    """A prompt of the class word with hidden words, and what was read at them."""

    text: str  # with the concept
    ids: list[int]  # with the class word, up to its EOS
    masked_ids: list[int]  # the same with MASK_ID where a token was hidden
    labels: list[int]  # hidden ids, IGNORE_INDEX elsewhere
    vectors_ND: Tensor  # the contextualizer's answers, in the order of the hidden tokens


@torch.no_grad()
def take_readings(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    pairs: Sequence[PromptPair],
    *,
    vocabulary: MaskingVocabulary,
    mlm_probability: float,
    replace: str,
    rng: random.Random,
) -> list[Reading]:
    """One reading of each prompt.

    Args:
        text_encoder: as it came.
        contextualizer: made for it, on its device.
        pairs: prompts.
        vocabulary: what is never hidden.
        mlm_probability: share of the context words to hide.
        replace: ``"mask"`` or ``"bert"``, as in :func:`mask_tokens`.
        rng: source of the masks.
    """
    readings = []
    for start in range(0, len(pairs), BATCH_SIZE):
        batch = pairs[start : start + BATCH_SIZE]
        ids_BL = text_encoder.tokenize_trimmed([pair.class_text for pair in batch])
        masked = mask_tokens(
            ids_BL, vocabulary, mlm_probability=mlm_probability, rng=rng, replace=replace
        )
        is_token_BL = tokens_before_padding(ids_BL, vocabulary.eos_token_id)
        vectors_ND = _read(text_encoder, contextualizer, masked, is_token_BL)
        read = vectors_ND.split((masked.labels != IGNORE_INDEX).sum(dim=1).tolist())
        lengths = is_token_BL.sum(dim=1).tolist()
        for row, pair in enumerate(batch):
            ids, masked_ids, labels = (
                tensor[row, : lengths[row]].tolist() for tensor in (ids_BL, *masked)
            )
            readings.append(Reading(pair.text, ids, masked_ids, labels, read[row]))
    return readings


def moved_onto(reading: Reading, ids_L: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Hide the same words in the prompt that holds the concept.

    Args:
        reading: of the prompt with the class word.
        ids_L: of the prompt with the concept, padding included.

    Returns:
        masked ids and labels, as long as ``ids_L``, and which of the N hidden tokens are there: the
        longer of two prompts may be cut off at its end.
    """
    masked, labels, found = list(ids_L), [IGNORE_INDEX] * len(ids_L), []
    hidden = (place for place, label in enumerate(reading.labels) if label != IGNORE_INDEX)
    number_of = {place: number for number, place in enumerate(hidden)}
    for start, our_start, size in SequenceMatcher(
        None, reading.ids, ids_L, autojunk=False
    ).get_matching_blocks():
        for place in range(start, start + size):
            if place in number_of:
                ours = our_start + place - start
                masked[ours], labels[ours] = reading.masked_ids[place], reading.labels[place]
                found.append(number_of[place])
    return masked, labels, found


def _read(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    masked: MaskedTokens,
    is_token_BL: Tensor,
) -> Tensor:
    """``(N, D)``, in fp32 on the CPU."""
    device = text_encoder.token_embedding.weight.device
    with mask_embedding(text_encoder.token_embedding, contextualizer.mask_vector):
        hidden_BLD = text_encoder.encode(masked.input_ids)
    places_N = places_of(masked.labels).to(device)
    vectors_ND = contextualizer.read(hidden_BLD, is_token_BL.to(device), places_N)
    return vectors_ND.float().cpu()
