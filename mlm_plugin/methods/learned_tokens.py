"""What methods that learn token embeddings share: initial values and files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import EmbeddingOptions, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import (
    EMBEDDING_KEYS,
    read_embeddings,
    save_embedding,
    verify_embedding,
)
from mlm_plugin.methods.base import Export, Method, load_part, on_cpu
from mlm_plugin.methods.facts import why_untrained
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.directional_tokens import DirectionalTokens
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import (
    LearnedTokens,
    initial_embeddings,
    initial_tokens,
    placeholder_pattern,
)
from mlm_plugin.prompt_sets.english import FUNCTION_WORDS

__all__ = [
    "LearnsTokens",
    "check_tokens",
    "create_all_tokens",
    "create_tokens",
    "embedding_files",
    "embeddings_beside",
    "save_embeddings",
    "verify_embeddings",
    "webui_words",
]

logger = logging.getLogger(__name__)

BESIDE = "_embedding"
MAX_SHARE = 0.5  # of a caption's tokens that a placeholder may take


def check_tokens(
    options: EmbeddingOptions,
    concepts: Sequence[Concept],
    *,
    read: Callable[[str], Sequence[Tensor]] = read_embeddings,
) -> None:
    """Check the options of token embeddings before a model is loaded.

    Raises:
        UserError: a placeholder that is part of other words, not one word or file per concept, or a
            file that is not such an embedding.
    """
    for concept in concepts:
        _refuse_ambiguous(concept, concepts)
    _one_each("init_word", options.init_word, concepts)
    for file in _one_each("weights", options.weights, concepts) or ():
        num_vectors = read(file)[0].shape[-2]
        if num_vectors != options.num_vectors_per_token:
            raise UserError(
                f"weights: {file} holds {num_vectors} vectors, num_vectors_per_token is "
                f"{options.num_vectors_per_token}; set it to {num_vectors}"
            )


class LearnsTokens(Method):
    """A method that learns token embeddings for the placeholders.

    They are initialized from words or from embedding files.

    Attributes:
        learned_tokens: one for each text encoder, with the same placeholders.
    """

    rate_options = {"embedding": ("embedding_lr",)}
    own_options = (
        "num_vectors_per_token",
        "init_word",
        "weights",
        "directional_embedding",
        "directional_kappa",
    )
    own_state_options = ("num_vectors_per_token", "directional_embedding", "directional_kappa")
    learns_tokens = True

    learned_tokens: list[LearnedTokens]

    @classmethod
    def why_text_untrained(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str | None:
        """Frozen token embeddings; see ``MethodFacts.why_text_untrained``."""
        rate = cls.learning_rate_of("embedding", config.optimizer)
        return why_untrained([rate], "the token embeddings")

    @classmethod
    def check(cls, config: TrainConfig, concepts: Sequence[Concept]) -> None:
        """Check placeholders, initial words and files; see ``Method.check``."""
        check_tokens(config.embedding, concepts)

    @property
    def only_tokens(self) -> LearnedTokens:
        """The learned tokens of a model with one text encoder."""
        (tokens,) = self.learned_tokens
        return tokens

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The placeholders of the token embeddings."""
        return self.learned_tokens[0].placeholders

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The token embeddings of every text encoder."""
        return [tensor for tokens in self.learned_tokens for tensor in tokens.embeddings.values()]

    def embeddings(self) -> dict[str, list[Tensor]]:
        """Embeddings ``(N, D)`` of each text encoder by placeholder, of the first variant."""
        return {
            name: [tokens.vectors[name][0] for tokens in self.learned_tokens]
            for name in self.placeholders
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained, and the initial directions where a prior pulls towards them."""
        return super().state_dict() | on_cpu(self._initial_directions())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` gave."""
        super().load_state_dict(load_part(self._initial_directions(), state))

    def prior_loss(self) -> Tensor | None:
        """The prior of directional embeddings, over all text encoders."""
        losses = [tokens.prior_loss() for tokens in self.learned_tokens]
        given = [loss for loss in losses if loss is not None]
        return torch.stack(given).sum() if given else None

    def after_step(self) -> dict[str, Tensor | float]:
        """Put directional embeddings back on their sphere."""
        for tokens in self.learned_tokens:
            tokens.retract()
        return super().after_step()

    def _initial_directions(self) -> dict[str, Tensor]:
        directions = [d for tokens in self.learned_tokens for d in tokens.initial_directions]
        return {f"initial_direction.{number}": tensor for number, tensor in enumerate(directions)}


def create_tokens(
    text_encoder: TextEncoder,
    options: EmbeddingOptions,
    concepts: Sequence[Concept],
    *,
    num_variants: int = 1,
    init_words: Sequence[str] = (),
    read: Callable[[str], Tensor] | None = None,
) -> LearnedTokens:
    """Create learned tokens for the placeholder of every concept, initialized as the options say.

    Args:
        text_encoder: gets placeholders and hooks.
        options: number of vectors, initial words or files; checked by :func:`check_tokens`.
        concepts: at least one.
        num_variants: K, equal at the start.
        init_words: initial words of the first concepts if the options give none; the others start
            at the class word.
        read: reads an embedding file to vectors ``(N, D)`` or ``(K, N, D)``; by default one for a
            model with one text encoder.

    Raises:
        UserError: a word or a file that does not fit the text encoder.
    """
    _refuse_too_many(text_encoder, options.num_vectors_per_token)
    read = read or partial(_read_for, index=0, count=1)
    classes = [concept.class_token for concept in concepts]
    words = options.init_word or [*init_words, *classes[len(init_words) :]]
    num_vectors = options.num_vectors_per_token
    embeddings = {}
    for i, concept in enumerate(concepts):
        if options.weights:
            start, origin = _fitting(options.weights[i], read, text_encoder), options.weights[i]
        else:
            start = initial_embeddings(text_encoder, words[i], num_vectors=num_vectors)
            tokens = initial_tokens(text_encoder, words[i], num_vectors)
            origin = " ".join(text_encoder.tokenizer.convert_ids_to_tokens(tokens))
        logger.info("%s: its embedding starts at %s", concept.placeholder_token, origin)
        embeddings[concept.placeholder_token] = start.expand(num_variants, *start.shape[-2:])
    if options.directional_embedding:
        return DirectionalTokens(text_encoder, embeddings, kappa=options.directional_kappa)
    return LearnedTokens(text_encoder, embeddings)


def create_all_tokens(
    models: StableDiffusion, options: EmbeddingOptions, concepts: Sequence[Concept]
) -> list[LearnedTokens]:
    """The learned tokens of every text encoder, as :func:`create_tokens` makes them.

    Raises:
        UserError: a word or a file that does not fit a text encoder, or their number.
    """
    count = len(models.text_encoders)
    return [
        create_tokens(
            text_encoder,
            options,
            concepts,
            read=partial(_read_for, index=index, count=count),
        )
        for index, text_encoder in enumerate(models.text_encoders)
    ]


def embedding_files(path: Path, placeholders: Sequence[str]) -> list[Path]:
    """Embedding files beside (or, for one placeholder, at) ``path``; no two are the same."""
    if len(placeholders) == 1:
        return [path]
    names = [re.sub(r"[^\w-]+", "_", placeholder).strip("_") for placeholder in placeholders]
    if len({name.lower() for name in names if name}) < len(names):
        names = [f"{name}{number}" for number, name in enumerate(names, start=1)]
    return [path.with_name(f"{path.stem}_{name}{path.suffix}") for name in names]


def embeddings_beside(path: Path, placeholders: Sequence[str]) -> list[Path]:
    """Embedding files where ``path`` itself is another kind of file."""
    return embedding_files(path.with_name(f"{path.stem}{BESIDE}{path.suffix}"), placeholders)


def save_embeddings(
    to: Export, files: Sequence[Path], embeddings: Mapping[str, Sequence[Tensor]]
) -> None:
    """Write embeddings that WebUIs and diffusers load.

    Args:
        to: metadata and precision.
        files: one for each placeholder.
        embeddings: by placeholder, vectors ``(N, D)`` for each text encoder.
    """
    for file, vectors in zip(files, embeddings.values(), strict=True):
        metadata = to.metadata("textual-inversion", file)
        tensors = dict(zip(EMBEDDING_KEYS[len(vectors)], vectors, strict=True))
        save_embedding(file, tensors, metadata=metadata, dtype=to.dtype)


def verify_embeddings(files: Sequence[Path]) -> str:
    """Read embeddings back; returns a description with the number of vectors."""
    counts = [verify_embedding(file) for file in files]
    return f"{sum(counts)} vector(s) in {len(files)} embedding file(s)"


def webui_words(files: Sequence[Path], placeholders: Sequence[str]) -> dict[Path, dict[str, str]]:
    """What WebUIs call the placeholder of each embedding: the name of its file."""
    return {
        file: {placeholder: file.stem}
        for placeholder, file in zip(placeholders, files, strict=True)
    }


def _refuse_ambiguous(concept: Concept, concepts: Sequence[Concept]) -> None:
    """The placeholder gets its embedding wherever it occurs, so it must not occur elsewhere."""
    placeholder = concept.placeholder_token
    pattern = placeholder_pattern([placeholder])
    if placeholder.lower() in FUNCTION_WORDS:
        raise UserError(
            f"placeholder_token = {placeholder!r} is an everyday word, and its embedding would "
            "replace it in every prompt; use a word that is in no prompt, like sks"
        )
    for other in concepts:
        taken = other.class_token if other is concept else other.text
        if pattern.search(taken):
            raise UserError(
                f"placeholder_token = {placeholder!r} also occurs in {taken!r}, so its embedding "
                "would be read there too; take a word that nothing else is called by, like sks"
            )


def _one_each(
    name: str, values: Sequence[str] | None, concepts: Sequence[Concept]
) -> Sequence[str] | None:
    if values and len(values) != len(concepts):
        raise UserError(
            f"{name}: {len(values)} given, and the concepts are "
            f"{', '.join(concept.text for concept in concepts)}; give one for each"
        )
    return values


def _refuse_too_many(text_encoder: TextEncoder, num_vectors: int) -> None:
    limit = int((text_encoder.window - 2) * MAX_SHARE)
    if num_vectors > limit:
        raise UserError(
            f"num_vectors_per_token = {num_vectors}: more than half of what the text encoder reads "
            f"of a prompt; give at most {limit}"
        )


def _read_for(file: str, *, index: int, count: int) -> Tensor:
    tensors = read_embeddings(file)
    if len(tensors) != count:
        raise UserError(
            f"weights: {file} holds embeddings for {len(tensors)} text encoder(s), this "
            f"model has {count}; use an embedding of this kind of model"
        )
    return tensors[index]


def _fitting(file: str, read: Callable[[str], Tensor], text_encoder: TextEncoder) -> Tensor:
    vectors = read(file)
    width, expected = vectors.shape[-1], text_encoder.token_embedding.embedding_dim
    if width != expected:
        raise UserError(
            f"weights: {file} holds vectors of width {width}, this text encoder has {expected}; "
            "use an embedding of this kind of model"
        )
    return vectors
