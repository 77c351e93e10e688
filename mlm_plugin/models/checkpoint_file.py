"""Stable Diffusion 1.x / 2.x from one WebUI checkpoint file, without the network.

The family is read off the tensors, the configurations are shipped in ``architectures/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.filling import (
    empty_text_encoder,
    empty_unet,
    empty_vae,
    fill_weights,
    plain_name,
    plain_places,
)
from mlm_plugin.models.ldm_names import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_names,
    open_clip_names,
    unet_names,
    vae_names,
)
from mlm_plugin.models.model_parts import (
    SDXL,
    ModelParts,
    wrong_architecture,
)
from mlm_plugin.models.weights_files import read_weights

__all__ = ["ARCHITECTURES", "load_file", "load_vae_file"]

ARCHITECTURES = Path(__file__).parent / "architectures"
SDXL_WIDTH = 2048
OTHER_FILES = {
    "conditioner.embedders.": SDXL,
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "FLUX",
    "double_blocks.": "FLUX",
    "lora_unet_": "a LoRA (--network_weights loads it)",
    "lora_te": "a LoRA (--network_weights loads it)",
}


def load_file(
    path: Path,
    *,
    architecture: Path | None,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
) -> ModelParts:
    """Load a checkpoint with LDM names (``.safetensors``, ``.ckpt``).

    The U-Net's weights are taken, not their moving average (``model_ema.*``), as sd-scripts does.

    Args:
        path: the checkpoint.
        architecture: folder of configurations in place of the shipped ones.
        dtype: of U-Net and text encoder.
        vae_dtype: of the VAE; ``None`` = do not read it.

    Raises:
        UserError: unreadable or incomplete file, or no SD 1.x / 2.x checkpoint.

    Source: sd-scripts ``library/model_util.py`` ``load_models_from_stable_diffusion_checkpoint``.
    """
    state = read_weights(path)
    family = _family(state, path=path)
    configs = architecture or ARCHITECTURES / family
    unet = empty_unet(configs / "unet")
    _check_width(state, unet, path=path)
    text_encoder = empty_text_encoder(configs / "text_encoder")
    fill_weights(unet, unet_names, state, prefix=UNET_PREFIX, path=path, dtype=dtype)
    if family == "sd_v1":
        named = {_nested_clip_name(name): tensor for name, tensor in state.items()}
        fill_weights(text_encoder, clip_names, named, prefix=CLIP_PREFIX, path=path, dtype=dtype)
    else:
        used = _without_last_layer(state, num_layers=text_encoder.config.num_hidden_layers)
        fill_weights(
            text_encoder, open_clip_names, used, prefix=OPEN_CLIP_PREFIX, path=path, dtype=dtype
        )
    return ModelParts(
        family=family,
        unet=unet,
        text_encoder=text_encoder,
        vae=vae_dtype and _vae_from_ldm(state, configs=configs, path=path, dtype=vae_dtype),
        tokenizer=None,
        scheduler={},
    )


def load_vae_file(path: Path, *, architecture: Path | None, dtype: torch.dtype) -> nn.Module:
    """Load a VAE from a file of its own, or from a full checkpoint.

    Accepts LDM names, with or without ``first_stage_model.``, and diffusers names of any age.

    Raises:
        UserError: unreadable or incomplete file.
    """
    state = read_weights(path)
    configs = architecture or ARCHITECTURES / "sd_v1"  # SD 2.x has the same autoencoder
    if any(name.startswith("decoder.up_blocks.") for name in state):
        return _vae_from_diffusers(state, configs=configs, path=path, dtype=dtype)
    if not any(name.startswith(VAE_PREFIX) for name in state):
        state = {VAE_PREFIX + name: tensor for name, tensor in state.items()}
    return _vae_from_ldm(state, configs=configs, path=path, dtype=dtype)


def _family(state: Mapping[str, Tensor], *, path: Path) -> str:
    """``sd_v1`` or ``sd_v2``, by the text encoder that the checkpoint carries."""
    for prefix, found in OTHER_FILES.items():
        if _has(state, prefix):
            raise wrong_architecture(path, found)
    if not _has(state, UNET_PREFIX):
        raise UserError(
            f"{path} is no Stable Diffusion checkpoint: it holds no U-Net ({UNET_PREFIX}*)"
        )
    if _context_width(state) == SDXL_WIDTH:
        raise wrong_architecture(path, SDXL)
    conv_in = state.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if conv_in is not None and conv_in.shape[1] != 4:
        raise wrong_architecture(
            path, f"a U-Net with {conv_in.shape[1]} input channels (inpainting or the like)"
        )
    if _has(state, OPEN_CLIP_PREFIX):
        return "sd_v2"
    if _has(state, CLIP_PREFIX):
        return "sd_v1"
    raise UserError(f"{path} holds no text encoder (cond_stage_model.*): use the full checkpoint")


def _has(state: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _context_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the text states that the U-Net attends to: 768, 1024 or 2048."""
    for name, tensor in state.items():
        if name.startswith(UNET_PREFIX) and name.endswith(".attn2.to_k.weight"):
            return tensor.shape[1]
    return None


def _check_width(state: Mapping[str, Tensor], unet: nn.Module, *, path: Path) -> None:
    width, expected = _context_width(state), unet.config.cross_attention_dim
    if width not in (expected, None):
        raise wrong_architecture(path, f"a U-Net with context width {width}, not {expected}")


def _nested_clip_name(name: str) -> str:
    """Some checkpoints lack the ``text_model.`` level."""
    rest = name.removeprefix(CLIP_PREFIX)
    if rest != name and rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"{CLIP_PREFIX}text_model.{rest}"
    return name


def _without_last_layer(state: Mapping[str, Tensor], *, num_layers: int) -> dict[str, Tensor]:
    """SD 2.x reads the state before OpenCLIP's last layer, which is therefore not part of it."""
    last = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{num_layers}."
    return {name: tensor for name, tensor in state.items() if not name.startswith(last)}


def _vae_from_ldm(
    state: Mapping[str, Tensor], *, configs: Path, path: Path, dtype: torch.dtype
) -> nn.Module:
    vae = empty_vae(configs / "vae")
    fill_weights(vae, vae_names, state, prefix=VAE_PREFIX, path=path, dtype=dtype)
    return vae


def _vae_from_diffusers(
    state: Mapping[str, Tensor], *, configs: Path, path: Path, dtype: torch.dtype
) -> nn.Module:
    vae = empty_vae(configs / "vae")
    state = {plain_name(name): tensor for name, tensor in state.items()}
    fill_weights(vae, plain_places, state, prefix="", path=path, dtype=dtype)
    return vae
