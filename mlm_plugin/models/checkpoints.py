"""Stable Diffusion 1.x, 2.x and XL by name: a diffusers folder, a hub id or one checkpoint file.

Assembles a model and resolves contradictions between it and the options. Knows nothing about
training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.checkpoint_file import ARCHITECTURES, CheckpointFile, load_vae_file
from mlm_plugin.models.components import TITLES, Components, empty_network, text_parts
from mlm_plugin.models.cross_attention import cross_attention_names
from mlm_plugin.models.diffusers_folder import (
    HUB_ID,
    DiffusersFolder,
    find_folder,
    find_local_folder,
    load_vae_folder,
    require_vae_folder,
    weights_files_of,
)
from mlm_plugin.models.key_values import MATRICES
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.tokenizers import find_tokenizers
from mlm_plugin.models.weights_files import read_weights

__all__ = [
    "SDXL_VERSION",
    "ModelSettings",
    "StableDiffusion",
    "empty_stable_diffusion",
    "load_stable_diffusion",
    "load_text_side",
    "require_weights",
]

logger = logging.getLogger(__name__)

SDXL_VERSION = "sdxl_base_v1-0"
SDXL_CLIP_SKIP = 2
# The betas of all Stable Diffusion 1.x, 2.x and XL models.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Source = CheckpointFile | DiffusersFolder


@dataclass(frozen=True)
class ModelSettings:
    """What the options say about a model, besides its name.

    Attributes:
        v2: ``--v2``. The weights decide; it is an error for a model that is not SD 2.x.
        v_parameterization: ``--v_parameterization``. A diffusers folder records what it predicts,
            and the option must not contradict it; for a checkpoint file the option decides.
        vae: replacement: diffusers folder (of the VAE, or with one in ``vae``), hub id or file.
        tokenizer_cache_dir: where to look for the tokenizer if the model has none.
        clip_skip: see ``TextEncoder``. SDXL always uses the state before the last layer, without
            the final norm; another value has no effect, as in sd-scripts, and causes a warning.
        max_token_length: see ``TextEncoder``.
        dtype: precision of U-Net and text encoders.
        vae_dtype: precision of the VAE.
    """

    v2: bool = False
    v_parameterization: bool = False
    vae: str | os.PathLike | None = None
    tokenizer_cache_dir: str | os.PathLike | None = None
    clip_skip: int | None = None
    max_token_length: int | None = None
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32


@dataclass
class StableDiffusion:
    """The frozen parts of a Stable Diffusion model, in eval mode, on the CPU.

    Attributes:
        text_encoders: one for SD 1.x and 2.x; CLIP-L and OpenCLIP bigG for SDXL, in the order in
            which the U-Net reads their states, the second with pooled states.
        noise_scheduler: DDPM with the betas the model was trained with.
        version: ``sd_v1``, ``sd_v2`` or ``sd_v2_v`` (``sd_v1_v`` for an SD 1.x that predicts v), or
            ``sdxl_base_v1-0``, as kohya writes it into ``ss_base_model_version``.
        prediction_type: ``epsilon`` or ``v_prediction``, the training target. Use this, not the
            option: a diffusers folder has its own.
        source: the model's name as given.
        zero_terminal_snr: whether the source says that it was trained with betas of zero terminal
            SNR; those of ``noise_scheduler`` are the usual ones.
    """

    text_encoders: list[TextEncoder]
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    version: str
    prediction_type: str
    source: str
    zero_terminal_snr: bool = False

    @property
    def family(self) -> str:
        """``sd_v1``, ``sd_v2`` or ``sdxl``: what decides names and shapes in files."""
        return "sdxl" if self.is_sdxl else self.version.removesuffix("_v")

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net is conditioned on two text encoders, a pooled state and sizes."""
        return self.version == SDXL_VERSION

    @property
    def components(self) -> Components:
        """The networks under diffusers' names."""
        clips = [text_encoder.model for text_encoder in self.text_encoders]
        return Components(self.unet, clips[0], self.vae, *clips[1:])


