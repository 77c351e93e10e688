"""Learned token rows beside a frozen token table: the words of Textual Inversion and its kin.

The vocabulary is not resized: added rows would bring optimizer state for the whole table, and would
move pooling and exports. A placeholder ("sks") stands in captions as a word; in the ids it becomes
tokens of its own, and a hook on the embedding layer answers those with the learned rows.

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

__all__ = ["TokenRows", "initial_rows", "placeholder_pattern"]

TOKEN_ID = re.compile(r"id:(\d+)")


def initial_rows(text_encoder: TextEncoder, init_word: str, *, num_vectors: int) -> Tensor:
    """Rows to start from: those of the tokens of a word, in turn, ``(N, D)`` fp32.

    Args:
        text_encoder: whose table is read.
        init_word: a word or several, or ``id:42170`` for one token by number (rare tokens that no
            text gives, as Custom Diffusion uses them).
        num_vectors: N.

    Raises:
        UserError: a word without tokens, or a number outside the vocabulary.

    Source: sd-scripts ``train_textual_inversion.py`` (``init_token_ids[i % len(init_token_ids)]``).
    """
    table_VD = text_encoder.token_embedding.weight.detach()
    if match := TOKEN_ID.fullmatch(init_word):
        ids = [int(match[1])]
        if ids[0] >= len(table_VD):
            raise UserError(
                f"init_word = {init_word!r}: this text encoder has tokens 0 to {len(table_VD) - 1}"
            )
    else:
        ids = text_encoder.tokenizer(init_word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"init_word = {init_word!r} has no tokens; give a word like 'dog'")
    return table_VD[[ids[n % len(ids)] for n in range(num_vectors)]].float().clone()


class TokenRows(nn.Module):
    """Placeholders that a text encoder reads as learned vectors, from here to :meth:`remove`.

    Args:
        text_encoder: gets a tokenizer that knows the placeholders, and hooks on its embedding.
        rows: initial vectors of each placeholder, ``(K, N, D)``; K is the same for all.

    Attributes:
        rows: the trained parameters by placeholder, ``(K, N, D)`` fp32.
        num_variants: K.
    """

    def __init__(self, text_encoder: TextEncoder, rows: Mapping[str, Tensor]):
        super().__init__()
        assert len({len(tensor) for tensor in rows.values()}) == 1, "as many variants of each"
        assert text_encoder.token_rows is None, "this text encoder has learned rows already"
        device = text_encoder.token_embedding.weight.device
        self._parameters_of = nn.ParameterList(
            nn.Parameter(tensor.detach().to(device, torch.float32).clone())
            for tensor in rows.values()
        )
        self.placeholders = tuple(rows)
        self.num_variants = len(self._parameters_of[0])
        self._text_encoder, self._old_tokenizer = text_encoder, text_encoder.tokenizer
        self._tokens = {
            placeholder: [f"<|row_{i}_{j}|>" for j in range(tensor.shape[0] * tensor.shape[1])]
            for i, (placeholder, tensor) in enumerate(rows.items())
        }
        self._first_id = self._extend_tokenizer()
        # variant k of a token stands k * (vectors of its placeholder) ids behind variant 0
        self._stride = torch.tensor(
            [tensor.shape[1] for tensor in rows.values() for _ in range(tensor[..., 0].numel())]
        )
        self._pattern = placeholder_pattern(self.placeholders)
        self._hidden_ids: list[Tensor] = []
        embedding = text_encoder.token_embedding
        self._handles = [
            embedding.register_forward_pre_hook(self._hide),
            embedding.register_forward_hook(self._reveal),
        ]
        text_encoder.token_rows = self

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        """Learned rows by placeholder, ``(K, N, D)``."""
        return dict(zip(self.placeholders, self._parameters_of, strict=True))

    @property
    def tokens(self) -> list[str]:
        """Every token that stands for a learned row, as the tokenizer knows it."""
        return [token for tokens in self._tokens.values() for token in tokens]

    def expand(self, caption: str) -> str:
        """Put the tokens of variant 0 in place of every placeholder that stands as whole words."""
        return self._pattern.sub(lambda match: self._words[_key(match[0])], caption)

    def holds_rows(self, ids_BL: Tensor) -> Tensor:
        """Which captions hold a placeholder, ``(B,)`` bool."""
        return (ids_BL >= self._first_id).any(dim=-1)

    def variant(self, ids: Tensor, k: int | Tensor) -> Tensor:
        """Ids with every placeholder in its ``k``-th variant.

        Args:
            ids: ids of variant 0, any shape.
            k: from 0 to K - 1; a tensor must broadcast to ``ids``.
        """
        is_row = ids >= self._first_id
        stride = self._stride.to(ids.device)[(ids - self._first_id).clamp(min=0)]
        return torch.where(is_row, ids + k * stride, ids)

    def remove(self) -> None:
        """Take hooks and placeholders off the text encoder."""
        for handle in self._handles:
            handle.remove()
        self._text_encoder.tokenizer = self._old_tokenizer
        self._text_encoder.token_rows = None

    def _extend_tokenizer(self) -> int:
        """Give the encoder a tokenizer with our tokens; returns the first of their ids."""
        tokenizer = copy.deepcopy(self._old_tokenizer)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.tokens])
        ids = tokenizer.convert_tokens_to_ids(self.tokens)
        assert ids == list(range(ids[0], ids[0] + len(ids))), "added tokens have ids in a row"
        self._text_encoder.tokenizer = tokenizer
        self._words = {
            _key(placeholder): " ".join(tokens[: self.rows[placeholder].shape[1]])
            for placeholder, tokens in self._tokens.items()
        }
        return ids[0]

    def _hide(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._hidden_ids.append(args[0])
        return (args[0].masked_fill(args[0] >= self._first_id, 0), *args[1:])

    def _reveal(self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids_BL = self._hidden_ids.pop()
        table_ND = torch.cat([rows.flatten(0, 1) for rows in self._parameters_of])
        rows_BLD = F.embedding((ids_BL - self._first_id).clamp(min=0), table_ND)
        return torch.where((ids_BL >= self._first_id)[..., None], rows_BLD.to(output), output)


def _key(text: str) -> str:
    return " ".join(text.lower().split())


def placeholder_pattern(placeholders: Sequence[str]) -> re.Pattern[str]:
    """Matches any placeholder as whole words, in any case, the longest first."""
    longest_first = sorted(placeholders, key=len, reverse=True)
    words = (r"\s+".join(map(re.escape, placeholder.split())) for placeholder in longest_first)
    return re.compile(rf"(?<!\w)({'|'.join(words)})(?!\w)", re.IGNORECASE)
