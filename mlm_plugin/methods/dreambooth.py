"""DreamBooth: the whole U-Net is trained, and the text encoder (SDXL: both) with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mlm_plugin.config.checks import Rule
from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.export.checkpoint import (
    require_replaceable,
    save_checkpoint,
    save_diffusers_folder,
    verify_checkpoint,
)
from mlm_plugin.methods.base import WEIGHT_DTYPES, Export, Method
from mlm_plugin.methods.facts import LearningRate, Part
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.networks.kohya_names import TEXT_ENCODER_PARTS

__all__ = ["DreamBooth"]


class DreamBooth(Method):
    """Trains all weights of U-Net and text encoder; the VAE is frozen.

    Args:
        models: the base, in fp32.
        train_text_encoders: for each, whether it is trained; default all. Where none is, the MLM
            term reaches the keys and values of the U-Net alone.
        frozen_dtype: precision of a frozen text encoder.
        diffusers_folder: also export a diffusers folder.
        zero_terminal_snr: whether the betas were rescaled, which such a folder must record.

    Source: Ruiz et al. 2022, arXiv 2208.12242; sd-scripts ``train_db.py`` and ``sdxl_train.py``.
    """

    rate_options = {
        "unet": (),
        "textencoder": ("learning_rate_te",),
        "textencoder1": ("learning_rate_te1", "learning_rate_te"),
        "textencoder2": ("learning_rate_te2", "learning_rate_te"),
    }
    own_options = ("no_train_text_encoder", "save_diffusers_folder")
    own_state_options = ("no_train_text_encoder",)
    rules = (
        Rule(
            (
                "learning_rate_te",
                "learning_rate_te1",
                "learning_rate_te2",
                "stop_text_encoder_training",
                "stop_text_encoder1_training",
                "stop_text_encoder2_training",
            ),
            "with no_train_text_encoder",
            lambda flat: not flat["no_train_text_encoder"],
        ),
    )
    trains_base_weights = True
    supports_fused_backward = True

    def __init__(
        self,
        models: StableDiffusion,
        *,
        train_text_encoders: Sequence[bool] | None = None,
        frozen_dtype: torch.dtype = torch.float32,
        diffusers_folder: bool = False,
        zero_terminal_snr: bool = False,
    ):
        super().__init__(models)
        self.diffusers_folder = diffusers_folder
        self.zero_terminal_snr = zero_terminal_snr
        self.trained: dict[Part, nn.Module] = {"unet": models.unet}
        parts = TEXT_ENCODER_PARTS[len(models.text_encoders)]
        trained = train_text_encoders or [True] * len(parts)
        for part, text_encoder, is_trained in zip(
            parts, models.text_encoders, trained, strict=True
        ):
            if is_trained:
                self.trained[part] = text_encoder.model
            else:
                text_encoder.model.to(frozen_dtype)
        for module in self.trained.values():
            module.requires_grad_(True)

    @classmethod
    def learning_rates(
        cls, config: TrainConfig, *, num_text_encoders: int = 2
    ) -> dict[Part, LearningRate]:
        """Only that of the U-Net with ``no_train_text_encoder``."""
        rates = super().learning_rates(config, num_text_encoders=num_text_encoders)
        return {"unet": rates["unet"]} if config.finetune.no_train_text_encoder else rates

    @classmethod
    def why_text_untrained(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str | None:
        """A frozen text encoder; see ``MethodFacts.why_text_untrained``."""
        if config.finetune.no_train_text_encoder:
            return "no_train_text_encoder leaves the text encoder untrained"
        return super().why_text_untrained(config, num_text_encoders=num_text_encoders)

    @classmethod
    def check(cls, config: TrainConfig, concepts: Sequence[Concept]) -> None:
        """Check the path of the diffusers folder; see ``Method.check``."""
        output = config.output
        if output.save_diffusers_folder and output.output_dir:
            require_replaceable(Path(output.output_dir) / (output.output_name or "last"))

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> DreamBooth:
        """All weights, or those with a learning rate; see ``Method.prepare``."""
        return cls(
            models,
            train_text_encoders=cls.trained_text_encoders(
                config, num_text_encoders=len(models.text_encoders)
            ),
            frozen_dtype=WEIGHT_DTYPES[config.schedule.mixed_precision],
            diffusers_folder=config.output.save_diffusers_folder,
            zero_terminal_snr=config.loss.zero_terminal_snr,
        )

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Weights of the U-Net and of the text encoders that are trained."""
        return {part: list(module.parameters()) for part, module in self.trained.items()}

    def files(self, path: Path) -> list[Path]:
        """The checkpoint, and the folder where one is asked for."""
        return [path, *([path.with_suffix("")] if self.diffusers_folder else [])]

    def export(self, to: Export) -> None:
        """One file in the original Stable Diffusion layout; a diffusers folder beside it."""
        models = self.models
        save_checkpoint(
            to.path,
            models.components,
            family=models.family,
            metadata=to.metadata("checkpoint", to.path),
            dtype=to.dtype,
            marks=self._marks(),
        )
        scheduler = type(models.noise_scheduler).from_config(
            models.noise_scheduler.config, rescale_betas_zero_snr=self.zero_terminal_snr
        )
        for folder in self.files(to.path)[1:]:
            save_diffusers_folder(
                folder,
                models.components,
                tokenizers=[encoder.tokenizer for encoder in models.text_encoders],
                noise_scheduler=scheduler,
                prediction_type=models.prediction_type,
                dtype=to.dtype,
            )

    def _marks(self) -> list[str]:
        """How readers tell what an SDXL model predicts; other families have no such marks."""
        if not self.models.is_sdxl or self.models.prediction_type != "v_prediction":
            return []
        return ["v_pred", *(["ztsnr"] if self.zero_terminal_snr else [])]

    def verify(self, path: Path) -> str:
        """Count the tensors."""
        counts = verify_checkpoint(path)
        return (
            f"{counts.unet} U-Net + {counts.text_encoder} text encoder + {counts.vae} VAE tensors"
        )
