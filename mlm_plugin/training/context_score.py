"""How much of its context a prompt with the concept keeps, measured during training.

No picture is drawn: what the text encoders and the keys and values of the cross-attention make of
fixed prompts is compared with what the untrained model made of them. On the pocket model the score
at the keys and values ranks files by how well they follow prompts (docs/experiments.md). It cannot
tell how well they show the concept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.mlm.kept_context import kept_context, lost_by_token
from mlm_plugin.models.cross_attention import is_per_layer, split_layers
from mlm_plugin.models.key_values import matrices_of
from mlm_plugin.models.text_encoder import TextEncoder

if TYPE_CHECKING:  # the methods need peft, which sd-scripts does not install
    from mlm_plugin.methods.base import Method

__all__ = ["ContextReading", "ContextScore", "ScorePrompts", "ScoredModel", "Word", "matrices_of"]

NUM_PROMPTS = 32


class Word(NamedTuple):
    """A word of a prompt, and the share of its meaning that is lost; ``None`` for the concept."""

    text: str
    lost: float | None


class ScorePrompts(NamedTuple):
    """Prompts, and the concept that each of them holds."""

    texts: Sequence[str]
    concepts: Sequence[str]

    @classmethod
    def drawn(
        cls,
        sample: Callable[[random.Random], str],
        concepts: Sequence[str],
        *,
        number: int = NUM_PROMPTS,
    ) -> ScorePrompts:
        """The same prompts in every run.

        Args:
            sample: draws a prompt that holds one of the concepts.
            concepts: as they are written in prompts.
            number: how many, if there are so many.
        """
        rng = random.Random("context score")
        texts: dict[str, str] = {}
        for text in (sample(rng) for _ in range(20 * number)):
            held = [concept for concept in concepts if concept in text]
            if len(held) == 1 and len(texts) < number:
                texts[text] = held[0]
        return cls(list(texts), list(texts.values()))

    def within(self, text_encoder: TextEncoder) -> ScorePrompts:
        """Those whose concept is among the tokens that the encoder reads at once."""
        pairs = [
            pair
            for pair in zip(*self, strict=True)
            if text_encoder.positions_around(*pair) is not None
        ]
        return ScorePrompts([text for text, _ in pairs], [concept for _, concept in pairs])


class ContextReading(NamedTuple):
    """Shares of the context that are kept, 0 to 1.

    Attributes:
        encoder: in the states of the text encoders.
        cross_attention: in the keys and values, mean over layers.
    """

    encoder: float
    cross_attention: float


@dataclass(frozen=True)
class ScoredModel:
    """What is scored, in whatever trainer it is trained.

    Attributes:
        text_encoder: the first one, whose tokens are counted.
        encode: states of prompts as the U-Net sees them, ``(B, L, D)`` or one for each layer.
        layers: the matrices of each cross-attention layer, as they are trained.
        trains_text: whether anything before the states is trained.
        untrained: within the block, before the first step, all of it computes as without training.
        autocast: mixed precision of the run.
    """

    text_encoder: TextEncoder
    encode: Callable[[list[str]], Tensor]
    layers: Sequence[Sequence[nn.Module]]
    trains_text: bool
    untrained: Callable[[], AbstractContextManager] = nullcontext
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @classmethod
    def of_method(
        cls, method: Method, autocast: Callable[[], AbstractContextManager] = nullcontext
    ) -> ScoredModel:
        """The models of a method of the standalone trainer."""
        return cls(
            method.models.text_encoders[0],
            lambda texts: method.encode(texts).states,
            matrices_of(method.models.unet),
            method.trains_text_side,
            method.untrained,
            autocast,
        )


class ContextScore:
    """Compares what is read now with what was read before training.

    Args:
        model: in evaluation mode and untrained when this is created, in evaluation mode whenever
            it is measured.
        prompts: what is read, each with its concept within the encoder's window.
    """

    def __init__(self, model: ScoredModel, prompts: ScorePrompts):
        self.model, self.prompts = model, prompts
        self._kept_states: Tensor | None = None
        self._now: list[Tensor] = []
        with model.untrained():
            if not model.trains_text:
                self._kept_states = self._states()
            self.before = self._read()

    def __call__(self) -> ContextReading:
        """What is kept now."""
        self._now = self._read()
        encoder, *key_values = (
            kept_context(now, before) for now, before in zip(self._now, self.before, strict=True)
        )
        return ContextReading(encoder, sum(key_values) / len(key_values))

    def sentences(self, number: int) -> list[list[Word]]:
        """The first prompts with what was lost of each word when last measured.

        Mean over keys and values; of a word its token that lost most.
        """
        if not self._now:
            return []
        pairs = list(zip(self._now, self.before, strict=True))[1:]
        lost = torch.stack([lost_by_token(*pair) for pair in pairs]).mean(dim=0).tolist()
        found, start = [], 0
        for text, concept, row in zip(*self.prompts, self._positions(), strict=True):
            found.append(self._words(text, concept, lost[start : start + len(row)]))
            start += len(row)
        return found[:number]

    def _words(self, text: str, concept: str, lost: Sequence[float]) -> list[Word]:
        """The words of one prompt; ``lost`` is of its tokens outside the concept, and of EOS."""
        tokenizer = self.model.text_encoder.tokenizer
        before, after = (tokenizer.tokenize(part) for part in text.split(concept, 1))
        return [
            *_whole_words(before, lost),
            Word(concept, None),
            *_whole_words(after, lost[len(before) :]),
        ]

    @torch.no_grad()
    def _read(self) -> list[Tensor]:
        """States ``(N, D)`` of the words around the concept, then keys and values; on the CPU."""
        states_KND = self._states() if self._kept_states is None else self._kept_states
        states_KND = states_KND.to(_device_of(self.model.layers[0][0]))
        read = [states_KND.flatten(0, 1)]
        with self.model.autocast():
            for number, matrices in enumerate(self.model.layers):
                states_ND = states_KND[number % len(states_KND)]
                read += [matrix(states_ND.to(_dtype_of(matrix))) for matrix in matrices]
        return [one.float().cpu() for one in read]

    @torch.no_grad()
    def _states(self) -> Tensor:
        """``(K, N, D)``; K is 1, or the number of layers that have states of their own."""
        with self.model.autocast():
            joined = self.model.encode(list(self.prompts.texts))
        states_KBLD = joined[None]
        if is_per_layer(joined):
            states_KBLD = split_layers(joined, len(self.model.layers))
        rows = self._positions()
        return torch.stack(
            [
                torch.cat([states_LD[row] for states_LD, row in zip(states_BLD, rows, strict=True)])
                for states_BLD in states_KBLD
            ]
        )

    def _positions(self) -> list[list[int]]:
        """Of the words around the concept and of EOS, for each prompt."""
        positions_around = self.model.text_encoder.positions_around
        return [positions_around(*pair) for pair in zip(*self.prompts, strict=True)]


def _whole_words(tokens: Sequence[str], lost: Sequence[float]) -> list[Word]:
    """Tokens of CLIP, whose words end in ``</w>``, as words."""
    words: list[Word] = []
    text, most = "", 0.0
    for token, share in zip(tokens, lost, strict=False):
        text, most = text + token.removesuffix("</w>"), max(most, share)
        if token.endswith("</w>"):
            words.append(Word(text, most))
            text, most = "", 0.0
    return words


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """Of what it takes; weights in 8 bits are only stored in them."""
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    if weight is None or not weight.is_floating_point() or weight.itemsize == 1:
        return torch.float32
    return weight.dtype


def _device_of(layer: nn.Module) -> torch.device:
    return next(chain(layer.parameters(), layer.buffers())).device
