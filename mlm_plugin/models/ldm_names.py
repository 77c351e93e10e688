"""Where Stable Diffusion 1.x, 2.x and XL weights are in WebUI checkpoints, by library name.

One table for both directions: a reader asks where a tensor is in a checkpoint, a writer what to
call it. diffusers converts in one direction only, by code that parses checkpoint names, so it
provides neither the names for a writer nor the unexpected tensors for a reader. The numbers of
blocks and layers are taken from the names, so toy models work as well. Knows no files and no model
classes.

LDM names: ``model.diffusion_model.*`` (U-Net), ``first_stage_model.*`` (VAE),
``cond_stage_model.transformer.*`` (SD 1 CLIP) and ``cond_stage_model.model.*`` (SD 2 OpenCLIP).
SDXL has both text encoders: ``conditioner.embedders.0.transformer.*`` and ``.1.model.*``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CLIP_PREFIX",
    "LDM_PARTS",
    "OPEN_CLIP_PREFIX",
    "SDXL_OPEN_CLIP_PREFIX",
    "UNET_PREFIX",
    "VAE_PREFIX",
    "LdmPart",
    "LdmTensor",
    "clip_names",
    "open_clip_names",
    "to_ldm",
    "unet_names",
    "vae_names",
]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_BLOCK = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "out_proj": "attn.out_proj",
}
OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
QKV = ("q_proj", "k_proj", "v_proj")


class LdmTensor(NamedTuple):
    """Where a tensor is in an LDM checkpoint.

    Attributes:
        key: name of the checkpoint's tensor.
        third: ``None`` = all of it; 0, 1, 2 = the first, second or last third of its rows (OpenCLIP
            keeps query, key and value in one tensor).
        transposed: the checkpoint has the transpose (OpenCLIP multiplies by its projection on the
            right).
    """

    key: str
    third: int | None = None
    transposed: bool = False


class LdmPart(NamedTuple):
    """Where a network is in an LDM checkpoint.

    Attributes:
        prefix: prefix of all its tensors.
        places: maps all of its weight names to their locations.
    """

    prefix: str
    places: Callable[[Iterable[str]], dict[str, LdmTensor]]


def unet_names(names: Iterable[str]) -> dict[str, LdmTensor]:
    """LDM location of each diffusers U-Net weight.

    With n layers per block, ``down_blocks.b`` holds the input blocks ``1 + b (n + 1)`` on and
    ``up_blocks.b`` the output blocks ``b (n + 1)`` on; a sampler closes the block it belongs to.

    Args:
        names: all weight names of one ``UNet2DConditionModel``.

    Raises:
        ValueError: a name that U-Nets of SD 1.x, 2.x and XL do not have.

    Source: huggingface/diffusers ``scripts/convert_diffusers_to_original_stable_diffusion.py``.
    """
    names = list(names)
    per_block = 1 + _count(r"down_blocks\.0\.resnets\.(\d+)\.", names)
    attentive = {m[1] for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return {name: LdmTensor(UNET_PREFIX + _unet_name(name, per_block, attentive)) for name in names}


def vae_names(names: Iterable[str]) -> dict[str, LdmTensor]:
    """LDM location of each diffusers VAE weight; LDM counts the decoder's blocks in reverse.

    Raises:
        ValueError: a name that VAEs of SD 1.x, 2.x and XL do not have.

    Source: as ``unet_names``.
    """
    names = list(names)
    num_ups = _count(r"decoder\.up_blocks\.(\d+)\.", names)
    return {name: LdmTensor(VAE_PREFIX + _vae_name(name, num_ups)) for name in names}


def clip_names(names: Iterable[str], *, prefix: str = CLIP_PREFIX) -> dict[str, LdmTensor]:
    """LDM location of each ``CLIPTextModel`` weight in an SD 1.x checkpoint, or below ``prefix``.

    ``names`` may be nested (``text_model.``, transformers < 5.6) or flat; LDM's are nested.
    """
    return {name: LdmTensor(f"{prefix}text_model.{_flat(name)}") for name in names}


def open_clip_names(
    names: Iterable[str], *, prefix: str = OPEN_CLIP_PREFIX
) -> dict[str, LdmTensor]:
    """OpenCLIP location of each CLIP text weight in an SD 2.x checkpoint, or below ``prefix``.

    SD 2.x has one layer more than its text model: it uses the state before the last. SDXL has no
    extra layer, and the projection of ``CLIPTextModelWithProjection`` as OpenCLIP applies it:
    ``x @ text_projection``. sd-scripts reads and writes that matrix unchanged, so it computes with
    its transpose.

    Raises:
        ValueError: a name that CLIP text models do not have.

    Source: mlfoundations/open_clip ``src/open_clip/transformer.py`` ``ResidualAttentionBlock``;
    Stability-AI/generative-models ``sgm/modules/encoders/modules.py`` ``FrozenOpenCLIPEmbedder2``;
    diffusers ``loaders/single_file_utils.py``.
    """
    return {name: _open_clip_place(_flat(name), prefix) for name in names}


def to_ldm(state: Mapping[str, Tensor], places: Mapping[str, LdmTensor]) -> dict[str, Tensor]:
    """Rename a module's state dict to LDM names and shapes.

    Query, key and value are joined where LDM keeps them in one tensor; the VAE's attention matrices
    become 1x1 convolutions, as in LDM.

    Args:
        state: weights under library names.
        places: their locations, from ``LdmPart.places``.
    """
    joined: dict[str, list[Tensor | None]] = {}
    for name, tensor in state.items():
        key, third, transposed = places[name]
        parts = joined.setdefault(key, [None] * (1 if third is None else 3))
        parts[third or 0] = tensor.T if transposed else tensor
    ldm = {key: torch.cat(parts) if len(parts) == 3 else parts[0] for key, parts in joined.items()}
    for key, tensor in ldm.items():
        if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", key):
            ldm[key] = tensor[:, :, None, None]
    return ldm


def _unet_name(name: str, per_block: int, attentive: set[str]) -> str:
    module, _, kind = name.rpartition(".")
    if module in UNET_TOP:
        return f"{UNET_TOP[module]}.{kind}"
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        index = 2 * int(m[2]) + (m[1] == "attentions")
        return f"middle_block.{index}.{_inner(m[3], UNET_RESNET)}"
    if m := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        index = int(m[2]) * per_block + int(m[4])
        side = f"input_blocks.{index + 1}" if m[1] == "down" else f"output_blocks.{index}"
        return f"{side}.{int(m[3] == 'attentions')}.{_inner(m[5], UNET_RESNET)}"
    if m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(int(m[1]) + 1) * per_block}.0.op.{m[2]}"
    if m := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        last = (int(m[1]) + 1) * per_block - 1
        return f"output_blocks.{last}.{2 if m[1] in attentive else 1}.conv.{m[2]}"
    raise ValueError(f"no LDM name for the U-Net weight {name}")


def _vae_name(name: str, num_ups: int) -> str:
    if re.match(r"(post_)?quant_conv\.|(en|de)coder\.conv_(in|out)\.", name):
        return name
    if m := re.match(r"(encoder|decoder)\.conv_norm_out\.(.+)", name):
        return f"{m[1]}.norm_out.{m[2]}"
    if m := re.match(r"(encoder|decoder)\.mid_block\.(resnet|attention)s\.(\d+)\.(.+)", name):
        kind = "block" if m[2] == "resnet" else "attn"
        return f"{m[1]}.mid.{kind}_{int(m[3]) + 1}.{_inner(m[4], VAE_BLOCK)}"
    if m := re.match(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(.+)", name):
        block = int(m[2]) if m[1] == "encoder.down" else num_ups - 1 - int(m[2])
        if resnet := re.match(r"resnets\.(\d+)\.(.+)", m[3]):
            return f"{m[1]}.{block}.block.{resnet[1]}.{_inner(resnet[2], VAE_BLOCK)}"
        if sampler := re.match(r"(downsample|upsample)rs\.0\.(.+)", m[3]):
            return f"{m[1]}.{block}.{sampler[1]}.{sampler[2]}"
    raise ValueError(f"no LDM name for the VAE weight {name}")


def _inner(name: str, table: Mapping[str, str]) -> str:
    """Name inside a block; names not in the table are the same in both (U-Net attention)."""
    module, _, kind = name.rpartition(".")
    return f"{table.get(module, module)}.{kind}"


def _open_clip_place(name: str, prefix: str) -> LdmTensor:
    if name in OPEN_CLIP_TOP:
        return LdmTensor(prefix + OPEN_CLIP_TOP[name])
    if name == "text_projection.weight":
        return LdmTensor(f"{prefix}text_projection", transposed=True)
    m = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if m is None:
        raise ValueError(f"no OpenCLIP name for the text encoder weight {name}")
    layer, module = f"{prefix}transformer.resblocks.{m[1]}", m[2].removeprefix("self_attn.")
    if module in QKV:
        return LdmTensor(f"{layer}.attn.in_proj_{m[3]}", third=QKV.index(module))
    return LdmTensor(f"{layer}.{OPEN_CLIP_LAYER[module]}.{m[3]}")


def _flat(name: str) -> str:
    return name.removeprefix("text_model.")


def _count(pattern: str, names: Iterable[str]) -> int:
    return 1 + max(int(m[1]) for name in names if (m := re.match(pattern, name)))


UNET, VAE = LdmPart(UNET_PREFIX, unet_names), LdmPart(VAE_PREFIX, vae_names)
LDM_PARTS = {
    "sd_v1": {"unet": UNET, "text_encoder": LdmPart(CLIP_PREFIX, clip_names), "vae": VAE},
    "sd_v2": {"unet": UNET, "text_encoder": LdmPart(OPEN_CLIP_PREFIX, open_clip_names), "vae": VAE},
    "sdxl": {
        "unet": UNET,
        "text_encoder": LdmPart(SDXL_CLIP_PREFIX, partial(clip_names, prefix=SDXL_CLIP_PREFIX)),
        "text_encoder_2": LdmPart(
            SDXL_OPEN_CLIP_PREFIX, partial(open_clip_names, prefix=SDXL_OPEN_CLIP_PREFIX)
        ),
        "vae": VAE,
    },
}
"""For each family, where its networks are in a checkpoint, by diffusers' name."""
