"""Masking of prompts: ids in, masked ids and labels out.

Pure functions over token ids; they know neither models nor prompt sets. Whole words are masked, at
least one per prompt, content words first (after Devlin et al. 2018 and, for short captions, the
"content words" remedy of data-efficient MLM).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "IGNORE_INDEX",
    "MASK_ID",
    "MaskedTokens",
    "MaskingVocabulary",
    "mask_tokens",
    "prompt_attention_mask",
]

MASK_ID = -1
"""Id of [MASK]. It is not in any vocabulary: a hook on the embedding layer handles it."""

CONTRACTIONS = frozenset({"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
"""Ends of words that tokenizers split off (patterns of CLIP and GPT-2): they mean too little."""

IGNORE_INDEX = -100
"""Label of a position without a target, as in transformers."""

LOW_PRIORITY_WEIGHT = 0.1
"""Chance of a function word to be chosen, relative to a content word."""

WORD_STARTS = ("\u0120", "\u2581")
"""Marks of a word's first token: of byte-level BPE and of SentencePiece."""

Word = tuple[int, ...]


class MaskedTokens(NamedTuple):
    """Result of :func:`mask_tokens`."""

    input_ids: Tensor  # (B, L) long, MASK_ID where a token was masked
    labels: Tensor  # (B, L) long, the masked id, IGNORE_INDEX elsewhere


