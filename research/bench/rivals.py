"""Related regularizers, for comparison: text terms and one on the U-Net's output.

Every rival is a class that replaces ``MLMRegularizer``: called with the number of the batch, it
returns a loss. Text rivals use the same prompts as the MLM term and compare with a frozen copy of
the text encoder. Shapes: B prompts, L and M tokens, D width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.config.concepts import Concept
from mlm_plugin.methods.lora import LoRAMethod
from mlm_plugin.mlm.masking import prompt_attention_mask
from mlm_plugin.mlm.regularizer import MLMOutput
from mlm_plugin.models.text_encoder import TextEncoder
from research.bench.anchors import (
    class_anchor,
    context_anchor,
    encoder_anchor,
    positions_outside,
)

__all__ = [
    "RIVALS",
    "ContextBatches",
    "OutputPreservation",
    "TextRival",
]


@dataclass(frozen=True)
class ContextBatches:
    """Batches of prompts with ``{}`` for the concept, the same for equal seed and number.

    Attributes:
        contexts: prompts to draw from.
        batch_size: B.
        seed: names the stream.
    """

    contexts: Sequence[str]
    batch_size: int
    seed: int

    def draw(self, number: int) -> list[str]:
        """The batch of this number."""
        rng = random.Random(f"rival/{self.seed}/{number}")
        return rng.choices(self.contexts, k=self.batch_size)


class TextRival:
    """A term on the text encoder's states, called like ``MLMRegularizer``.

    Args:
        name: ``core``, ``textboost`` or ``classdiffusion``.
        text_encoder: the encoder being trained.
        frozen: the untrained encoder.
        concept: the concept in the prompts.
        prompts: prompts with ``{}`` for the concept.
    """

    def __init__(
        self,
        name: str,
        *,
        text_encoder: TextEncoder,
        frozen: TextEncoder,
        concept: Concept,
        prompts: ContextBatches,
    ):
        self.loss_of = {
            "core": self._context_anchor,
            "textboost": self._encoder_anchor,
            "classdiffusion": self._class_anchor,
        }[name]
        self.text_encoder, self.frozen = text_encoder, frozen
        self.concept, self.prompts = concept, prompts

    def __call__(self, call: int) -> MLMOutput:
        """The term for the batch of this number."""
        return _as_output(self.loss_of(self.prompts.draw(call)))

    def _context_anchor(self, contexts: Sequence[str]) -> Tensor:
        ids_BL = self._ids(contexts, self.concept.text)
        class_ids_BM = self._ids(contexts, self.concept.class_token)
        concept_ids = self._bare_ids(self.concept.text)
        num_class_tokens = len(self._bare_ids(self.concept.class_token))
        lengths = self._attention_mask(ids_BL).sum(dim=1).tolist()
        kept = [
            positions_outside(ids_L[:length], concept_ids, num_class_tokens)
            for ids_L, length in zip(ids_BL.tolist(), lengths, strict=True)
        ]
        return context_anchor(self.text_encoder.encode(ids_BL), self._target(class_ids_BM), kept)

    def _encoder_anchor(self, contexts: Sequence[str]) -> Tensor:
        ids_BL = self._ids(contexts, self.concept.class_token)
        attention_mask_BL = self._attention_mask(ids_BL)
        return encoder_anchor(
            self.text_encoder.encode(ids_BL), self._target(ids_BL), attention_mask_BL
        )

    def _class_anchor(self, contexts: Sequence[str]) -> Tensor:
        ids_BL = self._ids(contexts, self.concept.text)
        class_ids_BM = self._ids(contexts, self.concept.class_token)
        pooled_BD = self._at_eos(self.text_encoder.encode(ids_BL), ids_BL)
        return class_anchor(pooled_BD, self._at_eos(self._target(class_ids_BM), class_ids_BM))

    def _ids(self, contexts: Sequence[str], words: str) -> Tensor:
        return self.text_encoder.tokenize_trimmed([text.replace("{}", words) for text in contexts])

    def _bare_ids(self, words: str) -> list[int]:
        text = self.text_encoder.expand(words)  # learned embeddings have their own tokens
        return self.text_encoder.tokenizer(text, add_special_tokens=False).input_ids

    def _attention_mask(self, ids_BL: Tensor) -> Tensor:
        return prompt_attention_mask(ids_BL, self.text_encoder.tokenizer.eos_token_id)

    def _at_eos(self, states_BLD: Tensor, ids_BL: Tensor) -> Tensor:
        ends_B = self._attention_mask(ids_BL).sum(dim=1) - 1
        return states_BLD[torch.arange(len(states_BLD)), ends_B.to(states_BLD.device)]

    @torch.no_grad()
    def _target(self, ids_BL: Tensor) -> Tensor:
        return self.frozen.encode(ids_BL)


class OutputPreservation:
    """Preserves the U-Net's output for the class word: ``|e(z_t, class) - e0(z_t, class)|^2``.

    Args:
        method: text encoder and U-Net with a network, which is disabled for the target.
        caption: the caption with the class word instead of the concept.
        latents: latents of the training pictures, ``(N, 4, h, w)``, scaled.
        batch_size: pictures per batch.
        seed: names the stream of noise.

    Source: ai-toolkit ``diff_output_preservation``; sd-scripts ``diff_output_preservation``.
    """

    def __init__(
        self, *, method: LoRAMethod, caption: str, latents: Tensor, batch_size: int, seed: int
    ):
        self.method, self.caption, self.latents = method, caption, latents
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, call: int) -> MLMOutput:
        """The term for the batch of this number."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + call)
        rows = torch.randint(0, len(self.latents), (self.batch_size,), generator=generator)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        schedule = self.method.models.noise_scheduler
        num_timesteps = schedule.config.num_train_timesteps
        timesteps = torch.randint(0, num_timesteps, (len(rows),), generator=generator)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.no_grad(), self.method.network.disabled():
            wanted = self._predict(noisy, timesteps)
        return _as_output(F.mse_loss(self._predict(noisy, timesteps), wanted))

    def _predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        states = self.method.encode([self.caption] * len(noisy)).states
        return self.method.models.unet(noisy, timesteps, encoder_hidden_states=states).sample


RIVALS = ("core", "textboost", "classdiffusion", "output_preservation")


def _as_output(loss: Tensor) -> MLMOutput:
    return MLMOutput(loss, parts={})
