"""Pivotal tuning: token embeddings and a LoRA together, each at its own rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import NetworkOptions, OptimizerOptions, TrainConfig
from mlm_plugin.export.lora_files import bundled_embeddings, bundled_word, save_lora, verify_lora
from mlm_plugin.methods.base import (
    Export,
    load_part,
    named_parameters,
    on_cpu,
    parameter_group,
)
from mlm_plugin.methods.facts import Part
from mlm_plugin.methods.learned_tokens import (
    LearnsTokens,
    create_all_tokens,
    embeddings_beside,
    save_embeddings,
    verify_embeddings,
    webui_words,
)
from mlm_plugin.methods.lora import LoRAMethod
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.token_embeddings import LearnedTokens

__all__ = ["Pivotal"]

BUNDLE = "_bundle"


class Pivotal(LearnsTokens, LoRAMethod):
    """The token embeddings learn what the concept is, the LoRA how to draw it.

    ``stop_embedding_training`` and similar options freeze a part after a share of the run. The
    usual recipe is embeddings first, then the LoRA alone.

    Args:
        models: the frozen base.
        options: those of the LoRA.
        learned_tokens: one for each text encoder.
        bundle: whether a second LoRA file contains the embeddings too.

    Source: Roich et al. 2021, arXiv 2106.05744 (the idea); cloneofsimo/lora and diffusers'
    ``train_dreambooth_lora_sdxl_advanced.py`` (with LoRA).
    """

    rate_options = {**LoRAMethod.rate_options, **LearnsTokens.rate_options}
    own_options = (*LoRAMethod.own_options, *LearnsTokens.own_options, "bundle_embedding")
    own_state_options = (*LoRAMethod.own_state_options, *LearnsTokens.own_state_options)

    def __init__(
        self,
        models: StableDiffusion,
        options: NetworkOptions,
        learned_tokens: Sequence[LearnedTokens],
        *,
        bundle: bool = False,
    ):
        super().__init__(models, options)
        self.learned_tokens, self.bundle = list(learned_tokens), bundle

    @classmethod
    def why_text_untrained(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str | None:
        """Either part is enough; see ``MethodFacts.why_text_untrained``."""
        if LearnsTokens.why_text_untrained(config) is None:
            return None
        return LoRAMethod.why_text_untrained(config, num_text_encoders=num_text_encoders)

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> Pivotal:
        """Embeddings and adapters as the options say; see ``Method.prepare``."""
        learned_tokens = create_all_tokens(models, config.embedding, concepts)
        return cls(models, config.network, learned_tokens, bundle=config.embedding.bundle_embedding)

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Adapters and token embeddings."""
        return {**super().parts(), "embedding": self.embedding_parameters()}

    def parameter_groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        """The LoRA's groups, and one of the token embeddings."""
        lr = self.learning_rate_of("embedding", options).value
        embeddings = parameter_group("embedding", self.embedding_parameters(), lr)
        return [*super().parameter_groups(options), *embeddings]

    def state_dict(self) -> dict[str, Tensor]:
        """Adapters in kohya's names, and the token embeddings."""
        return super().state_dict() | on_cpu(self._named_embeddings())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load adapters and token embeddings."""
        super().load_state_dict(load_part(self._named_embeddings(), state))

    def files(self, path: Path) -> list[Path]:
        """The LoRA, one embedding per placeholder, and the bundle where one is asked for."""
        return [path, *self._embeddings(path), *self._bundles(path)]

    def export(self, to: Export) -> None:
        """The LoRA in kohya's format and embeddings beside it; both in one file on request.

        diffusers and InvokeAI refuse a file with bundled embeddings, so the LoRA has none.
        """
        super().export(to)
        embeddings = self.embeddings()
        save_embeddings(to, self._embeddings(to.path), embeddings)
        for path in self._bundles(to.path):
            state = self.network.kohya_state_dict() | bundled_embeddings(embeddings)
            metadata = dict(to.metadata("lora", path))
            if "ss_output_name" in metadata:  # WebUIs' alias, which names one file
                metadata["ss_output_name"] = path.stem
            save_lora(path, state, metadata=metadata, dtype=to.dtype)

    def verify(self, path: Path) -> str:
        """Count modules and vectors."""
        for bundle in self._bundles(path):
            verify_lora(bundle)
        return f"{super().verify(path)}, {verify_embeddings(self._embeddings(path))}"

    def webui_files(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """Embeddings, called by their files' names, and the LoRA that goes with them.

        Embeddings inside the bundle are called by their placeholders.
        """
        embeddings = webui_words(self._embeddings(path), self.placeholders)
        together = {name: word for words in embeddings.values() for name, word in words.items()}
        bundled = {name: bundled_word(name) for name in self.placeholders}
        return {path: together, **embeddings, **dict.fromkeys(self._bundles(path), bundled)}

    def _embeddings(self, path: Path) -> list[Path]:
        return embeddings_beside(path, self.placeholders)

    def _bundles(self, path: Path) -> list[Path]:
        return [path.with_name(f"{path.stem}{BUNDLE}{path.suffix}")] if self.bundle else []

    def _named_embeddings(self) -> dict[str, Tensor]:
        return named_parameters({"embedding": self.embedding_parameters()})
