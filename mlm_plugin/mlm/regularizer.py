"""The regularizer: context-rich prompts in, one scalar out.

``loss = diffusion loss + weight * MLM loss``: run the text encoder that is being trained on prompts
that hold the concept, and compare the states of the words around it with those of the untrained
model, or mask words and let the frozen contextualizer predict them. Where the U-Net is trained,
what its cross-attention makes of the states can be read as well. The gradient reaches
whatever is trained before the place that is read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_plugin.mlm.cross_attention import CrossAttention
from mlm_plugin.mlm.encoder import EncoderHandle, PromptTarget
from mlm_plugin.mlm.losses import (
    TeacherFeatures,
    beyond_start,
    masked_positions,
    masked_word_loss,
    relative_distance,
)
from mlm_plugin.mlm.masking import mask_tokens, prompt_attention_mask
from mlm_plugin.mlm.teacher import MaskSettings, padded

__all__ = ["MLMOutput", "MLMRegularizer", "MLMSchedule"]

CROSS_ATTENTION = "cross_attention"


@dataclass(frozen=True)
class MLMSchedule:
    """When the term acts and how strongly.

    Attributes:
        weight: ``mlm_loss_weight``.
        every_n_steps: act on every n-th step with n times the weight. The mean gradient is the
            same; what an optimizer makes of it need not be (docs/method.md, Costs).
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


class MLMOutput(NamedTuple):
    """What one call returns. Tensors stay on the device; reading them synchronizes."""

    loss: Tensor  # 0-d fp32, mean over what is read, not yet weighted
    parts: Mapping[str, Tensor]  # to log: ``accuracy``, and each loss where there are several


class Part(NamedTuple):
    """The loss at one text encoder's states."""

    loss: Tensor
    num_tokens: int
    num_correct: Tensor | None = None  # None where states are compared


