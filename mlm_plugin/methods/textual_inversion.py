"""Textual Inversion: a few token embeddings are learned, the model is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.methods.base import Export
from mlm_plugin.methods.facts import Part
from mlm_plugin.methods.learned_tokens import (
    LearnsTokens,
    create_all_tokens,
    embedding_files,
    save_embeddings,
    verify_embeddings,
    webui_words,
)
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.token_embeddings import LearnedTokens

__all__ = ["TextualInversion"]


class TextualInversion(LearnsTokens):
    """Only the placeholders' embeddings are parameters: no optimizer state for the vocabulary.

    Args:
        models: the frozen base.
        learned_tokens: one for each of its text encoders.

    Source: Gal et al. 2022, arXiv 2208.01618; sd-scripts ``train_textual_inversion.py``.
    """

    def __init__(self, models: StableDiffusion, learned_tokens: Sequence[LearnedTokens]):
        super().__init__(models)
        self.learned_tokens = list(learned_tokens)

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> TextualInversion:
        """Embeddings that start as ``init_word`` or ``weights`` say; see ``Method.prepare``."""
        return cls(models, create_all_tokens(models, config.embedding, concepts))

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """The token embeddings."""
        return {"embedding": self.embedding_parameters()}

    def files(self, path: Path) -> list[Path]:
        """One embedding per placeholder."""
        return embedding_files(path, self.placeholders)

    def export(self, to: Export) -> None:
        """Embeddings in the format of kohya, A1111, ComfyUI and diffusers."""
        save_embeddings(to, self.files(to.path), self.embeddings())

    def webui_files(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """Every embedding, called by its file's name."""
        return webui_words(self.files(path), self.placeholders)

    def verify(self, path: Path) -> str:
        """Count the vectors."""
        return verify_embeddings(self.files(path))
