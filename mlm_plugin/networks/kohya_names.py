"""Names of modules and tensors in kohya's LoRA files, and the shapes they have there.

A module's name in the file is a prefix and its path with dots as underscores. Three things differ
between a file and the model in memory, and all are settled here:

- transformers >= 5.6 builds ``CLIPTextModel`` without the inner ``text_model``; files keep it.
- kohya loads SD 2 with convolutions as ``proj_in`` / ``proj_out`` where diffusers has linear
  layers, so these tensors end in ``(1, 1)`` in the file.
- kohya's U-Net of SDXL has Stability AI's paths (``input_blocks.4.1``), and so have its files.

Knows nothing of LoRA itself, of models or of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from mlm_plugin.models import ldm_names

__all__ = [
    "BUNDLE_PREFIX",
    "TEXT_ENCODER_PARTS",
    "canonical_name",
    "from_comfyui",
    "in_file_shape",
    "is_known_key",
    "part_of",
    "renamed",
    "sdxl_unet_names",
    "text_encoder_name",
    "unet_name",
]

UNET_PREFIX = "lora_unet"
TEXT_ENCODER_PREFIX = "lora_te"
BUNDLE_PREFIX = "bundle_emb."  # an embedding inside a LoRA file, as A1111 reads it
TEXT_ENCODER_PARTS = {1: ("textencoder",), 2: ("textencoder1", "textencoder2")}
"""kohya's names of the text encoders of a model, by how many there are."""

_NUMBERED_TEXT_ENCODER = re.compile(rf"{TEXT_ENCODER_PREFIX}([12]?)_")
_FLAT_TEXT_ENCODER = re.compile(
    rf"^{_NUMBERED_TEXT_ENCODER.pattern}(?=encoder_|embeddings_|final_layer_norm)"
)
_COMFYUI_ANIMA = {
    TEXT_ENCODER_PREFIX: re.compile(r"text_encoders\.qwen3_06b\.transformer\.model\.(.+)"),
    UNET_PREFIX: re.compile(
        r"diffusion_model\.((?:llm_adapter\.|blocks\.\d+\."
        r"(?:(?:self|cross)_attn\.\w+_proj|mlp\.layer|adaln_modulation)).+)"
    ),
}
_MODULE_AND_TENSOR = re.compile(r"(.+?)\.(lora_\w+\.weight|\w+)")
_COMFYUI_MATRICES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_PROJECTION = re.compile(r"_attentions_\d+_proj_(in|out)$")

# Tensors shaped like the layer's own weight: LoRA, GLoRA, LoKr, full, DoRA.
_LAYER_SHAPED = re.compile(r"(lora_(up|down)|[ab][12])\.weight|lokr_w2|diff|dora_scale")

_BLOCK = r"(down_blocks_\d|mid_block|up_blocks_\d)"
_TRANSFORMER = r"transformer_blocks_\d+_(attn[12]_to_([qkv]|out_0)|ff_net_(0_proj|2)|norm[123])"
_UNET_MODULE = (
    rf"{_BLOCK}_attentions_\d_(norm|proj_in|proj_out|{_TRANSFORMER})"
    rf"|{_BLOCK}_resnets_\d_(norm[12]|conv[12]|conv_shortcut|time_emb_proj)"
    r"|down_blocks_\d_downsamplers_0_conv|up_blocks_\d_upsamplers_0_conv"
    r"|conv_in|conv_out|conv_norm_out|time_embedding_linear_[12]"
)
_SDXL_UNET_MODULE = (
    rf"(input_blocks_\d_1|middle_block_1|output_blocks_\d_1)_(norm|proj_in|proj_out|{_TRANSFORMER})"
    r"|(input_blocks_\d_0|middle_block_[02]|output_blocks_\d_0)"
    r"_(in_layers_[02]|emb_layers_1|out_layers_[03]|skip_connection)"
    r"|input_blocks_\d_0_op|output_blocks_\d_[12]_conv"
    r"|input_blocks_0_0|out_[02]|time_embed_[02]|label_emb_0_[02]"
)
_TEXT_ENCODER_MODULE = (
    r"text_model_(encoder_layers_\d+_(self_attn_([qkv]|out)_proj|mlp_fc[12]|layer_norm[12])"
    r"|final_layer_norm)"
)
_TENSOR = (
    r"alpha|scalar|dora_scale|lora_(up|down|mid)\.weight"
    r"|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t[12])|diff(_b)?|[wb]_norm"
    r"|oft_(blocks|diag)|rescale|[ab][12]\.weight|bm\.weight|weight|on_input"
)
_KNOWN_KEY = re.compile(
    rf"({UNET_PREFIX}_({_UNET_MODULE}|{_SDXL_UNET_MODULE})"
    rf"|{TEXT_ENCODER_PREFIX}[12]?_({_TEXT_ENCODER_MODULE}))\.({_TENSOR})"
)


