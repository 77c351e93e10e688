"""Derive the LoRA names and numbers in tests/models by running sd-scripts' networks.lora itself.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_lora.py``

Needs transformers < 5.6 (sd-scripts fails with later ones) and sd-scripts' small requirements, but
not torchvision. The stored values come from commit 48d368fa.
"""

from __future__ import annotations

import hashlib
import importlib

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler  # noqa: F401
from sd_scripts import enable_imports
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def main() -> None:
    """Print name digests of SD 1.5, 2 and XL, and the max-norm numbers."""
    enable_imports()
    lora = importlib.import_module("networks.lora")
    original_unet = importlib.import_module("library.original_unet")
    model_util = importlib.import_module("library.model_util")
    for v2 in (False, True):
        for settings in ({}, {"conv_dim": "2", "conv_alpha": "0.5"}):
            with torch.device("meta"):
                config = model_util.create_unet_diffusers_config(v2, False)
                unet = original_unet.UNet2DConditionModel(**config)
                width, layers, heads = (1024, 23, 16) if v2 else (768, 12, 12)
                clip = CLIPTextConfig(
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_attention_heads=heads,
                    num_hidden_layers=layers,
                )
                text_encoder = CLIPTextModel(clip)
                lora.LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["Transformer2DModel"]
                network = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet, **settings)
                network.apply_to(text_encoder, unet, True, True)
            print(f"    ({v2}, {settings}): {_digest(network)},")
    for settings in ({}, {"conv_dim": "2", "conv_alpha": "0.5"}):
        print(f"    sdxl, {settings}: {_digest(_sdxl_network(lora, settings))},")
    _max_norm(lora)
    _dropouts(lora)


def _sdxl_network(lora, settings: dict[str, str]) -> torch.nn.Module:
    sdxl_unet = importlib.import_module("library.sdxl_original_unet")
    with torch.device("meta"):
        clip_l = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
            )
        )
        clip_g = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_attention_heads=20,
                num_hidden_layers=32,
                projection_dim=1280,
            )
        )
        unet = sdxl_unet.SdxlUNet2DConditionModel()
        lora.LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["Transformer2DModel"]
        network = lora.create_network(1.0, 4, 1.0, None, [clip_l, clip_g], unet, **settings)
        network.apply_to([clip_l, clip_g], unet, True, True)
    return network


def _digest(network: torch.nn.Module) -> tuple[int, str]:
    """Number of modules and digest of all names and shapes."""
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    lines = "\n".join(f"{key} {shapes[key]}" for key in sorted(shapes))
    return len(shapes) // 3, hashlib.sha256(lines.encode()).hexdigest()[:16]


def _max_norm(lora) -> None:
    network = lora.LoRANetwork.__new__(lora.LoRANetwork)
    torch.nn.Module.__init__(network)
    layers = {
        "linear": torch.nn.Linear(6, 5),
        "conv": torch.nn.Conv2d(3, 4, 3, padding=1),
        "small": torch.nn.Conv2d(3, 4, 1),
    }
    for name, layer in layers.items():
        module = lora.LoRAModule(name, layer, 1.0, 2, 1.0)
        del module.org_module
        for weight in (module.lora_down.weight, module.lora_up.weight):
            values = torch.sin(torch.arange(1.0, weight.numel() + 1)).reshape(weight.shape)
            weight.data = values * (0.01 if name == "small" else 1.0)
        network.add_module(name, module)
    print("MAX_NORM =", network.apply_max_norm_regularization(1.0, "cpu"))
    state = {key: value for key, value in network.state_dict().items() if "lora" in key}
    print("SUMS =", {key: round(value.abs().sum().item(), 5) for key, value in state.items()})


def _dropouts(lora) -> None:
    settings = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}
    module = lora.LoRAModule("x", torch.nn.Linear(3, 2), 1.0, 4, 2.0, **settings)
    torch.nn.init.constant_(module.lora_down.weight, 1.0)
    torch.nn.init.constant_(module.lora_up.weight, 1.0)
    module.org_forward = lambda x: torch.zeros(*x.shape[:-1], 2)
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        results.append(
            [round(v, 4) for v in module(torch.ones(2, 2, 3))[..., 0].flatten().tolist()]
        )
    print("DROPPED =", results)


if __name__ == "__main__":
    main()
