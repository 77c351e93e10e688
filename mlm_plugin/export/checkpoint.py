"""Writes a whole model, Stable Diffusion 1.x, 2.x or XL: WebUI checkpoint, or diffusers folder.

Knows names, shapes and files of plain modules, but nothing about adapters, training or the meaning
of the metadata.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.files import put_in_place
from mlm_plugin.models.components import Components
from mlm_plugin.models.ldm_names import (
    LDM_PARTS,
    OPEN_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    to_ldm,
)
from mlm_plugin.models.weights_files import for_file, write_weights

__all__ = [
    "CheckpointCounts",
    "ldm_tensors",
    "model_index",
    "require_replaceable",
    "save_checkpoint",
    "save_diffusers_folder",
    "verify_checkpoint",
]

OPEN_CLIP_LAYERS = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.")  # the second in SDXL
MAX_LOGIT_SCALE = math.log(100)  # where CLIP's own training clamps it
PYTORCH_FORMAT = {"format": "pt"}  # metadata that transformers requires
INDEX = "model_index.json"
FOLDER_ENTRIES = {INDEX, "scheduler", "tokenizer", "tokenizer_2", *Components._fields}


class CheckpointCounts(NamedTuple):
    """Number of tensors of each part in a checkpoint."""

    unet: int
    text_encoder: int
    vae: int


def save_checkpoint(
    path: str | os.PathLike,
    networks: Components,
    *,
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    marks: Sequence[str] = (),
) -> None:
    """Write a model as one ``.safetensors`` file with LDM names, completely or not at all.

    The networks are not changed; tensors are copied only where dtype or device differ.

    Args:
        path: final name.
        networks: the text encoders with their original vocabulary.
        family: ``sd_v1``, ``sd_v2`` or ``sdxl``.
        metadata: strings, written as given.
        dtype: dtype of every tensor in the file; ``None`` keeps each one's.
        marks: names of empty tensors, by which WebUIs tell what an SDXL model predicts:
            ``v_pred``, and ``ztsnr`` for betas of zero terminal SNR.

    Raises:
        ValueError: a network has a weight that the family does not have.
    """
    tensors = ldm_tensors(networks, family=family) | {name: torch.empty(0) for name in marks}
    _write(Path(path), tensors, metadata=metadata, dtype=dtype)


def ldm_tensors(networks: Components, *, family: str) -> dict[str, Tensor]:
    """A model's weights under LDM names and in LDM shapes; views of the networks' where possible.

    The names are those of an sd-scripts checkpoint made without a base file: without the buffers
    that older checkpoints carry (``alphas_cumprod``, ``position_ids``), which no reader needs.

    Raises:
        ValueError: a network has a weight that the family does not have.

    Source: sd-scripts ``save_stable_diffusion_checkpoint`` in ``library/model_util.py`` and
    ``library/sdxl_model_util.py``.
    """
    parts = networks.by_part()
    assert parts.keys() == LDM_PARTS[family].keys(), "SDXL alone has two text encoders"
    tensors: dict[str, Tensor] = {}
    for part, network in parts.items():
        state = network.state_dict()
        tensors |= to_ldm(state, LDM_PARTS[family][part].places(state))
    return tensors | _projections(tensors, convolutions=family == "sd_v1") | _unused(tensors)


def save_diffusers_folder(
    folder: str | os.PathLike,
    networks: Components,
    *,
    tokenizers: Sequence,
    noise_scheduler,
    prediction_type: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a diffusers folder (``StableDiffusion[XL]Pipeline``), completely or not at all.

    An earlier folder is replaced once the new one is complete. There is no safety checker.

    Args:
        folder: final name.
        networks: networks of the model.
        tokenizers: one ``CLIPTokenizer`` for each text encoder.
        noise_scheduler: diffusers scheduler with the betas of the model.
        prediction_type: ``epsilon`` or ``v_prediction``: what the U-Net was trained to predict.
        dtype: dtype of every tensor; ``None`` keeps each one's.

    Raises:
        UserError: see ``require_replaceable``.
    """
    is_sdxl = networks.text_encoder_2 is not None
    with _whole_folder(Path(folder)) as temporary:
        for part, network in networks.by_part().items():
            (temporary / part).mkdir()
            write = _write_text_encoder if part.startswith("text_encoder") else _write_network
            write(temporary / part, network, dtype)
        names = ("tokenizer", "tokenizer_2") if is_sdxl else ("tokenizer",)
        for name, tokenizer in zip(names, tokenizers, strict=True):
            _write_tokenizer(temporary / name, tokenizer)
        # Stable Diffusion's samplers start one step later; diffusers warns if it is missing.
        scheduler = type(noise_scheduler).from_config(
            noise_scheduler.config, prediction_type=prediction_type, steps_offset=1
        )
        scheduler.save_pretrained(temporary / "scheduler")
        _write_json(temporary / INDEX, model_index(type(scheduler).__name__, is_sdxl=is_sdxl))


