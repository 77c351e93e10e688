"""Textual Inversion: a few token rows are learned, the model stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import OptimizerOptions, TrainConfig
from mlm_plugin.methods.base import Export, Part, group_of
from mlm_plugin.methods.learned_tokens import (
    LearnsRows,
    create_all_rows,
    embedding_files,
    save_embeddings,
    verify_embeddings,
    words_of,
)
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.token_embeddings import TokenRows

__all__ = ["TextualInversion"]


class TextualInversion(LearnsRows):
    """Only the placeholders' rows are parameters: no optimizer state for the vocabulary.

    Args:
        models: the frozen base.
        rows: on each of its text encoders.

    Source: Gal et al. 2022, arXiv 2208.01618; sd-scripts ``train_textual_inversion.py``.
    """

    def __init__(self, models: StableDiffusion, rows: Sequence[TokenRows]):
        super().__init__(models)
        self.rows = list(rows)

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> TextualInversion:
        """Rows as ``init_word`` or ``weights`` say; see ``Method.prepare``."""
        return cls(models, create_all_rows(models, config.embedding, concepts))

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """The rows."""
        return {"embedding": self.row_parameters()}

    def parameter_groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        """One group with ``embedding_lr``, else ``learning_rate``."""
        rows = self.parts()["embedding"]
        return group_of("embedding", rows, options.embedding_lr, options.learning_rate)

    def files(self, path: Path) -> list[Path]:
        """One embedding per placeholder."""
        return embedding_files(path, self.placeholders)

    def export(self, to: Export) -> None:
        """Embeddings in the format of kohya, A1111, ComfyUI and diffusers."""
        save_embeddings(to, self.files(to.path), self.embeddings())

    def cards(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """Every embedding, called by its file's name."""
        return words_of(self.files(path), self.placeholders)

    def verify(self, path: Path) -> str:
        """Count the vectors."""
        return verify_embeddings(self.files(path))
