"""Qwen3 as Anima's text encoder, from a folder or from one file of weights.

Knows nothing about training or prompts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mlm_plugin.errors import UserError
from mlm_plugin.models.components import fill_weights, plain_places, read_json
from mlm_plugin.models.diffusers_folder import weights_files_of
from mlm_plugin.models.language_model import LanguageModelEncoder
from mlm_plugin.models.tokenizers import is_tokenizer_folder
from mlm_plugin.models.weights_files import read_weights

__all__ = ["AnimaText", "load_anima_text"]

MODEL_TYPE = "qwen3"
SHIPPED = Path("configs") / "qwen3_06b"
"""Configuration and tokenizer of Qwen3-0.6B in a checkout of sd-scripts."""


@dataclass
class AnimaText:
    """What of Anima reads text and can be loaded here: its language model, frozen, in fp32.

    Attributes:
        text_encoders: Qwen3 alone, whose last states, after the final norm, enter ``llm_adapter``.
        source: as given.
    """

    text_encoders: list[LanguageModelEncoder]
    source: str
    unet: ClassVar[None] = None


def load_anima_text(source: str, *, environment: Mapping[str, str] = os.environ) -> AnimaText:
    """Load Qwen3 on the CPU, as sd-scripts takes it with ``--qwen3``.

    Args:
        source: a folder of transformers with configuration, tokenizer and weights; or a file of
            weights, whose configuration and tokenizer lie beside it or in a checkout of sd-scripts.
        environment: may contain ``SD_SCRIPTS_DIR``, that checkout.

    Raises:
        UserError: there is nothing, or something else than Qwen3.

    Source: sd-scripts ``library/anima_utils.py`` ``load_qwen3_text_encoder``.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"--qwen3: {source} does not exist (a folder or a file of weights)")
    folder = path if path.is_dir() else _folder_for(path, environment)
    _require_qwen3(folder, source)
    state = _trunk(weights_files_of(path) if path.is_dir() else [path], source)
    tokenizer = _tokenizer(folder)
    model = _filled(folder, state, path)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"--qwen3: {folder}: the tokenizer knows {len(tokenizer)} tokens, the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return AnimaText([LanguageModelEncoder(tokenizer, model)], source)


def _folder_for(path: Path, environment: Mapping[str, str]) -> Path:
    """Where the configuration and the tokenizer of a file of weights are."""
    _trunk([path], str(path))  # another model is the likelier mistake than a missing configuration
    checkout = environment.get("SD_SCRIPTS_DIR")
    places = [path.parent, *([Path(checkout).expanduser() / SHIPPED] if checkout else [])]
    for place in places:
        if read_json(place / "config.json", optional=True).get("model_type") == MODEL_TYPE:
            return place
    raise UserError(
        f"--qwen3: {path} holds weights alone: set SD_SCRIPTS_DIR to a checkout of sd-scripts, "
        f"whose {SHIPPED.as_posix()} has the configuration and the tokenizer, or give a folder "
        "with all three"
    )


def _require_qwen3(folder: Path, source: str) -> None:
    kind = read_json(folder / "config.json", optional=True).get("model_type")
    if kind != MODEL_TYPE:
        found = f"is of type {kind}" if kind else "has no config.json of a language model"
        raise UserError(
            f"--qwen3: {source} {found}; give the folder or file of Qwen3-0.6B, the text encoder "
            "of Anima"
        )


def _trunk(paths: list[Path], source: str) -> dict[str, Tensor]:
    """The weights of the language model without its head, under the names of its trunk."""
    state = {
        name.removeprefix("model."): tensor
        for path in paths
        for name, tensor in read_weights(path).items()
        if not name.startswith("lm_head.")
    }
    if "embed_tokens.weight" not in state:
        raise UserError(
            f"--qwen3: {source} holds no language model (no embed_tokens.weight); give the folder "
            "or file of Qwen3-0.6B, Anima's text encoder"
        )
    return state


def _filled(folder: Path, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--qwen3: {folder}/config.json cannot be used ({error})") from error
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    fill_weights(model, plain_places, state, prefix="", path=path, dtype=torch.float32)
    model.rotary_emb = type(model.rotary_emb)(config)  # its buffers are in no file
    return model.requires_grad_(False).eval()


def _tokenizer(folder: Path):
    if not is_tokenizer_folder(folder):  # transformers 5 makes an empty one, without a word
        raise UserError(
            f"--qwen3: {folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, padding_side="right"
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--qwen3: {folder}: the tokenizer cannot be read ({error})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
