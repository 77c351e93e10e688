"""What is judged: a base model with the files of a training, in a pipeline of diffusers.

Custom Diffusion is loaded by diffusers itself, as a user of these files would. A LoRA is put on by
the trainer's own network, for diffusers passes over alphas that differ between layers. Learned rows
stand beside the token table (``models/token_rows.py``), so that the placeholder may be a word
that the tokenizer knows already, which diffusers refuses. Knows no prompts and no measures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.export.custom_diffusion import read_delta
from mlm_plugin.export.embeddings import read_embedding, read_xti
from mlm_plugin.models.checkpoints import StableDiffusion, load_stable_diffusion
from mlm_plugin.models.cross_attention import layer_codes, per_layer_conditioning
from mlm_plugin.models.networks import create_network, read_weights
from mlm_plugin.models.per_layer_text import encode_per_layer
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_rows import TokenRows
from mlm_plugin.training.samples import create_sampler

__all__ = ["Subject", "load_subject"]

LORA_UP = "lora_up.weight"


@dataclass
class Subject:
    """A model that draws a concept, frozen, in eval mode.

    Attributes:
        pipeline: takes ``prompt_embeds``; its scheduler is the sampler asked for.
        text_encoder: the pipeline's, with everything learned in place.
        base_text_encoder: the base model's, untouched, fp32.
        encode: prompts to what the U-Net reads, ``(B, L, D)``.
    """

    pipeline: StableDiffusionPipeline
    text_encoder: TextEncoder
    base_text_encoder: TextEncoder
    encode: Callable[[Sequence[str]], Tensor]

    def to(self, device: torch.device) -> Subject:
        """Move everything; returns itself."""
        self.pipeline.to(device)
        self.base_text_encoder.model.to(device)
        if self.text_encoder.token_rows is not None:
            self.text_encoder.token_rows.to(device)
        return self


@torch.no_grad()
def load_subject(
    base: str,
    *,
    placeholder_token: str,
    checkpoint: str | None = None,
    lora: str | None = None,
    lora_weight: float = 1.0,
    embedding: str | None = None,
    delta: str | None = None,
    xti: str | None = None,
    clip_skip: int | None = None,
    sampler: str = "ddim",
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """Load a base model and what was learned on it.

    Args:
        base: diffusers folder, hub id or checkpoint file.
        placeholder_token: what the rows of ``embedding`` and ``xti`` stand for.
        checkpoint: a trained model that draws in the base model's place.
        lora: LoRA file in kohya's spelling.
        lora_weight: its strength.
        embedding: Textual Inversion file.
        delta: Custom Diffusion's keys and values.
        xti: file with rows for every layer.
        clip_skip: as in training.
        sampler: kohya's name, see ``SAMPLERS``.
        dtype: of the models that draw.

    Raises:
        UserError: a file is missing, damaged, or made for another model.
    """
    for option, path in (("lora", lora), ("delta", delta), ("embedding", embedding), ("xti", xti)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{option}: there is no file {path}")
    how = {"clip_skip": clip_skip, "dtype": dtype, "vae_dtype": dtype}
    models = load_stable_diffusion(base, **how)
    if models.is_sdxl:
        raise UserError(f"{base} is SDXL; what was learned is judged on Stable Diffusion 1 and 2")
    base_text_encoder = _copy(models.text_encoders[0])
    if checkpoint is not None:
        shapes = base if Path(base).is_dir() else None
        models = load_stable_diffusion(checkpoint, architecture=shapes, **how)
    pipeline = _pipeline(models, sampler)
    if lora is not None:
        _load_lora(models, lora, lora_weight)
    if delta is not None:
        _load_delta(pipeline, delta)
    text_encoder = models.text_encoders[0]
    if xti is not None:
        encode = _load_xti(pipeline, text_encoder, xti, placeholder_token)
    else:
        if embedding is not None:
            _add_rows(text_encoder, read_embedding(embedding)[None], placeholder_token, embedding)
        encode = text_encoder.encode_captions
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    return Subject(pipeline, text_encoder, base_text_encoder, encode)


def _copy(text_encoder: TextEncoder) -> TextEncoder:
    model = copy.deepcopy(text_encoder.model).float()
    return TextEncoder(text_encoder.tokenizer, model, clip_skip=text_encoder.clip_skip)


def _pipeline(models: StableDiffusion, sampler: str) -> StableDiffusionPipeline:
    scheduler = create_sampler(
        sampler, models.noise_scheduler, prediction_type=models.prediction_type
    )
    pipeline = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=models.text_encoders[0].model,
        tokenizer=models.text_encoders[0].tokenizer,
        unet=models.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_lora(models: StableDiffusion, path: str, weight: float) -> None:
    state = read_weights(path)
    if not any(key.endswith(LORA_UP) for key in state):
        raise UserError(f"--lora {path}: holds no {LORA_UP}; give a LoRA in kohya's spelling")
    network = create_network(
        "networks.lora", models=models, weights=path, dim_from_weights=True, **_parts_of(state)
    )
    network.load_kohya_state_dict(
        {
            key: tensor * weight if key.endswith(LORA_UP) else tensor
            for key, tensor in network.kohya_state_dict().items()
        }
    )
    network.train(False)


def _parts_of(state: Mapping[str, Tensor]) -> dict[str, bool]:
    """Which of the two models the file adapts."""
    return {
        "train_unet": any(key.startswith("lora_unet") for key in state),
        "train_text_encoder": any(key.startswith("lora_te") for key in state),
    }


def _load_delta(pipeline: StableDiffusionPipeline, path: str) -> None:
    widths = {matrix.shape[1] for matrix in read_delta(path).values()}
    if widths != {pipeline.unet.config.cross_attention_dim}:
        raise UserError(f"--delta {path}: was not made for this base model (width {widths})")
    file = Path(path)
    pipeline.unet.load_attn_procs(str(file.parent), weight_name=file.name, _pipeline=pipeline)


def _load_xti(
    pipeline: StableDiffusionPipeline, text_encoder: TextEncoder, path: str, placeholder_token: str
) -> Callable[[Sequence[str]], Tensor]:
    rows_KND = read_xti(path, codes=layer_codes(pipeline.unet))
    _add_rows(text_encoder, rows_KND, placeholder_token, path)
    per_layer_conditioning(pipeline.unet)
    return lambda prompts: encode_per_layer(text_encoder, prompts)


def _add_rows(
    text_encoder: TextEncoder, rows_KND: Tensor, placeholder_token: str, path: str
) -> None:
    width = text_encoder.token_embedding.embedding_dim
    if rows_KND.shape[-1] != width:
        raise UserError(
            f"{path} is of width {rows_KND.shape[-1]}, the text encoder of width {width}: "
            "use a file trained on this kind of model (768 = SD 1.x, 1024 = SD 2.x)"
        )
    TokenRows(text_encoder, {placeholder_token: rows_KND}).requires_grad_(False)