@dataclass
class EncodedPrompts:
    """A batch of prompts, read by one text encoder.

    Attributes:
        encoder: that text encoder.
        states_BLD: as it is trained now.
        labels_BL: ids of the compared tokens, IGNORE_INDEX elsewhere; on the CPU.
        attention_mask_BL: false for padding; on the CPU.
        teacher_ND: of the untrained encoder with the class word, at the compared tokens.
        start: before training, with the concept: states ``(N, D)`` of the compared tokens, or their
            predictions' divergence ``(N,)`` from the teacher's.
        layers_B: the cross-attention layer that each prompt is for; ``None`` = for all.
    """

    encoder: EncoderHandle
    states_BLD: Tensor
    labels_BL: Tensor
    attention_mask_BL: Tensor
    teacher_ND: Tensor | None = None
    start: Tensor | None = None
    layers_B: Tensor | None = None

    @property
    def positions_N(self) -> Tensor:
        """Indices of the compared tokens into the ``B L`` positions, on the device."""
        return masked_positions(self.labels_BL).to(self.encoder.device, non_blocking=True)

    @property
    def layers_N(self) -> Tensor | None:
        """The layer that each compared token is for; on the CPU."""
        if self.layers_B is None:
            return None
        layers_BL = self.layers_B[:, None].expand_as(self.labels_BL)
        return layers_BL.flatten()[masked_positions(self.labels_BL)]

    def compared_states(self, states_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, g and h0 of the compared tokens, each ``(N, D)``; where states are compared."""
        return states_BLD.flatten(0, 1)[self.positions_N], self.teacher_ND, self.start

    def part(self, states_BLD: Tensor) -> Part:
        """The loss at these states: those of the encoder, or the same written back."""
        encoder = self.encoder
        if encoder.reader is None:
            compared = self.compared_states(states_BLD)
            return Part(relative_distance(*compared), len(compared[0]))
        if encoder.head is not None:
            return self._next_words(states_BLD)
        teacher = None
        if self.teacher_ND is not None:
            teacher = TeacherFeatures(self.teacher_ND, self.start)
        result = masked_word_loss(
            encoder.contextualizer,
            states_BLD,
            labels_BL=self.labels_BL,
            attention_mask_BL=self.attention_mask_BL.to(encoder.device, non_blocking=True),
            token_table_VD=encoder.token_table,
            teacher=teacher,
        )
        return Part(result.loss, result.num_masked, result.num_correct)

    def _next_words(self, states_BLD: Tensor) -> Part:
        features_ND = self.encoder.head.features(
            states_BLD, self.attention_mask_BL, self.positions_N
        )
        divergence_N = self.encoder.divergence(features_ND, self.teacher_ND)
        return Part(beyond_start(divergence_N, self.start), len(features_ND))


class MLMRegularizer:
    """Computes the MLM loss of prompts: freshly drawn, or those of the targets.

    Every call draws from its own stream, named by seed and call number. The host's random numbers
    stay unchanged, and a resumed run continues with the same prompts without any stored state.

    Args:
        encoders: one per text encoder; all see the same prompts, with or without targets. With
            ``cross_attention`` they are those that it reads, in its order, and maybe others.
        sample_prompt: draws one prompt that holds the concept.
        batch_size: B, prompts per call.
        masks: share of the context words to mask, and what replaces them.
        seed: names the stream; give each process its own.
        cross_attention: is read, if given.
    """

    def __init__(
        self,
        encoders: Sequence[EncoderHandle],
        sample_prompt: Callable[[random.Random], str],
        *,
        batch_size: int,
        masks: MaskSettings,
        seed: int | str = 0,
        cross_attention: CrossAttention | None = None,
    ):
        assert encoders, "a regularizer needs at least one text encoder"
        num_targets = {len(encoder.targets) for encoder in encoders}
        assert len(num_targets) == 1, "text encoders see the same prompts"
        is_read = any(encoder.is_read for encoder in encoders)
        assert cross_attention or is_read, "a regularizer reads something"
        self.encoders = list(encoders)
        self.sample_prompt = sample_prompt
        self.batch_size = batch_size
        self.masks = masks
        self.seed = seed
        self.cross_attention = cross_attention

    def __call__(self, call: int) -> MLMOutput:
        """The term for call number ``call`` (0, 1, ...)."""
        rng = random.Random(f"mlm/{self.seed}/{call}")
        batches = self._batches(rng)
        parts: dict[str, Part] = {}
        for number in self._read_now(batches):
            parts[f"te{number + 1}"] = batches[number].part(batches[number].states_BLD)
        if self.cross_attention:
            parts[CROSS_ATTENTION] = self._at_cross_attention(self.cross_attention, batches, rng)
        return _output(parts)

    def _read_now(self, batches: Sequence[EncodedPrompts]) -> list[int]:
        """The text encoders whose output is read: of several places, those that still change.

        What was frozen during the run would have a constant share in the mean, and so take from the
        pull on the others.
        """
        read = [number for number, batch in enumerate(batches) if batch.encoder.is_read]
        if not torch.is_grad_enabled():
            return read
        changing = [number for number in read if batches[number].states_BLD.requires_grad]
        return changing if changing or self.cross_attention else read

    def _batches(self, rng: random.Random) -> list[EncodedPrompts]:
        """The prompts of this call, read by every text encoder."""
        if targets := self.encoders[0].targets:
            drawn = rng.choices(range(len(targets)), k=self.batch_size)
            return [_from_targets(encoder, drawn, rng) for encoder in self.encoders]
        prompts = [self.sample_prompt(rng) for _ in range(self.batch_size)]
        batches, state = [], rng.getstate()
        for encoder in self.encoders:
            rng.setstate(state)  # the same words are masked for every text encoder
            batches.append(self._masked(encoder, prompts, rng))
        return batches

    def _masked(
        self, encoder: EncoderHandle, prompts: list[str], rng: random.Random
    ) -> EncodedPrompts:
        """Fresh prompts, whose masked words are the targets."""
        ids_BL, layers_B = encoder.vary(encoder.tokenize(prompts), rng)
        masked = mask_tokens(ids_BL, encoder.vocabulary, rng=rng, **self.masks._asdict())
        return EncodedPrompts(
            encoder,
            encoder.encode_masked(masked.input_ids),
            masked.labels,
            prompt_attention_mask(ids_BL, encoder.vocabulary.eos_token_id),
            layers_B=layers_B,
        )

    def _at_cross_attention(
        self,
        cross_attention: CrossAttention,
        batches: Sequence[EncodedPrompts],
        rng: random.Random,
    ) -> Part:
        first = batches[0]
        if first.encoder.reader is None:
            groups = cross_attention.groups_of(len(batches))
            return _mean_distance(
                [
                    _distance(cross_attention, [batches[number] for number in group], rng)
                    for group in groups
                ]
            )
        widths = [batch.states_BLD.shape[-1] for batch in batches]
        joined_BLD = torch.cat([batch.states_BLD for batch in batches], dim=-1)
        written = cross_attention.written_back(joined_BLD, rng, layers_B=first.layers_B)
        return _mean_part(
            [
                batch.part(states_BLD)
                for batch, states_BLD in zip(batches, written.split(widths, dim=-1), strict=True)
            ]
        )


def _from_targets(
    encoder: EncoderHandle, drawn: Sequence[int], rng: random.Random
) -> EncodedPrompts:
    """Prompts with what the untrained model makes of them."""
    targets = [encoder.targets[number] for number in drawn]
    masked = padded(targets, encoder.pad_token_id)
    ids_BL, layers_B = encoder.vary(masked.input_ids, rng)
    copies = len(ids_BL) // len(targets)  # XTI may encode a prompt several times
    if targets[0].states_LD is None:
        states_BLD = encoder.encode_masked(ids_BL)
    else:
        kept = [target.states_LD for target in targets]
        states_BLD = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).to(
            encoder.device, non_blocking=True
        )
    teacher_ND = start = None
    if targets[0].teacher_ND is not None:
        teachers = [target.teacher_ND for target in targets] * copies
        starts = _starts(targets * copies, layers_B)
        teacher_ND, start = (
            torch.cat(vectors).to(encoder.device, non_blocking=True)
            for vectors in (teachers, starts)
        )
    return EncodedPrompts(
        encoder,
        states_BLD,
        masked.labels.repeat(copies, 1),
        prompt_attention_mask(ids_BL, encoder.vocabulary.eos_token_id),
        teacher_ND,
        start,
        layers_B,
    )


def _starts(targets: Sequence[PromptTarget], layers_B: Tensor | None) -> list[Tensor]:
    """What each prompt was before training, in the layer that it is for."""
    if layers_B is None or len(targets[0].starts) == 1:
        return [target.starts[0] for target in targets]
    return [target.starts[layer] for target, layer in zip(targets, layers_B.tolist(), strict=True)]


def _distance(
    cross_attention: CrossAttention, batches: Sequence[EncodedPrompts], rng: random.Random
) -> Part:
    """The loss at the keys and values of one sequence of tokens."""
    states_ND, teacher_ND, start_ND = (
        torch.cat(parts, dim=-1)
        for parts in zip(
            *(batch.compared_states(batch.states_BLD) for batch in batches), strict=True
        )
    )
    loss = cross_attention.distance(
        states_ND, teacher_ND, start_ND, rng, layers_N=batches[0].layers_N
    )
    return Part(loss, len(states_ND))


def _mean_distance(parts: Sequence[Part]) -> Part:
    """Of several sequences."""
    loss = torch.stack([part.loss for part in parts]).mean()
    return Part(loss, sum(part.num_tokens for part in parts))


def _mean_part(parts: Sequence[Part]) -> Part:
    """Of several text encoders."""
    return Part(
        torch.stack([part.loss for part in parts]).mean(),
        sum(part.num_tokens for part in parts),
        sum(part.num_correct for part in parts),
    )


def _output(parts: Mapping[str, Part]) -> MLMOutput:
    logged = {name: part.loss for name, part in parts.items()} if len(parts) > 1 else {}
    with_words = [part for part in parts.values() if part.num_correct is not None]
    if with_words:
        num_tokens = sum(part.num_tokens for part in with_words)
        correct = sum(part.num_correct for part in with_words)
        logged = {"accuracy": correct / max(1, num_tokens), **logged}
    loss = torch.stack([part.loss for part in parts.values()]).mean()
    return MLMOutput(loss, parts=logged)
