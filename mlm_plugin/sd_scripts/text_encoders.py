"""The text encoders of sd-scripts' models, as the MLM term reads them."""

from __future__ import annotations

from typing import Any

from torch import nn

from mlm_plugin.models.language_model import (
    LanguageModelEncoder,
    T5Encoder,
    is_causal_language_model,
)
from mlm_plugin.models.text_encoder import TextEncoder

__all__ = ["is_clip_text_model", "is_t5", "wrap_text_encoder"]


def is_clip_text_model(module: Any) -> bool:
    """Whether this is a CLIP text encoder, and not T5, a language model or a placeholder."""
    return _model_type(module) == "clip_text_model"


def is_t5(module: Any) -> bool:
    """Whether this is T5's encoder."""
    return _model_type(module) == "t5"


def wrap_text_encoder(
    model: nn.Module, tokenizer: Any, *, arch: str, clip_skip: int | None, prefix: str = ""
) -> TextEncoder | LanguageModelEncoder | T5Encoder | None:
    """The text encoder with the states that the image model of this architecture sees.

    FLUX uses only one state of CLIP: the last one at the position of EOS. Here the last states of
    all positions are used, which the same weights compute.

    Args:
        model: of the base model.
        tokenizer: its own.
        arch: architecture of the base model.
        clip_skip: as given to the trainer; only SD 1 and 2 read it.
        prefix: text that the trainer puts before every caption (Lumina 2).

    Returns:
        ``None`` for a placeholder without weights.

    Source: sd-scripts ``library/strategy_*.py``.
    """
    if is_clip_text_model(model):
        if arch in ("sdxl", "sd3"):
            return TextEncoder(tokenizer, model, clip_skip=2, final_norm=False)
        return TextEncoder(tokenizer, model, clip_skip=None if arch == "flux" else clip_skip)
    if is_t5(model):
        return T5Encoder(tokenizer, model)
    if is_causal_language_model(model):
        skip = 1 if arch == "lumina" else 0
        return LanguageModelEncoder(tokenizer, model, skip=skip, prefix=prefix)
    return None


def _model_type(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)
