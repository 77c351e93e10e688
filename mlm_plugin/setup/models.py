"""The base model of a run: loading, placing, preparing for a method, and encoding beforehand.

Knows no loop and no optimizer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from mlm_plugin.config.datasets import LATENT_STRIDE
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.methods import METHODS, WEIGHT_DTYPES, Method
from mlm_plugin.models.checkpoints import ModelSettings, StableDiffusion, load_stable_diffusion
from mlm_plugin.models.quantized import quantize_linears
from mlm_plugin.setup.sampling import SampleDrawer
from mlm_plugin.training.caption_cache import CaptionCache

__all__ = [
    "cache_latents",
    "cached_captions",
    "load_models",
    "model_settings",
    "place_models",
    "prepare_models",
    "quantize_models",
    "warn_of_small_pictures",
    "warn_of_zero_terminal_snr",
]

logger = logging.getLogger(__name__)

SMALL_SHARE = 0.5  # of the area a model was made for; smaller pictures cause a warning


def load_models(config: TrainConfig) -> StableDiffusion:
    """The frozen base model on the CPU, in the precision that the method needs."""
    name = config.model.pretrained_model_name_or_path
    models = load_stable_diffusion(name, model_settings(config))
    warn_of_zero_terminal_snr(config, models)
    models.zero_terminal_snr = config.loss.zero_terminal_snr  # as it is trained and drawn here
    return models


def warn_of_zero_terminal_snr(config: TrainConfig, models: StableDiffusion) -> None:
    """Name the option that the model was made with."""
    if models.zero_terminal_snr and not config.loss.zero_terminal_snr:
        logger.warning("the model was made for zero terminal SNR: set --zero_terminal_snr")


def model_settings(config: TrainConfig) -> ModelSettings:
    """Settings of the base model from the options."""
    options = config.model
    dtype = WEIGHT_DTYPES[config.schedule.mixed_precision]
    in_fp32 = METHODS[config.schedule.method].trains_base_weights
    return ModelSettings(
        v2=options.v2,
        v_parameterization=options.v_parameterization,
        vae=options.vae,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        clip_skip=options.clip_skip,
        max_token_length=options.max_token_length,
        dtype=torch.float32 if in_fp32 else dtype,
        vae_dtype=torch.float32 if options.no_half_vae else dtype,
    )


def warn_of_small_pictures(models: StableDiffusion, dataset: TrainDataset) -> None:
    """SDXL at kohya's default resolution learns to draw poorly."""
    side = models.unet.config.sample_size * LATENT_STRIDE
    areas = [config.resolution[0] * config.resolution[1] for config in dataset.datasets]
    if models.is_sdxl and min(areas) < SMALL_SHARE * side**2:
        logger.warning(
            "resolution is %d x %d pixels, and this model was made at %d x %d: give "
            "--resolution %d",
            *dataset.datasets[areas.index(min(areas))].resolution,
            side,
            side,
            side,
        )


def place_models(config: TrainConfig, models: StableDiffusion, device: torch.device) -> None:
    """U-Net and VAE on the device that trains them."""
    quantize_models(config, models, device)
    for module in (models.unet, models.vae):
        module.to(device)
    if config.model.xformers:  # before methods wrap the processors with their own
        _use_xformers(models)


def quantize_models(config: TrainConfig, models: StableDiffusion, device: torch.device) -> None:
    """Quantize the U-Net (``quantize_unet``), before it is moved and before adapters are added.

    Text encoders are left unchanged: contextualizers are made for their exact states.
    """
    if config.model.quantize_unet != "no":
        quantize_linears(models.unet, config.model.quantize_unet, device=device)


def prepare_models(config: TrainConfig, models: StableDiffusion, method: Method) -> None:
    """Precision and device of what is trained; gradient checkpointing and compilation."""
    device = (
        models.unet.device
    )  # diffusers searches all modules for it: once, not for each parameter
    for parameter in method.parameters():
        parameter.data = parameter.data.to(device)
        if config.schedule.full_fp16 or config.schedule.full_bf16:
            parameter.data = parameter.data.to(WEIGHT_DTYPES[config.schedule.mixed_precision])
    if config.schedule.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        if method.trains_text_side:
            for text_encoder in models.text_encoders:
                text_encoder.enable_gradient_checkpointing()
    if config.model.torch_compile and config.model.dynamo_backend != "no":
        models.unet.compile(backend=config.model.dynamo_backend)


def _use_xformers(models: StableDiffusion) -> None:
    try:
        models.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, RuntimeError) as error:
        logger.warning("xformers is not usable (%s); PyTorch SDPA is used instead", error)


def cache_latents(
    config: TrainConfig,
    datasets: Sequence[TrainDataset],
    models: StableDiffusion,
    accelerator: Accelerator,
) -> None:
    """Encode the pictures of all data sets now, if the options say so.

    The U-Net is off the device meanwhile: both together would be the peak of an SDXL run.
    """
    if not (config.dataset.cache_latents or config.dataset.cache_latents_to_disk):
        return
    vae = models.vae
    models.unet.to("cpu")
    _free_cached_memory(accelerator.device)

    @torch.no_grad()
    def encode(pixels):
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample().float().cpu()

    with accelerator.main_process_first():
        for dataset in datasets:
            dataset.cache_latents(
                encode,
                vae_id=_vae_identity(vae),
                to_disk=config.dataset.cache_latents_to_disk,
                batch_size=config.dataset.vae_batch_size,
                skip_check=config.dataset.skip_cache_check,
                is_sdxl=models.is_sdxl,
            )
    vae.to("cpu")
    _free_cached_memory(accelerator.device)
    models.unet.to(accelerator.device)


def cached_captions(
    config: TrainConfig,
    datasets: Sequence[TrainDataset],
    method: Method,
    drawer: SampleDrawer | None,
    accelerator: Accelerator,
) -> CaptionCache | None:
    """Encode captions and sample prompts now, with ``cache_text_encoder_outputs``."""
    if not config.dataset.cache_text_encoder_outputs:
        return None
    method.train(False)
    captions = [caption for dataset in datasets for caption in dataset.fixed_captions()]
    with accelerator.autocast():
        cache = CaptionCache(
            method.encode,
            [*captions, *(drawer.captions if drawer else [])],
            device=accelerator.device,
            dtype=method.models.unet.dtype,
        )
    logger.info("%d captions encoded; the text encoders are not needed any more", len(cache))
    for text_encoder in method.models.text_encoders:
        text_encoder.model.to("cpu")
    _free_cached_memory(accelerator.device)
    return cache


def _free_cached_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _vae_identity(vae: torch.nn.Module) -> str:
    """A fingerprint of the VAE's weights that is the same in any precision."""
    signs = [(p.detach().flatten()[:: max(1, p.numel() // 64)] > 0).cpu() for p in vae.parameters()]
    return hashlib.sha256(torch.cat(signs).numpy().tobytes()).hexdigest()[:16]
