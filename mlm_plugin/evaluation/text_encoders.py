"""The text side of `mlm-plugin evaluate`: every text encoder of a model with its contextualizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlm_plugin.contextualizer_file import (
    cached_contextualizer_path,
    contextualizer_settings,
    digest_of,
    fits,
    load_contextualizer,
)
from mlm_plugin.evaluation.eval_prompts import EvaluationPrompt
from mlm_plugin.evaluation.evaluated_model import EvaluatedModel
from mlm_plugin.evaluation.options import NO_MODEL, EvaluateOptions
from mlm_plugin.evaluation.results import ENCODER_NAMES
from mlm_plugin.evaluation.text_measures import ConceptPrompts, measure_text_encoder
from mlm_plugin.files import cache_dir
from mlm_plugin.mlm.contextualizer import Contextualizer
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.find import find_contextualizer, is_small
from mlm_plugin.setup.builtin_names import contextualizer_path, model_path

__all__ = [
    "LEARNED",
    "check_contextualizers",
    "existing_contextualizer",
    "measure_text",
    "text_protocol",
]

logger = logging.getLogger(__name__)

LEARNED = ("checkpoint", "lora", "embedding", "delta", "xti")
"""The options that name trained files."""


def check_contextualizers(options: EvaluateOptions, model: EvaluatedModel) -> None:
    """Read the given files, so that one that does not fit is found before anything is drawn.

    Raises:
        UserError: another number of files, or one made for another text encoder.
    """
    bases = model.base_text_encoders
    for setting, base in zip(_contextualizers(options, len(bases)), bases, strict=True):
        if setting not in (NO_MODEL, "auto"):
            load_contextualizer(setting, base)


def measure_text(
    options: EvaluateOptions,
    model: EvaluatedModel,
    prompts: Sequence[EvaluationPrompt],
    device: torch.device,
) -> dict[str, Any]:
    """Measures of each text encoder by name, one at a time to save device memory."""
    names = ENCODER_NAMES[len(model.text_encoders)]
    settings = _contextualizers(options, len(names))
    concept_prompts = ConceptPrompts(
        [prompt.template for prompt in prompts], options.placeholder_token, options.class_token
    )
    model.release_drawing()
    text = {}
    for name, setting, text_encoder, base in zip(
        names, settings, model.text_encoders, model.base_text_encoders, strict=True
    ):
        text_encoder.model.float()  # small differences matter here
        base.model.to(device)
        if setting == "auto":
            setting = existing_contextualizer(options, base)
        contextualizer = _contextualizer(setting, base, name, device)
        text[name] = measure_text_encoder(
            text_encoder, base, contextualizer, prompts=concept_prompts, seed=options.seed
        )
        base.model.to("cpu")
    return text


def text_protocol(text: dict[str, Any]) -> dict[str, str]:
    """How the text was measured, for the report."""
    counts = {
        groups["masked_words"]["concept"]["num_masked"]
        for groups in text.values()
        if groups["masked_words"]
    }
    if not counts:
        return {}
    shown = " and ".join(map(str, sorted(counts)))
    return {"Masked words": f"{shown} hidden tokens, the same words in all three cases"}


def _contextualizers(options: EvaluateOptions, count: int) -> list[str]:
    """``mlm_contextualizer`` for each text encoder; ``none`` is for all of them.

    Raises:
        UserError: another number of files.
    """
    setting = contextualizer_path(options.mlm_contextualizer)
    return [setting] * count if setting == NO_MODEL else contextualizer_settings(setting, count)


def existing_contextualizer(options: EvaluateOptions, base: TextEncoder) -> str:
    """The contextualizer that a run was trained with, or another that exists; else ``auto``.

    Looked for beside the trained files and the base model, and in the cache.
    """
    trained = [path for name in LEARNED if (path := getattr(options, name))]
    used = {digest for path in trained for digest in _digests_in(Path(path))}
    model = Path(model_path(options.pretrained_model_name_or_path))
    folders = [*(Path(path).parent for path in trained), model if model.is_dir() else model.parent]
    found = [
        path
        for folder in dict.fromkeys((*folders, cache_dir() / "contextualizers"))
        for path in sorted(folder.glob("*.safetensors"))
        if fits(path, base)
    ]
    for path in found:
        if digest_of(path) in used:
            return str(path)
    if used:
        logger.warning(
            "the contextualizer of the run (%s) is neither beside its file nor in the cache; give "
            "it as --mlm_contextualizer FILE, as another one gives other numbers",
            ", ".join(sorted(used)),
        )
    return str(found[0]) if found else "auto"


def _digests_in(trained: Path) -> list[str]:
    """Digests of the contextualizers that a trained file names; none for other files."""
    if trained.suffix != ".safetensors" or not trained.is_file():
        return []
    try:
        with safe_open(trained, framework="pt") as file:
            named = (file.metadata() or {}).get("ss_mlm_contextualizer", "")
    except SafetensorError:
        return []
    return re.findall(r"[0-9a-f]{16}", named)


def _contextualizer(
    setting: str, base: TextEncoder, name: str, device: torch.device
) -> Contextualizer | None:
    """The contextualizer of a base text encoder; not pretrained where that would take hours."""
    if setting == NO_MODEL:
        return None
    is_available = setting != "auto" or cached_contextualizer_path(base).is_file()
    if not is_available and device.type == "cpu" and not is_small(base):
        logger.warning(
            "masked words are left out: there is no contextualizer for %s yet, and pretraining one "
            "on a CPU takes hours; give --mlm_contextualizer FILE",
            "this text encoder" if name in ENCODER_NAMES[1] else name,
        )
        return None
    return find_contextualizer(base, setting).network
