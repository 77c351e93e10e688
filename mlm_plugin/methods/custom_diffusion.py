"""Custom Diffusion: keys and values of the cross-attention, and token embeddings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.export.custom_diffusion_files import delta_to_lora, save_delta, verify_delta
from mlm_plugin.export.lora_files import save_lora
from mlm_plugin.methods.base import WEIGHT_DTYPES, Export
from mlm_plugin.methods.facts import Part
from mlm_plugin.methods.learned_tokens import (
    LearnsTokens,
    create_tokens,
    embeddings_beside,
    save_embeddings,
    verify_embeddings,
    webui_words,
)
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.cross_attention import cross_attention_names
from mlm_plugin.models.key_values import MATRICES
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens

__all__ = ["CustomDiffusion"]

logger = logging.getLogger(__name__)

RARE_TOKENS = (42170, 47629, 43514)
"""Initial embeddings of the first concepts: tokens that hardly ever occur in captions.

Source: adobe-research/custom-diffusion; two of them are word pieces that no text produces.
"""

LORA = "_lora"


class CustomDiffusion(LearnsTokens):
    """Trains ``to_k`` and ``to_v`` of every cross-attention layer, and token embeddings.

    Keys and values at the first token (BOS) get no gradient: they are the same for every prompt and
    would absorb whatever all pictures share.

    Args:
        models: the base, in fp32.
        learned_tokens: tokens of the text encoder.
        dtype: precision of the frozen parts.
        lora_rank: also export the change as a LoRA of this rank.

    Source: Kumari et al. 2022, arXiv 2212.04488, section 3.2; diffusers
    ``examples/custom_diffusion``.
    """

    rate_options = {"unet": (), **LearnsTokens.rate_options}
    own_options = (*LearnsTokens.own_options, "delta_lora_rank")
    trains_base_weights = True
    supports_sdxl = False

    def __init__(
        self,
        models: StableDiffusion,
        learned_tokens: LearnedTokens,
        *,
        dtype: torch.dtype = torch.float32,
        lora_rank: int | None = None,
    ):
        super().__init__(models)
        self.learned_tokens, self.lora_rank = [learned_tokens], lora_rank
        names = cross_attention_names(models.unet)
        layers = {
            f"{name}.{matrix}": models.unet.get_submodule(f"{name}.{matrix}")
            for name in names
            for matrix in MATRICES
        }
        self.base = {f"{k}.weight": v.weight.detach().cpu().clone() for k, v in layers.items()}
        for module in (models.unet, *(te.model for te in models.text_encoders)):
            nn.Module.to(module, dtype)  # diffusers' own warns about any cast
        self.matrices: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            master = self.base[f"{name}.weight"].to(layer.weight.device, copy=True)
            layer.weight = nn.Parameter(master)
            layer.register_forward_hook(_detach_first_token)
            self.matrices[f"{name}.weight"] = layer.weight

    @classmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> CustomDiffusion:
        """Unchanged keys and values, embeddings at rare tokens; see ``Method.prepare``."""
        (text_encoder,) = models.text_encoders
        learned_tokens = create_tokens(
            text_encoder,
            config.embedding,
            concepts,
            init_words=_rare_words(text_encoder, len(concepts)),
        )
        return cls(
            models,
            learned_tokens,
            dtype=WEIGHT_DTYPES[config.schedule.mixed_precision],
            lora_rank=config.finetune.delta_lora_rank,
        )

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Keys and values, and the token embeddings."""
        return {"unet": list(self.matrices.values()), "embedding": self.embedding_parameters()}

    def files(self, path: Path) -> list[Path]:
        """Keys and values, embeddings, and the LoRA where one is asked for."""
        return [path, *self._embeddings(path), *self._loras(path)]

    def export(self, to: Export) -> None:
        """The delta that diffusers loads: keys and values, embeddings, and a LoRA of the change."""
        save_delta(
            to.path,
            self.matrices,
            unet=self.models.unet,
            metadata=to.metadata("custom-diffusion", to.path),
            dtype=to.dtype,
        )
        save_embeddings(to, self._embeddings(to.path), self.embeddings())
        for path in self._loras(to.path):
            trained = {k: v.detach().cpu() for k, v in self.matrices.items()}
            lora = delta_to_lora(self.base, trained, rank=self.lora_rank)
            logger.info(
                "%s: rank %d keeps %.1f %% of the change", path, lora.rank, 100 * lora.energy
            )
            own = {
                "ss_network_dim": str(lora.rank),
                "ss_network_alpha": str(lora.rank),
                "ss_mlm_energy_kept": f"{lora.energy:.4f}",
            }
            metadata = {**to.metadata("lora", path), **own}
            save_lora(path, lora.state, metadata=metadata, dtype=to.dtype)

    def verify(self, path: Path) -> str:
        """Count layers and vectors."""
        found = f"keys and values of {verify_delta(path)} layers"
        return f"{found}, {verify_embeddings(self._embeddings(path))}"

    def webui_files(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """Embeddings, called by their files' names, and the LoRA that goes with them."""
        embeddings = webui_words(self._embeddings(path), self.placeholders)
        together = {name: word for words in embeddings.values() for name, word in words.items()}
        return {**embeddings, **dict.fromkeys(self._loras(path), together)}

    def _embeddings(self, path: Path) -> list[Path]:
        return embeddings_beside(path, self.placeholders)

    def _loras(self, path: Path) -> list[Path]:
        return [path.with_name(f"{path.stem}{LORA}{path.suffix}")] if self.lora_rank else []


def _detach_first_token(_layer: nn.Module, _args: tuple, output_BLD: Tensor) -> Tensor:
    """The same values, without gradient at BOS; tokens ``(N, D)`` outside a prompt have none."""
    if output_BLD.ndim < 3:
        return output_BLD
    return torch.cat([output_BLD[:, :1].detach(), output_BLD[:, 1:]], dim=1)


def _rare_words(text_encoder: TextEncoder, num_concepts: int) -> list[str]:
    """Rare tokens of CLIP's vocabulary for the first concepts; none in a smaller vocabulary."""
    if text_encoder.model.config.vocab_size <= max(RARE_TOKENS):
        return []
    return [f"id:{token}" for token in RARE_TOKENS[:num_concepts]]
