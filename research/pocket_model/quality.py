"""Quality of a pocket model: unseen prompts, judged by the oracle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mlm_plugin.pocket.captions import Caption, draw_said, write_caption
from mlm_plugin.pocket.oracle import Oracle
from mlm_plugin.pocket.world import draw_scene, generator_of, held_out_pairs

__all__ = ["held_out_prompts", "judge", "missed_bars"]

BARS = {
    "background": 0.95, "position": 0.95, "subject": 0.95, "colour": 0.90, "companion": 0.90,
    "pairs": 0.85,
}  # fmt: skip
"""What a model must reach before it ships."""


def held_out_prompts(number: int, *, seed: int) -> list[Caption]:
    """Captions with at least one held-out pair of values."""
    rng = generator_of("held-out prompts", seed)
    prompts: list[Caption] = []
    while len(prompts) < number:
        said = draw_said(draw_scene(rng, held_out=True), rng)
        if held_out_pairs(said):
            prompts.append(write_caption(said, rng))
    return prompts


@torch.no_grad()
def judge(oracle: Oracle, pictures: Tensor, prompts: Sequence[Caption]) -> dict[str, Any]:
    """Share of prompted attributes that are seen: per attribute, per pair, for held-out pairs.

    Args:
        oracle: recognizes what is in a picture.
        pictures: ``(B, 3, 64, 64)``, one per prompt.
        prompts: the prompts of the pictures.
    """
    device = next(oracle.parameters()).device
    predictions = oracle(pictures.to(device))
    seen = {name: predictions.values(name) for name in predictions.logits}
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
    """Measures below their bar, with their values."""
    reached = {**verdict["accuracy"], "pairs": verdict["mean_of_pairs"]}
    return {name: reached[name] for name, bar in BARS.items() if reached.get(name, 0.0) < bar}


def _shares(table: Mapping[str, list[bool]]) -> dict[str, float]:
    return {name: _share(values) for name, values in sorted(table.items())}


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
