"""The evaluated model: a base model with the files of a training, in a diffusers pipeline.

Custom Diffusion is loaded by diffusers itself, as users of these files would. A LoRA is applied by
the trainer's own network, because diffusers ignores alphas that differ between layers. Learned
token embeddings are kept beside the token table (``models/token_embeddings.py``), so that the
placeholder may be a word in the vocabulary, which diffusers refuses. Knows no prompts and no
measures.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.lora_file import load_lora
from mlm_plugin.export.custom_diffusion_files import read_delta
from mlm_plugin.export.embedding_files import EMBEDDING_KEYS, read_embeddings, read_xti
from mlm_plugin.models.checkpoints import ModelSettings, StableDiffusion, load_stable_diffusion
from mlm_plugin.models.components import TITLES
from mlm_plugin.models.conditioning import Conditioning, encode_captions
from mlm_plugin.models.cross_attention import layer_codes, per_layer_conditioning
from mlm_plugin.models.diffusers_folder import find_local_folder
from mlm_plugin.models.per_layer_text import encode_per_layer
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens
from mlm_plugin.networks.base import Network
from mlm_plugin.networks.lycoris_network import LycorisNetwork
from mlm_plugin.training.samples import create_sampler

__all__ = [
    "EvaluatedModel",
    "LearnedFiles",
    "LoadSettings",
    "Pipeline",
    "create_pipeline",
    "drawing_dtype",
    "load_evaluated_model",
]

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
Encode = Callable[[Sequence[str]], Conditioning]
"""Encodes prompts into the conditioning of the U-Net."""


@dataclass
class EvaluatedModel:
    """A model that draws a concept, frozen, in eval mode.

    Attributes:
        pipeline: takes ``prompt_embeds``; its scheduler is the chosen sampler, its VAE is fp32.
        text_encoders: the pipeline's, one or SDXL's two, with everything learned in place.
        base_text_encoders: the untrained ones of the base model, fp32; they stay on the CPU.
        encode: encodes prompts into the conditioning of the U-Net.
        family: ``sd_v1``, ``sd_v2`` or ``sdxl``.
        autocast: entered for the text encoders and the U-Net, where parts differ in precision.
        network: the LoRA or LyCORIS on them, whose strength can be changed.
    """

    pipeline: Pipeline
    text_encoders: list[TextEncoder]
    base_text_encoders: list[TextEncoder]
    encode: Encode
    family: str
    autocast: Callable[[], AbstractContextManager] = nullcontext
    network: Network | None = None

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the model was trained for."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device) -> EvaluatedModel:
        """Move everything that draws; returns itself."""
        self.pipeline.to(device)
        if self.network is not None:
            self.network.to(device)  # the models do not hold the adapters of LyCORIS
        for text_encoder in self.text_encoders:
            if text_encoder.learned_tokens is not None:
                text_encoder.learned_tokens.to(device)
        return self

    def release_drawing(self) -> None:
        """Move U-Net and VAE off the device, once all pictures are drawn."""
        for module in (self.pipeline.unet, self.pipeline.vae):
            torch.nn.Module.to(module, "cpu")  # diffusers' own warns about half weights on a CPU
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class LearnedFiles:
    """The files of a training; with none of them the base model itself is evaluated.

    Attributes:
        checkpoint: a trained model that replaces the base model for drawing.
        lora: LoRA or LyCORIS file with kohya's key names.
        lora_weight: its strength.
        embedding: Textual Inversion file.
        delta: keys and values of Custom Diffusion; not for SDXL.
        xti: file with token embeddings for every layer; not for SDXL.
    """

    checkpoint: str | None = None
    lora: str | None = None
    lora_weight: float = 1.0
    embedding: str | None = None
    delta: str | None = None
    xti: str | None = None


@dataclass(frozen=True)
class LoadSettings:
    """How a model is loaded.

    Attributes:
        clip_skip: as in training.
        sampler: kohya's name, see ``SAMPLERS``.
        dtype: precision of U-Net and text encoders. The VAE is fp32: SDXL's overflows in fp16.
        tokenizer_cache_dir: where to look for a checkpoint file's tokenizer; else the tokenizer of
            the base model is used.
        v_parameterization: as in training.
        zero_terminal_snr: as in training; a model that says so needs no setting.
        max_token_length: as in training; longer prompts are cut.
    """

    clip_skip: int | None = None
    sampler: str = "ddim"
    dtype: torch.dtype = torch.float32
    tokenizer_cache_dir: str | None = None
    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    max_token_length: int | None = None


def drawing_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of ``--precision``; ``auto`` is fp16 on a GPU, else fp32."""
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


