"""The regularizer: context-rich prompts in, one scalar out.

``loss = diffusion loss + weight * MLM loss``: hide words around the concept, run the text encoder
that is being trained, let the frozen contextualizer name the hidden words. The gradient reaches
whatever is trained before the text encoder's output.

Knows no trainer, no command line and no text-encoder class: a host hands over a :class:`TextTap`
per text encoder. Shapes: B prompts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.mlm.contextualizer import Contextualizer, MaskedWordLoss, masked_word_loss
from mlm_plugin.mlm.mask_token import mask_embedding
from mlm_plugin.mlm.masking import (
    MaskedTokens,
    MaskingVocabulary,
    mask_tokens,
    tokens_before_padding,
)
from mlm_plugin.mlm.teacher import Reading, moved_onto

__all__ = ["MLMOutput", "MLMRegularizer", "MLMSchedule", "TextTap"]


class MLMOutput(NamedTuple):
    """What one call gives back. Tensors stay on the device; reading them waits for it."""

    loss: Tensor  # 0-d fp32, mean over the text encoders, not yet weighted
    accuracy: Tensor  # 0-d fp32, share of hidden tokens named rightly, without gradient
    num_masked: int
    losses: tuple[Tensor, ...] = ()  # what the loss is the mean of, one per text encoder


@dataclass
class TextTap:
    """Where the regularizer touches one text encoder of a host.

    Attributes:
        tokenize: prompts to ids ``(B, L)``, padded to the longest, on the CPU. The random stream is
            for encoders with several readings of a prompt (XTI); B may then be a multiple.
        encode: ids ``(B, L)`` to the very states the U-Net is conditioned on, ``(B, L, D)``.
        embedding: the encoder's token embedding layer (takes the mask vector by hook).
        contextualizer: made for this encoder; frozen here.
        vocabulary: word ends and the words that are never masked.
        token_table: ``(V, D)``, frozen output table; a copy where the host trains the embeddings.
        readings: what the encoder as it came makes of prompts with the class word; the term's
            targets. Without them the hidden words themselves are the targets.
    """

    tokenize: Callable[[list[str], random.Random], Tensor]
    encode: Callable[[Tensor], Tensor]
    embedding: nn.Embedding
    contextualizer: Contextualizer
    vocabulary: MaskingVocabulary
    token_table: Tensor
    readings: Sequence[Reading] = ()

    def __post_init__(self):
        self.contextualizer.require_trained()
        self.contextualizer.requires_grad_(False).eval()
        assert not self.token_table.requires_grad, "the output table must be frozen"


@dataclass(frozen=True)
class MLMSchedule:
    """When the term acts and how strongly.

    Attributes:
        weight: ``mlm_loss_weight``.
        every_n_steps: act on every n-th step, n times as strongly, so that the expectation stays.
        start_step: first step with the term.
        end_step: first step without it again; ``None`` = to the end.
    """

    weight: float
    every_n_steps: int = 1
    start_step: int = 0
    end_step: int | None = None

    def weight_at(self, step: int) -> float:
        """Weight of the term in optimizer step ``step`` (from 0); 0.0 = skip the call."""
        started = step >= self.start_step and (self.end_step is None or step < self.end_step)
        due = started and (step - self.start_step) % self.every_n_steps == 0
        return self.weight * self.every_n_steps if due else 0.0


class MLMRegularizer:
    """Computes the MLM loss of drawn prompts: freshly made ones, or those of the taps' readings.

    Every call draws from a stream of its own, named by seed and call number: the host's random
    numbers stay as they were, and a resumed run goes on with the same prompts without stored state.

    Args:
        taps: one per text encoder; all see the same prompts, and have readings of the same or none.
        sample_prompt: draws one prompt that holds the concept.
        batch_size: B, prompts per call.
        mlm_probability: share of context words to hide.
        replace: ``"mask"`` or ``"bert"`` (80/10/10).
        seed: names the stream; give each process its own.
    """

    def __init__(
        self,
        taps: Sequence[TextTap],
        sample_prompt: Callable[[random.Random], str],
        *,
        batch_size: int,
        mlm_probability: float,
        replace: str = "mask",
        seed: int | str = 0,
    ):
        assert taps, "a regularizer needs at least one text encoder"
        assert len({len(tap.readings) for tap in taps}) == 1, "text encoders see the same prompts"
        self.taps = list(taps)
        self.sample_prompt = sample_prompt
        self.batch_size = batch_size
        self.mlm_probability = mlm_probability
        self.replace = replace
        self.seed = seed

    def __call__(self, call: int) -> MLMOutput:
        """The term for call number ``call`` (0, 1, ...)."""
        rng = random.Random(f"mlm/{self.seed}/{call}")
        if readings := self.taps[0].readings:
            drawn = rng.choices(range(len(readings)), k=self.batch_size)
            parts = [self._loss_of_readings(tap, drawn, rng) for tap in self.taps]
        else:
            prompts = [self.sample_prompt(rng) for _ in range(self.batch_size)]
            parts = [self._loss_of_words(tap, prompts, rng) for tap in self.taps]
        num_masked = sum(part.num_masked for part in parts)
        num_correct = sum(part.num_correct for part in parts)
        losses = tuple(part.loss for part in parts)
        return MLMOutput(
            loss=torch.stack(losses).mean(),
            accuracy=num_correct / max(1, num_masked),
            num_masked=num_masked,
            losses=losses,
        )

    def _loss_of_words(
        self, tap: TextTap, prompts: list[str], rng: random.Random
    ) -> MaskedWordLoss:
        ids_BL = tap.tokenize(prompts, rng)
        masked = mask_tokens(
            ids_BL,
            tap.vocabulary,
            mlm_probability=self.mlm_probability,
            rng=rng,
            replace=self.replace,
        )
        return _loss_of(tap, ids_BL, masked)

    def _loss_of_readings(
        self, tap: TextTap, drawn: Sequence[int], rng: random.Random
    ) -> MaskedWordLoss:
        readings = [tap.readings[number] for number in drawn]
        ids_BL = tap.tokenize([reading.text for reading in readings], rng)
        # the encoder may have several readings of a prompt: rows are a multiple of the prompts
        readings = readings * (len(ids_BL) // len(readings))
        moved = [moved_onto(*pair) for pair in zip(readings, ids_BL.tolist(), strict=True)]
        masked_ids, labels, found = zip(*moved, strict=True)
        wanted = [reading.vectors_ND[rows] for reading, rows in zip(readings, found, strict=True)]
        masked = MaskedTokens(torch.tensor(masked_ids), torch.tensor(labels))
        return _loss_of(tap, ids_BL, masked, wanted_ND=torch.cat(wanted))


def _loss_of(
    tap: TextTap, ids_BL: Tensor, masked: MaskedTokens, *, wanted_ND: Tensor | None = None
) -> MaskedWordLoss:
    device = tap.token_table.device
    is_token_BL = tokens_before_padding(ids_BL, tap.vocabulary.eos_token_id)
    with mask_embedding(tap.embedding, tap.contextualizer.mask_vector):
        hidden_BLD = tap.encode(masked.input_ids.to(device, non_blocking=True))
    return masked_word_loss(
        tap.contextualizer,
        hidden_BLD,
        labels_BL=masked.labels,
        is_token_BL=is_token_BL.to(device, non_blocking=True),
        token_table_VD=tap.token_table,
        wanted_ND=None if wanted_ND is None else wanted_ND.to(device, non_blocking=True),
    )
