"""Sampling from a pocket model by DDIM with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from mlm_plugin.pocket.world import PICTURE_SIDE
from mlm_plugin.training.samples import create_sampler

__all__ = ["LATENT_SIDE", "VAE_FACTOR", "Sampling", "TextToImage", "generate", "noise_schedule"]

VAE_FACTOR = 8
LATENT_SIDE = PICTURE_SIDE // VAE_FACTOR


class TextToImage(NamedTuple):
    """The models that draw.

    Attributes:
        unet: predicts the noise.
        vae: decodes latents.
        encode_captions: returns the conditioning of the U-Net, ``(B, L, D)``.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encode_captions: Callable[[Sequence[str]], Tensor]


class Sampling(NamedTuple):
    """How pictures are drawn.

    Attributes:
        num_steps: steps of the sampler.
        guidance: scale of classifier-free guidance.
    """

    num_steps: int
    guidance: float


def noise_schedule() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


@torch.no_grad()
def generate(
    texts: Sequence[str],
    model: TextToImage,
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int = 64,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Pictures ``(B, 3, 64, 64)`` in [-1, 1] on the CPU; the i-th one has seed ``seed + i``.

    ``on_step`` is called after each step of the sampler.
    """
    unet, vae, encode_captions = model
    empty = encode_captions([""])
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        latents = _noise(len(batch), seed=seed + start).to(unet.device)
        states = encode_captions(batch)
        states = torch.cat([empty.expand_as(states), states])
        sampler = create_sampler("ddim", noise_schedule(), prediction_type="epsilon")
        sampler.set_timesteps(sampling.num_steps)
        for timestep in sampler.timesteps:
            predicted = unet(
                torch.cat([latents, latents]), timestep, encoder_hidden_states=states
            ).sample
            without, with_text = predicted.chunk(2)
            guided = without + sampling.guidance * (with_text - without)
            latents = sampler.step(guided, timestep, latents).prev_sample
            on_step()
        parts.append(vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).cpu())
    return torch.cat(parts)


def _noise(number: int, *, seed: int) -> Tensor:
    """Latents ``(number, 4, 8, 8)``, each with its own seed."""
    return torch.stack(
        [
            torch.randn(
                4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(seed + index)
            )
            for index in range(number)
        ]
    )
