"""Make a Stable Diffusion XL with random weights, as a diffusers folder and as one file.

It has the real size, names, shapes and vocabulary, so that loaders, trainers and memory can be
tested where the real weights are not available. It is not trained. Full size: 3.5 billion weights,
7 GB of memory, and 7 GB on disk for each form in bf16.

    python -m research.benchmarks.make_sdxl --output DIR --tokenizer FOLDER [--dtype bf16] [--tiny]

writes ``DIR/diffusers`` and ``DIR/sdxl.safetensors`` (LDM names, as WebUI checkpoints).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlm_plugin.export.checkpoint import save_checkpoint, save_diffusers_folder
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.components import Components
from mlm_plugin.models.tokenizers import load_tokenizer, second_tokenizer
from research.benchmarks.make_sd15 import DTYPES, command_line

WIDTHS = 32, 64  # widths of the tiny text encoders
TINY = {
    "unet": {
        "block_out_channels": [32, 32, 64],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": sum(WIDTHS),
        "projection_class_embeddings_input_dim": WIDTHS[1] + 6 * 256,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    **{
        part: {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 2,
            "projection_dim": width,
        }
        for part, width in zip(("text_encoder", "text_encoder_2"), WIDTHS, strict=True)
    },
}
FORMS = ("both", "folder", "file")


class Models(NamedTuple):
    """The four networks of a Stable Diffusion XL model."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection


def build_models(
    *, tiny: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Models:
    """Random SDXL networks; the same seed and precision give the same weights.

    Args:
        tiny: 32 and 64 channels instead of the real widths; names and depths stay, so a LoRA has
            its 986 modules.
        seed: seed of the weights; the global random stream is not changed.
        dtype: dtype of all weights, used for drawing too: fp32 would temporarily take 14 GB.
    """
    configs = {part: _config(part, tiny=tiny) for part in TINY}
    with torch.random.fork_rng(devices=[]), default_dtype(dtype):
        torch.manual_seed(seed)
        models = Models(
            unet=UNet2DConditionModel.from_config(configs["unet"]),
            vae=AutoencoderKL.from_config(configs["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
        )
    return Models(*(model.eval() for model in models))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this precision in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def save_folder(models: Models, folder: Path, *, tokenizer: Path) -> None:
    """Write the models as a diffusers folder with both tokenizers."""
    first = load_tokenizer(tokenizer)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
    )
    save_diffusers_folder(
        folder,
        Components(**models._asdict()),
        tokenizers=[first, second_tokenizer(first)],
        noise_scheduler=scheduler,
        prediction_type="epsilon",
    )


def save_single_file(models: Models, path: Path) -> None:
    """Write the models as one ``.safetensors`` file with LDM names."""
    networks = Components(**models._asdict())
    save_checkpoint(path, networks, family="sdxl", metadata={"format": "pt"})


def _config(part: str, *, tiny: bool) -> dict:
    config = json.loads((ARCHITECTURES / "sdxl" / part / "config.json").read_text())
    return config | TINY[part] if tiny else config


def main() -> None:
    """Write the requested forms and print their paths."""
    parser = command_line(__doc__, dtype="bf16", tiny="32 and 64 channels, all layers")
    parser.add_argument("--form", choices=FORMS, default="both")
    args = parser.parse_args()
    models = build_models(tiny=args.tiny, seed=args.seed, dtype=DTYPES[args.dtype])
    if args.form != "file":
        save_folder(models, args.output / "diffusers", tokenizer=args.tokenizer)
        print(args.output / "diffusers")
    if args.form != "folder":
        save_single_file(models, args.output / "sdxl.safetensors")
        print(args.output / "sdxl.safetensors")


if __name__ == "__main__":
    main()
