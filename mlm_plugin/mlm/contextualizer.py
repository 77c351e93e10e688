"""The contextualizer: reads the text encoder's states in both directions and names hidden words.

A small pre-norm transformer whose output is compared with the text encoder's own token table. It
is trained once per text encoder (``pretrain.py``) and frozen while a concept is learned.
Knows no trainer and no prompts. Shapes: B prompts, L tokens, D width of the text encoder, W inner
width, V vocabulary, N hidden tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.mlm.masking import IGNORE_INDEX
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.weights_files import for_file, write_weights

__all__ = [
    "Contextualizer",
    "ContextualizerFacts",
    "ContextualizerSizes",
    "MaskedWordLoss",
    "default_width",
    "load_contextualizer",
    "masked_word_loss",
    "places_of",
    "save_contextualizer",
]

FORMAT = "mlm_plugin contextualizer 1"
HEAD_WIDTH = 64


@dataclass(frozen=True)
class ContextualizerSizes:
    """Architecture of a contextualizer.

    Attributes:
        hidden_size: D, width of the text encoder's states.
        vocab_size: V, rows of its token table.
        width: W, inner width.
        num_layers: transformer blocks.
        max_length: longest prompt in tokens, BOS and EOS included.
    """

    hidden_size: int
    vocab_size: int
    width: int = 384
    num_layers: int = 4
    max_length: int = 77


def default_width(hidden_size: int) -> int:
    """Inner width for a text encoder: its own, between 64 and 384.

    384 keeps the network under 2 % of the memory of an SD 1.5 run (``docs/performance.md``).
    """
    return min(384, max(64, hidden_size))


@dataclass(frozen=True)
class ContextualizerFacts:
    """Where a contextualizer comes from; stored in its file."""

    text_encoder: str
    tokenizer: str
    num_steps: int
    accuracy: float
    loss: float
    training: dict = field(default_factory=dict)


class Block(nn.Module):
    """Pre-norm self-attention over the whole prompt, then a feed-forward network."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = max(1, width // HEAD_WIDTH)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BLW: Tensor, is_token_BL: Tensor) -> Tensor:
        """``(B, L, W) -> (B, L, W)``; positions where ``is_token_BL`` is false are not attended."""
        qkv = self.qkv(self.attention_norm(x_BLW)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=is_token_BL[:, None, None, :])
        x_BLW = x_BLW + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x_BLW + self.feed_forward(x_BLW)


class Contextualizer(nn.Module):
    """Predicts hidden words from the text encoder's states of the whole prompt.

    CLIP's text encoder is causal: the state of a hidden word knows only the words before it. The
    blocks are bidirectional, so words on either side of the concept carry gradient to it.

    The output is tied: a state becomes a vector of width D that is compared with every row of the
    text encoder's token table, given by the caller and frozen. ``mask_vector`` stands for [MASK] at
    the encoder's input; it starts as NaN and only pretraining or a file can make it finite.
    """

    def __init__(self, sizes: ContextualizerSizes):
        super().__init__()
        self.sizes = sizes
        self.input_norm = nn.LayerNorm(sizes.hidden_size)
        self.input = nn.Linear(sizes.hidden_size, sizes.width)
        self.position = nn.Parameter(torch.randn(sizes.max_length, sizes.width) * 0.02)
        self.blocks = nn.ModuleList(Block(sizes.width) for _ in range(sizes.num_layers))
        self.head = nn.Sequential(
            nn.LayerNorm(sizes.width),
            nn.Linear(sizes.width, sizes.hidden_size),
            nn.GELU(),
            nn.LayerNorm(sizes.hidden_size),
        )
        self.output_scale = nn.Parameter(torch.ones(()))
        self.output_bias = nn.Parameter(torch.zeros(sizes.vocab_size))
        self.mask_vector = nn.Parameter(torch.full((sizes.hidden_size,), float("nan")))

    def forward(
        self, hidden_BLD: Tensor, is_token_BL: Tensor, places_N: Tensor, token_table_VD: Tensor
    ) -> Tensor:
        """Scores of the vocabulary at selected positions only.

        Args:
            hidden_BLD: conditioning states of the text encoder.
            is_token_BL: true for BOS, words and EOS; false for padding.
            places_N: where a word is to be named, as indices of the ``B L`` positions. A mask of
                truth values would have to be counted, for which a GPU makes everyone wait.
            token_table_VD: the text encoder's token embeddings.

        Returns:
            logits of shape ``(N, V)``, fp32.
        """
        return self.score(self.read(hidden_BLD, is_token_BL, places_N), token_table_VD)

    def read(self, hidden_BLD: Tensor, is_token_BL: Tensor, places_N: Tensor) -> Tensor:
        """:meth:`forward` up to the vectors that are compared with the table, ``(N, D)``."""
        dtype = self.input.weight.dtype
        x_BLW = self.input(self.input_norm(hidden_BLD.to(dtype)))
        x_BLW = x_BLW + self.position[: hidden_BLD.shape[1]]
        for block in self.blocks:
            x_BLW = block(x_BLW, is_token_BL)
        return self.head(x_BLW.flatten(0, 1)[places_N])

    def score(self, vectors_ND: Tensor, token_table_VD: Tensor) -> Tensor:
        """The rest of :meth:`forward`: ``(N, D)`` to logits ``(N, V)``, fp32."""
        # the few vectors follow the table's precision, not the large table theirs
        logits_NV = F.linear(vectors_ND.to(token_table_VD.dtype), token_table_VD).float()
        return logits_NV * self.output_scale.float() + self.output_bias.float()

    def start_from(self, token_table_VD: Tensor, token_counts_V: Tensor) -> None:
        """Fit a new network to the table it will read and to how often tokens occur.

        [MASK] begins as the mean token, a vector the text encoder knows how to read; the output
        scale makes logits of about unit size, whatever the length of the rows (0.4 in CLIP); the
        bias begins at the logarithm of the frequencies, which gradients would take long to find.

        Args:
            token_table_VD: the text encoder's token embeddings.
            token_counts_V: occurrences in the text to train on.
        """
        counts_V = token_counts_V.float() + 0.1
        with torch.no_grad():
            self.mask_vector.copy_(token_table_VD.float().mean(dim=0))
            self.output_scale.copy_(1 / token_table_VD.float().norm(dim=-1).mean())
            self.output_bias.copy_((counts_V / counts_V.sum()).log())

    def require_trained(self) -> None:
        """Refuse work with a mask vector that nobody has set.

        Raises:
            UserError: if the vector is not finite.
        """
        if not torch.isfinite(self.mask_vector).all():
            raise UserError(
                "mlm_contextualizer: its mask vector was never trained; "
                "make one with `mlm-plugin pretrain`"
            )