@torch.no_grad()
def load_evaluated_model(
    base: str,
    files: LearnedFiles = LearnedFiles(),
    *,
    placeholder_token: str,
    settings: LoadSettings = LoadSettings(),
) -> EvaluatedModel:
    """Load a base model and what was learned on it.

    Args:
        base: diffusers folder, hub id or checkpoint file.
        files: the trained files.
        placeholder_token: the word that ``files.embedding`` and ``files.xti`` were learned for.
        settings: how to load them.

    Raises:
        UserError: a file is missing, damaged, or made for another model.
    """
    _require_files(lora=files.lora, delta=files.delta, embedding=files.embedding, xti=files.xti)
    models = load_stable_diffusion(base, _model_settings(settings))
    if models.is_sdxl:
        _refuse_on_sdxl(base, delta=files.delta, xti=files.xti)
    base_text_encoders = [_copy(text_encoder) for text_encoder in models.text_encoders]
    if files.checkpoint is not None:
        family, predicts_v = models.family, models.prediction_type == "v_prediction"
        zero_terminal_snr = models.zero_terminal_snr
        del models  # free the memory of a whole model before the next one is loaded
        settings = replace(settings, v_parameterization=predicts_v)  # as what it was trained from
        models = _load_checkpoint(files.checkpoint, settings, base=base, family=family)
        models.zero_terminal_snr |= zero_terminal_snr
    models.zero_terminal_snr |= settings.zero_terminal_snr
    pipeline = create_pipeline(models, settings.sampler)
    network = None if files.lora is None else load_lora(models, files.lora)
    if network is not None:
        network.set_strength(text_encoder=files.lora_weight, unet=files.lora_weight)
    encode = _load_files(models, pipeline, files, placeholder_token)
    for module in (models.unet, models.vae, *(encoder.model for encoder in models.text_encoders)):
        module.eval().requires_grad_(False)
    model = EvaluatedModel(
        pipeline,
        models.text_encoders,
        base_text_encoders,
        encode,
        models.family,
        network=network,
    )
    if isinstance(network, LycorisNetwork) and settings.dtype != torch.float32:
        model.autocast = lambda: torch.autocast(models.unet.device.type, settings.dtype)
    return model


def _model_settings(settings: LoadSettings) -> ModelSettings:
    return ModelSettings(
        clip_skip=settings.clip_skip,
        dtype=settings.dtype,
        tokenizer_cache_dir=settings.tokenizer_cache_dir,
        v_parameterization=settings.v_parameterization,
        max_token_length=settings.max_token_length,
    )


def _load_files(
    models: StableDiffusion, pipeline: Pipeline, files: LearnedFiles, placeholder_token: str
) -> Encode:
    """Load what was learned into the models; returns the function that encodes prompts."""
    if files.delta is not None:
        _load_delta(pipeline, files.delta)
    if files.xti is not None:
        return _load_xti(pipeline, models.text_encoders[0], files.xti, placeholder_token)
    if files.embedding is not None:
        _load_embedding(models, files.embedding, placeholder_token)
    return functools.partial(encode_captions, models.text_encoders)


def _require_files(**paths: str | None) -> None:
    for option, path in paths.items():
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{option}: there is no file {path}")


def _refuse_on_sdxl(base: str, **paths: str | None) -> None:
    for option, path in paths.items():
        if path is not None:
            raise UserError(
                f"--{option}: {base} is {TITLES['sdxl']}, files of this method are for Stable "
                "Diffusion 1 and 2: give the model the file was trained on"
            )


def _copy(text_encoder: TextEncoder) -> TextEncoder:
    return TextEncoder(
        text_encoder.tokenizer,
        copy.deepcopy(text_encoder.model).float(),
        clip_skip=text_encoder.clip_skip,
        final_norm=text_encoder.final_norm,
    )


