"""LoRA: low-rank matrices on U-Net and text encoder; the model itself stays frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import NetworkOptions, OptimizerOptions, TrainConfig
from mlm_plugin.export.lora_files import save_lora, verify_lora
from mlm_plugin.methods.base import Export, Method
from mlm_plugin.methods.facts import TEXT_ENCODERS, Part
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.networks.create import create_network
from mlm_plugin.networks.kohya_names import TEXT_ENCODER_PARTS

__all__ = ["LoRAMethod"]


class LoRAMethod(Method):
    """Adapters through a network module, ``networks.lora`` or ``lycoris.kohya``.

    Args:
        models: the frozen base; adapters are put into it in place.
        options: rank, alpha, module, which parts are trained.
    """

    rate_options = {"unet": ("unet_lr",), **dict.fromkeys(TEXT_ENCODERS, ("text_encoder_lr",))}
    own_options = tuple(option.name for option in fields(NetworkOptions))
    own_state_options = (
        "network_module",
        "network_dim",
        "network_alpha",
        "network_args",
        "network_train_unet_only",
        "network_train_text_encoder_only",
    )
    trains_network = True

    def __init__(self, models: StableDiffusion, options: NetworkOptions):
        super().__init__(models)
        self.max_norm = options.scale_weight_norms
        self.network = create_network(models, options)

    @classmethod
    def why_text_untrained(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str | None:
        """No modules or no rate for the text encoder; see ``MethodFacts.why_text_untrained``."""
        network = config.network
        if network.network_train_unet_only:
            return "network_train_unet_only trains no text encoder"
        if reason := super().why_text_untrained(config, num_text_encoders=num_text_encoders):
            return reason
        if network.network_module.startswith("lycoris"):
            for argument in network.network_args:
                if argument.startswith("preset=unet-"):
                    return f"network_args {argument} trains no text encoder"
        return None

    @classmethod
    def why_unet_untrained(cls, config: TrainConfig) -> str | None:
        """No modules or no rate for the U-Net; see ``MethodFacts.why_unet_untrained``."""
        if config.network.network_train_text_encoder_only:
            return "network_train_text_encoder_only trains no U-Net"
        return super().why_unet_untrained(config)

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> LoRAMethod:
        """Adapters as the network options say; see ``Method.prepare``."""
        return cls(models, config.network)

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Adapter weights of text encoder and U-Net."""
        return self.network.parts()

    def parameter_groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        """Groups by part; ``unet_lr`` and ``text_encoder_lr`` fall back to ``learning_rate``."""
        text_parts = TEXT_ENCODER_PARTS[len(self.models.text_encoders)]
        return self.network.parameter_groups(
            unet_lr=self.learning_rate_of("unet", options).value,
            text_encoder_lrs=[self.learning_rate_of(part, options).value for part in text_parts],
        )

    def untrained(self) -> AbstractContextManager:
        """The models without adapters; they may start from a file."""
        return self.network.disabled()

    def train(self, mode: bool = True) -> None:
        """Put U-Net, text encoder and adapters into training mode or out of it."""
        super().train(mode)
        self.network.train(mode)

    def after_step(self) -> dict[str, Tensor | float]:
        """Max-norm regularisation where ``scale_weight_norms`` is set."""
        if self.max_norm is None:
            return {}
        result = self.network.apply_max_norm(self.max_norm)
        return {
            "max_norm/keys_scaled": result.keys_scaled,
            "max_norm/avg_key_norm": result.mean_norm,
            "max_norm/max_key_norm": result.max_norm,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Adapter weights in kohya's names and shapes."""
        return self.network.kohya_state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load adapter weights in kohya's names."""
        self.network.load_kohya_state_dict(state)

    def files(self, path: Path) -> list[Path]:
        """The LoRA."""
        return [path]

    def export(self, to: Export) -> None:
        """The LoRA in kohya's format."""
        state = self.network.kohya_state_dict()
        save_lora(to.path, state, metadata=to.metadata("lora", to.path), dtype=to.dtype)

    def verify(self, path: Path) -> str:
        """Count the adapted modules."""
        counts = verify_lora(path)
        return f"{counts.text_encoder} text encoder + {counts.unet} U-Net modules"
