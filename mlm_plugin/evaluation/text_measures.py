"""Measures of a text encoder alone, without pictures; each of SDXL's two has its own.

How well masked words around the concept can be predicted, how far the concept is from its class,
whether prompts with it have collapsed, and how far the encoder has drifted on text without it.

Shapes: B prompts, L tokens, D width, K variants of a placeholder (XTI's layers, else 1).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_plugin.evaluation.eval_prompts import with_class, with_concept
from mlm_plugin.evaluation.measures import intra_distance, mean_with_interval, paired_cosine
from mlm_plugin.mlm.contextualizer import Contextualizer
from mlm_plugin.mlm.encoder import mask_embedding
from mlm_plugin.mlm.losses import masked_word_loss
from mlm_plugin.mlm.masking import (
    MaskedTokens,
    MaskingVocabulary,
    mask_tokens,
    prompt_attention_mask,
)
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.prompt_sets.english import WORDS_WITHOUT_CONTENT
from mlm_plugin.training.drift import PROBES

__all__ = [
    "ConceptPrompts",
    "MaskedWords",
    "embedding_measures",
    "encoder_drift",
    "has_projection",
    "headline",
    "masked_words",
    "measure_text_encoder",
    "pooled_states",
    "projected_states",
    "projection_drift",
    "random_words",
    "set_distances",
]

NUM_MASKINGS = 8  # per prompt
NUM_RANDOM_WORDS = 8
MLM_PROBABILITY = 0.25


class MaskedWords(NamedTuple):
    """Cross-entropy in nats per masked token, accuracy, and number of masked tokens."""

    loss: float
    accuracy: float
    num_masked: int


@dataclass(frozen=True)
class ConceptPrompts:
    """Evaluation prompts, with the concept and with its class word alone.

    Attributes:
        templates: with ``{}`` for the concept.
        placeholder_token: "" = the plain class is evaluated.
        class_token: the class word.
    """

    templates: Sequence[str]
    placeholder_token: str
    class_token: str

    @property
    def with_concept(self) -> list[str]:
        """Such as "a sks dog in the jungle"."""
        return [with_concept(t, self.placeholder_token, self.class_token) for t in self.templates]

    @property
    def with_class(self) -> list[str]:
        """Such as "a dog in the jungle"."""
        return [with_class(t, self.class_token) for t in self.templates]


@torch.no_grad()
def measure_text_encoder(
    text_encoder: TextEncoder,
    base_text_encoder: TextEncoder,
    contextualizer: Contextualizer | None,
    *,
    prompts: ConceptPrompts,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures of one text encoder, by group.

    ``masked_words`` is None without a contextualizer; ``projected`` is None except for SDXL's
    second text encoder.

    Args:
        text_encoder: the encoder with everything learned in place.
        base_text_encoder: the untrained encoder.
        contextualizer: made for the base text encoder.
        prompts: the prompts to encode.
        seed: seed of masks and random words.
    """
    words = None
    if contextualizer is not None:
        words = _masked_words_by_filler(text_encoder, contextualizer, prompts, seed=seed)
    distances = set_distances(text_encoder, prompts.with_concept, prompts.with_class)
    per_prompt = distances.pop("per_prompt")
    return {
        "masked_words": words,
        "embedding": embedding_measures(
            text_encoder,
            placeholder_token=prompts.placeholder_token,
            class_token=prompts.class_token,
        ),
        "distances": distances,
        "distance_per_prompt": per_prompt,
        "drift": {
            "everyday": encoder_drift(text_encoder, base_text_encoder, PROBES),
            "class": encoder_drift(text_encoder, base_text_encoder, prompts.with_class),
        },
        "projected": _projected(text_encoder, base_text_encoder, prompts),
    }


def _projected(
    text_encoder: TextEncoder, base_text_encoder: TextEncoder, prompts: ConceptPrompts
) -> dict[str, Any] | None:
    """Distances and drift of the pooled text; None for an encoder without one."""
    if not has_projection(text_encoder):
        return None
    found = set_distances(
        text_encoder, prompts.with_concept, prompts.with_class, states=projected_states
    )
    del found["per_prompt"]
    return found | {"drift": projection_drift(text_encoder, base_text_encoder, PROBES)}


def _masked_words_by_filler(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    prompts: ConceptPrompts,
    *,
    seed: int,
) -> dict[str, Any]:
    """With the concept, with the class word, and with a random word in its place."""
    random_fillers = random_words(text_encoder, NUM_RANDOM_WORDS, seed=seed)
    protected = [prompts.placeholder_token, prompts.class_token, *random_fillers]
    prompts_of = {
        "concept": prompts.with_concept,
        "class": prompts.with_class,
        "random": [
            with_concept(template, random_fillers[i % len(random_fillers)], prompts.class_token)
            for i, template in enumerate(prompts.templates)
        ],
    }
    return {
        name: masked_words(
            text_encoder, contextualizer, texts, protected=protected, seed=seed
        )._asdict()
        for name, texts in prompts_of.items()
    }