def unet_name(module_name: str) -> str:
    """Name in the file of a U-Net module, e.g. ``mid_block.attentions.0.proj_in``."""
    return f"{UNET_PREFIX}_{module_name}".replace(".", "_")


def sdxl_unet_names(weight_names: Iterable[str]) -> dict[str, str]:
    """Names in the file of SDXL's U-Net modules, by what :func:`unet_name` makes of their paths.

    Some trainers write the latter; kohya's reads both.

    Args:
        weight_names: all weight names of one ``UNet2DConditionModel``.

    Source: sd-scripts ``library/sdxl_original_unet.py``.
    """
    places = ldm_names.unet_names(weight_names)
    return {
        unet_name(name.removesuffix(".weight")): unet_name(
            place.key.removeprefix(ldm_names.UNET_PREFIX).removesuffix(".weight")
        )
        for name, place in places.items()
        if name.endswith(".weight")
    }


def text_encoder_name(module_name: str, part: str = "textencoder") -> str:
    """Name in the file of a CLIP module, nested or flat, always with ``text_model_``.

    Args:
        module_name: path in the model.
        part: which text encoder, of ``TEXT_ENCODER_PARTS``.
    """
    number = part.removeprefix("textencoder")
    return canonical_name(f"{TEXT_ENCODER_PREFIX}{number}_{module_name}".replace(".", "_"))


def part_of(name: str) -> str:
    """The part that a module or tensor name belongs to: ``unet`` or a text encoder's name."""
    match = _NUMBERED_TEXT_ENCODER.match(name)
    return "unet" if match is None else f"textencoder{match[1]}"


def canonical_name(name: str) -> str:
    """A module or tensor name as kohya writes it: ``text_model_`` put in where it is missing."""
    return _FLAT_TEXT_ENCODER.sub(rf"{TEXT_ENCODER_PREFIX}\1_text_model_", name)


def from_comfyui(key: str) -> str:
    """A tensor's name of an Anima file in ComfyUI's names as sd-scripts writes it; others stay.

    Wan's modules, which start as Anima's, have other names inside their blocks.

    Source: sd-scripts ``networks/convert_anima_lora_to_comfy.py``.
    """
    for prefix, pattern in _COMFYUI_ANIMA.items():
        found = pattern.fullmatch(key)
        if found and (parts := _MODULE_AND_TENSOR.fullmatch(found[1])):
            module = f"{prefix}_{parts[1]}".replace(".", "_")
            return f"{module}.{_COMFYUI_MATRICES.get(parts[2], parts[2])}"
    return key


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under other names of their modules, where there is another.

    Args:
        state: tensors by ``module.tensor``.
        names: other names of modules.
    """
    result = {}
    for key, tensor in state.items():
        module, dot, rest = key.partition(".")
        result[f"{names.get(module, module)}{dot}{rest}"] = tensor
    return result


def in_file_shape(key: str, tensor: Tensor) -> Tensor:
    """A tensor as it lies in the file: those of linear ``proj_in`` / ``proj_out`` get ``(1, 1)``.

    Source: sd-scripts ``library/model_util.py``, which builds the SD 2 U-Net without
    ``use_linear_projection``.
    """
    name, _, part = key.partition(".")
    if tensor.ndim == 2 and _PROJECTION.search(name) and _LAYER_SHAPED.fullmatch(part):
        return tensor[..., None, None]
    return tensor


def is_known_key(key: str) -> bool:
    """Whether WebUIs find the layer for this key of an SD 1, SD 2 or SDXL file.

    Covers networks.lora and the LyCORIS algorithms. A1111, Forge and ComfyUI build the same names
    from their own model; Forge refuses files with many others.
    """
    return _KNOWN_KEY.fullmatch(key) is not None
