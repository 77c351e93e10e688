"""Teacher targets: what the contextualizer predicts from the untrained text encoder.

The masked word is one of many that fit, and no text encoder can tell which one it was. As a target
it is mostly noise. The teacher removes the noise: it sees the same prompt with the class word in
place of the concept and the same words masked. The target is the distribution that the
contextualizer then predicts for each masked word (``mlm_target = class``).

Targets are computed before anything is trained, and kept as vectors, so that training needs no
second text encoder in memory.

Source: soft targets from Hinton et al. 2015, arXiv 1503.02531; the class word as what a concept
should behave like among other words from CoRe, arXiv 2408.15914.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from mlm_plugin.mlm.encoder import EncoderHandle, TeacherTarget
from mlm_plugin.mlm.losses import masked_positions
from mlm_plugin.mlm.masking import (
    IGNORE_INDEX,
    MaskedTokens,
    mask_tokens,
    prompt_attention_mask,
)
from mlm_plugin.mlm.prompts import PromptPair

__all__ = ["align_to_prompt", "compute_teacher_targets"]

BATCH_SIZE = 32


@torch.no_grad()
def compute_teacher_targets(
    encoder: EncoderHandle,
    pairs: Sequence[PromptPair],
    *,
    mlm_probability: float,
    replace: str,
    rng: random.Random,
) -> list[TeacherTarget]:
    """Compute one target for each prompt.

    Args:
        encoder: untrained.
        pairs: prompts with the concept and with the class word.
        mlm_probability: share of the context words to mask.
        replace: ``"mask"`` or ``"bert"``, as in :func:`mask_tokens`.
        rng: source of the masks.
    """
    targets = []
    for start in range(0, len(pairs), BATCH_SIZE):
        batch = pairs[start : start + BATCH_SIZE]
        ids_BL = encoder.tokenize([pair.class_text for pair in batch], rng)
        masked = mask_tokens(
            ids_BL, encoder.vocabulary, mlm_probability=mlm_probability, rng=rng, replace=replace
        )
        attention_mask_BL = prompt_attention_mask(ids_BL, encoder.vocabulary.eos_token_id)
        features_ND = _features(encoder, masked, attention_mask_BL)
        by_prompt = features_ND.split((masked.labels != IGNORE_INDEX).sum(dim=1).tolist())
        lengths = attention_mask_BL.sum(dim=1).tolist()
        for row, pair in enumerate(batch):
            ids, masked_ids, labels = (
                tensor[row, : lengths[row]].tolist() for tensor in (ids_BL, *masked)
            )
            targets.append(TeacherTarget(pair.text, ids, masked_ids, labels, by_prompt[row]))
    return targets


def _features(encoder: EncoderHandle, masked: MaskedTokens, attention_mask_BL: Tensor) -> Tensor:
    """``(N, D)``, in fp32 on the CPU."""
    features_ND = encoder.contextualizer.features(
        encoder.encode_masked(masked.input_ids),
        attention_mask_BL.to(encoder.device),
        masked_positions(masked.labels).to(encoder.device),
    )
    return features_ND.float().cpu()


def align_to_prompt(
    target: TeacherTarget, ids_L: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Mask the same words in the prompt with the concept.

    Args:
        target: the target of the prompt with the class word.
        ids_L: ids of the prompt with the concept, padding included.

    Returns:
        masked ids and labels, as long as ``ids_L``, and which of the N masked tokens were found:
        the longer of two prompts may be truncated.
    """
    masked, labels, found = list(ids_L), [IGNORE_INDEX] * len(ids_L), []
    positions = (position for position, label in enumerate(target.labels) if label != IGNORE_INDEX)
    number_of = {position: number for number, position in enumerate(positions)}
    for start, our_start, size in SequenceMatcher(
        None, target.class_ids, ids_L, autojunk=False
    ).get_matching_blocks():
        for position in range(start, start + size):
            if position in number_of:
                ours = our_start + position - start
                masked[ours], labels[ours] = target.masked_ids[position], target.labels[position]
                found.append(number_of[position])
    return masked, labels, found
