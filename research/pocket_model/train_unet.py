"""Training of the pocket U-Net on latents, with the frozen text tower of CLIP."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from mlm_plugin.pocket.captions import caption_scene
from mlm_plugin.pocket.text_to_image import noise_schedule
from mlm_plugin.pocket.world import generator_of
from research.pocket_model.pictures import draw_any_scene, scene_pixels
from research.pocket_model.train_clip import text_states
from research.pocket_model.train_loop import Job, run_train_loop
from research.pocket_model.train_vae import encode

__all__ = ["noise_loss", "train_unet"]

UNNAMED_SHARE = 0.1
EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
MIN_SNR_GAMMA = 5.0
CHUNK = 128


def train_unet(
    unet: UNet2DConditionModel,
    text_model: nn.Module,
    tokenizer,
    vae: AutoencoderKL,
    *,
    pool_size: int,
    job: Job,
) -> float:
    """Train on ``pool_size`` captioned scenes, encoded once; returns the seconds."""
    device, noise_scheduler = job.device, noise_schedule()
    latents_pool, states_pool = _pool(vae, text_model, tokenizer, pool_size, seed=job.seed)
    empty = text_states(text_model, tokenizer, [""])

    def loss_of(rng, _step: int):
        rows = torch.from_numpy(rng.integers(0, pool_size, job.plan.batch_size))
        is_empty = torch.rand(job.plan.batch_size, 1, 1) < EMPTY_CAPTION_SHARE
        states = torch.where(is_empty.to(device), empty, states_pool[rows].to(device, empty.dtype))
        return noise_loss(unet, noise_scheduler, latents_pool[rows].to(device), states), {}

    unet.train()
    seconds = run_train_loop(
        "unet",
        {"unet": unet},
        loss_of,
        job,
    )
    unet.eval()
    return seconds


def noise_loss(
    unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, latents: Tensor, states: Tensor
) -> Tensor:
    """Squared error of the predicted noise, weighted by ``min(SNR, 5) / SNR``.

    Source: Min-SNR (arXiv 2303.09556), section 3.4.
    """
    noise = torch.randn_like(latents)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, encoder_hidden_states=states).sample
    kept = noise_scheduler.alphas_cumprod.to(latents.device)[timesteps]
    snr = kept / (1 - kept)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()


def _pool(
    vae: AutoencoderKL, text_model: nn.Module, tokenizer, pool_size: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Latents ``(B, 4, 8, 8)`` of scenes, and fp16 states ``(B, 77, D)`` of their captions."""
    rng = generator_of("unet pool", seed)
    latents, states = [], []
    for start in range(0, pool_size, CHUNK):
        scenes = [
            draw_any_scene(rng, unnamed_share=UNNAMED_SHARE, held_out=False)
            for _ in range(min(CHUNK, pool_size - start))
        ]
        latents.append(encode(vae, scene_pixels(scenes)).cpu())
        texts = [caption_scene(scene, rng).text for scene in scenes]
        states.append(text_states(text_model, tokenizer, texts).half().cpu())
    return torch.cat(latents), torch.cat(states)