def _tokenizer_of(base: str) -> Path:
    """Folder of the tokenizer for a checkpoint file that was trained from this model."""
    path = Path(base)
    if path.is_file():
        return path.parent / "tokenizer"
    return find_local_folder(base, option="--pretrained_model_name_or_path") / "tokenizer"


def _load_checkpoint(
    checkpoint: str, settings: LoadSettings, *, base: str, family: str
) -> StableDiffusion:
    try:
        own = _model_settings(settings)
        if not own.tokenizer_cache_dir:
            own = replace(own, tokenizer_cache_dir=_tokenizer_of(base))
        architecture = base if Path(base).is_dir() else None
        models = load_stable_diffusion(checkpoint, own, architecture=architecture)
    except UserError as error:
        reason = str(error).removeprefix("--pretrained_model_name_or_path: ")
        reason = reason.replace("--network_weights", "--lora")
        raise UserError(f"--checkpoint (the base model is {TITLES[family]}): {reason}") from error
    if models.family != family:
        raise UserError(
            f"--checkpoint {checkpoint}: is {TITLES[models.family]}, the base model {base} is "
            f"{TITLES[family]}: give the model it was trained from"
        )
    return models


def create_pipeline(models: StableDiffusion, sampler: str) -> Pipeline:
    """The models in a pipeline of diffusers, with a sampler by kohya's name."""
    scheduler = create_sampler(
        sampler,
        models.noise_scheduler,
        prediction_type=models.prediction_type,
        zero_terminal_snr=models.zero_terminal_snr,
    )
    first = models.text_encoders[0]
    parts: dict[str, Any] = {
        "vae": models.vae,
        "text_encoder": first.model,
        "tokenizer": first.tokenizer,
        "unet": models.unet,
        "scheduler": scheduler,
    }
    if models.is_sdxl:
        second = models.text_encoders[1]
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=second.model,
            tokenizer_2=second.tokenizer,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_delta(pipeline: Pipeline, path: str) -> None:
    widths = {matrix.shape[1] for matrix in read_delta(path).values()}
    if widths != {pipeline.unet.config.cross_attention_dim}:
        raise UserError(f"--delta {path}: was not made for this base model (width {widths})")
    file = Path(path)
    pipeline.unet.load_attn_procs(str(file.parent), weight_name=file.name, _pipeline=pipeline)


def _load_xti(
    pipeline: Pipeline, text_encoder: TextEncoder, path: str, placeholder_token: str
) -> Encode:
    tokens_KND = read_xti(path, codes=layer_codes(pipeline.unet))
    _add_embeddings(text_encoder, tokens_KND, placeholder_token, path)
    per_layer_conditioning(pipeline.unet)
    return lambda prompts: Conditioning(encode_per_layer(text_encoder, prompts))


def _load_embedding(models: StableDiffusion, path: str, placeholder_token: str) -> None:
    embeddings, count = read_embeddings(path), len(models.text_encoders)
    if len(embeddings) != count:
        keys = ", ".join(EMBEDDING_KEYS[count])
        raise UserError(
            f"--embedding {path}: holds embeddings for {len(embeddings)} text encoder(s), "
            f"{models.source} is {TITLES[models.family]} and needs {count} ({keys}): use a file "
            "trained on this kind of model"
        )
    for text_encoder, tokens_ND in zip(models.text_encoders, embeddings, strict=True):
        _add_embeddings(text_encoder, tokens_ND[None], placeholder_token, path)


def _add_embeddings(
    text_encoder: TextEncoder, tokens_KND: Tensor, placeholder_token: str, path: str
) -> None:
    width = text_encoder.token_embedding.embedding_dim
    if tokens_KND.shape[-1] != width:
        raise UserError(
            f"{path} is of width {tokens_KND.shape[-1]}, the text encoder of width {width}: use a "
            "file trained on this kind of model (768 = SD 1.x, 1024 = SD 2.x, 768 and 1280 = SDXL)"
        )
    LearnedTokens(text_encoder, {placeholder_token: tokens_KND}).requires_grad_(False)
