"""Make a Stable Diffusion 1.5 model with random weights, as a diffusers folder and as one file.

It has the real size, names, shapes and vocabulary, so that loaders, trainers and memory can be
tested where the real weights are not available. It is not trained.

    python -m research.benchmarks.make_sd15 --output DIR --tokenizer FOLDER [--dtype fp16] [--tiny]

writes ``DIR/diffusers`` and ``DIR/sd15.safetensors`` (LDM names, as WebUI checkpoints).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.export.checkpoint import save_diffusers_folder
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.components import Components
from mlm_plugin.models.ldm_names import CLIP_PREFIX, clip_names, to_ldm, unet_names, vae_names
from mlm_plugin.models.tokenizers import load_tokenizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TINY = {
    "unet": {
        "block_out_channels": [32, 32, 64, 64],
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    },
}


class Models(NamedTuple):
    """The three networks of a Stable Diffusion model."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


def build_models(
    *, tiny: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Models:
    """Random SD 1.5 networks; the same seed gives the same weights.

    Args:
        tiny: 32 channels and two text layers instead of the real sizes; names and depths stay.
        seed: seed of the weights; the global random stream is not changed.
        dtype: dtype of all weights.
    """
    configs = {part: _config(part, tiny=tiny) for part in ("unet", "vae", "text_encoder")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = Models(
            unet=UNet2DConditionModel.from_config(configs["unet"]),
            vae=AutoencoderKL.from_config(configs["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        )
    if dtype != torch.float32:
        models = Models(*(model.to(dtype) for model in models))
    return Models(*(model.eval() for model in models))


def save_diffusers(models: Models, folder: Path, *, tokenizer: Path) -> None:
    """Write the models as a diffusers folder, with a copy of the tokenizer."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    save_diffusers_folder(
        folder,
        Components(**models._asdict()),
        tokenizers=[load_tokenizer(tokenizer)],
        noise_scheduler=scheduler,
        prediction_type="epsilon",
    )


def ldm_state_dict(models: Models) -> dict[str, Tensor]:
    """All weights under LDM names, with the additional buffers of a WebUI checkpoint."""
    positions = torch.arange(models.text_encoder.config.max_position_embeddings)[None]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return {
        "alphas_cumprod": torch.cumprod(1 - betas, dim=0),
        f"{CLIP_PREFIX}text_model.embeddings.position_ids": positions,
        **_renamed(models.unet, unet_names),
        **_renamed(models.vae, vae_names),
        **_renamed(models.text_encoder, clip_names),
    }


def save_single_file(models: Models, path: Path) -> None:
    """Write the models as one ``.safetensors`` file with LDM names."""
    state = {name: tensor.contiguous() for name, tensor in ldm_state_dict(models).items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def _renamed(module: nn.Module, names) -> dict[str, Tensor]:
    state = module.state_dict()
    return to_ldm(state, names(state))


def _config(part: str, *, tiny: bool) -> dict:
    config = json.loads((ARCHITECTURES / "sd_v1" / part / "config.json").read_text())
    return config | TINY[part] if tiny else config


def command_line(description: str, *, dtype: str, tiny: str) -> argparse.ArgumentParser:
    """The options of every script that makes a model.

    Args:
        description: the module's docstring; its first line is shown.
        dtype: default precision.
        tiny: size of the model with ``--tiny``.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of the CLIP tokenizer"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=dtype)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help=tiny)
    return parser


def main() -> None:
    """Write both forms and print their paths."""
    args = command_line(__doc__, dtype="fp32", tiny="32 channels, two text layers").parse_args()
    models = build_models(tiny=args.tiny, seed=args.seed, dtype=DTYPES[args.dtype])
    save_diffusers(models, args.output / "diffusers", tokenizer=args.tokenizer)
    save_single_file(models, args.output / "sd15.safetensors")
    print(f"{args.output / 'diffusers'}\n{args.output / 'sd15.safetensors'}")


if __name__ == "__main__":
    main()
