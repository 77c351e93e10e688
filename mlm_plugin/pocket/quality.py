"""How good a pocket model is: prompts it never saw, pictures, and the oracle's verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from mlm_plugin.pocket.captions import Caption, draw_said, write_caption
from mlm_plugin.pocket.networks import LATENT_SIDE, new_scheduler
from mlm_plugin.pocket.oracle import Oracle
from mlm_plugin.pocket.stage import generator_of
from mlm_plugin.pocket.world import draw_scene, held_out_pairs
from mlm_plugin.training.samples import create_sampler

__all__ = ["generate", "held_out_prompts", "judge", "missed_bars"]

BARS = {
    "background": 0.95, "position": 0.95, "subject": 0.95, "colour": 0.90, "companion": 0.90,
    "pairs": 0.85,
}  # fmt: skip
"""What a model must reach before it ships."""


def held_out_prompts(number: int, *, seed: int) -> list[Caption]:
    """Captions that ask for at least one pair of values which building never showed."""
    rng = generator_of("held-out prompts", seed, 0)
    prompts: list[Caption] = []
    while len(prompts) < number:
        said = draw_said(draw_scene(rng, held_out=True), rng)
        if held_out_pairs(said):
            prompts.append(write_caption(said, rng))
    return prompts


@torch.no_grad()
def generate(
    texts: Sequence[str],
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    encode_captions: Callable[[Sequence[str]], Tensor],
    seed: int,
    num_steps: int,
    guidance: float,
    batch_size: int = 64,
) -> Tensor:
    """Pictures ``(B, 3, 64, 64)`` in [-1, 1] on the CPU; the i-th one has seed ``seed + i``.

    ``encode_captions`` gives the conditioning of the U-Net, ``(B, L, D)``.
    """
    device = next(unet.parameters()).device
    empty = encode_captions([""])
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        latents = torch.stack(
            [
                torch.randn(
                    4, LATENT_SIDE, LATENT_SIDE,
                    generator=torch.Generator().manual_seed(seed + start + index),
                )
                for index in range(len(batch))
            ]
        ).to(device)  # fmt: skip
        states = encode_captions(batch)
        states = torch.cat([empty.expand_as(states), states])
        sampler = create_sampler("ddim", new_scheduler(), prediction_type="epsilon")
        sampler.set_timesteps(num_steps)
        for timestep in sampler.timesteps:
            predicted = unet(
                torch.cat([latents, latents]), timestep, encoder_hidden_states=states
            ).sample
            without, with_text = predicted.chunk(2)
            guided = without + guidance * (with_text - without)
            latents = sampler.step(guided, timestep, latents).prev_sample
        parts.append(vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def judge(oracle: Oracle, pictures: Tensor, prompts: Sequence[Caption]) -> dict[str, Any]:
    """Share of what was said that is seen: per attribute, per pair, for the held-out pairs.

    Args:
        oracle: reads the pictures.
        pictures: ``(B, 3, 64, 64)``, one per prompt.
        prompts: what was asked for.
    """
    device = next(oracle.parameters()).device
    reading = oracle(pictures.to(device))
    seen = {name: reading.values(name) for name in reading.logits}
    singles, pairs, held_out = defaultdict(list), defaultdict(list), []
    for index, prompt in enumerate(prompts):
        right = {name: seen[name][index] == value for name, value in prompt.said.items()}
        for name, is_right in right.items():
            singles[name].append(is_right)
        for first, second in combinations(sorted(right), 2):
            pairs[f"{first}+{second}"].append(right[first] and right[second])
        held_out += [right[a] and right[b] for a, b in held_out_pairs(prompt.said)]
    barred = [name for name in pairs if all(part in BARS for part in name.split("+"))]
    return {
        "accuracy": _shares(singles),
        "pairs": _shares(pairs),
        "mean_of_pairs": _share([value for name in barred for value in pairs[name]]),
        "held_out_pairs": _share(held_out),
    }


def missed_bars(verdict: Mapping[str, Any]) -> dict[str, float]:
    """What lies below its bar, with the value reached."""
    reached = {**verdict["accuracy"], "pairs": verdict["mean_of_pairs"]}
    return {name: reached[name] for name, bar in BARS.items() if reached.get(name, 0.0) < bar}


def _shares(table: Mapping[str, list[bool]]) -> dict[str, float]:
    return {name: _share(values) for name, values in sorted(table.items())}


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
