"""Token embeddings of which only the direction is learned; their norm is that of ordinary tokens.

Freely learned embeddings grow to many times the norm of a word, and in a pre-norm transformer such
a token drowns out its position and its neighbours. Here an embedding is ``e = m v / |v|``: ``m`` is
the mean norm of the vocabulary, ``v`` is trained. The gradient in ``v`` is tangent to the sphere,
as ``e`` does not depend on ``|v|``; after every optimizer step ``v`` is put back on the sphere. So
the step is a Riemannian one, whatever the optimizer.

Shapes: K variants of a placeholder, N vectors, D width of the text encoder.

Source: Kim et al. 2025, "Directional Textual Inversion", arXiv 2512.13672; kunheek/dti.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens

__all__ = ["DirectionalTokens", "mean_norm", "von_mises_fisher_loss"]


def mean_norm(table_VD: Tensor) -> Tensor:
    """Mean norm of the vectors of a table that are not 0; 0-d fp32."""
    norms_V = table_VD.detach().float().norm(dim=-1)
    return norms_V.sum() / norms_V.count_nonzero()


def von_mises_fisher_loss(
    vectors: Sequence[Tensor], means: Sequence[Tensor], kappa: float
) -> Tensor:
    """Negative log density of directions, up to a constant: ``-kappa * sum(cos(v, mu))``, 0-d.

    Args:
        vectors: ``v``, of any norm and shape ``(..., D)``.
        means: ``mu``, mean directions of the same shapes.
        kappa: concentration.
    """
    cosines = [
        F.cosine_similarity(v, mu, dim=-1).sum() for v, mu in zip(vectors, means, strict=True)
    ]
    return -kappa * torch.stack(cosines).sum()


class DirectionalTokens(LearnedTokens):
    """Learned tokens whose embeddings keep the mean norm of the text encoder's vocabulary.

    Args:
        text_encoder: as for ``LearnedTokens``.
        embeddings: initial vectors; their directions count, not their norms.
        kappa: strength of the von Mises-Fisher prior, which pulls every direction back to its
            initial one; 0 = no prior.

    Attributes:
        embeddings: the trained directions by placeholder, unit vectors ``(K, N, D)`` fp32.
        norm: norm of every vector that the text encoder reads; 0-d fp32.
        initial_directions: mean directions of the prior, one tensor for each placeholder.
    """

    def __init__(
        self, text_encoder: TextEncoder, embeddings: Mapping[str, Tensor], *, kappa: float = 0.0
    ):
        directions = {name: F.normalize(vectors, dim=-1) for name, vectors in embeddings.items()}
        super().__init__(text_encoder, directions)
        self.norm, self.kappa = mean_norm(text_encoder.token_embedding.weight), kappa
        self.initial_directions = [
            direction.detach().clone() for direction in self.embeddings.values()
        ]

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The vectors that the text encoder reads, by placeholder, ``(K, N, D)``."""
        return {
            name: self.norm * F.normalize(direction, dim=-1)
            for name, direction in self.embeddings.items()
        }

    def prior_loss(self) -> Tensor | None:
        """The von Mises-Fisher prior of the directions that are trained now; see ``kappa``."""
        trained = [
            pair
            for pair in zip(self.embeddings.values(), self.initial_directions, strict=True)
            if pair[0].requires_grad
        ]
        if not trained or not self.kappa:
            return None
        return von_mises_fisher_loss(*zip(*trained, strict=True), self.kappa)

    @torch.no_grad()
    def retract(self) -> None:
        """Put the directions that are trained now back on the unit sphere."""
        for direction in self.embeddings.values():
            if direction.requires_grad:
                direction.copy_(F.normalize(direction, dim=-1))
