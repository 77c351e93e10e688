"""How an image model reads a prompt: its keys and values, without a pass through it.

A cross-attention layer sees the prompt's states h through two linear maps, ``W_K h`` and ``W_V h``.
Training adds ``dW`` to them. What it changes for a prompt, ``dW h``, takes a few small matrix
products. It is read in two ways:

- :meth:`CrossAttention.distance` compares keys and values with those of the untrained model;
- :meth:`CrossAttention.written_back` expresses the change in the text encoder's own language,
  ``h + W^+ dW h``, so that a contextualizer can read it. Without ``dW`` that is h itself.

A transformer without cross-attention layers (MM-DiT) joins the prompt to the picture in its first
block. There what the first block projects can be compared (:class:`TextInput`).

Shapes: N tokens, D width of the states (in SDXL of both encoders side by side), O outputs.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.mlm.losses import relative_distance

__all__ = ["CrossAttention", "Projection", "TextInput", "solve_for_states"]

MAX_LAYERS = 16
"""Layers per call: all of SD 1 and 2, a random part of SDXL's 70."""

RIDGE = 1e-2
"""Of the mean squared singular value of W. It bounds how much ``W^+`` enlarges the rounding errors
of half precision, in directions that W hardly reads."""


@dataclass(frozen=True, eq=False)
class TextInput:
    """What a transformer does with states before its first projection: embedder and norm.

    Attributes:
        trained: the map as it is now, ``(N, D) -> (N, inner width)``.
        untrained: the same without what training adds.
        width: D.
    """

    trained: Callable[[Tensor], Tensor]
    untrained: Callable[[Tensor], Tensor]
    width: int


@dataclass(frozen=True, eq=False)
class Projection:
    """Keys or values of a cross-attention layer, or both of a transformer's first block.

    Attributes:
        layer: number of the layer.
        trained: the map as it is now, ``(..., D) -> (..., O)``.
        weight: returns W ``(O, D)`` of the untrained map, in the precision that ``trained`` takes.
        bias: of the untrained map.
        text_input: what comes before the map; ``None`` = nothing.
        is_on: whether the map is on a device; block swapping moves some of them away.
        is_trained: whether training changes the map.
        copy: of W, where training changes W itself; ``weight`` reads it.
    """

    layer: int
    trained: Callable[[Tensor], Tensor]
    weight: Callable[[], Tensor]
    bias: Tensor | None = None
    text_input: TextInput | None = None
    is_on: Callable[[torch.device], bool] = lambda _device: True
    is_trained: Callable[[], bool] = lambda: True
    copy: Tensor | None = None

    @property
    def width(self) -> int:
        """Of the states that are read."""
        return self.text_input.width if self.text_input else self.weight().shape[1]

    def distance(self, states_ND: Tensor, teacher_ND: Tensor, start_ND: Tensor) -> Tensor:
        """:func:`relative_distance` of ``(W + dW) h`` to ``W g``, beyond that of ``W h0``."""
        weight_OD = self.weight()
        with torch.no_grad():
            if self.text_input:
                teacher_ND, start_ND = map(self.text_input.untrained, (teacher_ND, start_ND))
            wanted_NO, start_NO = (
                F.linear(x.to(weight_OD.dtype), weight_OD, self.bias)
                for x in (teacher_ND, start_ND)
            )
        if self.text_input:
            states_ND = self.text_input.trained(states_ND)
        trained_NO = self.trained(states_ND.to(weight_OD.dtype))
        return relative_distance(trained_NO, wanted_NO, start_NO)

    def written_back(self, states: Tensor) -> Tensor:
        """``h + W^+ dW h``, fp32 ``(..., D)``; of cross-attention layers only."""
        assert self.text_input is None
        weight_OD = self.weight()
        states = states.to(weight_OD.dtype)
        change = self.trained(states).float() - F.linear(states, weight_OD, self.bias).float()
        with torch.autocast(states.device.type, enabled=False):
            return states.float() + solve_for_states(weight_OD.float(), change)


def solve_for_states(weight_OD: Tensor, change: Tensor) -> Tensor:
    """``W^+ c``, ``(..., O) -> (..., D)``: the smallest change of states that W maps close to c.

    ``W^+ = (W'W + rI)^-1 W' = W' (WW' + rI)^-1``, with a small ridge r; the smaller of the two is
    solved.

    Source: ridge regression; the pseudo-inverse is its limit for r -> 0.
    """
    num_outputs, width = weight_OD.shape
    if num_outputs <= width:
        return _solve(weight_OD @ weight_OD.T, change) @ weight_OD
    return _solve(weight_OD.T @ weight_OD, change @ weight_OD)


