"""Pivotal tuning: token rows and a LoRA together, each at its own rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import NetworkOptions, OptimizerOptions, TrainConfig
from mlm_plugin.export.lora_files import bundled_embeddings, save_lora
from mlm_plugin.methods.base import Export, Part, group_of, numbered, stored, take_over
from mlm_plugin.methods.learned_tokens import (
    LearnsRows,
    create_all_rows,
    embeddings_beside,
    save_embeddings,
    verify_embeddings,
    words_of,
)
from mlm_plugin.methods.lora import LoRAMethod
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.token_embeddings import TokenRows

__all__ = ["Pivotal"]


class Pivotal(LearnsRows, LoRAMethod):
    """The rows learn what the thing is, the LoRA how to draw it.

    ``stop_embedding_training`` and its sisters freeze a part after a share of the run: rows first
    and then the LoRA alone is the classical recipe.

    Args:
        models: the frozen base.
        options: of the LoRA.
        rows: on each text encoder.
        bundle: whether the LoRA file holds the rows too.

    Source: Roich et al. 2021, arXiv 2106.05744 (the idea); cloneofsimo/lora and diffusers'
    ``train_dreambooth_lora_sdxl_advanced.py`` (with LoRA).
    """

    def __init__(
        self,
        models: StableDiffusion,
        options: NetworkOptions,
        rows: Sequence[TokenRows],
        *,
        bundle: bool = False,
    ):
        super().__init__(models, options)
        self.rows, self.bundle = list(rows), bundle

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> Pivotal:
        """Rows and adapters as the options say; see ``Method.prepare``."""
        rows = create_all_rows(models, config.embedding, concepts)
        return cls(models, config.network, rows, bundle=config.embedding.bundle_embedding)

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Adapters and rows."""
        return {**super().parts(), "embedding": self.row_parameters()}

    def parameter_groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        """The LoRA's groups, and the rows with ``embedding_lr``, else ``learning_rate``."""
        rows = self.parts()["embedding"]
        return [
            *super().parameter_groups(options),
            *group_of("embedding", rows, options.embedding_lr, options.learning_rate),
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Adapters in kohya's names, and the rows."""
        return super().state_dict() | stored(self._rows())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over adapters and rows."""
        rows = self._rows()
        take_over(rows, {name: state[name] for name in rows if name in state})
        super().load_state_dict({name: state[name] for name in state if name not in rows})

    def files(self, path: Path) -> list[Path]:
        """The LoRA, then one embedding per placeholder."""
        return [path, *self._embeddings(path)]

    def export(self, to: Export) -> None:
        """The LoRA in kohya's format and embeddings beside it."""
        rows = self.embeddings()
        state = self.network.kohya_state_dict()
        if self.bundle:
            state |= bundled_embeddings(rows)
        save_lora(to.path, state, metadata=to.metadata("lora"), dtype=to.dtype)
        save_embeddings(to, self._embeddings(to.path), rows)

    def verify(self, path: Path) -> str:
        """Count modules and vectors."""
        return f"{super().verify(path)}, {verify_embeddings(self._embeddings(path))}"

    def cards(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """Embeddings, called by their files' names, and the LoRA that goes with them.

        A1111 calls rows inside the LoRA file by their placeholders.
        """
        embeddings = words_of(self._embeddings(path), self.placeholders)
        together = {name: word for words in embeddings.values() for name, word in words.items()}
        return {path: {} if self.bundle else together, **embeddings}

    def _embeddings(self, path: Path) -> list[Path]:
        return embeddings_beside(path, self.placeholders)

    def _rows(self) -> dict[str, Tensor]:
        return numbered({"embedding": self.row_parameters()})
