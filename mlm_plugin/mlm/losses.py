"""The losses of this method, each a short pure function.

Symbols: ``h`` states of the encoder being trained, ``g`` of the untrained one; ``p`` what the
contextualizer predicts from h, ``q`` from g.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.mlm.contextualizer import Contextualizer
from mlm_plugin.mlm.masking import IGNORE_INDEX

__all__ = [
    "MaskedWordLoss",
    "TeacherFeatures",
    "beyond_start",
    "divergence",
    "masked_cross_entropy",
    "masked_positions",
    "masked_word_loss",
    "relative_distance",
    "teacher_kl",
]

ROUNDING, RELATIVE_ROUNDING = 1e-6, 1e-4


def masked_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """``-1/N sum_i log p_i(x_i)``: predict the masked tokens x.

    Without masked tokens it is a zero that is still part of the graph.

    Source: Devlin et al. 2018; as the loss of arXiv 2410.10058, according to public reviews.
    """
    return F.cross_entropy(logits_NV, labels_N, reduction="sum") / max(1, len(labels_N))


def teacher_kl(
    logits_NV: Tensor, teacher_logits_NV: Tensor, start_N: Tensor | float = 0.0
) -> Tensor:
    """``1/N sum_i max(0, KL(q_i || p_i) - s_i)``: predict what the teacher predicts.

    Args:
        logits_NV: of p.
        teacher_logits_NV: of q.
        start_N: s, the divergence before training, which costs nothing.

    Source: knowledge distillation, Hinton et al. 2015, arXiv 1503.02531; the hinge at the start is
    ours.
    """
    return beyond_start(divergence(logits_NV, teacher_logits_NV), start_N)


def beyond_start(divergence_N: Tensor, start_N: Tensor | float = 0.0) -> Tensor:
    """``1/N sum_i max(0, d_i - s_i)``: the mean of divergences beyond those before training.

    ``s_i`` is taken higher by ``ROUNDING`` and its share: in another batch it is rounded otherwise,
    and chance would decide which words have a gradient before training.
    """
    allowed_N = start_N * (1 + RELATIVE_ROUNDING) + ROUNDING
    return (divergence_N - allowed_N).relu().sum() / max(1, len(divergence_N))


def divergence(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """``KL(q_i || p_i)``, ``(N,)``."""
    log_p_NV = logits_NV.log_softmax(dim=-1)
    log_q_NV = teacher_logits_NV.log_softmax(dim=-1)
    return F.kl_div(log_p_NV, log_q_NV, reduction="none", log_target=True).sum(dim=-1)


def relative_distance(
    states_ND: Tensor, teacher_ND: Tensor, start_ND: Tensor | None = None
) -> Tensor:
    """``sum_i max(0, |h_i - g_i|^2 - |h0_i - g_i|^2) / sum_i |g_i|^2``, 0-d fp32.

    What share of the states has moved away from g. Without tokens it is a zero that is still part
    of the graph.

    Args:
        states_ND: h.
        teacher_ND: g.
        start_ND: h0, the states before training, whose distance costs nothing; by default g.
    """
    states_ND, teacher_ND = states_ND.float(), teacher_ND.float()
    distance_N = (states_ND - teacher_ND).square().sum(dim=-1)
    if start_ND is not None:
        distance_N = (distance_N - (start_ND.float() - teacher_ND).square().sum(dim=-1)).relu()
    norm = teacher_ND.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return distance_N.sum() / norm


class MaskedWordLoss(NamedTuple):
    """The loss at the masked tokens, and how many of them were predicted correctly."""

    loss: Tensor  # 0-d fp32, mean over the N masked tokens; 0 without any
    num_correct: Tensor  # 0-d long
    num_masked: int  # N


class TeacherFeatures(NamedTuple):
    """What the contextualizer makes of g, and the divergence from it before training."""

    features_ND: Tensor
    start_N: Tensor | float = 0.0


def masked_word_loss(
    contextualizer: Contextualizer,
    hidden_BLD: Tensor,
    *,
    labels_BL: Tensor,
    attention_mask_BL: Tensor,
    token_table_VD: Tensor,
    teacher: TeacherFeatures | None = None,
) -> MaskedWordLoss:
    """Compare the contextualizer's predictions at the masked tokens with words or a teacher.

    Args:
        contextualizer: predicts the words.
        hidden_BLD: states h of the masked prompts.
        labels_BL: masked ids, IGNORE_INDEX elsewhere; on the CPU, to avoid a synchronization.
        attention_mask_BL: false for padding.
        token_table_VD: the tied output table.
        teacher: with it the loss is :func:`teacher_kl`, without :func:`masked_cross_entropy`.
    """
    device = hidden_BLD.device
    positions_N = masked_positions(labels_BL)
    labels_N = labels_BL.flatten()[positions_N].to(device, non_blocking=True)
    logits_NV = contextualizer(
        hidden_BLD, attention_mask_BL, positions_N.to(device, non_blocking=True), token_table_VD
    )
    if teacher is None:
        loss = masked_cross_entropy(logits_NV, labels_N)
    else:
        teacher_NV = contextualizer.logits(teacher.features_ND, token_table_VD)
        loss = teacher_kl(logits_NV, teacher_NV, teacher.start_N)
    num_correct = (logits_NV.detach().argmax(dim=-1) == labels_N).sum()
    return MaskedWordLoss(loss, num_correct, len(positions_N))


def masked_positions(labels_BL: Tensor) -> Tensor:
    """Positions with a label, as indices into the ``B L`` positions, ``(N,)``."""
    return (labels_BL != IGNORE_INDEX).flatten().nonzero().squeeze(1)
