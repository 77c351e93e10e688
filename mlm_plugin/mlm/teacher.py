"""Teacher targets: what the untrained model makes of the words around the concept.

The masked word is one of many that fit, and no text encoder can tell which one it was. As a target
it is mostly noise. A teacher removes the noise. The target is then what the contextualizer predicts
for each masked word from the untrained text encoder, or what a language model predicts for the next
word (``mlm_target = class``), or the states of that encoder themselves (``mlm_target = states``).

Targets are computed before anything is trained, and kept as vectors, so that training needs no
second text encoder in memory. Where the text encoder stays frozen, its states of the prompts are
kept as well, and training needs no text encoder at all.

Source: soft targets from Hinton et al. 2015, arXiv 1503.02531; the class word as what a concept
should behave like among other words from CoRe, arXiv 2408.15914.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_plugin.mlm.encoder import EncoderHandle, PromptTarget
from mlm_plugin.mlm.losses import masked_positions
from mlm_plugin.mlm.masking import (
    IGNORE_INDEX,
    MaskedTokens,
    MaskingVocabulary,
    mask_tokens,
    prompt_attention_mask,
)
from mlm_plugin.mlm.prompts import PromptPair

__all__ = [
    "MaskSettings",
    "align_to_prompt",
    "compared_tokens",
    "compute_targets",
    "context_labels",
    "padded",
]

BATCH_SIZE = 32


class MaskSettings(NamedTuple):
    """How words are masked: see :func:`mask_tokens`."""

    mlm_probability: float
    replace: str


@torch.no_grad()
def compute_targets(
    encoder: EncoderHandle,
    pairs: Sequence[PromptPair],
    rng: random.Random,
    *,
    masks: MaskSettings,
    with_teacher: bool = True,
) -> list[PromptTarget]:
    """Compute one target for each pair.

    An encoder with a contextualizer gets masked words and predictions for them, one with a head the
    words after the concept and predictions of the next ones; one without either gets all words
    around the concept and their states. Those of a frozen encoder are kept, so that it is not
    needed any more.

    Args:
        encoder: untrained; placeholders may have embeddings of their own already.
        pairs: prompts with the concept, and with the class word instead.
        rng: source of the masks.
        masks: share of the context words to mask, and what replaces them.
        with_teacher: false where the masked words themselves are the targets.
    """
    targets = []
    for first in range(0, len(pairs), BATCH_SIZE):
        batch = pairs[first : first + BATCH_SIZE]
        prompts_BL, teacher_BL = (
            encoder.tokenize(list(texts)) for texts in zip(*batch, strict=True)
        )
        masked = compared_tokens(encoder, teacher_BL, masks, rng)
        aligned = [
            align_to_prompt(_up_to_eos(prompt, encoder), _up_to_eos(teacher, encoder), one)
            for prompt, teacher, one in zip(
                prompts_BL, teacher_BL, map(MaskedTokens, *masked), strict=True
            )
        ]
        found = [PromptTarget(ids, labels) for ids, labels, _ in aligned]
        ours = padded(found, encoder.pad_token_id)
        if with_teacher or not encoder.is_trained:
            starts = [encoder.encode_masked(ids_BL) for ids_BL in encoder.starts(ours.input_ids)]
        if with_teacher:
            states_of_teacher = encoder.encode_masked(masked.input_ids)
            of_teacher = _vectors(encoder, teacher_BL, masked, states_of_teacher)
            before = zip(
                *(_vectors(encoder, prompts_BL, ours, states_BLD) for states_BLD in starts),
                strict=True,
            )
            found = [
                _with_teacher(encoder, target, teacher_ND[rows], before_KND)
                for target, teacher_ND, before_KND, (_, _, rows) in zip(
                    found, of_teacher, before, aligned, strict=True
                )
            ]
        if not encoder.is_trained:
            found = [
                target._replace(states_LD=states_LD[: len(target.ids)].clone())
                for target, states_LD in zip(found, starts[0].cpu(), strict=True)
            ]
        targets += found
    return targets


def padded(targets: Sequence[PromptTarget], pad_token_id: int) -> MaskedTokens:
    """Masked ids and labels of several targets, both ``(B, L)``."""
    length = max(len(target.ids) for target in targets)
    return MaskedTokens(
        torch.tensor([t.ids + [pad_token_id] * (length - len(t.ids)) for t in targets]),
        torch.tensor([t.labels + [IGNORE_INDEX] * (length - len(t.ids)) for t in targets]),
    )


def labels_after(ids_BL: Tensor, vocabulary: MaskingVocabulary) -> Tensor:
    """The ids themselves at the words after the concept, ``(B, L)``, where it can be heard."""
    labels_BL = torch.full_like(ids_BL, IGNORE_INDEX)
    for row, ids in enumerate(ids_BL.tolist()):
        for start, end in vocabulary.words_after(ids):
            labels_BL[row, start:end] = ids_BL[row, start:end]
    return labels_BL


def context_labels(ids_BL: Tensor, vocabulary: MaskingVocabulary) -> Tensor:
    """The ids themselves at the words around the concept and at EOS, ``(B, L)``.

    BOS and the host's prefix are left out: a causal encoder gives them the same states in every
    prompt.
    """
    labels_BL = torch.full_like(ids_BL, IGNORE_INDEX)
    for row, ids in enumerate(ids_BL.tolist()):
        for start, end in vocabulary.split_words(ids):
            if tuple(ids[start:end]) not in vocabulary.protected:
                labels_BL[row, start:end] = ids_BL[row, start:end]
        if vocabulary.has_eos and vocabulary.eos_token_id in ids:
            labels_BL[row, ids.index(vocabulary.eos_token_id)] = vocabulary.eos_token_id
    return labels_BL


def align_to_prompt(
    prompt_ids: Sequence[int], teacher_ids: Sequence[int], masked: MaskedTokens
) -> tuple[list[int], list[int], list[int]]:
    """Mask or mark the same words in the prompt with the concept.

    Args:
        prompt_ids: the prompt with the concept.
        teacher_ids: the teacher's prompt.
        masked: masked ids and labels of the latter, ``(L,)``.

    Returns:
        masked ids and labels, as long as ``prompt_ids``, and which of the N labelled tokens were
        found: the longer of two prompts may be truncated.
    """
    masked_ids, labels_L = masked.input_ids.tolist(), masked.labels.tolist()
    ids, labels, found = list(prompt_ids), [IGNORE_INDEX] * len(prompt_ids), []
    positions = (position for position, label in enumerate(labels_L) if label != IGNORE_INDEX)
    number_of = {position: number for number, position in enumerate(positions)}
    for start, our_start, size in SequenceMatcher(
        None, teacher_ids, prompt_ids, autojunk=False
    ).get_matching_blocks():
        for position in range(start, start + size):
            if position in number_of:
                ours = our_start + position - start
                ids[ours], labels[ours] = masked_ids[position], labels_L[position]
                found.append(number_of[position])
    return ids, labels, found


def compared_tokens(
    encoder: EncoderHandle, ids_BL: Tensor, masks: MaskSettings, rng: random.Random
) -> MaskedTokens:
    """Masked words for a contextualizer; otherwise words around the concept, as they are."""
    if encoder.head is not None:
        return MaskedTokens(ids_BL, labels_after(ids_BL, encoder.vocabulary))
    if encoder.contextualizer is None:
        return MaskedTokens(ids_BL, context_labels(ids_BL, encoder.vocabulary))
    return mask_tokens(ids_BL, encoder.vocabulary, rng=rng, **masks._asdict())


def _with_teacher(
    encoder: EncoderHandle, target: PromptTarget, teacher_ND: Tensor, before_KND: tuple[Tensor, ...]
) -> PromptTarget:
    """The target with the teacher's vectors, and the prompt's own distance before training."""
    starts = before_KND
    if encoder.reader is not None:
        on_device_ND = teacher_ND.to(encoder.device)
        starts = tuple(
            encoder.divergence(before_ND.to(encoder.device), on_device_ND).cpu()
            for before_ND in before_KND
        )
    return target._replace(teacher_ND=teacher_ND.clone(), starts=torch.stack(starts))


def _vectors(
    encoder: EncoderHandle, ids_BL: Tensor, masked: MaskedTokens, states_BLD: Tensor
) -> tuple[Tensor, ...]:
    """For each prompt features of the reader, or states, at its N labelled tokens.

    ``(N, D)`` each, on the CPU.
    """
    positions_N = masked_positions(masked.labels).to(states_BLD.device)
    if encoder.reader is None:
        vectors_ND = states_BLD.flatten(0, 1)[positions_N]
    else:
        attention_mask_BL = prompt_attention_mask(ids_BL, encoder.vocabulary.eos_token_id)
        vectors_ND = encoder.reader.features(
            states_BLD, attention_mask_BL.to(states_BLD.device), positions_N
        ).float()
    return vectors_ND.cpu().split((masked.labels != IGNORE_INDEX).sum(dim=1).tolist())


def _up_to_eos(ids_L: Tensor, encoder: EncoderHandle) -> list[int]:
    return ids_L[prompt_attention_mask(ids_L[None], encoder.vocabulary.eos_token_id)[0]].tolist()
