"""The regularizer: context-rich prompts in, one scalar out.

``loss = diffusion loss + weight * MLM loss``: mask words around the concept, run the text encoder
that is being trained, let the frozen contextualizer predict the masked words. The gradient reaches
whatever is trained before the text encoder's output.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_plugin.mlm.encoder import EncoderHandle
from mlm_plugin.mlm.losses import MaskedWordLoss, masked_word_loss
from mlm_plugin.mlm.masking import MaskedTokens, mask_tokens, prompt_attention_mask
from mlm_plugin.mlm.teacher import align_to_prompt

__all__ = ["MLMOutput", "MLMRegularizer", "MLMSchedule"]


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

    loss: Tensor  # 0-d fp32, mean over the text encoders, not yet weighted
    accuracy: Tensor  # 0-d fp32, share of masked tokens predicted correctly, detached
    num_masked: int
    losses: tuple[Tensor, ...] = ()  # what the loss is the mean of, one per text encoder


class MLMRegularizer:
    """Computes the MLM loss of prompts: freshly drawn, or those of the teacher targets.

    Every call draws from its own stream, named by seed and call number. The host's random numbers
    stay unchanged, and a resumed run continues with the same prompts without any stored state.

    Args:
        encoders: one per text encoder; all see the same prompts, with or without teacher targets.
        sample_prompt: draws one prompt that holds the concept.
        batch_size: B, prompts per call.
        mlm_probability: share of the context words to mask.
        replace: ``"mask"`` or ``"bert"`` (80/10/10).
        seed: names the stream; give each process its own.
    """

    def __init__(
        self,
        encoders: Sequence[EncoderHandle],
        sample_prompt: Callable[[random.Random], str],
        *,
        batch_size: int,
        mlm_probability: float,
        replace: str = "mask",
        seed: int | str = 0,
    ):
        assert encoders, "a regularizer needs at least one text encoder"
        num_targets = {len(encoder.teacher_targets) for encoder in encoders}
        assert len(num_targets) == 1, "text encoders see the same prompts"
        self.encoders = list(encoders)
        self.sample_prompt = sample_prompt
        self.batch_size = batch_size
        self.mlm_probability = mlm_probability
        self.replace = replace
        self.seed = seed

    def __call__(self, call: int) -> MLMOutput:
        """The term for call number ``call`` (0, 1, ...)."""
        rng = random.Random(f"mlm/{self.seed}/{call}")
        if targets := self.encoders[0].teacher_targets:
            drawn = rng.choices(range(len(targets)), k=self.batch_size)
            parts = [self._against_teacher(encoder, drawn, rng) for encoder in self.encoders]
        else:
            prompts = [self.sample_prompt(rng) for _ in range(self.batch_size)]
            parts, state = [], rng.getstate()
            for encoder in self.encoders:
                rng.setstate(state)  # the same words are masked for every text encoder
                parts.append(self._against_words(encoder, prompts, rng))
        num_masked = sum(part.num_masked for part in parts)
        num_correct = sum(part.num_correct for part in parts)
        losses = tuple(part.loss for part in parts)
        return MLMOutput(
            loss=torch.stack(losses).mean(),
            accuracy=num_correct / max(1, num_masked),
            num_masked=num_masked,
            losses=losses,
        )

    def _against_words(
        self, encoder: EncoderHandle, prompts: list[str], rng: random.Random
    ) -> MaskedWordLoss:
        ids_BL = encoder.tokenize(prompts, rng)
        masked = mask_tokens(
            ids_BL,
            encoder.vocabulary,
            mlm_probability=self.mlm_probability,
            rng=rng,
            replace=self.replace,
        )
        return _loss(encoder, ids_BL, masked)

    def _against_teacher(
        self, encoder: EncoderHandle, drawn: Sequence[int], rng: random.Random
    ) -> MaskedWordLoss:
        targets = [encoder.teacher_targets[number] for number in drawn]
        ids_BL = encoder.tokenize([target.text for target in targets], rng)
        targets = targets * (len(ids_BL) // len(targets))  # XTI may encode a prompt several times
        aligned = [align_to_prompt(*pair) for pair in zip(targets, ids_BL.tolist(), strict=True)]
        masked_ids, labels, found = zip(*aligned, strict=True)
        teacher = [target.teacher_ND[rows] for target, rows in zip(targets, found, strict=True)]
        masked = MaskedTokens(torch.tensor(masked_ids), torch.tensor(labels))
        return _loss(encoder, ids_BL, masked, teacher_ND=torch.cat(teacher))


def _loss(
    encoder: EncoderHandle,
    ids_BL: Tensor,
    masked: MaskedTokens,
    *,
    teacher_ND: Tensor | None = None,
) -> MaskedWordLoss:
    attention_mask_BL = prompt_attention_mask(ids_BL, encoder.vocabulary.eos_token_id)
    if teacher_ND is not None:
        teacher_ND = teacher_ND.to(encoder.device, non_blocking=True)
    return masked_word_loss(
        encoder.contextualizer,
        encoder.encode_masked(masked.input_ids),
        labels_BL=masked.labels,
        attention_mask_BL=attention_mask_BL.to(encoder.device, non_blocking=True),
        token_table_VD=encoder.token_table,
        teacher_ND=teacher_ND,
    )
