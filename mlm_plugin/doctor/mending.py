"""Writes a file again with a weaker text encoder part; everything else stays as it was."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mlm_plugin.doctor.learned_file import MODULE_KEY, LearnedFile, algorithm_of, kohya_key
from mlm_plugin.doctor.weight_changes import LINEAR_FACTORS
from mlm_plugin.errors import UserError
from mlm_plugin.export.lora_files import kohya_hashes
from mlm_plugin.files import require_writable
from mlm_plugin.models.weights_files import for_file, read_weights, write_weights

__all__ = ["SCALE_KEY", "check_mending", "rescale_text_encoders"]

SCALE_KEY = "mlm_text_encoder_scale"
"""Metadata: what the text encoders' part was multiplied by, in all."""

DIFFUSERS_FACTOR = re.compile(r"text_encoder(_2)?\..*\.(lora_B|up)\.weight")


def check_mending(file: LearnedFile, output: str) -> None:
    """Refuse what cannot be rescaled, before it is examined.

    Raises:
        UserError: an embedding, no text encoder part, an algorithm whose strength is no factor, or
            an output that is the file itself.
    """
    parts = [module for name, module in file.modules.items() if name.startswith("lora_te")]
    if not parts:
        what = "an embedding" if file.embeddings else "a network without a text encoder part"
        raise UserError(f"{file.path} is {what}: there is nothing to rescale")
    others = sorted({algorithm_of(module) for module in parts} - LINEAR_FACTORS.keys())
    if others:
        raise UserError(
            f"{file.path}: a text encoder part with {', '.join(others)} cannot be rescaled inside "
            "the file, as its strength is not a factor of its weights; use it at a lower strength"
        )
    if Path(output).exists() and os.path.samefile(output, file.path):
        raise UserError(f"--output {output}: is the file that is examined; give another name")
    require_writable(Path(output).parent, "--output")


def rescale_text_encoders(file: LearnedFile, strength: float, output: str) -> None:
    """Write the file with ``strength`` times the change of the text encoders.

    Tensors keep their names and precision, metadata their values; kohya's hashes are renewed.
    """
    tensors = dict(_rescaled(file, strength))
    before = float(file.metadata.get(SCALE_KEY, "1"))
    metadata = {**file.metadata, SCALE_KEY: f"{before * strength:g}"}
    if "sshs_model_hash" in metadata:
        metadata |= kohya_hashes(tensors, metadata)
    write_weights(output, tensors, metadata=metadata)


def _rescaled(file: LearnedFile, strength: float) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in read_weights(file.path).items():
        if _is_factor(key, file):
            tensor = (tensor.float() * strength).to(tensor.dtype)
        yield key, for_file(tensor)


def _is_factor(key: str, file: LearnedFile) -> bool:
    """Whether the change of a text encoder is proportional to this tensor."""
    match = MODULE_KEY.fullmatch(kohya_key(key))
    if match is None:
        return DIFFUSERS_FACTOR.fullmatch(key) is not None
    module = file.modules[match[1]]
    return match[1].startswith("lora_te") and match[2] in LINEAR_FACTORS[algorithm_of(module)]
