"""Stable Diffusion 1.x, 2.x or XL from one WebUI checkpoint file, without the network.

The family is read off the tensors, the configurations are shipped in ``architectures/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.components import (
    REFINER,
    ModelParts,
    wrong_architecture,
)
from mlm_plugin.models.diffusers_folder import empty_parts
from mlm_plugin.models.ldm_names import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_names,
    open_clip_names,
    sdxl_clip_names,
    sdxl_open_clip_names,
    unet_names,
    vae_names,
)
from mlm_plugin.models.load_weights import (
    empty_pooled_text_encoder,
    empty_text_encoder,
    empty_unet,
    empty_vae,
    fill_weights,
    plain_name,
    plain_places,
)
from mlm_plugin.models.weights_files import read_shapes, read_weights

__all__ = ["ARCHITECTURES", "empty_file", "load_file", "load_vae_file"]

ARCHITECTURES = Path(__file__).parent / "architectures"
OTHER_FILES = {
    "conditioner.embedders.0.model.": REFINER,
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
    """Load a checkpoint of SD 1.x, 2.x or XL with LDM names (``.safetensors``, ``.ckpt``).

    The U-Net's weights are taken, not their moving average (``model_ema.*``), as sd-scripts does.

    Args:
        path: the checkpoint.
        architecture: folder of configurations in place of the shipped ones.
        dtype: of U-Net and text encoder.
        vae_dtype: of the VAE; ``None`` = do not read it.

    Raises:
        UserError: unreadable or incomplete file, or no checkpoint of these kinds.

    Source: sd-scripts ``library/model_util.py`` ``load_models_from_stable_diffusion_checkpoint``.
    """
    state = read_weights(path)
    family = _family(state, path=path)
    configs = architecture or ARCHITECTURES / family
    unet = empty_unet(configs / "unet")
    _check_width(state, unet, path=path)
    fill_weights(unet, unet_names, state, prefix=UNET_PREFIX, path=path, dtype=dtype)
    return ModelParts(
        family=family,
        unet=unet,
        text_encoders=TEXT_ENCODERS[family](state, configs=configs, path=path, dtype=dtype),
        vae=vae_dtype and _vae_from_ldm(state, configs=configs, path=path, dtype=vae_dtype),
        tokenizers=[],
        scheduler=_scheduler(state),
    )


def empty_file(path: Path) -> ModelParts:
    """What :func:`load_file` would load, on the meta device: weights are not read.

    Raises:
        UserError: unreadable file, or no checkpoint of these kinds.
    """
    state = read_shapes(path)
    family = _family(state, path=path)
    parts = empty_parts(ARCHITECTURES / family, family=family)
    _check_width(state, parts.unet, path=path)
    parts.scheduler = _scheduler(state)
    return parts


def load_vae_file(
    path: Path, *, family: str, architecture: Path | None, dtype: torch.dtype
) -> nn.Module:
    """Load a VAE from a file of its own, or from a full checkpoint.

    Accepts LDM names, with or without ``first_stage_model.``, and diffusers names of any age.

    Args:
        path: the file.
        family: of the model it is for. All have the same autoencoder; SDXL scales its latents
            differently, which no file says.
        architecture: folder of configurations in place of the shipped ones.
        dtype: of the VAE.

    Raises:
        UserError: unreadable or incomplete file.
    """
    state = read_weights(path)
    configs = architecture or ARCHITECTURES / family
    if any(name.startswith("decoder.up_blocks.") for name in state):
        return _vae_from_diffusers(state, configs=configs, path=path, dtype=dtype)
    if not any(name.startswith(VAE_PREFIX) for name in state):
        state = {VAE_PREFIX + name: tensor for name, tensor in state.items()}
    return _vae_from_ldm(state, configs=configs, path=path, dtype=dtype)


def _family(state: Mapping[str, Tensor], *, path: Path) -> str:
    """``sd_v1``, ``sd_v2`` or ``sdxl``, by the text encoders that the checkpoint carries."""
    for prefix, found in OTHER_FILES.items():
        if _has(state, prefix):
            raise wrong_architecture(path, found)
    if not _has(state, UNET_PREFIX):
        raise UserError(
            f"{path} is no Stable Diffusion checkpoint: it holds no U-Net ({UNET_PREFIX}*)"
        )
    conv_in = state.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if conv_in is not None and conv_in.shape[1] != 4:
        raise wrong_architecture(
            path, f"a U-Net with {conv_in.shape[1]} input channels (inpainting or the like)"
        )
    for family, prefix in TEXT_PREFIXES.items():
        if _has(state, prefix):
            return family
    raise UserError(
        f"{path} holds no text encoder (cond_stage_model.* or conditioner.embedders.*): "
        "use the full checkpoint"
    )


def _has(state: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _context_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the text states that the U-Net attends to: 768, 1024, or 2048 in SDXL."""
    for name, tensor in state.items():
        if name.startswith(UNET_PREFIX) and name.endswith(".attn2.to_k.weight"):
            return tensor.shape[1]
    return None


