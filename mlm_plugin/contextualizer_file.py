"""The file of a contextualizer (weights, sizes, what it was made for), and the cache of them."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlm_plugin.config.pretraining import RECIPE
from mlm_plugin.errors import UserError
from mlm_plugin.files import cache_dir
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.weights_files import for_file, write_weights

__all__ = [
    "ContextualizerFacts",
    "LoadedContextualizer",
    "cached_contextualizer_path",
    "contextualizer_settings",
    "digest_of",
    "fits",
    "in_memory",
    "load_and_report",
    "load_contextualizer",
    "read_contextualizer",
    "related_contextualizer_paths",
    "save_contextualizer",
]

logger = logging.getLogger(__name__)

FORMAT = "mlm_plugin contextualizer 1"
POOR_ACCURACY = 0.02  # about what always predicting the most frequent word gives


@dataclass(frozen=True)
class ContextualizerFacts:
    """How a contextualizer was made; stored in its file."""

    text_encoder: str
    tokenizer: str
    num_steps: int
    accuracy: float
    loss: float
    training: dict = field(default_factory=dict)


class LoadedContextualizer(NamedTuple):
    """A contextualizer and how it was made."""

    network: Contextualizer
    facts: ContextualizerFacts
    digest: str  # of its file, 16 hex digits


def cached_contextualizer_path(text_encoder: TextEncoder) -> Path:
    """Where the contextualizer of a text encoder is kept between runs."""
    made_for = f"{text_encoder.fingerprint()}-{text_encoder.tokenizer_fingerprint()}"
    return cache_dir() / "contextualizers" / f"{made_for}-r{RECIPE}.safetensors"


def related_contextualizer_paths(text_encoder: TextEncoder) -> list[Path]:
    """Cached contextualizers of other text encoders with this tokenizer, the newest first."""
    own = cached_contextualizer_path(text_encoder)
    made_alike = own.parent.glob(f"*-{text_encoder.tokenizer_fingerprint()}-r{RECIPE}.safetensors")
    others = [path for path in made_alike if path != own]
    return sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def contextualizer_settings(
    setting: str, num_text_encoders: int, *, more_may_come: bool = False
) -> list[str]:
    """``mlm_contextualizer`` of each text encoder; files for several are separated by commas.

    Args:
        setting: a file, several, or ``auto``, which serves any number.
        num_text_encoders: how many need one.
        more_may_come: whether further names are for text encoders that are not known yet.

    Raises:
        UserError: another number of files.
    """
    if setting == "auto":
        return [setting] * num_text_encoders
    is_one = Path(setting).is_file()
    settings = [setting] if is_one else [part.strip() for part in setting.split(",")]
    num_extra = len(settings) - num_text_encoders
    if num_extra < 0 or (num_extra > 0 and not more_may_come):
        needed = f"{num_text_encoders}{' or more' if more_may_come else ''}"
        raise UserError(
            f"mlm_contextualizer = {setting!r} names {len(settings)} file(s), needed: {needed}; "
            "give one for each text encoder that is trained, with commas between, or 'auto'"
        )
    return settings


def save_contextualizer(
    path: str | Path, contextualizer: Contextualizer, facts: ContextualizerFacts
) -> None:
    """Write weights, mask vector, sizes and facts into one safetensors file, atomically."""
    contextualizer.require_trained()
    metadata = {
        "format": FORMAT,
        "sizes": json.dumps(asdict(contextualizer.sizes)),
        "facts": json.dumps(asdict(facts)),
    }
    write_weights(path, _tensors(contextualizer), metadata=metadata)


def _tensors(contextualizer: Contextualizer) -> dict[str, Tensor]:
    return {k: for_file(v, torch.float32) for k, v in contextualizer.state_dict().items()}


def in_memory(contextualizer: Contextualizer, facts: ContextualizerFacts) -> LoadedContextualizer:
    """A contextualizer without a file, as :func:`load_contextualizer` gives it."""
    digest = hashlib.sha256(save(_tensors(contextualizer))).hexdigest()[:16]
    network = contextualizer.to("cpu", torch.float32).requires_grad_(False).eval()
    return LoadedContextualizer(network, facts, digest)


def load_and_report(path: str | Path, text_encoder: TextEncoder) -> LoadedContextualizer:
    """:func:`load_contextualizer`, with a message that says how good it is.

    Raises:
        UserError: the file does not fit the text encoder.
    """
    path = Path(path)
    network, facts = load_contextualizer(path, text_encoder)
    digest = digest_of(path)
    share = f"{path.name} names {facts.accuracy:.0%} of hidden held-out words"
    if facts.accuracy < POOR_ACCURACY:
        logger.warning("%s: it can teach little; pretrain it for longer", share)
    else:
        logger.info("%s", share)
    return LoadedContextualizer(network, facts, digest)


def digest_of(path: Path) -> str:
    """What a trained file calls the contextualizer that it was trained with."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fits(path: Path, text_encoder: TextEncoder) -> bool:
    """Whether a file holds a contextualizer for ``text_encoder``; only its header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    if metadata.get("format") != FORMAT:
        return False
    facts = ContextualizerFacts(**json.loads(metadata["facts"]))
    wanted = text_encoder.fingerprint(), text_encoder.tokenizer_fingerprint()
    return (facts.text_encoder, facts.tokenizer) == wanted


def load_contextualizer(
    path: str | Path, text_encoder: TextEncoder
) -> tuple[Contextualizer, ContextualizerFacts]:
    """Read a contextualizer made for ``text_encoder``; frozen, fp32, in eval mode, on the CPU.

    Raises:
        UserError: if the file is missing, is not a contextualizer, or was made for another text
            encoder, clip skip or tokenizer (both fingerprints are named).
    """
    network, facts = read_contextualizer(path)
    _require_same(path, "text encoder", facts.text_encoder, text_encoder.fingerprint())
    _require_same(path, "tokenizer", facts.tokenizer, text_encoder.tokenizer_fingerprint())
    return network, facts


def read_contextualizer(path: str | Path) -> tuple[Contextualizer, ContextualizerFacts]:
    """Read a contextualizer, whatever text encoder it was made for.

    Raises:
        UserError: if the file is missing or is not a contextualizer.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"mlm_contextualizer: no such file: {path}; "
            "give a file made by `mlm-plugin pretrain`, or 'auto'"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(
            f"mlm_contextualizer: {path} is not a safetensors file ({error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"mlm_contextualizer: {path} is not a contextualizer (format "
            f"{metadata.get('format')!r}, expected {FORMAT!r}); make one with `mlm-plugin pretrain`"
        )
    facts = ContextualizerFacts(**json.loads(metadata["facts"]))
    with torch.device("meta"):  # no random initialization: the caller's stream stays unchanged
        contextualizer = Contextualizer(ContextualizerSizes(**json.loads(metadata["sizes"])))
    contextualizer.load_state_dict(tensors, assign=True)
    contextualizer.require_trained()
    return contextualizer.requires_grad_(False).eval(), facts


def _require_same(path: str | Path, what: str, made_for: str, present: str) -> None:
    if made_for != present:
        raise UserError(
            f"mlm_contextualizer: {path} was made for {what} {made_for}, this model has {present}; "
            "use 'auto' or run `mlm-plugin pretrain` on this model"
        )
