"""Reads a LoRA, LyCORIS or embedding from any trainer, and tells what is in it. Needs no model.

Modules go by kohya's names; diffusers' own, and ComfyUI's of Anima, are translated.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import EMBEDDING_KEYS, read_embeddings
from mlm_plugin.models.weights_files import read_weights
from mlm_plugin.networks.kohya_names import BUNDLE_PREFIX, canonical_name, from_comfyui

__all__ = ["Contents", "LearnedFile", "Module", "contents_of", "kohya_key", "read_learned_file"]

MODULE_KEY = re.compile(r"(lora_(?:unet|te[12]?)_\w+?|lora_te3_\w+?)\.(.+)")
DIFFUSERS_KEY = re.compile(r"(unet|text_encoder(_2)?)\..*(lora|diff)")
ALGORITHMS = (
    ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lokr_w1_a", "LoKr"), ("oft_blocks", "OFT"),
    ("oft_diag", "OFT"), ("a1.weight", "GLoRA"), ("lora_up.weight", "LoRA"), ("diff", "full"),
    ("diff_b", "full"), ("w_norm", "norm"), ("b_norm", "norm"), ("on_input", "IA3"),
)  # fmt: skip
"""The algorithm of a module by a tensor that it holds; the first that fits."""

FAMILY_OF_WIDTH = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl"}
"""The family by the width of the text states that the cross-attention takes."""

ANIMA = "Anima"
OTHER_MODELS = {
    "lora_unet_joint_blocks_": "Stable Diffusion 3",
    "lora_unet_double_blocks_": "FLUX",
    "lora_unet_context_refiner_": "Lumina 2",
    "lora_unet_noise_refiner_": "Lumina 2",
    "lora_unet_layers_": "Lumina 2",
    "lora_unet_blocks_": ANIMA,
    "lora_unet_llm_adapter_": ANIMA,
}
"""Models that are not Stable Diffusion 1, 2 or XL, by the start of a module's name."""

LANGUAGE_MODEL = "lora_te_layers_"
"""How the modules of Qwen3 (Anima) and of Gemma 2 (Lumina 2) start."""

READS_TEXT = re.compile(r"lora_unet_.*attn2_to_[kv]")
TRIGGER_KEYS = (
    "modelspec.trigger_phrase", "trigger_word", "trigger_words", "ss_mlm_placeholder_token",
)  # fmt: skip

Module = Mapping[str, Tensor]
"""The tensors of one module by the rest of their names."""


