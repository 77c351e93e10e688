"""Text encoders of diffusion transformers: language models (Qwen3, Gemma 2) and T5.

They offer what the MLM term needs of a text encoder (``text_encoder.py`` has CLIP). Knows nothing
about training, prompts or masks. Shapes: B captions, L tokens, D width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mlm_plugin.mlm.next_word import NextWordHead
from mlm_plugin.models.text_encoder import activations_kept

__all__ = ["AdaptedEncoder", "LanguageModelEncoder", "T5Encoder", "is_causal_language_model"]

MAX_LENGTH = 256
"""Tokens of a prompt that are read; prompts of the built-in sets have less than 80."""


def is_causal_language_model(model: nn.Module) -> bool:
    """Whether this is the trunk of a decoder-only language model."""
    return hasattr(model, "embed_tokens") and hasattr(model, "layers") and hasattr(model, "norm")


class T5Encoder:
    """Tokenizer and bidirectional encoder behind one call.

    Hosts pad captions to hundreds of tokens, and T5 attends to the padding unless they mask it.
    Here it is masked, so that short prompts give the states of their own tokens.

    Args:
        tokenizer: pads on the right.
        model: ``T5EncoderModel``.

    Source: sd-scripts ``library/strategy_sd3.py``, ``strategy_flux.py``.
    """

    learned_tokens = None
    reads_itself = False
    prefix = ""

    def __init__(self, tokenizer, model: nn.Module):
        self.tokenizer = tokenizer
        self.model = model

    @property
    def models(self) -> list[nn.Module]:
        """What has to be on a device to encode there."""
        return [self.model]

    @property
    def token_embedding(self) -> nn.Embedding:
        """The token table, ``(V, D)``."""
        return self.model.get_input_embeddings()

    def tokenize_trimmed(self, captions: Sequence[str]) -> Tensor:
        """Token ids padded to the longest caption, ``(B, L)``."""
        return _padded_ids(self.tokenizer, captions)

    def encode(self, input_ids_BL: Tensor) -> Tensor:
        """States that the image model is conditioned on, ``(B, L) -> (B, L, D)``."""
        return self._output(input_ids_BL).last_hidden_state

    def encode_storing(self, input_ids_BL: Tensor) -> Tensor:
        """:meth:`encode` with its activations kept, also where gradient checkpointing is on.

        Without the dropout of T5, which would be taken for a change by training.
        """
        with activations_kept(self.model), _evaluated(self.model):
            return self.encode(input_ids_BL)

    def _output(self, input_ids_BL: Tensor, **settings):
        input_ids_BL = input_ids_BL.to(self.token_embedding.weight.device, non_blocking=True)
        is_token_BL = input_ids_BL != self.tokenizer.pad_token_id
        return self.model(
            input_ids=input_ids_BL, attention_mask=is_token_BL, return_dict=True, **settings
        )


class LanguageModelEncoder(T5Encoder):
    """A decoder-only language model as text encoder. Its own head can read its states.

    Args:
        tokenizer: pads on the right.
        model: its trunk, without the head (``Qwen3Model``, ``Gemma2Model``).
        skip: last layers that the image model does not see: 0 in Anima, 1 in Lumina 2. Without any
            the states are those after the final norm.
        prefix: text that the host puts before every caption.

    Source: sd-scripts ``library/strategy_anima.py``, ``strategy_lumina.py``.
    """

    def __init__(self, tokenizer, model: nn.Module, *, skip: int = 0, prefix: str = ""):
        super().__init__(tokenizer, model)
        self.skip = skip
        self.prefix = prefix

    @property
    def reads_itself(self) -> bool:
        """Whether its head is at hand: tied to the token embeddings."""
        return self.model.config.tie_word_embeddings

    def tokenize_trimmed(self, captions: Sequence[str]) -> Tensor:
        """Token ids padded to the longest caption, the prefix included, ``(B, L)``."""
        return super().tokenize_trimmed([self.prefix + caption for caption in captions])

    def positions_around(self, caption: str, words: str) -> list[int] | None:
        """Positions of the caption's tokens outside ``words``, without the prompt's first.

        That sees nothing but itself, so its state holds no context. Tokens that are partly inside
        ``words`` are left out too.

        ``None`` if the words are not in the caption, or beyond the last token that is read.
        """
        text = self.prefix + caption
        found = re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text[len(self.prefix) :])
        spans = self.tokenizer(
            text, truncation=True, max_length=MAX_LENGTH, return_offsets_mapping=True
        ).offset_mapping
        if found is None or not spans:
            return None
        start, end = (len(self.prefix) + place for place in found.span())
        if max(last for _, last in spans) < end:
            return None
        in_caption = (i for i, (_, last) in enumerate(spans) if i and last > len(self.prefix))
        return [i for i in in_caption if spans[i][1] <= start or spans[i][0] >= end]

    def encode(self, input_ids_BL: Tensor) -> Tensor:
        """States that the image model is conditioned on, ``(B, L) -> (B, L, D)``."""
        if not self.skip:
            return super().encode(input_ids_BL)
        output = self._output(input_ids_BL, output_hidden_states=True)
        return output.hidden_states[-1 - self.skip]

    def next_word_head(self) -> NextWordHead:
        """The model's own head, tied to its token embeddings. Call it before anything is trained.

        Skipped layers are copied: what is trained in them must not help the reader.
        """
        embedding = self.token_embedding
        return NextWordHead(
            lambda: embedding.weight.detach(),
            tail=_LastLayers(self.model, self.skip) if self.skip else None,
            softcap=getattr(self.model.config, "final_logit_softcapping", None),
        )


class AdaptedEncoder:
    """What Anima's transformer reads: a language model's states, adapted to the tokens of T5.

    Its prompts are T5's ids, of which only the tokens are used. The text behind them is remembered
    when they are made, because the adapter needs the language model's states of it too.

    Args:
        source: the language model.
        adapter: ``llm_adapter`` of the transformer.
        tokenizer: of T5.
        keep_states: whether the language model stays untrained, so that its states of a prompt are
            computed once.

    Source: sd-scripts ``library/anima_models.py``.
    """

    learned_tokens = None
    reads_itself = False
    prefix = ""

    def __init__(
        self, source: LanguageModelEncoder, adapter: nn.Module, tokenizer, *, keep_states: bool
    ):
        self.source = source
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.keep_states = keep_states
        self._texts: dict[tuple[int, ...], str] = {}
        self._states: dict[str, Tensor] = {}  # (L, D) each, on the CPU

    @property
    def models(self) -> list[nn.Module]:
        """What has to be on a device to encode there."""
        return [self.source.model, self.adapter]

    @property
    def token_embedding(self) -> nn.Embedding:
        """Of T5's tokens, ``(V, D)``."""
        return self.adapter.embed

    def tokenize_trimmed(self, captions: Sequence[str]) -> Tensor:
        """T5's token ids padded to the longest caption, ``(B, L)``."""
        ids_BL = _padded_ids(self.tokenizer, captions)
        self._texts |= zip(map(self._key, ids_BL), captions, strict=True)
        return ids_BL

    def encode(self, input_ids_BL: Tensor) -> Tensor:
        """Adapted states of prompts that were tokenized here, ``(B, L) -> (B, L, D)``."""
        source_BMD, is_source_BM = self._source_states(
            [self._texts[self._key(ids_L)] for ids_L in input_ids_BL]
        )
        ids_BL = input_ids_BL.to(self.token_embedding.weight.device, non_blocking=True)
        return self.adapter(
            source_BMD.to(ids_BL.device),
            ids_BL,
            target_attention_mask=ids_BL != self.tokenizer.pad_token_id,
            source_attention_mask=is_source_BM.to(ids_BL.device),
        )

    def encode_storing(self, input_ids_BL: Tensor) -> Tensor:
        """:meth:`encode` with its activations kept, also where gradient checkpointing is on."""
        with activations_kept(self.source.model):
            return self.encode(input_ids_BL)

    def _key(self, ids_L: Tensor) -> tuple[int, ...]:
        return tuple(ids_L[ids_L != self.tokenizer.pad_token_id].tolist())

    def _source_states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The language model's states, zero at padding, and where its tokens are."""
        ids_BM = self.source.tokenize_trimmed(texts)
        is_token_BM = ids_BM != self.source.tokenizer.pad_token_id
        if not self.keep_states:
            states_BMD = self.source.encode(ids_BM)
            return states_BMD * is_token_BM.to(states_BMD)[..., None], is_token_BM
        new = [row for row, text in enumerate(texts) if text not in self._states]
        if new:
            with torch.no_grad():
                states = self.source.encode(ids_BM[new]).cpu()
            for row, states_MD in zip(new, states, strict=True):
                self._states[texts[row]] = states_MD[is_token_BM[row]].clone()
        kept = [self._states[text] for text in texts]
        return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True), is_token_BM


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module then is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _padded_ids(tokenizer, captions: Sequence[str]) -> Tensor:
    return tokenizer(
        list(captions),
        padding="longest",
        truncation=True,
        max_length=MAX_LENGTH,
        return_tensors="pt",
    ).input_ids


class _LastLayers(nn.Module):
    """Copies of the last layers of a language model and its final norm: states in, states out.

    They run inside a shortened model of the same class, which knows its masks and positions; what
    enters its first layer is replaced.
    """

    def __init__(self, model: nn.Module, count: int):
        super().__init__()
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-count:]
        with torch.device("meta"):
            self.short = type(model)(config)
        self.short.layers = copy.deepcopy(model.layers[-count:])
        self.short.norm = copy.deepcopy(model.norm)
        self.short.rotary_emb = copy.deepcopy(model.rotary_emb)
        del self.short.embed_tokens
        self.short.requires_grad_(False).eval()

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """``(B, L, D) -> (B, L, D)``, padding on the right."""

        def replace(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (hidden_BLD, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden_BLD}

        handle = self.short.layers[0].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            return self.short(
                inputs_embeds=hidden_BLD, use_cache=False, return_dict=True
            ).last_hidden_state
        finally:
            handle.remove()
