"""The networks of a Stable Diffusion model: created empty, then filled completely or refused.

Knows no file formats; names of tensors come from ``ldm_names`` or are the library's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlm_plugin.errors import UserError
from mlm_plugin.models.ldm_names import LdmTensor

__all__ = [
    "REFINER",
    "TITLES",
    "Components",
    "empty_network",
    "fill_weights",
    "find_weight",
    "plain_name",
    "plain_places",
    "read_json",
    "text_parts",
    "wrong_architecture",
]

TITLES = {
    "sd_v1": "Stable Diffusion 1.x",
    "sd_v2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
REFINER = "the refiner of Stable Diffusion XL"
CLASSES = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
}
MAX_NAMED = 3  # tensors named in an error
# Tensors in checkpoints that these networks do not use.
UNUSED = re.compile(
    r".*\bposition_ids"
    r"|cond_stage_model\.model\.(?:logit_scale|text_projection|attn_mask)"
    r"|cond_stage_model\.transformer\.text_projection\.weight"
    r"|conditioner\.embedders\.1\.model\.(?:logit_scale|attn_mask)"
    r"|conditioner\.embedders\.0\.transformer\.(?:text_projection\.weight|logit_scale)"
    r"|first_stage_model\.(?:loss|model_ema)\..*"
)
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Components(NamedTuple):
    """The networks of a model, under diffusers' names.

    Attributes:
        unet: ``UNet2DConditionModel``.
        text_encoder: ``CLIPTextModel``.
        vae: ``AutoencoderKL``.
        text_encoder_2: SDXL's ``CLIPTextModelWithProjection``; ``None`` in SD 1.x and 2.x.
    """

    unet: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    text_encoder_2: nn.Module | None = None

    def by_part(self) -> dict[str, nn.Module]:
        """The networks that the model has, by name."""
        return {part: network for part, network in self._asdict().items() if network is not None}


def text_parts(family: str) -> tuple[str, ...]:
    """Names of the text encoders, in the order in which the U-Net reads their states."""
    return ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)


def empty_network(part: str, folder: Path) -> nn.Module:
    """A network on the meta device, to be filled.

    Args:
        part: name of a field of ``Components``.
        folder: folder of its ``config.json``.

    Raises:
        UserError: the configuration cannot be read.
    """
    if not part.startswith("text_encoder"):
        with torch.device("meta"):
            return CLASSES[part].from_config(read_json(folder / "config.json"))
    config = CLIPTextConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        clip = CLASSES[part](config)
    # No checkpoint contains these, so they need their values now.
    position_ids = torch.arange(config.max_position_embeddings)[None]
    getattr(clip, "text_model", clip).embeddings.position_ids = position_ids
    return clip


def fill_weights(
    network: nn.Module,
    places_of: Callable[[Iterable[str]], dict[str, LdmTensor]],
    state: Mapping[str, Tensor],
    *,
    prefix: str,
    path: Path,
    dtype: torch.dtype,
) -> None:
    """Fill in all weights of a network, as copies in ``dtype``.

    Copies, because the file may be memory-mapped and change while the model is in use.

    This is stricter than diffusers' ``from_single_file`` and transformers' ``from_pretrained``.
    Their versions differ in the names they know (``text_model.`` is gone since transformers 5.6)
    and in what they do about missing tensors, from an error without a name to weights that are
    random or stay on the meta device. They ignore leftover tensors.

    Args:
        network: may be on the meta device, if all its buffers are in its state dict.
        places_of: maps the network's weight names to their locations in ``state``.
        state: tensors by name; a matrix may be stored as a 1x1 convolution and vice versa.
        prefix: every tensor whose name starts with it must be used.
        path: the file of ``state``, for errors.
        dtype: precision of the filled weights.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    wanted = network.state_dict()
    places = places_of(wanted)
    keys = {place.key for place in places.values()}
    unexpected = (name for name in state if name.startswith(prefix) and name not in keys)
    _refuse_gaps(
        path,
        missing=keys.difference(state),
        unexpected=(name for name in unexpected if not UNUSED.fullmatch(name)),
    )
    filled = {
        name: _shaped(state, places[name], like=like, path=path).to(dtype, copy=True)
        for name, like in wanted.items()
    }
    network.load_state_dict(filled, assign=True)


def find_weight(state: Mapping[str, Tensor], key: str, *, path: Path) -> Tensor:
    """One tensor of a file.

    Raises:
        UserError: it is missing.
    """
    if key not in state:
        raise UserError(f"{path} lacks {key}: it does not fit its architecture")
    return state[key]


def plain_name(name: str) -> str:
    """A library's name for a weight, the same for all versions of the library.

    CLIP's names begin with ``text_model.`` before transformers 5.6 and do not since; the matrices
    of the VAE's attention have other names in files of older versions of diffusers.
    """
    name = name.removeprefix("text_model.")
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{OLD_VAE_ATTENTION[leaf]}.{kind}" if leaf in OLD_VAE_ATTENTION else name


def plain_places(names: Iterable[str]) -> dict[str, LdmTensor]:
    """Locations of weights in a state dict with plain names."""
    return {name: LdmTensor(plain_name(name)) for name in names}


def wrong_architecture(source: str | Path, found: str) -> UserError:
    """The error for a model of an unsupported kind; ``found`` says what it is."""
    return UserError(f"{source} is {found}; this version trains {TITLES['sd_v1']}, 2.x and XL base")


def read_json(path: Path, *, optional: bool = False) -> dict:
    """A configuration file; with ``optional``, an absent file is empty.

    Raises:
        UserError: the file cannot be read.
    """
    if optional and not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error


def _refuse_gaps(path: Path, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise if tensors are missing or unexpected, naming the first few."""
    parts = []
    for kind, names in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if names:
            more = ", ..." if len(names) > MAX_NAMED else ""
            parts.append(f"{kind} {len(names)} tensors ({', '.join(names[:MAX_NAMED])}{more})")
    if parts:
        raise UserError(f"{path} {' and '.join(parts)}: it does not fit its architecture")


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
