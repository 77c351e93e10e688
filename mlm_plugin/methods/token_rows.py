"""What the methods that learn token rows share: where rows start, and the files they end in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import EmbeddingOptions
from mlm_plugin.errors import UserError
from mlm_plugin.export.embeddings import (
    EMBEDDING_KEY,
    read_embedding,
    save_embedding,
    verify_embedding,
)
from mlm_plugin.methods.base import Export
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_rows import TokenRows, initial_rows

__all__ = [
    "STATE_PREFIX",
    "create_rows",
    "embedding_files",
    "load_rows",
    "rows_state",
    "save_embeddings",
    "verify_embeddings",
    "words_of",
]

STATE_PREFIX = "embedding."


def create_rows(
    text_encoder: TextEncoder,
    options: EmbeddingOptions,
    concepts: Sequence[Concept],
    *,
    num_variants: int = 1,
    init_words: Sequence[str] = (),
    read: Callable[[str], Tensor] = read_embedding,
) -> TokenRows:
    """Rows for the placeholder of every concept, as the options want them to start.

    Args:
        text_encoder: gets placeholders and hooks.
        options: number of vectors, first words or files.
        concepts: at least one.
        num_variants: K, alike at the start.
        init_words: where the rows start if the options do not say; else at the head of the class
            word ("toy" of "duck toy").
        read: an embedding file to its rows ``(N, D)`` or ``(K, N, D)``.

    Raises:
        UserError: not one word or file per concept, or a file that does not fit.
    """
    defaults = init_words or [concept.class_token.split()[-1] for concept in concepts]
    words = _one_each("init_word", options.init_word, concepts) or defaults
    files = _one_each("weights", options.weights, concepts)
    rows = {}
    for i, concept in enumerate(concepts):
        if files:
            start = _fitting(files[i], read(files[i]), options, text_encoder)
        else:
            start = initial_rows(text_encoder, words[i], num_vectors=options.num_vectors_per_token)
        rows[concept.placeholder_token] = start.expand(num_variants, *start.shape[-2:])
    return TokenRows(text_encoder, rows)


def rows_state(rows: TokenRows) -> dict[str, Tensor]:
    """The rows as a training state keeps them, ``(K, N, D)`` by placeholder."""
    return {
        STATE_PREFIX + name: tensor.detach().to("cpu", copy=True)
        for name, tensor in rows.rows.items()
    }


@torch.no_grad()
def load_rows(rows: TokenRows, state: Mapping[str, Tensor]) -> None:
    """Take over what :func:`rows_state` gave."""
    for name, tensor in rows.rows.items():
        tensor.copy_(state[STATE_PREFIX + name])


def embedding_files(path: Path, placeholders: Sequence[str]) -> list[Path]:
    """Files of the rows beside (or, for one placeholder, at) ``path``."""
    if len(placeholders) == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{_in_file_name(p)}{path.suffix}") for p in placeholders]


def save_embeddings(
    to: Export, files: Sequence[Path], rows_ND: Mapping[str, Tensor], *, key: str = EMBEDDING_KEY
) -> None:
    """Write each placeholder's rows ``(N, D)`` as an embedding that WebUIs and diffusers load."""
    for file, rows in zip(files, rows_ND.values(), strict=True):
        save_embedding(file, {key: rows}, metadata=to.metadata("textual-inversion"), dtype=to.dtype)


def verify_embeddings(files: Sequence[Path]) -> str:
    """Read embeddings back; says how many vectors they hold."""
    counts = [verify_embedding(file) for file in files]
    return f"{sum(counts)} vector(s) in {len(files)} embedding file(s)"


def words_of(files: Sequence[Path], rows: TokenRows) -> dict[str, str]:
    """What WebUIs call each placeholder: the name of its embedding's file."""
    return {name: file.stem for name, file in zip(rows.placeholders, files, strict=True)}


def _one_each(
    name: str, values: Sequence[str] | None, concepts: Sequence[Concept]
) -> Sequence[str] | None:
    if values and len(values) != len(concepts):
        raise UserError(
            f"{name}: {len(values)} given for {len(concepts)} concepts "
            f"({', '.join(concept.text for concept in concepts)}); give one for each"
        )
    return values


def _fitting(
    file: str, rows: Tensor, options: EmbeddingOptions, text_encoder: TextEncoder
) -> Tensor:
    num_vectors, width = rows.shape[-2:]
    expected = text_encoder.token_embedding.embedding_dim
    if width != expected:
        raise UserError(
            f"weights: {file} holds vectors of width {width}, this text encoder has {expected}; "
            "use an embedding of this kind of model"
        )
    if num_vectors != options.num_vectors_per_token:
        raise UserError(
            f"weights: {file} holds {num_vectors} vectors, num_vectors_per_token is "
            f"{options.num_vectors_per_token}; set it to {num_vectors}"
        )
    return rows


def _in_file_name(placeholder: str) -> str:
    return re.sub(r"[^\w-]+", "_", placeholder).strip("_") or "concept"
