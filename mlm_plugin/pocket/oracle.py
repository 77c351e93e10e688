"""The oracle: a small network that names every attribute of a picture.

It is trained on all of the world, held-out pairs included, on things of any colours, and on what
the autoencoder makes of them, since its task is to judge generated pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path
from mlm_plugin.models.weights_files import read_weights
from mlm_plugin.pocket.backgrounds import SIDE
from mlm_plugin.pocket.pictures import draw_any_scene, scene_pixels
from mlm_plugin.pocket.stage import StagePlan, generator_of, run_stage
from mlm_plugin.pocket.train_clip import label_loss, label_tensors
from mlm_plugin.pocket.world import ATTRIBUTES, Scene, labels

__all__ = ["Oracle", "Reading", "load_oracle", "oracle_accuracy", "save_oracle", "train_oracle"]

UNNAMED_SHARE = 0.3
RECONSTRUCTED_SHARE = 0.6
CHUNK = 128  # pictures at once, where no gradient is needed
LATENT_NOISE = 0.25  # in units of the latents' standard deviation


class Reading(NamedTuple):
    """What the oracle sees in B pictures."""

    logits: dict[str, Tensor]  # attribute -> (B, values)

    def values(self, attribute: str) -> list[str]:
        """The most likely value of each picture."""
        names = ATTRIBUTES[attribute]
        return [names[index] for index in self.logits[attribute].argmax(dim=-1).tolist()]


class Oracle(nn.Module):
    """Convolutions on the 32x32 art pixels, and one linear layer for everything that is asked.

    Args:
        channels: width of the first convolution.
    """

    def __init__(self, channels: int = 24):
        super().__init__()
        widths = [3, channels, 2 * channels, 3 * channels, 3 * channels, 2 * channels]
        strides = [1, 2, 2, 1, 2]
        layers: list[nn.Module] = []
        for inside, outside, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [
                nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1))
        num_logits = sum(len(values) for values in ATTRIBUTES.values())
        self.head = nn.Linear(widths[-1] * 16, num_logits)

    def answers(self, art: Tensor) -> Tensor:
        """From ``(B, 3, 32, 32)``: the logits of all attributes side by side, ``(B, values)``."""
        return self.head(self.body(art))

    def forward(self, pixels: Tensor) -> Reading:
        """Read pictures ``(B, 3, 64, 64)`` in [-1, 1]."""
        logits = self.answers(F.avg_pool2d(pixels, 2))
        parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=-1)
        return Reading(dict(zip(ATTRIBUTES, parts, strict=True)))


def train_oracle(
    oracle: Oracle,
    vae: AutoencoderKL,
    *,
    plan: StagePlan,
    pool_size: int,
    seed: int,
    state_path: Path,
    device: torch.device,
    show_progress: bool = True,
) -> float:
    """Train on ``pool_size`` pictures, clean and as the autoencoder makes them; the seconds."""
    scenes = _draw_scenes("oracle pool", pool_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    clean, made = (torch.empty(pool_size, 3, SIDE, SIDE) for _ in range(2))
    for start in range(0, pool_size, CHUNK):
        pixels = scene_pixels(scenes[start : start + CHUNK])
        clean[start : start + CHUNK] = F.avg_pool2d(pixels, 2)
        reconstructed = _reconstruct(vae, pixels, generator, noise=LATENT_NOISE)
        made[start : start + CHUNK] = F.avg_pool2d(reconstructed, 2)
    targets = label_tensors([labels(scene) for scene in scenes], torch.device("cpu"))

    def loss_of(rng: np.random.Generator, _step: int):
        rows = torch.from_numpy(rng.integers(0, pool_size, plan.batch_size))
        reconstructed = torch.rand(len(rows), 1, 1, 1) < RECONSTRUCTED_SHARE
        art = torch.where(reconstructed, made[rows], clean[rows])
        art = art + 0.15 * torch.rand(len(rows), 1, 1, 1) * torch.randn_like(art)
        wanted = {name: value[rows].to(device) for name, value in targets.items()}
        return label_loss(oracle.answers(art.to(device)), wanted), {}

    oracle.train()
    seconds = run_stage(
        "oracle",
        {"oracle": oracle},
        loss_of,
        plan=plan,
        seed=seed,
        state_path=state_path,
        show_progress=show_progress,
    )
    oracle.eval()
    return seconds


@torch.no_grad()
def oracle_accuracy(
    oracle: Oracle, vae: AutoencoderKL, *, num_pictures: int, seed: int
) -> dict[str, float]:
    """Share of rightly named values on fresh scenes, as the autoencoder makes them."""
    scenes = _draw_scenes("oracle test", num_pictures, seed=seed, unnamed_share=0.0)
    device = next(oracle.parameters()).device
    right = dict.fromkeys(ATTRIBUTES, 0)
    for start in range(0, num_pictures, CHUNK):
        part = scenes[start : start + CHUNK]
        made = _reconstruct(vae, scene_pixels(part), torch.Generator(), noise=0.0)
        reading = oracle(made.to(device))
        for name in ATTRIBUTES:
            wanted = [getattr(scene, name) for scene in part]
            right[name] += sum(map(str.__eq__, reading.values(name), wanted))
    return {name: count / num_pictures for name, count in right.items()}


def save_oracle(oracle: Oracle, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write its weights; whole numbers keep their type."""
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in oracle.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def load_oracle(path: Path) -> Oracle:
    """Read it back, in fp32 and ready to judge.

    Raises:
        UserError: the file is damaged, or holds another network.
    """
    state = read_weights(path)
    try:
        oracle = Oracle(channels=len(state["body.0.weight"]))
        oracle.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: is no oracle of this world; build the model anew") from error
    return oracle.eval()


def _draw_scenes(
    name: str, number: int, *, seed: int, unnamed_share: float = UNNAMED_SHARE
) -> list[Scene]:
    rng = generator_of(name, seed, 0)
    return [draw_any_scene(rng, unnamed_share=unnamed_share, held_out=None) for _ in range(number)]


@torch.no_grad()
def _reconstruct(
    vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator, *, noise: float
) -> Tensor:
    """What the autoencoder makes of pictures, with some noise on the latents in between."""
    device = next(vae.parameters()).device
    latents = vae.encode(pixels.to(device)).latent_dist.mean
    amount = noise * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    shift = amount * torch.randn(latents.shape, generator=generator)
    latents = latents + shift.to(device) / vae.config.scaling_factor
    return vae.decode(latents).sample.clamp(-1, 1).cpu()
