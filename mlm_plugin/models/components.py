"""What a source of Stable Diffusion weights gives, and the errors all sources share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mlm_plugin.errors import UserError

__all__ = ["REFINER", "TITLES", "ModelParts", "read_json", "refuse_gaps", "wrong_architecture"]

TITLES = {
    "sd_v1": "Stable Diffusion 1.x",
    "sd_v2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
REFINER = "the refiner of Stable Diffusion XL"
MAX_NAMED = 3  # tensors named in an error


@dataclass
class ModelParts:
    """The parts one source holds.

    Attributes:
        family: ``sd_v1``, ``sd_v2`` or ``sdxl``.
        text_encoders: one; two in SDXL.
        vae: ``None`` if not asked for.
        tokenizers: one for each text encoder; none if the source has no first one.
        scheduler: the source's own scheduler configuration; empty if it has none.
    """

    family: str
    unet: nn.Module
    text_encoders: list[nn.Module]
    vae: nn.Module | None
    tokenizers: list
    scheduler: dict


def wrong_architecture(source: str | Path, found: str) -> UserError:
    """The error for a model of a kind that is not trained; ``found`` says what it is."""
    return UserError(f"{source} is {found}; this version trains {TITLES['sd_v1']}, 2.x and XL base")


def refuse_gaps(source: str | Path, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise if tensors are missing or left over, naming the first few.

    Raises:
        UserError: ``missing`` or ``unexpected`` is not empty.
    """
    parts = []
    for kind, names in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if names:
            more = ", ..." if len(names) > MAX_NAMED else ""
            parts.append(f"{kind} {len(names)} tensors ({', '.join(names[:MAX_NAMED])}{more})")
    if parts:
        raise UserError(f"{source} {' and '.join(parts)}: it does not fit its architecture")


def read_json(path: Path, *, optional: bool = False) -> dict:
    """A configuration file; with ``optional``, an absent file is empty.

    Raises:
        UserError: the file cannot be read.
    """
    if optional and not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
