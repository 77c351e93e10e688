"""The forward passes of a training step: the denoising loss of a batch, and the MLM term.

Knows no loop and no optimizer. Shapes: B images, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mlm_plugin.data.dataset import Batch
from mlm_plugin.mlm.regularizer import MLMOutput
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.conditioning import Conditioning, size_ids, unet_inputs
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.training.diffusion_loss import DiffusionLoss

__all__ = ["batch_diffusion_loss", "batch_latents", "term_output"]


def batch_diffusion_loss(
    batch: Batch,
    *,
    models: StableDiffusion,
    encode: Callable[[Sequence[str]], Conditioning],
    diffusion_loss: DiffusionLoss,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """Forward pass of one batch: the denoising loss, 0-d.

    Args:
        batch: pictures or latents with their captions.
        models: what is trained.
        encode: captions to conditioning.
        diffusion_loss: calls the U-Net.
        device: of the models.
        autocast: enters mixed precision.
    """
    latents = batch_latents(batch, models.vae, device=device)
    with autocast():
        conditioning = encode(batch.captions)
        sizes_B6 = size_ids(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)

        def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            dtype = models.unet.dtype
            inputs = unet_inputs(conditioning, sizes_B6, dtype=dtype)
            return models.unet(noisy_latents.to(dtype), timesteps, **inputs).sample

        return diffusion_loss(
            predict,
            latents,
            loss_weights_B=batch.loss_weights,
            loss_masks=batch.loss_masks,
            valid_masks=batch.valid_masks,
        )


def term_output(
    mlm: Callable[[], MLMOutput],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> MLMOutput:
    """Forward pass of the term; random streams are restored.

    Dropout of the adapters draws here too, and the diffusion noise must not depend on it.

    Args:
        mlm: computes the term.
        device: of the models.
        autocast: enters mixed precision.
    """
    with preserved_random_state(device), autocast():
        return mlm()


@torch.no_grad()
def batch_latents(batch: Batch, vae: nn.Module, *, device: torch.device) -> Tensor:
    """Scaled latents ``(B, 4, h, w)``, from the cache or from pixels."""
    if batch.latents is not None:
        latents = batch.latents.to(device, non_blocking=True)
    else:
        pixels = batch.pixel_values.to(device, vae.dtype, non_blocking=True)
        latents = vae.encode(pixels).latent_dist.sample().float()
    return latents * vae.config.scaling_factor