def _solve(gram_MM: Tensor, right: Tensor) -> Tensor:
    """``(G + rI)^-1 b`` for b in the last dimension."""
    ridge = RIDGE * gram_MM.diagonal().mean()
    factor = torch.linalg.cholesky(gram_MM + ridge * torch.eye(len(gram_MM)).to(gram_MM))
    columns = right.flatten(0, -2).T
    return torch.cholesky_solve(columns, factor).T.reshape(right.shape)


class CrossAttention:
    """The layers of an image model that read the prompt, as trained and as they were.

    Args:
        projections: keys and values of every layer.
        groups: the text encoders whose states lie side by side, by number, for each sequence of
            tokens that is read; by default all of them for a single one.
    """

    def __init__(
        self, projections: Sequence[Projection], *, groups: Sequence[Sequence[int]] | None = None
    ):
        assert projections, "no cross-attention"
        self.groups = groups
        self.by_layer: dict[int, list[Projection]] = defaultdict(list)
        for projection in projections:
            self.by_layer[projection.layer].append(projection)

    @property
    def width(self) -> int:
        """D, which the text encoders of a group have together."""
        return next(iter(self.by_layer.values()))[0].width

    @property
    def copies(self) -> list[Tensor]:
        """What is kept of the untrained maps, where training changes them in place."""
        return [one.copy for one in self._projections if one.copy is not None]

    @property
    def _projections(self) -> list[Projection]:
        return [projection for members in self.by_layer.values() for projection in members]

    def groups_of(self, num_encoders: int) -> Sequence[Sequence[int]]:
        """``groups``, with the default for so many text encoders."""
        return [range(num_encoders)] if self.groups is None else self.groups

    @property
    def is_trained(self) -> bool:
        """Whether any key or value is trained; the states themselves may be as well."""
        return any(projection.is_trained() for projection in self._projections)

    def trained_part(self) -> CrossAttention:
        """The trained keys and values alone, for untrained states: the others cannot change."""
        trained = [projection for projection in self._projections if projection.is_trained()]
        return CrossAttention(trained, groups=self.groups) if trained else self

    def distance(
        self,
        states_ND: Tensor,
        teacher_ND: Tensor,
        start_ND: Tensor,
        rng: random.Random,
        *,
        layers_N: Tensor | None = None,
    ) -> Tensor:
        """Mean over layers, K and V of :meth:`Projection.distance`, 0-d fp32.

        Args:
            states_ND: h, as the trained text encoder gives them.
            teacher_ND: g, of the untrained text encoder with the class word.
            start_ND: h0, of the untrained text encoder with the concept.
            rng: draws the layers, where there are more than ``MAX_LAYERS``.
            layers_N: the layer that each token is for, on the CPU; by default all layers.
        """
        losses = []
        for layer, rows in self._layers_of(rng, layers_N, states_ND.device):
            chosen = [
                x if rows is None else x[rows.to(x.device)]
                for x in (states_ND, teacher_ND, start_ND)
            ]
            losses += [projection.distance(*chosen) for projection in self.by_layer[layer]]
        return torch.stack(losses).mean()

    def written_back(
        self, states_BLD: Tensor, rng: random.Random, *, layers_B: Tensor | None = None
    ) -> Tensor:
        """States as one layer's keys or values show them, ``(B, L, D)`` fp32.

        Layer, and K or V, are drawn for each prompt.

        Args:
            states_BLD: of B prompts.
            rng: draws the layers.
            layers_B: the layers, where they are given.
        """
        prompts_of: dict[Projection, list[int]] = defaultdict(list)
        layers = list(self.by_layer) if layers_B is None else layers_B.tolist()
        for row in range(len(states_BLD)):
            layer = rng.choice(layers) if layers_B is None else layers[row]
            prompts_of[rng.choice(self.by_layer[layer])].append(row)
        written: dict[int, Tensor] = {}
        for projection, rows in prompts_of.items():
            written |= zip(rows, projection.written_back(states_BLD[rows]), strict=True)
        return torch.stack([written[row] for row in range(len(states_BLD))])

    def _layers_of(
        self, rng: random.Random, layers_N: Tensor | None, device: torch.device
    ) -> list[tuple[int, Tensor | None]]:
        """Layers, and which tokens are for each; ``None`` = all. Layers elsewhere are left out."""
        if layers_N is not None:
            numbers = layers_N.unique().tolist()
            return [(layer, (layers_N == layer).nonzero().squeeze(1)) for layer in numbers]
        layers = [
            layer
            for layer, members in self.by_layer.items()
            if all(projection.is_on(device) for projection in members)
        ]
        if len(layers) > MAX_LAYERS:
            layers = rng.sample(layers, MAX_LAYERS)
        return [(layer, None) for layer in layers]
