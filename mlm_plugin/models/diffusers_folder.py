"""Stable Diffusion 1.x, 2.x or XL from a diffusers folder, or from the hub as one."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.components import REFINER, ModelParts, read_json, wrong_architecture
from mlm_plugin.models.load_weights import (
    empty_pooled_text_encoder,
    empty_text_encoder,
    empty_unet,
    empty_vae,
    fill_weights,
    plain_name,
    plain_places,
)
from mlm_plugin.models.tokenizers import is_tokenizer_folder, load_tokenizer, second_tokenizer
from mlm_plugin.models.weights_files import read_weights

__all__ = [
    "empty_folder",
    "empty_parts",
    "find_folder",
    "find_local_folder",
    "load_folder",
    "load_vae_folder",
]

FAMILY_OF_WIDTH = {768: "sd_v1", 1024: "sd_v2"}
MAX_REASON = 200  # characters of a library's own story in an error
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>(?!safetensors|bin)\w+))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def find_folder(source: str, *, option: str) -> Path:
    """The folder ``source`` names, or the snapshot of a hub id (downloaded, or from the cache).

    Args:
        source: folder or hub id.
        option: the option it came from, for the error.

    Raises:
        UserError: neither exists, or the hub gave no weights.
    """
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source):
        raise UserError(
            f"{option}: {source} does not exist (a file, a folder or a hub id org/name)"
        )
    reason = "it has no weights"
    for variant in (None, "fp16"):
        try:
            folder = Path(_download(source, variant=variant))
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0][:MAX_REASON]
            continue
        if any(WEIGHTS_NAME.fullmatch(path.name) for path in folder.rglob("*")):
            return folder
    raise UserError(f"{option}: {source} is no file or folder here, nor on the hub ({reason})")


def find_local_folder(source: str, *, option: str) -> Path:
    """The folder ``source`` names, or the snapshot of a hub id that is on this machine already.

    Raises:
        UserError: neither is here.
    """
    if Path(source).is_dir():
        return Path(source)
    if HUB_ID.fullmatch(source):
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError):  # the hub's own errors are these
            pass
    raise UserError(f"{option}: {source} is not on this machine (a file, a folder or a hub id)")


def empty_folder(folder: Path, *, source: str) -> ModelParts:
    """What :func:`load_folder` would load, on the meta device: weights are not read.

    Args:
        folder: as there.
        source: what the user called it, for errors.

    Raises:
        UserError: a configuration is missing or damaged, or it is a model of another kind.
    """
    parts = empty_parts(folder, family=_family(folder, source=source))
    parts.tokenizers = _tokenizers(folder, count=len(parts.text_encoders))
    parts.scheduler = read_json(folder / "scheduler" / "scheduler_config.json", optional=True)
    return parts


def empty_parts(folder: Path, *, family: str) -> ModelParts:
    """Networks of the configurations in a folder, on the meta device, without a tokenizer."""
    clips = [empty_text_encoder(folder / "text_encoder")]
    if family == "sdxl":
        clips.append(empty_pooled_text_encoder(folder / "text_encoder_2"))
    return ModelParts(
        family=family,
        unet=empty_unet(folder / "unet"),
        text_encoders=[clip.to("meta") for clip in clips],
        vae=empty_vae(folder / "vae"),
        tokenizers=[],
        scheduler={},
    )


def load_folder(
    folder: Path, *, source: str, dtype: torch.dtype, vae_dtype: torch.dtype | None
) -> ModelParts:
    """Load a diffusers folder part by part; the safety checker is never read.

    Args:
        folder: holds ``unet``, ``text_encoder``, ``vae``, ``tokenizer`` and ``scheduler``, in SDXL
            also ``text_encoder_2`` and ``tokenizer_2``.
        source: what the user called it, for errors.
        dtype: of U-Net and text encoder.
        vae_dtype: of the VAE; ``None`` = do not read it.

    Raises:
        UserError: a part is missing or damaged, or it is a model of another kind.
    """
    family = _family(folder, source=source)
    clips = {"text_encoder": empty_text_encoder(folder / "text_encoder")}
    if family == "sdxl":
        clips["text_encoder_2"] = empty_pooled_text_encoder(folder / "text_encoder_2")
    return ModelParts(
        family=family,
        unet=_load(folder / "unet", empty_unet(folder / "unet"), dtype=dtype),
        text_encoders=[_load(folder / part, clip, dtype=dtype) for part, clip in clips.items()],
        vae=_own_vae(folder, source=source, dtype=vae_dtype),
        tokenizers=_tokenizers(folder, count=len(clips)),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json", optional=True),
    )


def load_vae_folder(folder: Path, *, source: str, dtype: torch.dtype) -> nn.Module:
    """Load a VAE from its own folder or from ``vae`` inside a model's.

    Raises:
        UserError: there is none, or it is damaged.
    """
    for place in (folder / "vae", folder):
        config = read_json(place / "config.json", optional=True)
        if config.get("_class_name") == "AutoencoderKL":
            return _load(place, empty_vae(place), dtype=dtype)
    raise UserError(f"{source} holds no VAE (neither vae/config.json nor config.json of one)")


def _download(hub_id: str, *, variant: str | None) -> str:
    return DiffusionPipeline.download(
        hub_id, variant=variant, safety_checker=None, feature_extractor=None
    )


def _own_vae(folder: Path, *, source: str, dtype: torch.dtype | None) -> nn.Module | None:
    return None if dtype is None else load_vae_folder(folder, source=source, dtype=dtype)


def _tokenizers(folder: Path, *, count: int) -> list:
    first, second = folder / "tokenizer", folder / "tokenizer_2"
    if not is_tokenizer_folder(first):
        return []
    tokenizers = [load_tokenizer(first)]
    if count == 2:
        has_own = is_tokenizer_folder(second)
        tokenizers.append(load_tokenizer(second) if has_own else second_tokenizer(tokenizers[0]))
    return tokenizers


def _family(folder: Path, *, source: str) -> str:
    kind = read_json(folder / "model_index.json", optional=True).get("_class_name", "a pipeline")
    if (folder / "transformer").is_dir():
        raise wrong_architecture(source, f"{kind} (with a transformer)")
    is_sdxl = (folder / "text_encoder_2").is_dir()
    if is_sdxl and not (folder / "text_encoder").is_dir():
        raise wrong_architecture(source, REFINER)
    for part in ("unet", "text_encoder", *(["text_encoder_2"] if is_sdxl else [])):
        if not (folder / part / "config.json").is_file():
            raise UserError(
                f"{source} is no diffusers model folder: {part}/config.json is missing "
                "(give the folder that holds model_index.json, or a checkpoint file)"
            )
    unet = read_json(folder / "unet" / "config.json")
    text_encoder = read_json(folder / "text_encoder" / "config.json")
    text_width = text_encoder.get("hidden_size", 512)
    if is_sdxl:
        second = read_json(folder / "text_encoder_2" / "config.json")
        text_width += second.get("hidden_size", 512)
    channels, width = unet.get("in_channels", 4), unet.get("cross_attention_dim", 1280)
    if channels != 4:
        raise wrong_architecture(source, f"{kind} with {channels} input channels")
    if width != text_width:
        raise wrong_architecture(source, f"{kind} with context width {width}")
    if is_sdxl:
        return "sdxl"
    openai_clip = text_encoder.get("hidden_act", "quick_gelu") == "quick_gelu"
    return FAMILY_OF_WIDTH.get(width, "sd_v1" if openai_clip else "sd_v2")


def _load(folder: Path, model: nn.Module, *, dtype: torch.dtype) -> nn.Module:
    """Fill a part from its own folder.

    Not by ``from_pretrained``: its versions differ in which names they know (``text_model.`` is
    gone since transformers 5.6) and in what they do about missing tensors, up to random weights.
    """
    state = {}
    for path in _weights_files(folder):
        state |= {plain_name(name): tensor for name, tensor in read_weights(path).items()}
    fill_weights(model, plain_places, state, prefix="", path=folder, dtype=dtype)
    return model


def _weights_files(folder: Path) -> list[Path]:
    """The files of the chosen set of weights, safetensors where there are both kinds."""
    variant = _variant(folder)
    files = [
        path
        for path in sorted(folder.glob("*"))
        if (match := WEIGHTS_NAME.fullmatch(path.name)) and match["variant"] == variant
    ]
    return [path for path in files if path.suffix == ".safetensors"] or files


def _variant(folder: Path) -> str | None:
    """Which of a folder's sets of weights to load: the plain one, else fp16, else the first."""
    matches = [WEIGHTS_NAME.fullmatch(path.name) for path in folder.glob("*")]
    variants = {match["variant"] for match in matches if match}
    if not variants:
        raise UserError(f"{folder} holds no weights (*.safetensors or *.bin)")
    if None in variants:
        return None
    return "fp16" if "fp16" in variants else min(variants)
