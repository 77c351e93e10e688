"""What an oracle's reading is worth: was the prompt drawn, and is it still the concept?

Knows no model: a reading and labels in, numbers out. Shapes: B pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import Concept
from mlm_plugin.pocket.oracle import Reading
from mlm_plugin.pocket.world import ATTRIBUTES, named_paint

__all__ = ["colour_agreement", "identity", "prompt_fidelity", "seen_right"]

COLOUR_SCALE = 0.15
"""Distance at which colours agree by 1/e; black to white is 1.73.

Named colours lie at 0.25 and more from those of every concept, a good oracle reads within 0.05.
"""
GROUND_SHOWS = ("plain", "dotted")  # elsewhere both colours cover the same area


def seen_right(reading: Reading, prompts: Sequence[Caption]) -> dict[str, Tensor]:
    """By attribute ``(B,)``: 1 where it is seen as asked, 0 where not, nan where it is not asked.

    Args:
        reading: of B pictures.
        prompts: what each was asked for.
    """
    found = {}
    for name, logits in reading.logits.items():
        values = ATTRIBUTES[name]
        asked = [values.index(p.said[name]) if name in p.said else -1 for p in prompts]
        wanted = torch.tensor(asked, device=logits.device)
        right = (logits.argmax(dim=-1) == wanted).float()
        found[name] = right.masked_fill(wanted < 0, torch.nan)
    return found


def prompt_fidelity(reading: Reading, prompts: Sequence[Caption]) -> Tensor:
    """Share of what was asked that is seen, ``(B,)``; nan where nothing was.

    The subject is left out: it is the concept's own and counts in :func:`identity`.
    """
    right = seen_right(reading, prompts)
    return torch.stack([right[name] for name in right if name != "subject"]).nanmean(dim=0)


def identity(reading: Reading, concept: Concept) -> Tensor:
    """How much the thing looks like the concept, ``(B,)`` in [0, 1], wherever it stands.

    ``(subject right + pattern right + colour agreement) / 3``, the first two 0 or 1 and the third
    :func:`colour_agreement`.
    """
    scene = concept.scene
    read = [
        (reading.logits[name].argmax(dim=-1) == ATTRIBUTES[name].index(value)).float()
        for name, value in (("subject", scene.subject), ("pattern", scene.pattern))
    ]
    return torch.stack([*read, colour_agreement(reading.paint, concept)]).mean(dim=0)


def colour_agreement(paint: Tensor, concept: Concept) -> Tensor:
    """``exp(-(d / 0.15)^2)``, ``(B,)``: 1 for the concept's colours, about 0 for any named one.

    ``d^2`` is the mean over both colours of ``|RGB read - RGB true|^2``, RGB in [0, 1]. Stripes and
    checks are as well read the other way round, so the smaller ``d`` of the two counts; dots have
    a ground, and their colours an order; what is plain has its first colour alone.

    Args:
        paint: ``(B, 2, 3)``, as :class:`Reading` has it.
        concept: what was to be drawn.
    """
    scene = concept.scene
    true = torch.tensor(scene.paint or named_paint(scene.colour), device=paint.device) / 255
    if scene.pattern == "plain":
        paint, true = paint[:, :1], true[:1]
    squared = (paint - true).square().sum(dim=-1).mean(dim=-1)
    if scene.pattern not in GROUND_SHOWS:
        swapped = (paint.flip(1) - true).square().sum(dim=-1).mean(dim=-1)
        squared = torch.minimum(squared, swapped)
    return torch.exp(-squared / COLOUR_SCALE**2)
