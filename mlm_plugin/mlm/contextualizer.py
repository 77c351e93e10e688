"""The contextualizer: predicts masked words from the text encoder's hidden states.

A small bidirectional pre-norm transformer whose output is compared with the text encoder's own
token table. It is pretrained once per text encoder (``pretraining/run.py``), then frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_plugin.errors import UserError

__all__ = ["Contextualizer", "ContextualizerSizes", "default_width"]

HEAD_WIDTH = 64


@dataclass(frozen=True)
class ContextualizerSizes:
    """Architecture of a contextualizer.

    Attributes:
        hidden_size: D, width of the text encoder's states.
        vocab_size: V, size of its token embeddings.
        width: W, inner width.
        num_layers: transformer blocks.
        max_length: longest prompt in tokens, BOS and EOS included.
    """

    hidden_size: int
    vocab_size: int
    width: int = 384
    num_layers: int = 4
    max_length: int = 77


def default_width(hidden_size: int) -> int:
    """Inner width for a text encoder: its own, between 64 and 384.

    384 keeps the network under 2 % of the memory of an SD 1.5 run (``docs/performance.md``).
    """
    return min(384, max(64, hidden_size))


class Block(nn.Module):
    """Pre-norm self-attention over the whole prompt, then a feed-forward network."""

    def __init__(self, width: int):
        super().__init__()
        most = max(1, width // HEAD_WIDTH)
        self.num_heads = max(number for number in range(1, most + 1) if width % number == 0)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BLW: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """``(B, L, W) -> (B, L, W)``; positions where the mask is false are not attended to."""
        qkv = self.qkv(self.attention_norm(x_BLW)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask_BL[:, None, None, :]
        )
        x_BLW = x_BLW + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x_BLW + self.feed_forward(x_BLW)


class Contextualizer(nn.Module):
    """Predicts masked words from the text encoder's hidden states of the whole prompt.

    CLIP's text encoder is causal: the state of a masked word depends only on the words before it.
    The blocks are bidirectional, so words on either side of the concept carry gradient to it.

    The output is tied: a state becomes a vector of width D that is compared with every
    embedding of the text encoder's token table, given by the caller and frozen. ``mask_vector``
    is the embedding of [MASK] at the encoder's input. It starts as NaN; only pretraining or a file
    can make it finite.
    """

    def __init__(self, sizes: ContextualizerSizes):
        super().__init__()
        self.sizes = sizes
        self.input_norm = nn.LayerNorm(sizes.hidden_size)
        self.input = nn.Linear(sizes.hidden_size, sizes.width)
        self.position = nn.Parameter(torch.randn(sizes.max_length, sizes.width) * 0.02)
        self.blocks = nn.ModuleList(Block(sizes.width) for _ in range(sizes.num_layers))
        self.head = nn.Sequential(
            nn.LayerNorm(sizes.width),
            nn.Linear(sizes.width, sizes.hidden_size),
            nn.GELU(),
            nn.LayerNorm(sizes.hidden_size),
        )
        self.output_scale = nn.Parameter(torch.ones(()))
        self.output_bias = nn.Parameter(torch.zeros(sizes.vocab_size))
        self.mask_vector = nn.Parameter(torch.full((sizes.hidden_size,), float("nan")))

    def forward(
        self,
        hidden_BLD: Tensor,
        attention_mask_BL: Tensor,
        positions_N: Tensor,
        token_table_VD: Tensor,
    ) -> Tensor:
        """Logits over the vocabulary at selected positions only.

        Args:
            hidden_BLD: conditioning states of the text encoder.
            attention_mask_BL: true for BOS, words and EOS; false for padding.
            positions_N: where to predict, as indices into the ``B L`` positions. A boolean mask
                would have to be counted, which makes a GPU synchronize.
            token_table_VD: the text encoder's token embeddings.

        Returns:
            logits of shape ``(N, V)``, fp32.
        """
        features_ND = self.features(hidden_BLD, attention_mask_BL, positions_N)
        return self.logits(features_ND, token_table_VD)

    def features(
        self, hidden_BLD: Tensor, attention_mask_BL: Tensor, positions_N: Tensor
    ) -> Tensor:
        """:meth:`forward` up to the vectors that are compared with the table, ``(N, D)``."""
        dtype = self.input.weight.dtype
        x_BLW = self.input(self.input_norm(hidden_BLD.to(dtype)))
        x_BLW = x_BLW + self.position[: hidden_BLD.shape[1]]
        for block in self.blocks:
            x_BLW = block(x_BLW, attention_mask_BL)
        return self.head(x_BLW.flatten(0, 1)[positions_N])

    def logits(self, features_ND: Tensor, token_table_VD: Tensor) -> Tensor:
        """The last step of :meth:`forward`: ``(N, D)`` to logits ``(N, V)``, fp32."""
        # cast the few features to the table's precision, not the large table to theirs
        logits_NV = F.linear(features_ND.to(token_table_VD.dtype), token_table_VD).float()
        return logits_NV * self.output_scale.float() + self.output_bias.float()

    def start_from(self, token_table_VD: Tensor, token_counts_V: Tensor) -> None:
        """Initialize a new network from the token embeddings and token frequencies.

        [MASK] starts as the mean token, a vector the text encoder can handle. The output scale
        makes logits of about unit size, whatever the norm of the embeddings (0.4 in CLIP). The bias
        starts at the logarithm of the frequencies, which gradients would take long to find.

        Args:
            token_table_VD: the text encoder's token embeddings.
            token_counts_V: occurrences in the text to train on.
        """
        counts_V = token_counts_V.float() + 0.1
        with torch.no_grad():
            self.mask_vector.copy_(token_table_VD.float().mean(dim=0))
            self.output_scale.copy_(1 / token_table_VD.float().norm(dim=-1).mean())
            self.output_bias.copy_((counts_V / counts_V.sum()).log())

    def require_trained(self) -> None:
        """Refuse a mask vector that was never set.

        Raises:
            UserError: if the vector is not finite.
        """
        if not torch.isfinite(self.mask_vector).all():
            raise UserError(
                "mlm_contextualizer: its mask vector was never trained; "
                "make one with `mlm-plugin pretrain`"
            )