def load_stable_diffusion(
    name_or_path: str | os.PathLike,
    settings: ModelSettings | None = None,
    *,
    architecture: str | os.PathLike | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x, 2.x or XL model, frozen and in eval mode, on the CPU.

    Args:
        name_or_path: diffusers folder, hub id (network or local hub cache), or a ``.safetensors`` /
            ``.ckpt`` checkpoint with WebUI names (no network).
        settings: defaults if not given.
        architecture: folder of configurations for checkpoint files, laid out as a diffusers folder,
            instead of the shipped ones (models of other sizes).

    Raises:
        UserError: nothing found, damaged or incomplete weights, another architecture than SD 1.x,
            2.x or XL base, an option that contradicts the model, or no tokenizer.
    """
    settings, name = settings or ModelSettings(), str(name_or_path)
    configs = None if architecture is None else Path(architecture)
    source = _open(name, find_folder, architecture=configs)
    networks = {
        part: source.load(part, settings.dtype) for part in ("unet", *text_parts(source.family))
    }
    if settings.vae is None:
        networks["vae"] = source.load("vae", settings.vae_dtype)
    tokenizers = source.tokenizers or _find_tokenizers(source, networks, settings)
    if settings.vae is not None:
        shapes = configs or ARCHITECTURES / source.family
        networks["vae"] = _load_vae(str(settings.vae), configs=shapes, dtype=settings.vae_dtype)
    return _assembled(source, Components(**networks), tokenizers, settings)


def load_text_side(
    name_or_path: str | os.PathLike, settings: ModelSettings | None = None
) -> StableDiffusion:
    """The parts of a model that read text; all others stay on the meta device.

    These are the text encoders, and the keys and values of the U-Net's cross-attention.

    Args:
        name_or_path: as in :func:`load_stable_diffusion`.
        settings: likewise.

    Raises:
        UserError: as in :func:`load_stable_diffusion`.
    """
    settings = settings or ModelSettings()
    source = _open(str(name_or_path), find_folder)
    unet, vae = (empty_network(part, source.configs / part) for part in ("unet", "vae"))
    clips = {part: source.load(part, settings.dtype) for part in text_parts(source.family)}
    names = [f"{name}.{matrix}" for name in cross_attention_names(unet) for matrix in MATRICES]
    weights = source.unet_weights(unet, [f"{name}.weight" for name in names])
    networks = {"unet": unet, "vae": vae, **clips}
    tokenizers = source.tokenizers or _find_tokenizers(source, networks, settings)
    models = _assembled(source, Components(**networks), tokenizers, settings)
    for name in names:
        weight = weights[f"{name}.weight"].to(settings.dtype, copy=True)
        unet.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return models


def empty_stable_diffusion(
    name_or_path: str | os.PathLike,
    settings: ModelSettings | None = None,
    *,
    download: bool = False,
) -> StableDiffusion:
    """What :func:`load_stable_diffusion` would load, on the meta device: weights are not read.

    Reads configurations, or names and shapes of a file.

    Args:
        name_or_path: as in :func:`load_stable_diffusion`.
        settings: likewise; a replacement VAE has the shapes of the model's own.
        download: whether a hub id that is not on this machine is fetched; refused otherwise.

    Raises:
        UserError: as in :func:`load_stable_diffusion`, except for damaged weights.
    """
    settings, name = settings or ModelSettings(), str(name_or_path)
    source = _open(name, find_folder if download else find_local_folder)
    clips = text_parts(source.family)
    networks = {
        part: empty_network(part, source.configs / part).to("meta")
        for part in ("unet", *clips, "vae")
    }
    tokenizers = source.tokenizers or _find_tokenizers(source, networks, settings)
    return _assembled(source, Components(**networks), tokenizers, settings)


def require_weights(name_or_path: str | os.PathLike, settings: ModelSettings) -> None:
    """Refuse a folder without weights, and a replacement VAE that is not on this machine.

    Args:
        name_or_path: as in :func:`load_stable_diffusion`; on this machine.
        settings: likewise. A VAE by hub id is looked for when it is loaded.

    Raises:
        UserError: names what is missing.
    """
    name, vae = str(name_or_path), settings.vae and str(settings.vae)
    if not Path(name).is_file():
        folder = find_local_folder(name, option="--pretrained_model_name_or_path")
        source = DiffusersFolder(folder, name=name)
        parts = ("unet", *text_parts(source.family), *(() if vae else ("vae",)))
        for part in parts:
            weights_files_of(folder / part)
    if vae and Path(vae).is_file():
        read_weights(vae)
    elif vae and (Path(vae).is_dir() or not HUB_ID.fullmatch(vae)):
        require_vae_folder(find_local_folder(vae, option="--vae"), source=f"--vae: {vae}")


def _open(name: str, find: Callable[..., Path], *, architecture: Path | None = None) -> Source:
    if Path(name).is_file():
        return CheckpointFile(name, architecture=architecture)
    folder = find(name, option="--pretrained_model_name_or_path")
    return DiffusersFolder(folder, name=name)


def _load_vae(name: str, *, configs: Path, dtype: torch.dtype) -> nn.Module:
    if Path(name).is_file():
        return load_vae_file(Path(name), configs=configs, dtype=dtype)
    return load_vae_folder(find_folder(name, option="--vae"), source=f"--vae: {name}", dtype=dtype)


def _find_tokenizers(
    source: Source, networks: Mapping[str, nn.Module], settings: ModelSettings
) -> list:
    return find_tokenizers(
        source.family,
        vocab_size=networks["text_encoder"].config.vocab_size,
        cache_dir=settings.tokenizer_cache_dir,
        near=source.path.parent if isinstance(source, CheckpointFile) else None,
    )


def _assembled(
    source: Source, networks: Components, tokenizers: Sequence, settings: ModelSettings
) -> StableDiffusion:
    """The frozen model; an error or a warning where the options contradict its source."""
    family = source.family
    if settings.v2 and family != "sd_v2":
        raise UserError(
            f"--v2 says {TITLES['sd_v2']}, but {source.name} is {TITLES[family]}: drop --v2"
        )
    prediction_type = _prediction_type(source, settings.v_parameterization)
    suffix = "_v" if prediction_type == "v_prediction" else ""
    is_sdxl = family == "sdxl"
    clip_skip = _sdxl_clip_skip(settings.clip_skip) if is_sdxl else settings.clip_skip
    _refuse_skipping_all(clip_skip, networks.text_encoder)
    text_encoders = [
        TextEncoder(
            tokenizer,
            _frozen(getattr(networks, part), settings.dtype),
            clip_skip=clip_skip,
            max_token_length=settings.max_token_length,
            final_norm=not is_sdxl,
        )
        for tokenizer, part in zip(tokenizers, text_parts(family), strict=True)
    ]
    return StableDiffusion(
        text_encoders=text_encoders,
        vae=_frozen(networks.vae, settings.vae_dtype),
        unet=_frozen(networks.unet, settings.dtype),
        noise_scheduler=_noise_scheduler(source.scheduler, prediction_type),
        version=SDXL_VERSION if is_sdxl else f"{family}{suffix}",
        prediction_type=prediction_type,
        source=source.name,
        zero_terminal_snr=bool(source.scheduler.get("rescale_betas_zero_snr")),
    )


def _refuse_skipping_all(clip_skip: int | None, clip: nn.Module) -> None:
    num_layers = clip.config.num_hidden_layers
    if (clip_skip or 1) > num_layers:
        raise UserError(
            f"--clip_skip {clip_skip}: this text encoder has {num_layers} layers; give 1 to "
            f"{num_layers} (2 is usual for anime models)"
        )


def _sdxl_clip_skip(given: int | None) -> int:
    if given not in (None, SDXL_CLIP_SKIP):
        logger.warning(
            "--clip_skip %d has no effect: SDXL always reads the state before the last layer", given
        )
    return SDXL_CLIP_SKIP


def _frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    nn.Module.to(module, dtype)  # diffusers' own ``to`` warns about every cast
    return module.eval().requires_grad_(False)


def _prediction_type(source: Source, v_parameterization: bool) -> str:
    if not source.scheduler:
        if source.family == "sd_v2" and not v_parameterization:
            logger.warning(
                "%s is Stable Diffusion 2.x and does not say what it predicts: epsilon is assumed; "
                "set --v_parameterization for 768-v models",
                source.name,
            )
        return "v_prediction" if v_parameterization else "epsilon"
    known = source.scheduler.get("prediction_type", "epsilon")
    if known not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{source.name}: its scheduler_config.json has prediction_type {known!r}; "
            "this version trains epsilon and v_prediction"
        )
    if v_parameterization and known != "v_prediction":
        raise UserError(
            "--v_parameterization says v_prediction, but the scheduler_config.json of "
            f"{source.name} says {known}: drop the option, or correct prediction_type there"
        )
    return known


def _noise_scheduler(config: Mapping, prediction_type: str) -> DDPMScheduler:
    own_betas = {key: config[key] for key in (*BETAS, "trained_betas") if key in config}
    return DDPMScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        clip_sample=False,
        prediction_type=prediction_type,
        **BETAS | own_betas,
    )
