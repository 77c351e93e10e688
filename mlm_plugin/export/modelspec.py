"""ModelSpec's ``modelspec.*`` metadata: what a file is, and what one types to use it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from mlm_plugin import __version__
from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import OutputOptions, TrainConfig
from mlm_plugin.export.run_facts import RunFacts
from mlm_plugin.export.thumbnails import thumbnail

__all__ = ["given_sides", "modelspec", "names_in_prompts", "trigger_phrase"]

logger = logging.getLogger(__name__)

TITLES = {
    "lora": "LoRA",
    "textual-inversion": "TextualInversion",
    "custom-diffusion": "CustomDiffusion",
    "checkpoint": "Checkpoint",
}
STABILITY_AI = "https://github.com/Stability-AI/generative-models"
"""The naming scheme of SDXL's files in ModelSpec."""
MODELSPEC_EXTRAS = ("merged_from", "preprocessor", "is_negative_embedding")


def modelspec(config: TrainConfig, facts: RunFacts, *, kind: str) -> dict[str, str]:
    """ModelSpec 1.0.1. Source: sd-scripts ``library/sai_model_spec.py`` ``build_metadata``."""
    output, loss = config.output, config.loss
    timestamp = facts.started_at if facts.finished_at is None else facts.finished_at
    fields: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        "architecture": _architecture(facts) + ("" if kind == "checkpoint" else f"/{kind}"),
        "implementation": STABILITY_AI if facts.is_sdxl else "diffusers",
        "title": output.metadata_title or output.output_name or f"{TITLES[kind]}@{timestamp}",
        "resolution": "{}x{}".format(*_sides(config, facts)),
        "date": datetime.fromtimestamp(int(timestamp)).isoformat(),
        "implementation_version": f"mlm-plugin/{__version__}",
        "prediction_type": "v" if facts.prediction_type == "v_prediction" else "epsilon",
        "encoder_layer": config.model.clip_skip,
        "author": output.metadata_author,
        "description": output.metadata_description,
        "license": output.metadata_license,
        "tags": output.metadata_tags,
        "thumbnail": _thumbnail(output.metadata_thumbnail) or facts.thumbnail,
        "trigger_phrase": _trigger(output, facts),
        "usage_hint": output.metadata_usage_hint or _usage_hint(output, facts, kind=kind),
    }
    fields |= {name: getattr(output, f"metadata_{name}") for name in MODELSPEC_EXTRAS}
    if loss.min_timestep is not None or loss.max_timestep is not None:
        last = 1000 if loss.max_timestep is None else loss.max_timestep
        fields["timestep_range"] = f"{loss.min_timestep or 0},{last}"
    return {f"modelspec.{key}": str(value) for key, value in fields.items() if value is not None}


def _architecture(facts: RunFacts) -> str:
    if facts.is_sdxl:
        return "stable-diffusion-xl-v1-base"
    if not facts.is_v2:
        return "stable-diffusion-v1"
    is_v = facts.prediction_type == "v_prediction"
    return "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"


def _sides(config: TrainConfig, facts: RunFacts) -> tuple[int, int]:
    given = given_sides(config.dataset.resolution)
    if given is not None:
        return given
    if facts.is_sdxl:
        side = 1024
    else:
        side = 768 if facts.is_v2 and facts.prediction_type == "v_prediction" else 512
    return side, side


def trigger_phrase(
    options: OutputOptions, concepts: Iterable[Concept], words: Mapping[str, str]
) -> str | None:
    """What one types for the concepts in a file: the user's phrase, or :func:`names_in_prompts`."""
    return options.metadata_trigger_phrase or names_in_prompts(concepts, words)


def names_in_prompts(concepts: Iterable[Concept], words: Mapping[str, str]) -> str | None:
    """What the concepts in a file are called: ``"my_dog dog"``, several separated by commas.

    Args:
        concepts: those of the run.
        words: as ``Method.webui_files`` says; empty for all concepts by their placeholders.
    """
    names = [
        concept._replace(placeholder_token=words.get(concept.placeholder_token) or concept[0]).text
        for concept in concepts
        if not words or concept.placeholder_token in words
    ]
    return ", ".join(names) or None


def _trigger(output: OutputOptions, facts: RunFacts) -> str | None:
    if output.no_metadata:
        return output.metadata_trigger_phrase
    return trigger_phrase(output, facts.concepts, facts.words)


def _usage_hint(output: OutputOptions, facts: RunFacts, *, kind: str) -> str | None:
    """One line for people: what to type, at which strength, with which other files."""
    if output.no_metadata:
        return None
    trigger = _trigger(output, facts)
    hints = [f"Trigger: {trigger}."] if trigger else []
    if kind == "lora":
        hints.append("Strength: 1, as trained.")
    if kind == "textual-inversion" and not facts.words:  # WebUIs have no word for XTI's layers
        hints.append("Holds an embedding for each cross-attention layer: not for WebUIs.")
    if facts.needs:
        hints.append(f"Needs the embedding {', '.join(facts.needs)}.")
    return " ".join(hints) or None


def _thumbnail(value: str | None) -> str | None:
    """A picture as data URL; a file that is gone costs the thumbnail, not the training."""
    if value is None or value.startswith("data:"):
        return value
    try:
        return thumbnail(value)
    except OSError as error:
        logger.warning("metadata_thumbnail: %s is left out: %s", value, error)
        return None


def given_sides(text: str | None) -> tuple[int, int] | None:
    """Width and height of kohya's ``--resolution``, ``"512"`` or ``"768,512"``."""
    if text is None:
        return None
    sides = [int(side) for side in str(text).split(",")]
    return sides[0], sides[-1]
