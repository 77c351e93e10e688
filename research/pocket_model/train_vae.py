"""Training of the pocket autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mlm_plugin.pocket.world import draw_scene, generator_of
from research.pocket_model.pictures import scene_pixels, to_pixels, universal_art
from research.pocket_model.train_loop import Job, run_train_loop

__all__ = ["encode", "measure_scale", "train_vae", "vae_loss"]

KL_WEIGHT = 2e-6
THING_WEIGHT = 4.0  # of a pixel on an object; backgrounds are large and similar, faces are not
NUM_MEASURED = 256


def vae_loss(vae: AutoencoderKL, pixels: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error plus a little KL divergence.

    Args:
        vae: the autoencoder.
        pixels: ``(B, 3, 64, 64)`` in [-1, 1].
        weight: ``(B, 1, 64, 64)``, weight of the error of each pixel.
    """
    posterior = vae.encode(pixels).latent_dist
    error = vae.decode(posterior.sample()).sample - pixels
    squared = error.square()
    missed = (weight * (error.abs() + squared)).sum() / weight.sum() / 3
    loss = missed + KL_WEIGHT * posterior.kl().mean()
    return loss, {"mse": float(squared.mean().detach())}


def train_vae(vae: AutoencoderKL, job: Job) -> float:
    """Train the autoencoder and set its ``scaling_factor``; returns the seconds."""

    def loss_of(rng, _step: int):
        art, things = universal_art(rng, job.plan.batch_size)
        weight = 1 + (THING_WEIGHT - 1) * torch.from_numpy(things)[:, None].float()
        weight = weight.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return vae_loss(vae, to_pixels(art).to(job.device), weight.to(job.device))

    vae.train()
    seconds = run_train_loop(
        "autoencoder",
        {"vae": vae},
        loss_of,
        job,
    )
    vae.eval()
    vae.register_to_config(scaling_factor=round(measure_scale(vae, seed=job.seed), 5))
    return seconds


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, *, seed: int) -> float:
    """The scale that gives latents of scenes variance 1."""
    rng = generator_of("scale", seed)
    scenes = [draw_scene(rng) for _ in range(NUM_MEASURED)]
    device = next(vae.parameters()).device
    return 1.0 / float(vae.encode(scene_pixels(scenes).to(device)).latent_dist.mean.std())


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, *, batch_size: int = 64) -> Tensor:
    """Scaled latents (the mean, without noise) of pictures, ``(B, 4, 8, 8)``, on the CPU."""
    device = next(vae.parameters()).device
    parts = [
        vae.encode(part.to(device)).latent_dist.mean.cpu() for part in pixels.split(batch_size)
    ]
    return torch.cat(parts) * vae.config.scaling_factor
