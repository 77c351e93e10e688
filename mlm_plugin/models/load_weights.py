"""Giving a model its weights from a dict of tensors: all of them, or an error that names the gaps.

Knows no file formats; names come from ``ldm_names`` or are the library's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlm_plugin.errors import UserError
from mlm_plugin.models.components import read_json, refuse_gaps
from mlm_plugin.models.ldm_names import LdmTensor

__all__ = [
    "empty_pooled_text_encoder",
    "empty_text_encoder",
    "empty_unet",
    "empty_vae",
    "fill_weights",
    "plain_name",
    "plain_places",
]

# Tensors that checkpoints carry and these models do not use.
UNUSED = re.compile(
    r".*\bposition_ids"
    r"|cond_stage_model\.model\.(?:logit_scale|text_projection|attn_mask)"
    r"|cond_stage_model\.transformer\.text_projection\.weight"
    r"|conditioner\.embedders\.1\.model\.(?:logit_scale|attn_mask)"
    r"|conditioner\.embedders\.0\.transformer\.(?:text_projection\.weight|logit_scale)"
    r"|first_stage_model\.(?:loss|model_ema)\..*"
)
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """A U-Net of the configuration in ``folder``, on the meta device, to be filled."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(read_json(folder / "config.json"))


def empty_vae(folder: Path) -> AutoencoderKL:
    """A VAE of the configuration in ``folder``, on the meta device, to be filled."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(read_json(folder / "config.json"))


def empty_text_encoder(folder: Path) -> CLIPTextModel:
    """A CLIP text model of the configuration in ``folder``, on the meta device, to be filled."""
    return _empty_clip(CLIPTextModel, folder)


def empty_pooled_text_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """The same with pooled states, as SDXL's second text encoder has them."""
    return _empty_clip(CLIPTextModelWithProjection, folder)


def _empty_clip(cls, folder: Path) -> nn.Module:
    config = CLIPTextConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        model = cls(config)
    embeddings = model.get_submodule(
        "text_model" if hasattr(model, "text_model") else ""
    ).embeddings
    # In no checkpoint, so they must have their values from the start.
    embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return model


def plain_name(name: str) -> str:
    """A library's name without what its versions differ in.

    CLIP's names begin with ``text_model.`` before transformers 5.6 and do not since; the matrices
    of the VAE's attention have other names in files of older versions of diffusers.
    """
    name = name.removeprefix("text_model.")
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{OLD_VAE_ATTENTION[leaf]}.{kind}" if leaf in OLD_VAE_ATTENTION else name


def plain_places(names: Iterable[str]) -> dict[str, LdmTensor]:
    """Places of weights in a state dict with plain names."""
    return {name: LdmTensor(plain_name(name)) for name in names}


def fill_weights(
    module: nn.Module,
    places_of: Callable[[Iterable[str]], dict[str, LdmTensor]],
    state: Mapping[str, Tensor],
    *,
    prefix: str,
    path: Path,
    dtype: torch.dtype,
) -> None:
    """Give a module all its weights, as copies in ``dtype``.

    Copies, because the file may be mapped from disk and change while the model lives.

    Args:
        module: may be on the meta device, if all its buffers are in its state dict.
        places_of: from the module's weight names to their places in ``state``.
        state: tensors by name; a matrix may be stored as a 1x1 convolution and vice versa.
        prefix: the part of ``state`` that must be used up.
        path: where ``state`` came from, for errors.
        dtype: of the filled weights.

    Raises:
        UserError: tensors are missing, left over or of another shape.
    """
    wanted = module.state_dict()
    places = places_of(wanted)
    keys = {place.key for place in places.values()}
    unexpected = (name for name in state if name.startswith(prefix) and name not in keys)
    refuse_gaps(
        path,
        missing=keys.difference(state),
        unexpected=(name for name in unexpected if not UNUSED.fullmatch(name)),
    )
    filled = {
        name: _shaped(state, places[name], like=like, path=path).to(dtype, copy=True)
        for name, like in wanted.items()
    }
    module.load_state_dict(filled, assign=True)


def _shaped(state: Mapping[str, Tensor], place: LdmTensor, *, like: Tensor, path: Path) -> Tensor:
    tensor = state[place.key]
    if place.third is not None:
        tensor = tensor.chunk(3)[place.third]
    if place.transposed:
        tensor = tensor.T
    if _matrix_shape(tensor) != _matrix_shape(like):
        came, expected = tuple(tensor.shape), tuple(like.shape)
        raise UserError(f"{path}: {place.key} has shape {came}, expected {expected}")
    return tensor.reshape(like.shape).contiguous()


def _matrix_shape(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    return shape[:2] if shape[2:] == [1, 1] else shape