def require_replaceable(folder: str | os.PathLike) -> None:
    """Refuse a folder that contains anything but a model saved here; called before training.

    Raises:
        UserError: it is a file, or replacing it would lose other files.
    """
    folder = Path(folder)
    if folder.is_dir():
        entries = sorted(path.name for path in folder.iterdir())
        foreign = [name for name in entries if name not in FOLDER_ENTRIES]
        if not entries or (INDEX in entries and not foreign):
            return
        found = foreign[0] if foreign else f"{entries[0]} without {INDEX}"
        raise UserError(
            f"{folder} holds {found} and is not replaced by a diffusers folder: "
            "choose another output_name, or move it away"
        )
    if folder.exists():
        raise UserError(f"{folder} is a file, not a diffusers folder: choose another output_name")


def verify_checkpoint(path: str | os.PathLike) -> CheckpointCounts:
    """Read a saved checkpoint back, one tensor at a time, and check what WebUIs need.

    Raises:
        UserError: If a value is not finite.
    """
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        broken = sorted(name for name in names if not torch.isfinite(file.get_tensor(name)).all())
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of {len(names)} tensors hold NaN or infinity, "
            f"e.g. {broken[0]}; use an earlier save and train again with a lower learning rate"
        )
    prefixes = CheckpointCounts(unet=UNET_PREFIX, text_encoder=TEXT_PREFIXES, vae=VAE_PREFIX)
    return CheckpointCounts(*(sum(name.startswith(p) for name in names) for p in prefixes))


# --- tensors of a checkpoint ---


def _projections(tensors: Mapping[str, Tensor], *, convolutions: bool) -> dict[str, Tensor]:
    """Matrices around a transformer block in the family's form: SD 1 has 1x1 convolutions.

    Diffusers models of either family may have either form.
    """
    end = (1, 1) if convolutions else ()
    return {
        name: tensor.reshape(*tensor.shape[:2], *end)
        for name, tensor in tensors.items()
        if name.startswith(UNET_PREFIX) and name.endswith((".proj_in.weight", ".proj_out.weight"))
    }


def _unused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP tensors that readers of SD 2.x and XL expect, but never use.

    They are the scale of the logits in training and, in SD 2.x, the layer after the last used one
    (here a copy of it) and the projection into the image space (here the identity).
    """
    unused = {
        f"{prefix}logit_scale": torch.tensor(MAX_LOGIT_SCALE, dtype=norm.dtype)
        for prefix in (OPEN_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX)
        if (norm := tensors.get(f"{prefix}ln_final.weight")) is not None
    }
    layers = {
        name: (int(m[1]), m[2])
        for name in tensors
        if (m := re.fullmatch(rf"{re.escape(OPEN_CLIP_LAYERS)}(\d+)\.(.+)", name))
    }
    if layers:
        last, _ = max(layers.values())
        like = tensors[f"{OPEN_CLIP_PREFIX}ln_final.weight"]
        unused[f"{OPEN_CLIP_PREFIX}text_projection"] = torch.eye(len(like), dtype=like.dtype)
        for name, (number, rest) in layers.items():
            if number == last:
                unused[f"{OPEN_CLIP_LAYERS}{last + 1}.{rest}"] = tensors[name].clone()
    return unused


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    stored = {name: for_file(tensor, dtype) for name, tensor in tensors.items()}
    write_weights(path, stored, metadata=metadata)


# --- parts of a diffusers folder ---


def _write_network(folder: Path, network: nn.Module, dtype: torch.dtype | None) -> None:
    network.save_config(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    _write(path, network.state_dict(), metadata=PYTORCH_FORMAT, dtype=dtype)


def _write_text_encoder(folder: Path, text_encoder: nn.Module, dtype: torch.dtype | None) -> None:
    """Write nested names and ``torch_dtype``, which every version of transformers reads."""
    config = json.loads(text_encoder.config.to_json_string())
    config.pop("dtype", None)
    config["architectures"] = [type(text_encoder).__name__]
    config["torch_dtype"] = str(dtype or text_encoder.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    state = {_nested(name): tensor for name, tensor in text_encoder.state_dict().items()}
    _write(folder / "model.safetensors", state, metadata=PYTORCH_FORMAT, dtype=dtype)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _nested(name: str) -> str:
    if name == "text_projection.weight":
        return name
    return f"text_model.{name.removeprefix('text_model.')}"


def _write_tokenizer(folder: Path, tokenizer) -> None:
    """Write both: transformers 5 writes only ``tokenizer.json``, version 4 reads the others."""
    tokenizer.save_pretrained(folder)
    if (folder / "vocab.json").is_file():
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *map(_merge_line, model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merge_line(merge: str | Iterable[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def model_index(scheduler: str, *, is_sdxl: bool = False) -> dict:
    """Contents of ``model_index.json`` of a ``StableDiffusionPipeline``, without safety checker.

    Args:
        scheduler: class name.
        is_sdxl: for ``StableDiffusionXLPipeline``, which has a second text encoder and no checker.
    """
    index = {
        "_class_name": "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not is_sdxl:
        return index | {"requires_safety_checker": False, "safety_checker": [None, None]}
    return index | {
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that replaces it when the block succeeds.

    A kill while writing leaves the old folder; one between the two renames leaves both old and new
    complete under their hidden names.
    """
    require_replaceable(folder)
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        require_replaceable(folder)
        if folder.exists():
            folder.rename(old)
        try:
            put_in_place(temporary, folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
