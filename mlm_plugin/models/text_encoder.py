"""A CLIP text encoder as the U-Net sees it: tokenizer, model, clip skip and long captions.

Knows nothing about training, prompts or masks. Shapes: B captions, L tokens, N windows of 77, D
width, P width of the pooled state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mlm_plugin.models.token_embeddings import LearnedTokens

__all__ = ["PooledStates", "TextEncoder", "activations_kept"]

SIGN_BITS_PER_TENSOR = 64


class PooledStates(NamedTuple):
    """Output of SDXL's second text encoder.

    Attributes:
        states: ``(B, L, D)``, clip skip applied.
        pooled: ``(B, P)``, the last state of the end token through the projection.
    """

    states: Tensor
    pooled: Tensor


class TextEncoder:
    """Tokenizer and CLIP text model behind one call: captions in, U-Net conditioning out.

    Args:
        tokenizer: CLIP tokenizer (BPE, words end in ``</w>``).
        model: ``CLIPTextModel``; nested (transformers < 5.6) or flat (>= 5.6). For pooled states
            ``CLIPTextModelWithProjection``.
        clip_skip: ``None`` or 1 = last layer; k = the k-th state from the end, followed by the
            final layer norm. Source: sd-scripts ``library/strategy_sd.py``.
        max_token_length: ``None`` or 75 = one window of 77; 150 / 225 = two / three windows.
        final_norm: whether the final layer norm follows a skipped layer. It does in SD 1 and 2,
            not in SDXL and SD 3. Source: ``library/strategy_sdxl.py``.

    Attributes:
        learned_tokens: placeholders with learned embeddings; set by ``LearnedTokens``.
        reads_itself: whether it has a head of its own, as a language model has.
        prefix: text that the host puts before every caption.
    """

    reads_itself = False
    prefix = ""

    def __init__(
        self,
        tokenizer,
        model: nn.Module,
        *,
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        final_norm: bool = True,
    ):
        assert final_norm or clip_skip is not None, "the last state always has the final norm"
        self.tokenizer = tokenizer
        self.model = model
        self.clip_skip = clip_skip
        self.max_token_length = max_token_length
        self.final_norm = final_norm
        self.learned_tokens: LearnedTokens | None = None

    @property
    def models(self) -> list[nn.Module]:
        """What has to be on a device to encode there."""
        return [self.model]

    @property
    def token_embedding(self) -> nn.Embedding:
        """The token table, ``(V, D)``."""
        return self.model.get_input_embeddings()

    @property
    def window(self) -> int:
        """Tokens of one pass through the model, BOS and EOS included (77)."""
        return self.model.config.max_position_embeddings

    @property
    def body(self) -> nn.Module:
        """The transformer itself, however this version of transformers nests it."""
        return getattr(self.model, "text_model", self.model)

    @property
    def most_tokens(self) -> int:
        """Tokens of a caption that are read, BOS and EOS aside; the rest is cut."""
        body_length = self.window - 2
        return max(1, (self.max_token_length or body_length) // body_length) * body_length

    def is_cut(self, caption: str) -> bool:
        """Whether a caption is longer than what is read."""
        ids = self.tokenizer(self.expand(caption), add_special_tokens=False).input_ids
        return len(ids) > self.most_tokens

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids of captions, padded and split into windows.

        Returns:
            ids of shape ``(B, N, 77)``; a window is BOS, 75 tokens, EOS or padding.

        Source: sd-scripts ``library/strategy_base.py`` ``_get_input_ids``.
        """
        body_length = self.window - 2
        num_windows = self.most_tokens // body_length
        ids_BL = self.tokenizer(
            [self.expand(caption) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=num_windows * body_length + 2,
            return_tensors="pt",
        ).input_ids
        if num_windows == 1:
            return ids_BL[:, None]
        return torch.stack([self._split_windows(ids_L, num_windows) for ids_L in ids_BL])

    def tokenize_trimmed(self, captions: Sequence[str]) -> Tensor:
        """Token ids padded to the longest caption only, ``(B, L)`` with L <= 77.

        A causal encoder computes the same states for them as for a full window.
        """
        return self.tokenizer(
            [self.expand(caption) for caption in captions],
            padding="longest",
            truncation=True,
            max_length=self.window,
            return_tensors="pt",
        ).input_ids

    def positions_around(self, caption: str, words: str) -> list[int] | None:
        """Positions of the tokens outside ``words``, from the first after BOS to EOS.

        ``None`` if the words are not in the caption, or beyond the window.
        """
        ids, wanted = (self.tokenize_trimmed([text])[0].tolist() for text in (caption, words))
        end, length = ids.index(self.tokenizer.eos_token_id), len(wanted) - 2
        for start in range(1, end - length + 1):
            if ids[start : start + length] == wanted[1:-1]:
                return [*range(1, start), *range(start + length, end + 1)]
        return None

    def expand(self, caption: str) -> str:
        """The caption with placeholders replaced by their learned tokens."""
        return caption if self.learned_tokens is None else self.learned_tokens.expand(caption)

    def encode(self, input_ids_BL: Tensor) -> Tensor:
        """States of one window, ``(B, L) -> (B, L, D)``, L <= 77, clip skip applied."""
        input_ids_BL = input_ids_BL.to(self.token_embedding.weight.device, non_blocking=True)
        if self.clip_skip is None:
            return self.model(input_ids=input_ids_BL, return_dict=True).last_hidden_state
        states = self.model(input_ids=input_ids_BL, output_hidden_states=True, return_dict=True)
        return self._skipped(states.hidden_states)

    def encode_pooled(self, input_ids_BL: Tensor) -> PooledStates:
        """:meth:`encode` and the pooled state, in one pass.

        The end token is found by its id. The library's own pooling may use the position of the
        highest id instead, but learned tokens have higher ids.

        Source: sd-scripts ``library/strategy_sdxl.py`` ``_pool_workaround``.
        """
        assert self.clip_skip is not None, "models with pooled states skip layers"
        input_ids_BL = input_ids_BL.to(self.token_embedding.weight.device, non_blocking=True)
        output = self.model(input_ids=input_ids_BL, output_hidden_states=True, return_dict=True)
        last_BLD = output.last_hidden_state
        ends_B = (input_ids_BL == self.tokenizer.eos_token_id).int().argmax(dim=1)
        end_BD = last_BLD[torch.arange(len(ends_B), device=ends_B.device), ends_B]
        projection = self.model.text_projection
        pooled_BP = projection(end_BD.to(projection.weight.dtype)).to(last_BLD.dtype)
        return PooledStates(self._skipped(output.hidden_states), pooled_BP)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass while the model is in training mode."""
        model = self.model
        name = "activation_checkpointing_enable"  # transformers >= 5; the old name warns there
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def encode_storing(self, input_ids_BL: Tensor) -> Tensor:
        """:meth:`encode` with its activations kept, also where gradient checkpointing is on.

        For short batches: they need little memory, and a third of their time would be spent on
        computing activations again.
        """
        with activations_kept(self.model):
            return self.encode(input_ids_BL)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """The U-Net's conditioning: ``(B, 75 N + 2, D)``."""
        return self.encode_windows(self.tokenize(captions))

    def encode_captions_pooled(self, captions: Sequence[str]) -> PooledStates:
        """:meth:`encode_captions` and the pooled state of the first window, ``(B, P)``.

        Source: sd-scripts ``library/strategy_sdxl.py`` ``_get_hidden_states_sdxl``.
        """
        input_ids_BNL = self.tokenize(captions)
        num_windows = input_ids_BNL.shape[1]
        states, pooled = self.encode_pooled(input_ids_BNL.flatten(0, 1))
        return PooledStates(_joined(states, num_windows), pooled[::num_windows])

    def encode_windows(self, input_ids_BNL: Tensor) -> Tensor:
        """Encode windows one by one and join them: BOS, the bodies, the last window's end."""
        states = self.encode(input_ids_BNL.flatten(0, 1))
        return _joined(states, input_ids_BNL.shape[1])

    def count_tokens(self, caption: str) -> int:
        """Number of tokens of a caption without BOS and EOS, before truncation."""
        text = self.expand(caption)
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def fingerprint(self) -> str:
        """Identity of this encoder's states: 16 hex digits for the weights, and clip skip.

        Computed from the signs of a sample of weights, so that the same checkpoint has the same
        fingerprint in fp32, bf16 and fp16.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(_plain_names(self.model)):
            flat = tensor.detach().flatten()
            stride = max(1, flat.numel() // SIGN_BITS_PER_TENSOR)
            signs = (flat[::stride] > 0).cpu().numpy()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + signs.tobytes())
        norm = "" if self.final_norm else "-raw"
        return f"{digest.hexdigest()[:16]}-skip{self.clip_skip or 1}{norm}"

    def tokenizer_fingerprint(self) -> str:
        """Identity of the vocabulary without tokens added later, 16 hex digits."""
        size = self.model.config.vocab_size
        vocabulary = {k: v for k, v in self.tokenizer.get_vocab().items() if v < size}
        text = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _skipped(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The hidden state selected by clip skip."""
        state_BLD = hidden_states[-self.clip_skip]
        return self.body.final_layer_norm(state_BLD) if self.final_norm else state_BLD

    def _split_windows(self, ids_L: Tensor, num_windows: int) -> Tensor:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        body_length = self.window - 2
        windows = []
        for i in range(num_windows):
            start = 1 + i * body_length
            window = torch.cat([ids_L[:1], ids_L[start : start + body_length], ids_L[-1:]])
            if pad != eos:  # SD 2: padding is not EOS, so an EOS may have to be put back
                if window[-2] not in (pad, eos):
                    window[-1] = eos
                if window[1] == pad:
                    window[1] = eos
            windows.append(window)
        return torch.stack(windows)


@contextmanager
def activations_kept(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of a transformers model, switched off inside the block."""
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def _joined(states: Tensor, num_windows: int) -> Tensor:
    """States of windows ``(B N, L, D)`` as those of captions, ``(B, N (L - 2) + 2, D)``."""
    if num_windows == 1:
        return states
    states_BNLD = states.unflatten(0, (-1, num_windows))
    bodies = states_BNLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BNLD[:, 0, :1], bodies, states_BNLD[:, -1, -1:]], dim=1)


def _plain_names(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights under names that do not depend on the library's nesting or on LoRA wrappers."""
    plain = []
    for name, tensor in model.named_parameters():
        if ".lora_" not in name:
            plain.append((name.removeprefix("text_model.").replace(".base_layer", ""), tensor))
    return plain
