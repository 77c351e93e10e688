"""Stable Diffusion 1.x, 2.x or XL from one WebUI checkpoint file, without the network.

The family follows from the tensors; configurations are shipped in ``architectures/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.components import (
    REFINER,
    empty_network,
    fill_weights,
    find_weight,
    plain_name,
    plain_places,
    read_json,
    wrong_architecture,
)
from mlm_plugin.models.ldm_names import (
    LDM_PARTS,
    OPEN_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    vae_names,
)
from mlm_plugin.models.weights_files import read_weights

__all__ = ["ARCHITECTURES", "CheckpointFile", "load_vae_file"]

ARCHITECTURES = Path(__file__).parent / "architectures"
OTHER_FILES = {
    "conditioner.embedders.0.model.": REFINER,
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "FLUX",
    "double_blocks.": "FLUX",
    "lora_unet_": "a LoRA (--network_weights loads it)",
    "lora_te": "a LoRA (--network_weights loads it)",
}
# In this order: the first family whose text encoder is in the file.
FAMILIES = ("sdxl", "sd_v2", "sd_v1")
FLAT_CLIP = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer"
    r"\.(?=embeddings\.|encoder\.|final_layer_norm\.)"
)
PROJECTION = f"{SDXL_OPEN_CLIP_PREFIX}text_projection"


class CheckpointFile:
    """A checkpoint of SD 1.x, 2.x or XL with LDM names (``.safetensors``, ``.ckpt``).

    Like sd-scripts, it loads the U-Net's weights, not their moving average (``model_ema.*``).

    Args:
        name: the file.
        architecture: folder of configurations in place of the shipped ones.

    Attributes:
        family: ``sd_v1``, ``sd_v2`` or ``sdxl``.
        configs: folder of configurations.
        scheduler: the part of a scheduler's configuration in the file; mostly empty.
        tokenizers: empty, as such a file contains no tokenizer.

    Raises:
        UserError: unreadable file, or not a checkpoint of these kinds.

    Source: sd-scripts ``library/model_util.py`` ``load_models_from_stable_diffusion_checkpoint``.
    """

    tokenizers = ()

    def __init__(self, name: str, *, architecture: Path | None = None):
        self.name, self.path = name, Path(name)
        state = read_weights(self.path)
        self.family = _family(state, path=self.path)
        self.configs = architecture or ARCHITECTURES / self.family
        _check_width(state, self.configs, path=self.path)
        self.scheduler = _scheduler(state)
        self._state = _in_common_form(state)

    def load(self, part: str, dtype: torch.dtype) -> nn.Module:
        """One of the networks, on the CPU.

        Args:
            part: name of a field of ``Components``.
            dtype: precision of its weights.

        Raises:
            UserError: tensors are missing, unexpected or of another shape.
        """
        network, state = empty_network(part, self.configs / part), self._state
        if self.family == "sd_v2" and part == "text_encoder":
            state = _without_layer(state, network.config.num_hidden_layers)
        prefix, names = LDM_PARTS[self.family][part]
        fill_weights(network, names, state, prefix=prefix, path=self.path, dtype=dtype)
        return network

    def unet_weights(self, unet: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        """Some weights of the U-Net by name; the others are not read.

        Args:
            unet: of this architecture; may be on the meta device.
            names: of matrices.

        Raises:
            UserError: a tensor is missing.
        """
        places = LDM_PARTS[self.family]["unet"].places(unet.state_dict())
        return {name: find_weight(self._state, places[name].key, path=self.path) for name in names}


def load_vae_file(path: Path, *, configs: Path, dtype: torch.dtype) -> nn.Module:
    """Load a VAE from a file of its own, or from a full checkpoint.

    Accepts LDM names, with or without ``first_stage_model.``, and diffusers names of any age.

    Args:
        path: the file.
        configs: folder of configurations. All families have the same autoencoder, but SDXL scales
            its latents differently, which is not recorded in the file.
        dtype: precision of the VAE.

    Raises:
        UserError: unreadable or incomplete file.
    """
    state, prefix, places = read_weights(path), VAE_PREFIX, vae_names
    if any(name.startswith("decoder.up_blocks.") for name in state):
        state, prefix, places = {plain_name(k): t for k, t in state.items()}, "", plain_places
    elif not _has(state, VAE_PREFIX):
        state = {VAE_PREFIX + name: tensor for name, tensor in state.items()}
    vae = empty_network("vae", configs / "vae")
    fill_weights(vae, places, state, prefix=prefix, path=path, dtype=dtype)
    return vae


def _family(state: Mapping[str, Tensor], *, path: Path) -> str:
    """``sd_v1``, ``sd_v2`` or ``sdxl``, by the text encoders in the checkpoint."""
    for prefix, found in OTHER_FILES.items():
        if _has(state, prefix):
            raise wrong_architecture(path, found)
    if not _has(state, UNET_PREFIX):
        raise UserError(
            f"{path} is not a Stable Diffusion checkpoint: it holds no U-Net ({UNET_PREFIX}*)"
        )
    conv_in = state.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if conv_in is not None and conv_in.shape[1] != 4:
        raise wrong_architecture(
            path, f"a U-Net with {conv_in.shape[1]} input channels (inpainting or the like)"
        )
    for family in FAMILIES:
        if _has(state, LDM_PARTS[family]["text_encoder"].prefix):
            return family
    raise UserError(
        f"{path} holds no text encoder (cond_stage_model.* or conditioner.embedders.*): "
        "use the full checkpoint"
    )


def _has(state: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _check_width(state: Mapping[str, Tensor], configs: Path, *, path: Path) -> None:
    """Compare the width of the text states that the U-Net attends to: 768, 1024; 2048 in SDXL."""
    expected = read_json(configs / "unet" / "config.json").get("cross_attention_dim", 1280)
    for name, tensor in state.items():
        if name.startswith(UNET_PREFIX) and name.endswith(".attn2.to_k.weight"):
            width = tensor.shape[1]
            if width != expected:
                raise wrong_architecture(
                    path, f"a U-Net with context width {width}, not {expected}"
                )
            return


def _scheduler(state: Mapping[str, Tensor]) -> dict:
    """SDXL files that predict v mark it with empty tensors; other files have no mark."""
    if "v_pred" not in state:
        return {}
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in state}


def _in_common_form(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in their most common form.

    Some checkpoints lack CLIP's ``text_model.`` level. Some have OpenCLIP's projection as a linear
    layer, which is its transpose.
    """
    common = {FLAT_CLIP.sub(r"\g<0>text_model.", name): tensor for name, tensor in state.items()}
    linear = common.pop(f"{PROJECTION}.weight", None)
    return common if linear is None else common | {PROJECTION: linear.T}


def _without_layer(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """SD 2.x uses the state before OpenCLIP's last layer, so that layer is dropped."""
    last = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{number}."
    return {name: tensor for name, tensor in state.items() if not name.startswith(last)}
