"""The networks of the pocket model: ordinary classes at pocket sizes. Knows no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from mlm_plugin.pocket.text_to_image import LATENT_SIDE, VAE_FACTOR
from mlm_plugin.pocket.world import PICTURE_SIDE

__all__ = [
    "Sizes",
    "new_clip",
    "new_unet",
    "new_vae",
    "preprocessor_config",
]


@dataclass(frozen=True)
class Sizes:
    """Widths and depths."""

    vae_channels: tuple[int, int, int, int] = (16, 32, 64, 80)
    text_width: int = 96
    text_layers: int = 4
    vision_width: int = 96
    vision_layers: int = 3
    projection: int = 64
    unet_channels: tuple[int, int] = (64, 104)
    oracle_channels: int = 24


def new_vae(sizes: Sizes) -> AutoencoderKL:
    """Autoencoder of factor 8 with four latent channels, as Stable Diffusion's.

    Norms run over at least four channels: a norm over a single one would remove its mean, and with
    it the brightness of a picture.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=max(1, min(sizes.vae_channels) // 4),
        sample_size=PICTURE_SIDE,
        scaling_factor=1.0,  # measured after training
    )


def new_clip(sizes: Sizes, *, vocab_size: int) -> CLIPModel:
    """CLIP with both towers; patches have the size of one latent."""
    end = vocab_size - 1
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        projection_dim=sizes.projection,
    )
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=4,
        image_size=PICTURE_SIDE,
        patch_size=VAE_FACTOR,
        projection_dim=sizes.projection,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=sizes.projection,
        )
    )


def preprocessor_config() -> dict[str, Any]:
    """Preprocessing for the vision tower, in the format of transformers' ``CLIPImageProcessor``."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": PICTURE_SIDE},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": PICTURE_SIDE, "width": PICTURE_SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def new_unet(sizes: Sizes) -> UNet2DConditionModel:
    """U-Net on 8x8 latents with cross-attention in both levels and in the middle."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        down_block_types=("CrossAttnDownBlock2D",) * len(sizes.unet_channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(sizes.unet_channels),
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )
