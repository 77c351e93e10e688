"""The reader of a causal language model: its own output head, which predicts the next word.

Where such a model is the text encoder, nothing has to be pretrained and no word is masked: after
the concept, the distribution over the next word must stay what it is after the class word.

Shapes: B prompts, L tokens, D width of the states, N compared tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_plugin.mlm.losses import divergence

__all__ = ["NextWordHead"]

CHUNK_SIZE = 16
"""Tokens scored at once: 10 MB of logits for a vocabulary of 150,000."""


class NextWordHead:
    """A frozen language-model head on the states that the image model is conditioned on.

    Args:
        table: returns the output table ``(V, D)``; frozen, usually that of the input embeddings.
        tail: what the language model does between those states and its head, frozen; ``None``
            where they are its last.
        softcap: c in ``c tanh(logits / c)``, where the model bounds its logits so.

    Source of the softcap: Gemma 2, arXiv 2408.00118.
    """

    def __init__(
        self,
        table: Callable[[], Tensor],
        *,
        tail: nn.Module | None = None,
        softcap: float | None = None,
    ):
        self.table = table
        self.tail = tail
        self.softcap = softcap

    def features(
        self, hidden_BLD: Tensor, _attention_mask_BL: Tensor, positions_N: Tensor
    ) -> Tensor:
        """The vectors that are compared with the table, ``(N, D)``.

        Args:
            hidden_BLD: states of whole prompts, padded on the right.
            positions_N: the compared tokens, as indices into the ``B L`` positions.
        """
        if self.tail is not None:
            hidden_BLD = self.tail.to(hidden_BLD.device)(hidden_BLD)
        return hidden_BLD.flatten(0, 1)[positions_N]

    def logits(self, features_ND: Tensor) -> Tensor:
        """Over the whole vocabulary, ``(N, V)`` fp32."""
        table_VD = self.table()
        logits_NV = F.linear(features_ND.to(table_VD.dtype), table_VD).float()
        if self.softcap is None:
            return logits_NV
        return self.softcap * torch.tanh(logits_NV / self.softcap)

    def divergence(self, features_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        """``KL(q_i || p_i)`` over the next word, ``(N,)`` fp32; q from the teacher's features.

        Some tokens at a time, whose logits are computed again in the backward pass, so that the
        memory does not grow with the number of tokens.
        """
        pairs = zip(features_ND.split(CHUNK_SIZE), teacher_ND.split(CHUNK_SIZE), strict=True)
        return torch.cat([checkpoint(self._divergence, *p, use_reentrant=False) for p in pairs])

    def _divergence(self, features_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        return divergence(self.logits(features_ND), self.logits(teacher_ND))