@torch.no_grad()
def masked_words(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    prompts: Sequence[str],
    *,
    protected: Sequence[str],
    seed: int,
) -> MaskedWords:
    """``-1/N sum log p(masked token | states)`` and the accuracy at masked tokens.

    Every prompt is masked several times. Protected words are never masked and do not count, so the
    same seed masks the same context words whatever is in the slot.

    Args:
        text_encoder: computes the states.
        contextualizer: predicts the words.
        prompts: filled templates.
        protected: concept, class and the words that replace them.
        seed: seed of the masks.

    Source: the training's own term (``mlm/regularizer.py``), on evaluation prompts.
    """
    learned = text_encoder.learned_tokens
    words = [*protected, *(learned.tokens if learned is not None else [])]
    vocabulary = MaskingVocabulary.from_tokenizer(
        text_encoder.tokenizer, protected=words, low_priority=WORDS_WITHOUT_CONTENT
    )
    ids_BL = text_encoder.tokenize_trimmed(list(prompts)).repeat_interleave(NUM_MASKINGS, dim=0)
    masked = mask_tokens(
        ids_BL,
        vocabulary,
        mlm_probability=MLM_PROBABILITY,
        rng=random.Random(f"evaluate/masks/{seed}"),
    )
    attention_mask_BL = prompt_attention_mask(ids_BL, vocabulary.eos_token_id)
    parts = [
        _loss_and_accuracy(text_encoder, contextualizer, masked, attention_mask_BL, variant=k)
        for k in range(1 if learned is None else learned.num_variants)
    ]
    loss, accuracy = torch.tensor([part[:2] for part in parts]).mean(dim=0).tolist()
    return MaskedWords(loss, accuracy, parts[0].num_masked)


def _loss_and_accuracy(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    masked: MaskedTokens,
    attention_mask_BL: Tensor,
    *,
    variant: int,
) -> MaskedWords:
    table_VD = text_encoder.token_embedding.weight[: contextualizer.sizes.vocab_size]
    device = table_VD.device
    contextualizer = contextualizer.to(device)
    with mask_embedding(text_encoder.token_embedding, contextualizer.mask_vector):
        hidden_BLD = text_encoder.encode(_variant(text_encoder, masked.input_ids, variant))
    result = masked_word_loss(
        contextualizer,
        hidden_BLD,
        labels_BL=masked.labels,
        attention_mask_BL=attention_mask_BL.to(device),
        token_table_VD=table_VD,
    )
    accuracy = int(result.num_correct) / max(result.num_masked, 1)
    return MaskedWords(float(result.loss), accuracy, result.num_masked)


def random_words(text_encoder: TextEncoder, count: int, *, seed: int) -> list[str]:
    """Ordinary single-token words without special meaning, drawn from the vocabulary."""
    tokenizer = text_encoder.tokenizer
    pieces = sorted(
        token.removesuffix("</w>")
        for token in tokenizer.get_vocab()
        if token.endswith("</w>") and token.removesuffix("</w>").isalpha() and len(token) > 7
    )
    rng = random.Random(f"evaluate/words/{seed}")
    return rng.sample([piece for piece in pieces if piece.isascii()], count)


def embedding_measures(
    text_encoder: TextEncoder, *, placeholder_token: str, class_token: str
) -> dict[str, float] | None:
    """Norm of the concept's embeddings, cosine to the class word's; None without concept.

    ``norm``: mean |v| over tokens and layers; ``class_norm``: that of the class word;
    ``table_norm``: mean |v| of the whole table; ``cosine``: mean over tokens of cos(v, mean
    class embedding). A norm far above the table's dominates the rest of a prompt.

    Source: the norm and direction of V* in "semantic collapse" (Embedding-Adjustment).
    """
    if not placeholder_token:
        return None
    table_VD = text_encoder.token_embedding.weight.float()
    concept_ND = _embeddings_of(text_encoder, placeholder_token)
    class_ND = _embeddings_of(text_encoder, class_token)
    cosine = F.cosine_similarity(concept_ND, class_ND.mean(dim=0, keepdim=True), dim=-1).mean()
    return {
        "norm": concept_ND.norm(dim=-1).mean().item(),
        "class_norm": class_ND.norm(dim=-1).mean().item(),
        "table_norm": table_VD.norm(dim=-1).mean().item(),
        "cosine": cosine.item(),
        "num_vectors": len(concept_ND),
    }


def _embeddings_of(text_encoder: TextEncoder, word: str) -> Tensor:
    """Token embeddings of a word, learned or from the table."""
    tokens = text_encoder.learned_tokens
    learned = tokens.vectors if tokens is not None else {}
    if word in learned:
        return learned[word].detach().flatten(0, 1)
    ids = text_encoder.tokenizer(word, add_special_tokens=False).input_ids
    return text_encoder.token_embedding.weight[ids].float()


