"""Learned token embeddings beside a frozen table, as in Textual Inversion and similar methods.

The vocabulary is not resized: added entries would need optimizer state for the whole table, and
would affect pooling and exports. A placeholder ("sks") is a word in captions and becomes its own
tokens in the ids. A hook on the embedding layer returns the learned embeddings for these tokens.

Knows no loss, no trainer and no files. Shapes: B captions, L tokens, N vectors per placeholder, K
variants of a placeholder (the cross-attention layers of XTI, else 1), D width of the text encoder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.text_encoder import TextEncoder

__all__ = ["LearnedTokens", "initial_embeddings", "initial_tokens", "placeholder_pattern"]

ID_PREFIX = "id:"


def initial_tokens(text_encoder: TextEncoder, init_word: str, num_vectors: int) -> list[int]:
    """Ids of the tokens that N embeddings are initialized from.

    If a word has more tokens than there are embeddings, the last ones are used, the head of an
    English compound ("toy" of "duck toy"). If it has fewer, they are repeated.

    Raises:
        UserError: a word without tokens, or a number outside the vocabulary.
    """
    if init_word.startswith(ID_PREFIX):
        number = init_word.removeprefix(ID_PREFIX)
        size = text_encoder.token_embedding.num_embeddings
        if not number.isdecimal() or int(number) >= size:
            raise UserError(
                f"init_word = {init_word!r}: this text encoder has tokens id:0 to id:{size - 1}"
            )
        ids = [int(number)]
    else:
        ids = text_encoder.tokenizer(init_word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"init_word = {init_word!r} has no tokens; give a word like 'dog'")
    ids = ids[-num_vectors:]
    return [ids[n % len(ids)] for n in range(num_vectors)]


def initial_embeddings(text_encoder: TextEncoder, init_word: str, *, num_vectors: int) -> Tensor:
    """Initial embeddings: those of the tokens of a word, ``(N, D)`` fp32.

    Args:
        text_encoder: the encoder with the token table.
        init_word: a word or several, or ``id:42170`` for one token by number (rare tokens that no
            text produces, as used by Custom Diffusion).
        num_vectors: N.

    Raises:
        UserError: as for :func:`initial_tokens`.

    Source: sd-scripts ``train_textual_inversion.py``, which takes the first tokens of a long word.
    """
    ids = initial_tokens(text_encoder, init_word, num_vectors)
    return text_encoder.token_embedding.weight.detach()[ids].float().clone()


class LearnedTokens(nn.Module):
    """Placeholders that a text encoder maps to learned embeddings, until :meth:`remove`.

    Args:
        text_encoder: gets a tokenizer that knows the placeholders, and hooks on its embedding.
        embeddings: initial vectors of each placeholder, ``(K, N, D)``; K is the same for all.

    Attributes:
        embeddings: the trained parameters by placeholder, ``(K, N, D)`` fp32.
        num_variants: K.
        initial_directions: unit vectors that a prior needs besides the embeddings; here none.
    """

    def __init__(self, text_encoder: TextEncoder, embeddings: Mapping[str, Tensor]):
        super().__init__()
        assert len({len(tensor) for tensor in embeddings.values()}) == 1, "as many variants of each"
        assert text_encoder.learned_tokens is None, "this text encoder has learned tokens already"
        device = text_encoder.token_embedding.weight.device
        self._parameters_of = nn.ParameterList(
            nn.Parameter(tensor.detach().to(device, torch.float32).clone())
            for tensor in embeddings.values()
        )
        self.placeholders = tuple(embeddings)
        self.num_variants = len(self._parameters_of[0])
        self.initial_directions: list[Tensor] = []
        self._text_encoder, self._old_tokenizer = text_encoder, text_encoder.tokenizer
        self._tokens = {
            placeholder: [f"<|row_{i}_{j}|>" for j in range(tensor.shape[0] * tensor.shape[1])]
            for i, (placeholder, tensor) in enumerate(embeddings.items())
        }
        self._first_id = self._extend_tokenizer()
        # the id of variant k of a token is k * (vectors of its placeholder) above that of variant 0
        self._stride = torch.tensor(
            [
                tensor.shape[1]
                for tensor in embeddings.values()
                for _ in range(tensor[..., 0].numel())
            ]
        )
        self._pattern = placeholder_pattern(self.placeholders)
        self._original_ids: list[Tensor] = []
        embedding = text_encoder.token_embedding
        self._handles = [
            embedding.register_forward_pre_hook(self._replace_learned_ids),
            embedding.register_forward_hook(self._insert_embeddings),
        ]
        text_encoder.learned_tokens = self

    @property
    def embeddings(self) -> dict[str, nn.Parameter]:
        """Learned embeddings by placeholder, ``(K, N, D)``."""
        return dict(zip(self.placeholders, self._parameters_of, strict=True))

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """The vectors that the text encoder reads, by placeholder, ``(K, N, D)``."""
        return self.embeddings

    def prior_loss(self) -> Tensor | None:
        """A loss of the embeddings alone, 0-d; ``None`` where they have no prior."""
        return None

    def retract(self) -> None:
        """Called after every optimizer step, for embeddings with a constraint."""

    @property
    def tokens(self) -> list[str]:
        """Every token with a learned embedding, as in the tokenizer."""
        return [token for tokens in self._tokens.values() for token in tokens]

    def expand(self, caption: str) -> str:
        """Replace every placeholder, matched as whole words, by the tokens of variant 0."""
        return self._pattern.sub(lambda match: self._words[match.lastindex - 1], caption)

    def variant(self, ids: Tensor, k: int | Tensor) -> Tensor:
        """Ids with every placeholder in its ``k``-th variant.

        Args:
            ids: ids of variant 0, any shape.
            k: from 0 to K - 1; a tensor must broadcast to ``ids``.
        """
        is_learned = ids >= self._first_id
        stride = self._stride.to(ids.device)[(ids - self._first_id).clamp(min=0)]
        return torch.where(is_learned, ids + k * stride, ids)

    def remove(self) -> None:
        """Remove hooks and placeholders from the text encoder."""
        for handle in self._handles:
            handle.remove()
        self._text_encoder.tokenizer = self._old_tokenizer
        self._text_encoder.learned_tokens = None

    def _extend_tokenizer(self) -> int:
        """Give the encoder a tokenizer with our tokens; returns the first of their ids."""
        tokenizer = copy.deepcopy(self._old_tokenizer)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.tokens])
        ids = tokenizer.convert_tokens_to_ids(self.tokens)
        assert ids == list(range(ids[0], ids[0] + len(ids))), "added tokens have consecutive ids"
        self._text_encoder.tokenizer = tokenizer
        self._words = [
            " ".join(self._tokens[placeholder][: self.embeddings[placeholder].shape[1]])
            for placeholder in _longest_first(self.placeholders)
        ]
        return ids[0]

    def _replace_learned_ids(
        self, _module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        self._original_ids.append(args[0])
        return (args[0].masked_fill(args[0] >= self._first_id, 0), *args[1:])

    def _insert_embeddings(
        self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        ids_BL = self._original_ids.pop()
        table_ND = torch.cat([tensor.flatten(0, 1) for tensor in self.vectors.values()])
        learned_BLD = F.embedding((ids_BL - self._first_id).clamp(min=0), table_ND)
        return torch.where((ids_BL >= self._first_id)[..., None], learned_BLD.to(output), output)


def placeholder_pattern(placeholders: Sequence[str]) -> re.Pattern[str]:
    """Matches any placeholder as whole words, in any case, the longest first.

    Group n is the n-th of the placeholders in that order.
    """
    words = (
        r"\s+".join(map(re.escape, placeholder.split()))
        for placeholder in _longest_first(placeholders)
    )
    alternatives = "|".join(f"({word})" for word in words)
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)


def _longest_first(placeholders: Sequence[str]) -> list[str]:
    return sorted(placeholders, key=len, reverse=True)
