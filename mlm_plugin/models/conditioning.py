"""What the U-Net is conditioned on: text states, and in SDXL pooled text and the picture's sizes.

Knows the keyword arguments of diffusers' U-Net, but nothing about captions, training or sampling.
Shapes: B pictures, L tokens, D width of the text states, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm_plugin.models.text_encoder import TextEncoder

__all__ = ["Conditioning", "encode_captions", "size_ids", "unet_inputs"]

Size = tuple[int, int]


class Conditioning(NamedTuple):
    """Text as the U-Net takes it."""

    states: Tensor  # (B, L, D); in SDXL those of both encoders side by side
    pooled: Tensor | None = None  # (B, P), the second encoder's; None in Stable Diffusion 1 and 2

    def to(self, place: torch.device | torch.dtype, *, non_blocking: bool = False) -> Conditioning:
        """Move to a device or cast to a precision; ``non_blocking`` is for copies to a GPU."""
        parts = (
            part if part is None else part.to(place, non_blocking=non_blocking) for part in self
        )
        return Conditioning(*parts)


def encode_captions(text_encoders: Sequence[TextEncoder], captions: Sequence[str]) -> Conditioning:
    """Captions through the text encoder, or through SDXL's two.

    Source: sd-scripts ``library/strategy_sdxl.py`` ``encode_tokens``; ``sdxl_train_network.py``
    ``call_unet``.
    """
    if len(text_encoders) == 1:
        return Conditioning(text_encoders[0].encode_captions(captions))
    clip_l, clip_g = text_encoders
    states_g, pooled = clip_g.encode_captions_pooled(captions)
    return Conditioning(torch.cat([clip_l.encode_captions(captions), states_g], dim=-1), pooled)


def size_ids(
    original_sizes: Sequence[Size], crop_top_lefts: Sequence[Size], target_sizes: Sequence[Size]
) -> Tensor:
    """SDXL's size conditioning for each picture, ``(B, 6)`` fp32.

    Height and width of the file, top and left of the crop, height and width of the training
    picture, like diffusers' ``time_ids``.

    Args:
        original_sizes: (h, w) of each picture.
        crop_top_lefts: (top, left).
        target_sizes: (h, w).

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2; sd-scripts
    ``library/sdxl_train_util.py`` ``get_size_embeddings``.
    """
    sizes = zip(original_sizes, crop_top_lefts, target_sizes, strict=True)
    rows = [[*original, *crop, *target] for original, crop, target in sizes]
    return torch.tensor(rows, dtype=torch.float32)


def unet_inputs(
    conditioning: Conditioning, size_ids_B6: Tensor, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of a U-Net; only SDXL, which has pooled text, gets the sizes.

    The sizes stay fp32, as bf16 has no number between 1024 and 1032.
    """
    inputs: dict[str, Any] = {"encoder_hidden_states": conditioning.states.to(dtype)}
    if conditioning.pooled is not None:
        inputs["added_cond_kwargs"] = {
            "text_embeds": conditioning.pooled.to(dtype),
            "time_ids": size_ids_B6.to(conditioning.pooled.device, non_blocking=True),
        }
    return inputs
