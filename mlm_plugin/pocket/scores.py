"""Does a picture show the prompt, and does it show the concept?

Knows no model: predictions, pictures and labels in, numbers out. Shapes: B pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import Concept
from mlm_plugin.pocket.oracle import Predictions
from mlm_plugin.pocket.world import ATTRIBUTES, SIZES, thing_alone

__all__ = ["IDENTITY_SCALE", "identity", "prompt_fidelity", "seen_right"]

IDENTITY_SCALE = 0.2
"""Difference at which the identity is 1/e."""


def seen_right(predictions: Predictions, prompts: Sequence[Caption]) -> dict[str, Tensor]:
    """By attribute ``(B,)``: 1 where it is as prompted, 0 where not, nan where not prompted.

    Args:
        predictions: predictions for B pictures.
        prompts: the prompt of each picture.
    """
    found = {}
    for name, logits in predictions.logits.items():
        values = ATTRIBUTES[name]
        asked = [values.index(p.said[name]) if name in p.said else -1 for p in prompts]
        wanted = torch.tensor(asked, device=logits.device)
        right = (logits.argmax(dim=-1) == wanted).float()
        found[name] = right.masked_fill(wanted < 0, torch.nan)
    return found


def prompt_fidelity(predictions: Predictions, prompts: Sequence[Caption]) -> Tensor:
    """Share of the prompted attributes that are seen, ``(B,)``; nan where there are none.

    The subject is left out: it belongs to the concept and counts in :func:`identity`.
    """
    right = seen_right(predictions, prompts)
    return torch.stack([right[name] for name in right if name != "subject"]).nanmean(dim=0)


def identity(pictures: Tensor, concept: Concept) -> Tensor:
    """How well a picture shows the concept at any position, ``(B,)`` in [0, 1].

    ``exp(-(d / 0.2)^2)``, ``d`` the root mean square difference of RGB values (in [0, 1]) between
    the concept's sprite and the picture below it, at the position and size where it is
    smallest. No learned model is involved.

    Args:
        pictures: ``(B, 3, 64, 64)`` in [-1, 1].
        concept: what they should show.
    """
    art = F.avg_pool2d((pictures.float() + 1) / 2, 2)
    nearest = torch.stack(
        [_least_difference(art, *thing_alone(concept.scene, size)) for size in SIZES]
    )
    return torch.exp(-nearest.amin(dim=0) / IDENTITY_SCALE**2)


def _least_difference(art: Tensor, thing: np.ndarray, covers: np.ndarray) -> Tensor:
    """Mean square difference to a sprite ``(h, w, 3)`` at the best position, ``(B,)``.

    ``mean m (a - t)^2 = (m * a^2 - 2 (m t) * a + sum m t^2) / (3 sum m)``, ``*`` a correlation.
    """
    m = torch.from_numpy(covers).to(art)
    t = torch.from_numpy(thing).to(art).permute(2, 0, 1) / 255 * m
    squares = F.conv2d(art.square(), m.expand(3, -1, -1)[None])
    products = F.conv2d(art, t[None])
    mean = (squares - 2 * products + t.square().sum()) / (3 * m.sum())
    return mean.clamp(min=0).flatten(1).amin(dim=1)
