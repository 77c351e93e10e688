"""LoRA: low-rank matrices on U-Net and text encoder; the model itself stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from mlm_plugin.config.options import NetworkOptions, OptimizerOptions
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.networks import create_network

__all__ = ["LoRAMethod"]


class LoRAMethod:
    """Adapters through a network module, ``networks.lora`` or ``lycoris.kohya``.

    Args:
        models: the frozen base; adapters are put into it in place.
        options: rank, alpha, module, which parts are trained.
    """

    def __init__(self, models: StableDiffusion, options: NetworkOptions):
        self.models = models
        self.max_norm = options.scale_weight_norms
        self.network = create_network(
            options.network_module,
            models=models,
            dim=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            network_args=options.network_args,
            train_unet=not options.network_train_text_encoder_only,
            train_text_encoder=not options.network_train_unet_only,
            weights=options.network_weights,
            dim_from_weights=options.dim_from_weights,
        )

    @property
    def trains_text_encoder(self) -> bool:
        """Whether any adapter lies before the text encoder's output."""
        return self.network.num_text_encoder_modules > 0

    def parameter_groups(self, options: OptimizerOptions) -> list[dict]:
        """Groups by part; ``unet_lr`` and ``text_encoder_lr`` fall back to ``learning_rate``."""
        unet_lr = options.learning_rate if options.unet_lr is None else options.unet_lr
        text_encoder_lrs = options.text_encoder_lr or (options.learning_rate,)
        return self.network.parameter_groups(unet_lr=unet_lr, text_encoder_lrs=text_encoder_lrs)

    def parameters(self) -> list[nn.Parameter]:
        """Adapter weights that are trained."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Conditioning of the U-Net, ``(B, L, D)``."""
        (text_encoder,) = self.models.text_encoders
        return text_encoder.encode_captions(captions)

    def train(self, mode: bool = True) -> None:
        """Put U-Net, text encoder and adapters into training mode or out of it."""
        self.models.unet.train(mode)
        for text_encoder in self.models.text_encoders:
            text_encoder.model.train(mode)
        self.network.train(mode)

    def after_step(self) -> dict[str, float]:
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

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over adapter weights in kohya's names."""
        self.network.load_kohya_state_dict(state)

    def base_model(self) -> AbstractContextManager:
        """Switch the adapters off while the block runs."""
        return self.network.disabled()
