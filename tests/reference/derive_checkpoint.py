"""Derive the tensor names in tests/export/test_checkpoint.py by running sd-scripts' own function.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_checkpoint.py``

Takes the functions it needs out of ``library/model_util.py`` and ``library/sdxl_model_util.py``
without importing these files, so that diffusers and transformers are the only requirements. The
models are of full size and on the meta device. The stored values come from commit 48d368fa.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FUNCTIONS = (
    "conv_transformer_to_linear",
    "convert_text_encoder_state_dict_to_sd_v2",
    "convert_unet_state_dict_to_sd",
    "convert_vae_state_dict",
    "is_safetensors",
    "reshape_weight_for_sd",
    "save_stable_diffusion_checkpoint",
)
SDXL_FUNCTIONS = (
    "convert_diffusers_unet_state_dict_to_sdxl",
    "convert_text_encoder_2_state_dict_to_sdxl",
    "convert_unet_state_dict",
    "make_unet_conversion_map",
    "save_stable_diffusion_checkpoint",
)
ARCHITECTURES = Path(__file__).parents[2] / "mlm_plugin" / "models" / "architectures"


def main() -> None:
    """Print number and digest of the names and shapes in a checkpoint of each family."""
    for family in ("sd_v1", "sd_v2", "sdxl"):
        tensors = saved_sdxl_tensors() if family == "sdxl" else saved_tensors(family)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        lines = "\n".join(f"{name} {shapes[name]}" for name in sorted(shapes))
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        print(f'    "{family}": ({len(shapes)}, "{digest}"),')


def saved_tensors(family: str) -> dict[str, Tensor]:
    """What sd-scripts passes to ``save_file`` for a full-size model without a base file."""
    written: dict[str, Tensor] = {}
    save = _functions("model_util.py", FUNCTIONS, written)["save_stable_diffusion_checkpoint"]
    unet, vae, text_encoder = _models(family)
    save(family == "sd_v2", "x.safetensors", _nested(text_encoder), unet, None, 0, 0, {}, vae=vae)
    return written


def saved_sdxl_tensors() -> dict[str, Tensor]:
    """The same for SDXL, whose U-Net sd-scripts has under the names of the file already."""
    written: dict[str, Tensor] = {}
    model_util = SimpleNamespace(**_functions("model_util.py", FUNCTIONS, written))
    scope = _functions("sdxl_model_util.py", SDXL_FUNCTIONS, written)
    scope["model_util"] = model_util
    unet, vae, text_encoder = _models("sdxl")
    with torch.device("meta"):
        config = CLIPTextConfig(**_config("sdxl", "text_encoder_2"))
        text_encoder_2 = CLIPTextModelWithProjection(config)
        logit_scale = torch.tensor(0.0)
    unet_state = scope["convert_diffusers_unet_state_dict_to_sdxl"](unet.state_dict())
    own_unet = SimpleNamespace(state_dict=lambda: unet_state)
    models = (_nested(text_encoder), text_encoder_2, own_unet)
    scope["save_stable_diffusion_checkpoint"](
        "x.safetensors", *models, 0, 0, None, vae, logit_scale, {}
    )
    return written


def _functions(file: str, names: tuple[str, ...], written: dict[str, Tensor]) -> dict:
    scope = {
        "diffusers": diffusers,
        "logger": logging.getLogger(__name__),
        "os": os,
        "save_file": lambda tensors, path, metadata: written.update(tensors),
        "torch": torch,
    }
    source = (Path(os.environ["SD_SCRIPTS_DIR"]) / "library" / file).read_text("utf-8")
    wanted = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    exec(compile(ast.Module(wanted, type_ignores=[]), file, "exec"), scope)
    return scope


def _config(family: str, part: str) -> dict:
    return json.loads((ARCHITECTURES / family / part / "config.json").read_text())


def _models(family: str) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    with torch.device("meta"):
        return (
            UNet2DConditionModel.from_config(_config(family, "unet")),
            AutoencoderKL.from_config(_config(family, "vae")),
            CLIPTextModel(CLIPTextConfig(**_config(family, "text_encoder"))),
        )


def _nested(text_encoder: nn.Module) -> nn.Module:
    """With the ``text_model.`` level that sd-scripts reads and transformers >= 5.6 lacks."""
    if hasattr(text_encoder, "text_model"):
        return text_encoder
    return nn.ModuleDict({"text_model": text_encoder})


if __name__ == "__main__":
    main()
