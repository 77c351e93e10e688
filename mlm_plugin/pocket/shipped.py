"""The pocket model that ships with the package, and how to unpack it to a diffusers folder.

What can be derived is left out of the package: the text encoder is CLIP's text tower, and both
tokenizers are the same. Knows no training.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from mlm_plugin.errors import UserError
from mlm_plugin.files import cached_folder
from mlm_plugin.pocket.concepts import REPORTED, contexts, write_concept

__all__ = [
    "CONTEXTUALIZER",
    "SHIPPED",
    "TOKENIZER_FILES",
    "pocket_concept",
    "pocket_model",
    "save_text_encoder",
    "unpack",
]

SHIPPED = Path(__file__).parent / "model"
CONTEXTUALIZER = "contextualizer.safetensors"
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip


def pocket_model() -> Path:
    """The built-in model as a diffusers folder in the user's cache, unpacked on first use.

    Raises:
        UserError: this package does not include it.
    """
    card = SHIPPED / "quality.json"
    if not card.is_file():
        raise UserError(
            "pocket: this package has no built-in pocket model; make one in a checkout with "
            "`python -m research.pocket_model --output DIR` and give its folder"
        )
    digest = hashlib.sha256(card.read_bytes()).hexdigest()[:12]
    return cached_folder(f"pocket-{digest}/model", lambda folder: unpack(SHIPPED, folder))


def pocket_concept() -> Path:
    """Pictures and prompts of the first concept in the user's cache, drawn on first use."""
    concept = REPORTED[0]
    written = [repr(concept), *contexts(concept)]  # other texts go to another folder
    digest = hashlib.sha256("\n".join(written).encode()).hexdigest()[:8]
    return cached_folder(
        f"pocket-{concept.token}-{digest}", lambda folder: write_concept(concept, folder)
    )


def unpack(packed: Path, target: Path) -> None:
    """Copy a packed model and restore what was left out."""
    from transformers import CLIPModel

    shutil.copytree(packed, target)
    for name in TOKENIZER_FILES:
        shutil.copyfile(target / "tokenizer" / name, target / "clip" / name)
    clip = CLIPModel.from_pretrained(target / "clip", torch_dtype="auto")
    save_text_encoder(clip, target / "text_encoder")


def save_text_encoder(clip, folder: Path) -> None:
    """Write the text tower of a ``CLIPModel`` as a ``CLIPTextModel``, in its precision."""
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel(clip.config.text_config).to(clip.dtype)
    body = getattr(text_encoder, "text_model", text_encoder)
    body.load_state_dict(
        {
            name.removeprefix("text_model."): value
            for name, value in clip.state_dict().items()
            if name.startswith("text_model.")
        }
    )
    text_encoder.save_pretrained(folder)
