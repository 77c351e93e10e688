"""Training of the oracle, and its accuracy.

It is trained on the whole world, held-out pairs included, on objects of any colours, and on
reconstructions by the autoencoder, since its task is to judge generated pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from mlm_plugin.files import atomic_path
from mlm_plugin.pocket.backgrounds import SIDE
from mlm_plugin.pocket.oracle import Oracle
from mlm_plugin.pocket.world import ATTRIBUTES, Scene, generator_of, labels
from research.pocket_model.pictures import draw_any_scene, scene_pixels
from research.pocket_model.train_clip import label_loss, label_tensors
from research.pocket_model.train_loop import Job, run_train_loop

__all__ = ["oracle_accuracy", "save_oracle", "train_oracle"]

UNNAMED_SHARE = 0.3
RECONSTRUCTED_SHARE = 0.6
CHUNK = 128  # pictures per batch without gradients
LATENT_NOISE = 0.25  # in units of the latents' standard deviation


def train_oracle(
    oracle: Oracle,
    vae: AutoencoderKL,
    *,
    pool_size: int,
    job: Job,
) -> float:
    """Train on ``pool_size`` pictures and their reconstructions; returns the seconds."""
    scenes = _draw_scenes("oracle pool", pool_size, seed=job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    clean, made = (torch.empty(pool_size, 3, SIDE, SIDE) for _ in range(2))
    for start in range(0, pool_size, CHUNK):
        pixels = scene_pixels(scenes[start : start + CHUNK])
        clean[start : start + CHUNK] = F.avg_pool2d(pixels, 2)
        reconstructed = _reconstruct(vae, pixels, generator, noise=LATENT_NOISE)
        made[start : start + CHUNK] = F.avg_pool2d(reconstructed, 2)
    targets = label_tensors([labels(scene) for scene in scenes], torch.device("cpu"))

    def loss_of(rng: np.random.Generator, _step: int):
        rows = torch.from_numpy(rng.integers(0, pool_size, job.plan.batch_size))
        reconstructed = torch.rand(len(rows), 1, 1, 1) < RECONSTRUCTED_SHARE
        art = torch.where(reconstructed, made[rows], clean[rows])
        art = art + 0.15 * torch.rand(len(rows), 1, 1, 1) * torch.randn_like(art)
        wanted = {name: value[rows].to(job.device) for name, value in targets.items()}
        return label_loss(oracle.all_logits(art.to(job.device)), wanted), {}

    oracle.train()
    seconds = run_train_loop(
        "oracle",
        {"oracle": oracle},
        loss_of,
        job,
    )
    oracle.eval()
    return seconds


@torch.no_grad()
def oracle_accuracy(
    oracle: Oracle, vae: AutoencoderKL, *, num_pictures: int, seed: int
) -> dict[str, float]:
    """Accuracy on reconstructions of new scenes, by attribute."""
    scenes = _draw_scenes("oracle test", num_pictures, seed=seed, unnamed_share=0.0)
    device = next(oracle.parameters()).device
    right = dict.fromkeys(ATTRIBUTES, 0)
    for start in range(0, num_pictures, CHUNK):
        part = scenes[start : start + CHUNK]
        made = _reconstruct(vae, scene_pixels(part), torch.Generator(), noise=0.0)
        predictions = oracle(made.to(device))
        for name in ATTRIBUTES:
            wanted = [getattr(scene, name) for scene in part]
            right[name] += sum(map(str.__eq__, predictions.values(name), wanted))
    return {name: count / num_pictures for name, count in right.items()}


def save_oracle(oracle: Oracle, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write its weights; integers keep their type."""
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in oracle.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def _draw_scenes(
    name: str, number: int, *, seed: int, unnamed_share: float = UNNAMED_SHARE
) -> list[Scene]:
    rng = generator_of(name, seed)
    return [draw_any_scene(rng, unnamed_share=unnamed_share, held_out=None) for _ in range(number)]


@torch.no_grad()
def _reconstruct(
    vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator, *, noise: float
) -> Tensor:
    """Reconstructions by the autoencoder, with some noise on the latents."""
    device = next(vae.parameters()).device
    latents = vae.encode(pixels.to(device)).latent_dist.mean
    amount = noise * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    shift = amount * torch.randn(latents.shape, generator=generator)
    latents = latents + shift.to(device) / vae.config.scaling_factor
    return vae.decode(latents).sample.clamp(-1, 1).cpu()
