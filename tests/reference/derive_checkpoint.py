"""Derive the tensor names in tests/export/test_checkpoint.py by running sd-scripts' own function.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_checkpoint.py``

Takes the functions it needs out of ``library/model_util.py`` without importing that file, so that
diffusers and transformers are the only requirements. The models are of full size and on the meta
device. The stored values come from commit 48d368fa.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

FUNCTIONS = (
    "conv_transformer_to_linear",
    "convert_text_encoder_state_dict_to_sd_v2",
    "convert_unet_state_dict_to_sd",
    "convert_vae_state_dict",
    "is_safetensors",
    "reshape_weight_for_sd",
    "save_stable_diffusion_checkpoint",
)
ARCHITECTURES = Path(__file__).parents[2] / "mlm_plugin" / "models" / "architectures"


def main() -> None:
    """Print number and digest of the names and shapes in an SD 1 and an SD 2 checkpoint."""
    for family in ("sd_v1", "sd_v2"):
        shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(family).items()}
        lines = "\n".join(f"{name} {shapes[name]}" for name in sorted(shapes))
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        print(f'    "{family}": ({len(shapes)}, "{digest}"),')


def saved_tensors(family: str) -> dict[str, Tensor]:
    """What sd-scripts gives to ``save_file`` for a model of full size, made without a base file."""
    written: dict[str, Tensor] = {}
    scope = {
        "diffusers": diffusers,
        "logger": logging.getLogger(__name__),
        "os": os,
        "save_file": lambda tensors, path, metadata: written.update(tensors),
        "torch": torch,
    }
    source = (Path(os.environ["SD_SCRIPTS_DIR"]) / "library" / "model_util.py").read_text("utf-8")
    wanted = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS
    ]
    exec(compile(ast.Module(wanted, type_ignores=[]), "model_util", "exec"), scope)
    configs = {
        part: json.loads((ARCHITECTURES / family / part / "config.json").read_text())
        for part in ("unet", "vae", "text_encoder")
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    scope["save_stable_diffusion_checkpoint"](
        family == "sd_v2", "x.safetensors", _nested(text_encoder), unet, None, 0, 0, {}, vae=vae
    )
    return written


def _nested(text_encoder: nn.Module) -> nn.Module:
    """With the ``text_model.`` level that sd-scripts reads and transformers >= 5.6 lacks."""
    if hasattr(text_encoder, "text_model"):
        return text_encoder
    return nn.ModuleDict({"text_model": text_encoder})


if __name__ == "__main__":
    main()