@dataclass(frozen=True)
class LearnedFile:
    """A trained file.

    Attributes:
        path: as given.
        metadata: strings by key; empty for a pickle.
        modules: tensors of a network by module, under kohya's names; empty for an embedding.
        embeddings: ``(N, D)`` for each text encoder; empty for a network.
        ignored: names of tensors that belong to neither.
        given_trigger: what the user says is to be typed; ``None`` = as the metadata say.
    """

    path: Path
    metadata: Mapping[str, str]
    modules: Mapping[str, Module] = field(default_factory=dict)
    embeddings: Sequence[Tensor] = ()
    ignored: Sequence[str] = ()
    given_trigger: str | None = None

    @property
    def other_model(self) -> str | None:
        """Title of the model, where it is not Stable Diffusion 1, 2 or XL."""
        for start, title in OTHER_MODELS.items():
            if self._has(start):
                return title
        if not self._has(LANGUAGE_MODEL):
            return None
        is_lumina = self.metadata.get("modelspec.architecture", "").startswith("lumina")
        return "Lumina 2" if is_lumina else ANIMA

    @property
    def is_anima(self) -> bool:
        """Whether it is for Anima, whose text encoder can be examined."""
        return self.other_model == ANIMA

    @property
    def has_text_part(self) -> bool:
        """Whether it holds modules of a text encoder."""
        return self._has("lora_te")

    @property
    def family(self) -> str | None:
        """``sd_v1``, ``sd_v2`` or ``sdxl``; ``None`` if the file does not tell."""
        if self.other_model:
            return None
        if self.embeddings:
            width = sum(vectors_ND.shape[1] for vectors_ND in self.embeddings)
            return FAMILY_OF_WIDTH.get(width)
        if any(name.startswith("lora_te2_") for name in self.modules):
            return "sdxl"
        for name, module in self.modules.items():
            down = module.get("lora_down.weight")
            if READS_TEXT.match(name) and down is not None:
                return FAMILY_OF_WIDTH.get(down.shape[1])
        return None

    def _has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.modules)

    def of_text_encoder(self, number: int) -> dict[str, Module]:
        """Modules of a text encoder, 0 or 1, by name without the prefix."""
        prefixes = ("lora_te2_",) if number else ("lora_te_", "lora_te1_")
        return {
            name.removeprefix(prefix): module
            for name, module in self.modules.items()
            for prefix in prefixes
            if name.startswith(prefix)
        }

    @property
    def trigger(self) -> str:
        """What is to be typed, by the user or the metadata; of an embedding the file's name."""
        if self.given_trigger is not None:
            return self.given_trigger
        for key in TRIGGER_KEYS:
            if self.metadata.get(key):
                return self.metadata[key].split(",")[0].strip()
        return self.path.stem if self.embeddings else _most_frequent_tag(self.metadata)


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        counts: number of modules by part: the text encoders, the U-Net or the transformer, and
            Anima's ``llm_adapter``.
        algorithms: number of modules by algorithm.
        ranks: number of modules by rank.
        broken: names of tensors with values that are not finite.
        halves: modules with one of a LoRA's two matrices.
        zeros: number of modules that change nothing.
    """

    counts: Mapping[str, int]
    algorithms: Mapping[str, int]
    ranks: Mapping[int, int]
    broken: Sequence[str]
    halves: Sequence[str]
    zeros: int


def read_learned_file(path: str | os.PathLike) -> LearnedFile:
    """Read a file; tensors are mapped, not copied.

    Raises:
        UserError: it cannot be read, or holds neither a network nor an embedding.
    """
    path = Path(path)
    tensors = read_weights(path)
    metadata = _metadata(path)
    if any(DIFFUSERS_KEY.match(key) for key in tensors):
        tensors = _in_kohya_names(tensors, path)
    modules: dict[str, dict[str, Tensor]] = {}
    ignored = []
    for key, tensor in tensors.items():
        if match := MODULE_KEY.fullmatch(kohya_key(key)):
            modules.setdefault(match[1], {})[match[2]] = tensor
        else:
            ignored.append(key)
    if modules:
        return LearnedFile(path, metadata, modules, ignored=ignored)
    if not _is_embedding(tensors, path):
        shown = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise UserError(
            f"{path} holds neither a LoRA nor an embedding of Stable Diffusion 1, 2 or XL "
            f"({shown}, ...); give the file that a trainer wrote"
        )
    return LearnedFile(path, metadata, embeddings=read_embeddings(path))


def kohya_key(key: str) -> str:
    """A tensor's name as kohya writes it; names that are neither his nor ComfyUI's stay."""
    return canonical_name(from_comfyui(key))


def contents_of(file: LearnedFile) -> Contents:
    """Count what a file holds, and find what is broken. Reads every tensor."""
    image_part = "transformer" if file.other_model else "U-Net"
    kinds = Counter(_part(name, image_part) for name in file.modules)
    ranks = Counter(
        len(module["lora_down.weight"])
        for module in file.modules.values()
        if "lora_down.weight" in module
    )
    broken = [
        f"{name}.{key}"
        for name, module in file.modules.items()
        for key, tensor in module.items()
        if not bool(tensor.isfinite().all())
    ]
    broken += [
        f"vectors {number}"
        for number, vectors_ND in enumerate(file.embeddings)
        if not bool(vectors_ND.isfinite().all())
    ]
    return Contents(
        counts=kinds,
        algorithms=Counter(map(algorithm_of, file.modules.values())),
        ranks=dict(sorted(ranks.items())),
        broken=broken,
        halves=[name for name, module in file.modules.items() if _is_half(module)],
        zeros=sum(map(_changes_nothing, file.modules.values())),
    )


def _part(name: str, image_part: str) -> str:
    if name.startswith("lora_unet_llm_adapter_"):
        return "llm_adapter"
    return image_part if name.startswith("lora_unet_") else "text encoder"


def algorithm_of(module: Module) -> str:
    """Name of the algorithm that a module's tensors belong to; "unknown" if none fits."""
    found = next((name for key, name in ALGORITHMS if key in module), "unknown")
    return f"{found} with DoRA" if "dora_scale" in module else found


def _is_half(module: Module) -> bool:
    return ("lora_up.weight" in module) != ("lora_down.weight" in module)


def _changes_nothing(module: Module) -> bool:
    """Whether the matrix that training starts at zero still is."""
    return any(
        key in module and not bool(module[key].any())
        for key in ("lora_up.weight", "hada_w2_a", "diff", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    )


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix.lower() != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _in_kohya_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:
        if any(".lora_A." in key for key in tensors):
            return convert_state_dict_to_kohya(dict(tensors))
        return convert_state_dict_to_kohya(convert_state_dict_to_peft(dict(tensors)))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} has names of diffusers that are not known ({error})") from error


def _is_embedding(tensors: Mapping[str, Tensor], path: Path) -> bool:
    known = {key for keys in EMBEDDING_KEYS.values() for key in keys}
    is_pickle = path.suffix.lower() != ".safetensors"
    return len(tensors) <= 2 and (is_pickle or bool(known & tensors.keys()) or len(tensors) == 1)


def _most_frequent_tag(metadata: Mapping[str, str]) -> str:
    """The tag of most captions, which is the trigger where captions are tags.

    Source: what WebUIs show of ``ss_tag_frequency``.
    """
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(number) for tag, number in tags.items()})
    except (ValueError, AttributeError, TypeError):
        return ""
    return counts.most_common(1)[0][0] if counts else ""


def bundled(file: LearnedFile) -> list[str]:
    """Words whose embeddings lie in a LoRA file; they are not examined."""
    keys = (key for key in file.ignored if key.startswith(BUNDLE_PREFIX))
    return sorted({key.removeprefix(BUNDLE_PREFIX).split(".")[0] for key in keys})