class MaskedWordLoss(NamedTuple):
    """How far the answers at the hidden tokens are off, and how many were named rightly."""

    loss: Tensor  # 0-d fp32, mean over the N labelled tokens; 0 without labels
    num_correct: Tensor  # 0-d long
    num_masked: int  # N


def places_of(labels_BL: Tensor) -> Tensor:
    """Where labels ask for a word, as indices of the ``B L`` positions, ``(N,)``."""
    return (labels_BL != IGNORE_INDEX).flatten().nonzero().squeeze(1)


def masked_word_loss(
    contextualizer: Contextualizer,
    hidden_BLD: Tensor,
    *,
    labels_BL: Tensor,
    is_token_BL: Tensor,
    token_table_VD: Tensor,
    wanted_ND: Tensor | None = None,
) -> MaskedWordLoss:
    """``-mean log p(hidden token | states)``, in fp32, over labelled positions only.

    With ``wanted_ND`` the target is a distribution q instead of the token: ``mean KL(q, p)``.

    Args:
        contextualizer: the network that names the words.
        hidden_BLD: states of the text encoder on masked ids.
        labels_BL: hidden ids, IGNORE_INDEX elsewhere; on the CPU, so that no device is waited for.
        is_token_BL: false for padding.
        token_table_VD: the tied output table.
        wanted_ND: vectors that the contextualizer is to give (:meth:`Contextualizer.read`).

    Source: arXiv 2410.10058 as summarised in public reviews; the loss of Devlin et al. 2018.
    """
    device = hidden_BLD.device
    places_N = places_of(labels_BL)
    labels_N = labels_BL.flatten()[places_N].to(device, non_blocking=True)
    logits_NV = contextualizer(
        hidden_BLD, is_token_BL, places_N.to(device, non_blocking=True), token_table_VD
    )
    # sums, not means: without a label the loss is a zero that still belongs to the graph
    if wanted_ND is None:
        loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    else:
        wanted_NV = contextualizer.score(wanted_ND, token_table_VD).log_softmax(dim=-1)
        log_p_NV = logits_NV.log_softmax(dim=-1)
        loss = F.kl_div(log_p_NV, wanted_NV, reduction="sum", log_target=True)
    loss = loss / max(1, len(places_N))
    num_correct = (logits_NV.detach().argmax(dim=-1) == labels_N).sum()
    return MaskedWordLoss(loss, num_correct, len(places_N))


def save_contextualizer(
    path: str | Path, contextualizer: Contextualizer, facts: ContextualizerFacts
) -> None:
    """Write weights, mask vector, sizes and facts into one safetensors file, atomically."""
    contextualizer.require_trained()
    tensors = {k: for_file(v, torch.float32) for k, v in contextualizer.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "sizes": json.dumps(asdict(contextualizer.sizes)),
        "facts": json.dumps(asdict(facts)),
    }
    write_weights(path, tensors, metadata=metadata)


def load_contextualizer(
    path: str | Path, text_encoder: TextEncoder
) -> tuple[Contextualizer, ContextualizerFacts]:
    """Read a contextualizer made for ``text_encoder``; frozen, fp32, in eval mode, on the CPU.

    Raises:
        UserError: if the file is missing, is no contextualizer, or was made for another text
            encoder, clip skip or tokenizer (both fingerprints are named).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"mlm_contextualizer: no such file: {path}; "
            "give a file made by `mlm-plugin pretrain`, or 'auto'"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(
            f"mlm_contextualizer: {path} is not a safetensors file ({error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"mlm_contextualizer: {path} is no contextualizer (format {metadata.get('format')!r}, "
            f"expected {FORMAT!r}); make one with `mlm-plugin pretrain`"
        )
    facts = ContextualizerFacts(**json.loads(metadata["facts"]))
    _require_same(path, "text encoder", facts.text_encoder, text_encoder.fingerprint())
    _require_same(path, "tokenizer", facts.tokenizer, text_encoder.tokenizer_fingerprint())
    with torch.device("meta"):  # no random initialisation: the caller's stream stays as it was
        contextualizer = Contextualizer(ContextualizerSizes(**json.loads(metadata["sizes"])))
    contextualizer.load_state_dict(tensors, assign=True)
    contextualizer.require_trained()
    return contextualizer.requires_grad_(False).eval(), facts


def _require_same(path: Path, what: str, made_for: str, present: str) -> None:
    if made_for != present:
        raise UserError(
            f"mlm_contextualizer: {path} was made for {what} {made_for}, this model has {present}; "
            "use 'auto' or run `mlm-plugin pretrain` on this model"
        )
