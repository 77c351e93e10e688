"""A full XTI file in a diffusers pipeline: prompts become text states for each layer.

    xti = load_xti(pipeline, "my_dog_xti.safetensors", placeholder_token="<my-dog>")
    pipeline(
        prompt_embeds=xti.encode("a photo of <my-dog> on the moon"),
        negative_prompt_embeds=xti.encode("blurry"),
    )

Shapes: B prompts, K cross-attention layers, L tokens of one layer, D width.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import read_xti
from mlm_plugin.models.cross_attention import (
    PerLayerConditioning,
    layer_codes,
    per_layer_conditioning,
)
from mlm_plugin.models.per_layer_text import encode_per_layer
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["XTIPrompts", "load_xti"]


def load_xti(
    pipeline: StableDiffusionPipeline,
    path: str | os.PathLike,
    *,
    placeholder_token: str,
    clip_skip: int | None = None,
) -> XTIPrompts:
    """Add a placeholder to a pipeline's prompts, with its own embedding in each layer.

    Prompts given to the pipeline as text work as before, but without the placeholder. Give both
    ``prompt_embeds`` and ``negative_prompt_embeds``: they must have the same length. Choose
    xformers or slicing before the call.

    Args:
        pipeline: for SD 1.x or 2.x; its U-Net and text encoder get hooks, its tokenizer is
            unchanged.
        path: an XTI file, ours or kohya's.
        placeholder_token: the concept's word in prompts, matched as whole words, ignoring case.
        clip_skip: as in training; ``None`` or 1 = last layer.

    Returns:
        the encoder of prompts; its ``remove()`` undoes everything.

    Raises:
        UserError: the file does not fit the model, or the U-Net already has such a file.
    """
    if not placeholder_token.strip():
        raise UserError("placeholder_token is empty: name the word that stands for the concept")
    vectors_KND = read_xti(path, codes=layer_codes(pipeline.unet))
    text_encoder = TextEncoder(pipeline.tokenizer, pipeline.text_encoder, clip_skip=clip_skip)
    width = text_encoder.token_embedding.embedding_dim
    if vectors_KND.shape[-1] != width:
        raise UserError(
            f"{path} is of width {vectors_KND.shape[-1]}, the text encoder of width {width}: "
            "use a file trained on the same kind of model (768 = SD 1.x, 1024 = SD 2.x)"
        )
    conditioning = per_layer_conditioning(pipeline.unet)
    learned_tokens = LearnedTokens(text_encoder, {placeholder_token: vectors_KND})
    learned_tokens.requires_grad_(False)
    return XTIPrompts(pipeline, text_encoder, learned_tokens, conditioning)


class XTIPrompts:
    """Encodes prompts with a placeholder for :func:`load_xti`'s pipeline, until :meth:`remove`."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        text_encoder: TextEncoder,
        learned_tokens: LearnedTokens,
        conditioning: PerLayerConditioning,
    ):
        self._pipeline = pipeline
        self._text_encoder = text_encoder
        self._learned_tokens = learned_tokens
        self._conditioning = conditioning

    @torch.no_grad()
    def encode(self, prompt: str | list[str]) -> Tensor:
        """Text states of all layers for prompts, with or without placeholder: ``(B, K L, D)``."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self._learned_tokens.to(
            self._pipeline._execution_device
        )  # the pipeline may have moved since loading
        return encode_per_layer(self._text_encoder, prompts)

    def remove(self) -> None:
        """Undo all changes to the pipeline's U-Net and text encoder."""
        self._conditioning.remove()
        self._learned_tokens.remove()
