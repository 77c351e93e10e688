"""Extended Textual Inversion (XTI, P+): token embeddings for every cross-attention layer.

A caption is encoded once per layer, all in one batch, and every layer of the U-Net attends to its
own encoding. Shapes: K layers, B captions, N windows, L tokens, D width.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.export.embedding_files import (
    all_layers_file,
    layer_average,
    read_vectors,
    save_xti,
)
from mlm_plugin.methods.base import Export
from mlm_plugin.methods.learned_tokens import (
    check_tokens,
    create_tokens,
    embedding_files,
    save_embeddings,
    verify_embeddings,
    webui_words,
)
from mlm_plugin.methods.textual_inversion import TextualInversion
from mlm_plugin.mlm.encoder import Variants
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.models.cross_attention import (
    cross_attention_names,
    layer_codes,
    per_layer_conditioning,
)
from mlm_plugin.models.per_layer_text import encode_per_layer
from mlm_plugin.models.token_embeddings import LearnedTokens

__all__ = ["XTI"]

logger = logging.getLogger(__name__)


class XTI(TextualInversion):
    """Textual Inversion with one set of token embeddings per layer.

    Args:
        models: the frozen base; its attention layers are set up to take their own text states.
        learned_tokens: K variants of each placeholder, one per cross-attention layer.
        all_layers: whether the MLM term encodes every prompt with the embeddings of every layer;
            else with those of one random layer, which gives the same gradient on average.

    Source: Voynov et al. 2023, arXiv 2303.09522; sd-scripts ``train_textual_inversion_XTI.py``.
    """

    own_options = (*TextualInversion.own_options, "xti_mlm_layers")
    supports_sdxl = False

    def __init__(
        self, models: StableDiffusion, learned_tokens: LearnedTokens, *, all_layers: bool = False
    ):
        super().__init__(models, [learned_tokens])
        self.all_layers = all_layers
        self.conditioning = per_layer_conditioning(models.unet)

    @classmethod
    def check(cls, config: TrainConfig, concepts: Sequence[Concept]) -> None:
        """Check placeholders, initial words and files; see ``Method.check``."""
        check_tokens(config.embedding, concepts, read=lambda file: [read_vectors(file)])
        for file in config.embedding.weights or ():
            _warn_of_average(Path(file))

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> XTI:
        """The same embeddings in all layers, or those of an XTI file; see ``Method.prepare``."""
        (text_encoder,) = models.text_encoders
        learned_tokens = create_tokens(
            text_encoder,
            config.embedding,
            concepts,
            num_variants=len(cross_attention_names(models.unet)),
            read=partial(read_vectors, codes=layer_codes(models.unet)),
        )
        return cls(models, learned_tokens, all_layers=config.embedding.xti_mlm_layers == "all")

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of all layers, joined: ``(B, K L, D)``."""
        (text_encoder,) = self.models.text_encoders
        return Conditioning(encode_per_layer(text_encoder, captions))

    def mlm_variants(self, ids_BL: Tensor, rng: random.Random) -> Variants:
        """Each prompt for one random layer ``(B, L)``, or for every layer ``(K B, L)``."""
        tokens = self.only_tokens
        layers = range(tokens.num_variants)
        if self.all_layers:
            ids = torch.cat([tokens.variant(ids_BL, k) for k in layers])
            return Variants(ids, torch.tensor(layers).repeat_interleave(len(ids_BL)))
        drawn_B1 = torch.tensor([[rng.choice(layers)] for _ in ids_BL])
        return Variants(tokens.variant(ids_BL, drawn_B1), drawn_B1.squeeze(1))

    def mlm_starts(self, ids_BL: Tensor) -> Sequence[Tensor]:
        """One for each layer, where a file gave each its own embeddings."""
        tokens = self.only_tokens
        if all((vectors == vectors[0]).all() for vectors in tokens.vectors.values()):
            return (ids_BL,)
        return [tokens.variant(ids_BL, k) for k in range(tokens.num_variants)]

    def files(self, path: Path) -> list[Path]:
        """The averages, which have the plain names, then per placeholder the file of all layers.

        ComfyUI would read the latter as an embedding, with one layer's vectors for all.
        """
        return [*self._average_files(path), *self._full_files(path)]

    def export(self, to: Export) -> None:
        """The layers' average as an ordinary embedding, and all layers in sd-scripts' format."""
        codes, embeddings = layer_codes(self.models.unet), self.only_tokens.vectors
        for file, tensor in zip(self._full_files(to.path), embeddings.values(), strict=True):
            metadata = to.metadata("textual-inversion", file)
            save_xti(file, tensor, metadata=metadata, dtype=to.dtype, codes=codes)
        averages = {name: [layer_average(tensor)] for name, tensor in embeddings.items()}
        save_embeddings(to, self._average_files(to.path), averages)

    def webui_files(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """The averages, called by their files' names: WebUIs cannot use the layers apart."""
        return webui_words(self._average_files(path), self.placeholders)

    def verify(self, path: Path) -> str:
        """Count the vectors."""
        verify_embeddings(self.files(path))
        (average, *_), (full, *_) = self._average_files(path), self._full_files(path)
        return (
            f"{full.name} holds {self.only_tokens.num_variants} layers; WebUIs cannot use them "
            f"apart: {average.name} is their average, less faithful to the concept"
        )

    def _average_files(self, path: Path) -> list[Path]:
        return embedding_files(path, self.placeholders)

    def _full_files(self, path: Path) -> list[Path]:
        return [all_layers_file(average) for average in self._average_files(path)]


def _warn_of_average(file: Path) -> None:
    """Name the file of all layers where only their average is given to go on with."""
    full = all_layers_file(file)
    if full.is_file() and read_vectors(file).ndim == 2:
        logger.warning(
            "weights: %s is the average, with which all layers start; %s holds each layer's own",
            file,
            full,
        )
