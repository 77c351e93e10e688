"""The oracle of a pocket model as judge: does the picture show the prompt and the concept?

What a prompt asks for is known from the labels beside the prompts file, never parsed from its text.
Knows no model that draws; the formulas are in ``pocket/scores.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from mlm_plugin.data.images import image_tensor
from mlm_plugin.evaluation.eval_prompts import EvaluationPrompt
from mlm_plugin.pocket.concepts import Concept, find_concept
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.prompt_labels import PromptLabels, labels_path, read_labels
from mlm_plugin.pocket.scores import identity, prompt_fidelity, seen_right
from mlm_plugin.pocket.world import PICTURE_SIDE

__all__ = ["OracleJudge", "find_oracle", "load_oracle_judge", "oracle_columns", "why_not_judged"]

ORACLE_FILE = "oracle.safetensors"


class OracleJudge(NamedTuple):
    """An oracle, and what pictures are judged by.

    Attributes:
        name: file and digest.
        accuracy: its accuracy on true pictures, by attribute; may be empty.
        concept: the concept that pictures should show.
        labels: what the prompts ask for.
    """

    oracle: Oracle
    name: str
    accuracy: dict[str, float]
    concept: Concept
    labels: PromptLabels


def find_oracle(model: str) -> Path | None:
    """The oracle in the folder of a pocket model; None for any other model."""
    path = Path(model) / ORACLE_FILE
    return path if path.is_file() and (path.parent / "model_index.json").is_file() else None


def why_not_judged(prompts: str | None, *, resolution: int | None) -> str | None:
    """Why an oracle cannot judge, in one line; None if it can.

    Args:
        prompts: the prompts file; None = DreamBench's prompts.
        resolution: side of the pictures in pixels; None = the model's own.
    """
    if prompts is None:
        return "it is not known what DreamBench's prompts ask for; give --prompts test_prompts.txt"
    if not labels_path(prompts).is_file():
        return f"there is no {labels_path(prompts)} that says what the prompts ask for"
    if resolution not in (None, PICTURE_SIDE):
        return f"it reads pictures of {PICTURE_SIDE} pixels, not of {resolution}"
    return None


def load_oracle_judge(path: Path, prompts: str) -> OracleJudge:
    """Load the oracle, and the labels beside the prompts file.

    Raises:
        UserError: one of the files is damaged, or the concept is unknown.
    """
    labels = read_labels(labels_path(prompts))
    concept = find_concept(labels.concept, named_by=f"{labels_path(prompts)}: concept")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return OracleJudge(
        load_oracle(path), f"{path.name}, sha256 {digest[:16]}", _accuracy(path), concept, labels
    )


@torch.no_grad()
def oracle_columns(
    judge: OracleJudge, prompt: EvaluationPrompt, images: Sequence[Image.Image]
) -> dict[str, list[float]]:
    """Scores of the pictures of one prompt; identity alone where the prompt has no labels.

    Args:
        judge: from :func:`load_oracle_judge`.
        prompt: what they were drawn from.
        images: at least one, of 64 x 64 pixels.

    Returns:
        ``identity``, ``prompt_fidelity`` and ``seen_<attribute>`` for every prompted attribute.
    """
    pixels = torch.stack([image_tensor(image) for image in images])
    seen = judge.oracle(pixels)
    columns = {"identity": identity(pixels, judge.concept).tolist()}
    caption = judge.labels.captions.get(prompt.template)
    if caption is None:
        return columns
    captions = [caption] * len(images)
    if set(caption.said) - {"subject"}:
        columns["prompt_fidelity"] = prompt_fidelity(seen, captions).tolist()
    right = seen_right(seen, captions)
    return columns | {f"seen_{name}": right[name].tolist() for name in caption.said}


def _accuracy(path: Path) -> dict[str, float]:
    """From the quality report beside it, if there is one."""
    card = path.with_name("quality.json")
    return json.loads(card.read_text(encoding="utf-8"))["oracle_accuracy"] if card.is_file() else {}