def _check_width(state: Mapping[str, Tensor], unet: nn.Module, *, path: Path) -> None:
    width, expected = _context_width(state), unet.config.cross_attention_dim
    if width not in (expected, None):
        raise wrong_architecture(path, f"a U-Net with context width {width}, not {expected}")


def _scheduler(state: Mapping[str, Tensor]) -> dict:
    """What SDXL files that predict v say of themselves by empty tensors; others say nothing."""
    if "v_pred" not in state:
        return {}
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in state}


def _sd1_text_encoders(
    state: Mapping[str, Tensor], *, configs: Path, path: Path, dtype: torch.dtype
) -> list[nn.Module]:
    clip = empty_text_encoder(configs / "text_encoder")
    named = _with_nested_clip(state, CLIP_PREFIX)
    fill_weights(clip, clip_names, named, prefix=CLIP_PREFIX, path=path, dtype=dtype)
    return [clip]


def _sd2_text_encoders(
    state: Mapping[str, Tensor], *, configs: Path, path: Path, dtype: torch.dtype
) -> list[nn.Module]:
    clip = empty_text_encoder(configs / "text_encoder")
    used = _without_last_layer(state, num_layers=clip.config.num_hidden_layers)
    fill_weights(clip, open_clip_names, used, prefix=OPEN_CLIP_PREFIX, path=path, dtype=dtype)
    return [clip]


def _sdxl_text_encoders(
    state: Mapping[str, Tensor], *, configs: Path, path: Path, dtype: torch.dtype
) -> list[nn.Module]:
    clip_l = empty_text_encoder(configs / "text_encoder")
    clip_g = empty_pooled_text_encoder(configs / "text_encoder_2")
    named = _with_projection_matrix(_with_nested_clip(state, SDXL_CLIP_PREFIX))
    for clip, names, prefix in (
        (clip_l, sdxl_clip_names, SDXL_CLIP_PREFIX),
        (clip_g, sdxl_open_clip_names, SDXL_OPEN_CLIP_PREFIX),
    ):
        fill_weights(clip, names, named, prefix=prefix, path=path, dtype=dtype)
    return [clip_l, clip_g]


def _with_projection_matrix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some checkpoints have OpenCLIP's projection as a linear layer, which holds its transpose."""
    name = f"{SDXL_OPEN_CLIP_PREFIX}text_projection"
    linear = state.get(f"{name}.weight")
    if linear is None:
        return dict(state)
    return {key: t for key, t in state.items() if key != f"{name}.weight"} | {name: linear.T}


def _with_nested_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Some checkpoints lack CLIP's ``text_model.`` level."""
    flat = tuple(f"{prefix}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))
    return {
        f"{prefix}text_model.{name.removeprefix(prefix)}" if name.startswith(flat) else name: tensor
        for name, tensor in state.items()
    }


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


TEXT_PREFIXES = {"sdxl": SDXL_CLIP_PREFIX, "sd_v2": OPEN_CLIP_PREFIX, "sd_v1": CLIP_PREFIX}
TEXT_ENCODERS = {
    "sd_v1": _sd1_text_encoders,
    "sd_v2": _sd2_text_encoders,
    "sdxl": _sdxl_text_encoders,
}