def pooled_states(text_encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """States at the end token, which sees the whole prompt: ``(K, B, D)`` fp32, on the CPU.

    They are those that condition the U-Net, clip skip included.
    """
    ids_BL = text_encoder.tokenize_trimmed(list(prompts))
    eos_B = (ids_BL == text_encoder.tokenizer.eos_token_id).int().argmax(dim=1)
    learned = text_encoder.learned_tokens
    states = []
    for k in range(1 if learned is None else learned.num_variants):
        hidden_BLD = text_encoder.encode(_variant(text_encoder, ids_BL, k)).float().cpu()
        states.append(hidden_BLD[torch.arange(len(ids_BL)), eos_B])
    return torch.stack(states)


def has_projection(text_encoder: TextEncoder) -> bool:
    """Whether the encoder also has a pooled, projected state, like SDXL's second one."""
    return hasattr(text_encoder.model, "text_projection")


def projected_states(text_encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """SDXL's pooled text, the end token's last state through the projection: ``(1, B, P)`` fp32."""
    return text_encoder.encode_captions_pooled(prompts).pooled.float().cpu()[None]


def set_distances(
    text_encoder: TextEncoder,
    concept_prompts: Sequence[str],
    class_prompts: Sequence[str],
    *,
    states: Callable[[TextEncoder, Sequence[str]], Tensor] = pooled_states,
) -> dict[str, Any]:
    """Distance of prompts with the concept from those with the class, and from each other.

    With p_i the pooled state of prompt i with the concept and c_i of the same prompt with the class
    word: ``inter`` = mean_i (1 - cos(p_i, c_i)); ``intra`` = mean_{i<j} (1 - cos(p_i, p_j));
    ``intra_class`` the same for c; ``collapse`` = 1 - intra / intra_class (0: as varied as the
    class, 1: all prompts are the same). ``per_prompt``: the terms of ``inter``.

    Args:
        text_encoder: computes the states.
        concept_prompts: prompts with the concept.
        class_prompts: the same prompts with the class word.
        states: returns ``(K, B, D)`` for prompts.

    Source: the distances of "semantic collapse" (Embedding-Adjustment); there between whole sets.
    """
    concept_KBD = states(text_encoder, concept_prompts)
    class_BD = states(text_encoder, class_prompts)[0]
    per_prompt = torch.stack([1 - paired_cosine(p_BD, class_BD) for p_BD in concept_KBD]).mean(0)
    intra_class = intra_distance(class_BD)
    intra = None
    if intra_class is not None:
        intra = sum(intra_distance(p_BD) for p_BD in concept_KBD) / len(concept_KBD)
    return {
        "inter": mean_with_interval(per_prompt).mean,
        "intra": intra,
        "intra_class": intra_class,
        "collapse": 1 - intra / intra_class if intra_class else None,
        "per_prompt": per_prompt.tolist(),
    }


def projection_drift(
    text_encoder: TextEncoder, base_text_encoder: TextEncoder, prompts: Sequence[str]
) -> float:
    """``mean (1 - cos(p, p_base))`` of SDXL's pooled text, one vector for each prompt."""
    now_BP, before_BP = (
        projected_states(encoder, prompts)[0] for encoder in (text_encoder, base_text_encoder)
    )
    return (1 - paired_cosine(now_BP, before_BP)).mean().item()


def encoder_drift(
    text_encoder: TextEncoder, base_text_encoder: TextEncoder, prompts: Sequence[str]
) -> float:
    """``mean (1 - cos(h, h_base))`` over the tokens of prompts without the concept.

    0: the encoder is unchanged on ordinary text. BOS is left out: it is the same in every prompt,
    and would count more than any word.
    """
    ids_BL = base_text_encoder.tokenize_trimmed(list(prompts))
    attention_mask_BL = prompt_attention_mask(ids_BL, base_text_encoder.tokenizer.eos_token_id)
    attention_mask_BL[:, 0] = False
    now, before = (
        encoder.encode(ids_BL).float().cpu()[attention_mask_BL]
        for encoder in (text_encoder, base_text_encoder)
    )
    return (1 - paired_cosine(now, before)).mean().item()


def _variant(text_encoder: TextEncoder, ids_BL: Tensor, k: int) -> Tensor:
    learned = text_encoder.learned_tokens
    return ids_BL if learned is None else learned.variant(ids_BL, k)


def headline(text: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of one text encoder in a table of runs."""
    words = text["masked_words"]
    embedding = text["embedding"] or {}
    return {
        "masked_accuracy": words["concept"]["accuracy"] if words else None,
        "masked_loss": words["concept"]["loss"] if words else None,
        "embedding_norm": embedding.get("norm"),
        "embedding_cosine": embedding.get("cosine"),
        "text_inter": text["distances"]["inter"],
        "text_collapse": text["distances"]["collapse"],
        "drift_everyday": text["drift"]["everyday"],
    }