@dataclass(frozen=True)
class MaskingVocabulary:
    """What masking needs to know about a tokenizer and the concept.

    A tokenizer marks either the last token of a word (CLIP) or the first (byte-level BPE and
    SentencePiece), where punctuation marks are words of their own.

    Attributes:
        ends_word: ids that close a word (CLIP's BPE marks them with ``</w>``).
        bos_token_id: id of the first token; ``None`` where prompts begin with a word.
        eos_token_id: id that ends the prompt; everything from the first one on is padding.
        punctuation: ids without a letter or digit, and contractions such as 's; never masked, as
            they teach nothing.
        protected: words that are never masked: placeholder tokens and the class word.
        low_priority: function words and words of neutral prefixes ("a photo of").
        replacements: ids that 80/10/10 masking may put in a word's place.
        begins_word: ids that open a word; ``None`` where ends are marked.
        has_eos: whether ``eos_token_id`` belongs to the prompt; otherwise it is that of padding.
        prefix: ids that the host puts before every caption, which are no part of its words.
    """

    ends_word: frozenset[int]
    bos_token_id: int | None
    eos_token_id: int
    punctuation: frozenset[int]
    protected: frozenset[Word]
    low_priority: frozenset[Word]
    replacements: Sequence[int]
    begins_word: frozenset[int] | None = None
    has_eos: bool = True
    prefix: Word = ()

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer,
        *,
        protected: Iterable[str],
        low_priority: Iterable[str],
        prefix: str = "",
    ) -> MaskingVocabulary:
        """Get word boundaries and the ids of protected and low-priority words from a tokenizer."""
        vocabulary = tokenizer.get_vocab()
        added = set(tokenizer.get_added_vocab().values())
        special = set(tokenizer.all_special_ids)
        ends = {id for token, id in vocabulary.items() if token.endswith("</w>")}
        begins = {id for token, id in vocabulary.items() if _opens_word(token)}
        boundaries = ends or begins
        punctuation = {
            id
            for token, id in vocabulary.items()
            if id not in added and _is_punctuation(token.removesuffix("</w>"), id, tokenizer)
        }
        first, *_, last = tokenizer("a b").input_ids
        has_eos = last == tokenizer.eos_token_id
        bare = cls(
            ends_word=frozenset(ends | (added - special)) if ends else frozenset(),
            bos_token_id=tokenizer.bos_token_id if first == tokenizer.bos_token_id else None,
            eos_token_id=tokenizer.eos_token_id if has_eos else tokenizer.pad_token_id,
            punctuation=frozenset(punctuation),
            protected=frozenset(),
            low_priority=frozenset(),
            replacements=sorted(boundaries - added - special - punctuation),
            begins_word=None if ends else frozenset(begins),
            has_eos=has_eos,
        )

        def words(texts: Iterable[str]) -> frozenset[Word]:
            texts = [text for text in texts if text]
            if not texts:
                return frozenset()
            if not ends:  # a word has other tokens at the start of the text than after a space
                texts += [f" {text}" for text in texts]
            encoded = tokenizer(texts, add_special_tokens=False).input_ids
            found = {tuple(ids[s:e]) for ids in encoded for s, e in bare.split_words(ids)}
            if not ends:  # SentencePiece may write the space before a word as a token
                found = {word for word in found if not punctuation.issuperset(word)}
            return frozenset(found)

        return replace(
            bare,
            protected=words(protected),
            low_priority=words(low_priority),
            prefix=tuple(tokenizer(prefix, add_special_tokens=False).input_ids) if prefix else (),
        )

    def split_words(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Spans ``(start, end)`` of the words between BOS, or the prefix, and the first EOS."""
        first = self._start(ids)
        length = next((i for i in range(first, len(ids)) if ids[i] == self.eos_token_id), len(ids))
        if self.begins_word is None:
            ends = [i + 1 for i in range(first, length) if ids[i] in self.ends_word]
            if length > first and (not ends or ends[-1] < length):
                ends.append(length)  # a word cut off by the length limit
            return list(zip([first, *ends], ends, strict=False))
        starts = [i for i in range(first, length) if i == first or self._begins(ids[i - 1], ids[i])]
        return list(zip(starts, [*starts[1:], length], strict=False))

    def _start(self, ids: Sequence[int]) -> int:
        first = 1 if len(ids) and ids[0] == self.bos_token_id else 0
        matches = map(operator.eq, ids[first:], self.prefix)
        return first + sum(1 for _ in takewhile(bool, matches))

    def _begins(self, before: int, token: int) -> bool:
        return token in self.begins_word or not self.punctuation.isdisjoint((before, token))

    def words_after(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Spans of the words after the first protected one, without the protected ones."""
        spans = self.split_words(ids)
        is_protected = [tuple(ids[slice(*span)]) in self.protected for span in spans]
        if True not in is_protected:
            return []
        start = is_protected.index(True) + 1
        pairs = zip(spans[start:], is_protected[start:], strict=True)
        return [span for span, protected in pairs if not protected]


def mask_tokens(
    input_ids_BL: Tensor,
    vocabulary: MaskingVocabulary,
    *,
    mlm_probability: float,
    rng: random.Random,
    replace: str = "mask",
) -> MaskedTokens:
    """Mask random context words of each prompt.

    Per prompt ``max(1, round(mlm_probability * words))`` words are drawn without replacement among
    those that are neither protected nor punctuation (rounded at random, so that the rate holds on
    average); content words are ten times as likely as function words. A prompt without a maskable
    word gets no label.

    Args:
        input_ids_BL: token ids, shape ``(B, L)``, long, on the CPU.
        vocabulary: word ends, specials, protected words.
        mlm_probability: share of the maskable words to mask, in (0, 1].
        rng: the caller's own stream.
        replace: ``"mask"`` replaces every chosen word by MASK_ID; ``"bert"`` does so with 80 %,
            puts a random token in place of 10 % and leaves 10 % unchanged.

    Returns:
        Masked ids and labels, both ``(B, L)``.

    Raises:
        ValueError: if ``mlm_probability`` or ``replace`` is out of range.

    Source: Devlin et al. 2018, section 3.1. That concept tokens stay visible: arXiv 2410.10058.
    """
    if not 0 < mlm_probability <= 1:
        raise ValueError(f"mlm_probability must be in (0, 1], got {mlm_probability}")
    if replace not in ("mask", "bert"):
        raise ValueError(f"replace must be 'mask' or 'bert', got {replace!r}")
    masked_BL = input_ids_BL.clone()
    labels_BL = torch.full_like(input_ids_BL, IGNORE_INDEX)
    for row, ids in enumerate(input_ids_BL.tolist()):
        for start, end in _choose_words(ids, vocabulary, mlm_probability, rng):
            labels_BL[row, start:end] = input_ids_BL[row, start:end]
            masked_BL[row, start:end] = _replacement(ids[start:end], vocabulary, replace, rng)
    return MaskedTokens(masked_BL, labels_BL)


def prompt_attention_mask(ids_BL: Tensor, eos_token_id: int) -> Tensor:
    """True up to the first EOS, false after it (SD 1 pads with EOS, SD 2 with "!")."""
    num_eos_before = (ids_BL == eos_token_id).cumsum(dim=1) - (ids_BL == eos_token_id).long()
    return num_eos_before == 0


def _opens_word(piece: str) -> bool:
    """Whether a token follows a space or begins with a punctuation mark ("'s")."""
    return piece.startswith(WORD_STARTS) or (piece[:1].isascii() and not piece[:1].isalnum())


def _is_punctuation(piece: str, id: int, tokenizer) -> bool:  # noqa: A002 - a token id
    if piece in CONTRACTIONS:
        return True
    if any(char.isascii() and char.isalnum() for char in piece):
        return False
    if piece.isascii():
        return True
    text = tokenizer.decode([id])  # pieces write bytes beyond ASCII as other letters
    return not any(char.isalnum() or char == "\ufffd" for char in text)  # half a letter counts


def _choose_words(
    ids: list[int], vocabulary: MaskingVocabulary, mlm_probability: float, rng: random.Random
) -> list[tuple[int, int]]:
    maskable = [
        span
        for span in vocabulary.split_words(ids)
        if tuple(ids[slice(*span)]) not in vocabulary.protected
        and not vocabulary.punctuation.issuperset(ids[slice(*span)])
    ]
    if not maskable:
        return []
    count = max(1, int(mlm_probability * len(maskable) + rng.random()))

    def priority(span: tuple[int, int]) -> float:
        # the k largest u^(1/w) are a weighted draw without replacement (Efraimidis, Spirakis 2006)
        low = tuple(ids[slice(*span)]) in vocabulary.low_priority
        return rng.random() ** (1 / (LOW_PRIORITY_WEIGHT if low else 1.0))

    keys = {span: priority(span) for span in maskable}
    return sorted(maskable, key=keys.__getitem__, reverse=True)[:count]


def _replacement(
    word: list[int], vocabulary: MaskingVocabulary, replace: str, rng: random.Random
) -> Tensor:
    fate = rng.random() if replace == "bert" else 0.0
    if fate < 0.8:
        return torch.full((len(word),), MASK_ID)
    if fate < 0.9:
        return torch.tensor([rng.choice(vocabulary.replacements) for _ in word])
    return torch.tensor(word)
