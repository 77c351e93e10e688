"""The oracle: a small network that classifies every attribute of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.weights_files import read_weights
from mlm_plugin.pocket.world import ATTRIBUTES

__all__ = ["Oracle", "Predictions", "load_oracle"]


class Predictions(NamedTuple):
    """What the oracle sees in B pictures."""

    logits: dict[str, Tensor]  # attribute -> (B, values)

    def values(self, attribute: str) -> list[str]:
        """The most likely value of each picture."""
        names = ATTRIBUTES[attribute]
        return [names[index] for index in self.logits[attribute].argmax(dim=-1).tolist()]


class Oracle(nn.Module):
    """Convolutions on the 32x32 art pixels, and one linear layer for all attributes.

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

    def all_logits(self, art: Tensor) -> Tensor:
        """From ``(B, 3, 32, 32)``: the logits of all attributes concatenated, ``(B, values)``."""
        return self.head(self.body(art))

    def forward(self, pixels: Tensor) -> Predictions:
        """Predict what pictures ``(B, 3, 64, 64)`` in [-1, 1] show."""
        logits = self.all_logits(F.avg_pool2d(pixels, 2))
        parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=-1)
        return Predictions(dict(zip(ATTRIBUTES, parts, strict=True)))


def load_oracle(path: Path) -> Oracle:
    """Load an oracle in fp32 and eval mode.

    Raises:
        UserError: the file is damaged, or is another network.
    """
    state = read_weights(path)
    try:
        oracle = Oracle(channels=len(state["body.0.weight"]))
        oracle.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: is not an oracle of this world; build the model again") from error
    return oracle.eval()
