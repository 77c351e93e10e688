"""Encodes captions once per cross-attention layer, with the embeddings of that layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlm_plugin.models.cross_attention import join_layers
from mlm_plugin.models.text_encoder import TextEncoder

__all__ = ["encode_per_layer"]


def encode_per_layer(text_encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Conditioning of all layers, ``(B, K L, D)``: one pass of ``K B`` captions, then joined.

    Args:
        text_encoder: with learned tokens of K variants, one per layer.
        captions: B texts.

    Source: sd-scripts ``train_textual_inversion_XTI.py``, which loops over the layers.
    """
    tokens = text_encoder.learned_tokens
    assert tokens is not None, "per-layer encoding needs learned tokens for each layer"
    ids_BNL = text_encoder.tokenize(captions)
    ids_KBNL = torch.stack([tokens.variant(ids_BNL, k) for k in range(tokens.num_variants)])
    states = text_encoder.encode_windows(ids_KBNL.flatten(0, 1))
    return join_layers(states.unflatten(0, (tokens.num_variants, len(captions))))
