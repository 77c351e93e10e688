"""The denoising loss of Stable Diffusion with kohya's options: noise, timesteps, target, weights.

Knows the forward process and the timestep weights, but nothing about text, LoRA or the MLM term.
Definitions and the order of the random draws are those of kohya-ss/sd-scripts (commit 48d368fa), so
that one seed gives one loss in both. The draws come from PyTorch's global stream, as they do there;
pyramid noise also takes the global ``random`` stream. Nothing here waits for the device.

Shapes: B images, C latent channels (4), h and w latent height and width, T timesteps (1000).
``snr`` is the signal-to-noise ratio of a timestep, alpha_bar / (1 - alpha_bar).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from mlm_plugin.config.options import LossOptions
from mlm_plugin.errors import UserError

__all__ = [
    "DiffusionLoss",
    "NoisedLatents",
    "add_offset_noise",
    "add_pyramid_noise",
    "check_loss_options",
    "debiased_weight",
    "elementwise_loss",
    "huber_delta",
    "masked",
    "mean_where",
    "min_snr_weight",
    "noise_latents",
    "sample_noise",
    "sample_timesteps",
    "signal_to_noise",
    "timestep_range",
    "timestep_weight",
    "velocity_weight",
]

logger = logging.getLogger(__name__)

MAX_SNR = 1000.0  # early timesteps have nearly no noise; their ratio is clamped here


class NoisedLatents(NamedTuple):
    """One draw of the forward process."""

    noisy_latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w), the epsilon of the target
    timesteps: Tensor  # (B,), int64


class DiffusionLoss:
    """The loss of one batch, ready to be called every step.

    Args:
        noise_scheduler: The model's training schedule; it is not changed.
        options: The ``loss`` group of the configuration.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        device: Where the latents live; the tables of the schedule are moved there once.

    Raises:
        UserError: Options that contradict each other or the prediction type.
    """

    def __init__(
        self,
        noise_scheduler: DDPMScheduler,
        options: LossOptions,
        *,
        prediction_type: str,
        device: torch.device | str = "cpu",
    ):
        assert prediction_type in ("epsilon", "v_prediction"), prediction_type
        check_loss_options(options, prediction_type=prediction_type)
        self.options = options
        self.prediction_type = prediction_type
        # kohya tabulates the SNR before it rescales the betas: the weights keep the old one.
        self.snr_T = signal_to_noise(noise_scheduler.alphas_cumprod).to(device)
        self.noise_scheduler = DDPMScheduler.from_config(
            noise_scheduler.config,
            **({"rescale_betas_zero_snr": True} if options.zero_terminal_snr else {}),
        )
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(device)

    def __call__(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        latents: Tensor,
        *,
        loss_weights_B: Tensor,
        loss_masks: Tensor | None = None,
        valid_masks: Tensor | None = None,
    ) -> Tensor:
        """Noise the latents, predict, and weight the distance to the target.

        Args:
            predict: ``(noisy_latents, timesteps) -> model_pred``, the U-Net with its conditioning.
            latents: Scaled VAE latents, ``(B, C, h, w)``.
            loss_weights_B: Weight per image: 1 or ``prior_loss_weight``.
            loss_masks: ``(B, 1, H, W)`` in [0, 1] at any size; 0 leaves a pixel out.
            valid_masks: the same shape, 1 where the picture is. An image's loss is the mean over
                these pixels, so that a small picture counts as much as a large one.

        Returns:
            0-d fp32 tensor.

        Source: sd-scripts ``train_network.py`` ``process_batch`` and ``post_process_loss``;
        ``valid_masks``: Kumari et al. 2022, arXiv 2212.04488 (the loss of a scaled picture).
        """
        options = self.options
        noised = noise_latents(latents, self.noise_scheduler, options)
        model_pred = predict(noised.noisy_latents, noised.timesteps)
        loss = elementwise_loss(
            model_pred.float(),
            self.target(latents, noised).float(),
            loss_type=options.loss_type,
            huber_delta_B=huber_delta(noised.timesteps, self.noise_scheduler, options),
        )
        if loss_masks is not None:
            loss = masked(loss, loss_masks)
        loss_B = loss.mean(dim=(1, 2, 3)) if valid_masks is None else mean_where(loss, valid_masks)
        loss_B = loss_B * loss_weights_B.to(loss.device, non_blocking=True)
        snr_B = self.snr_T[noised.timesteps]
        weight_B = timestep_weight(snr_B, options, prediction_type=self.prediction_type)
        return (loss_B * weight_B).mean()

    def target(self, latents: Tensor, noised: NoisedLatents) -> Tensor:
        """What the model should predict: the noise, or ``v = alpha * noise - sigma * latents``."""
        if self.prediction_type == "epsilon":
            return noised.noise
        return self.noise_scheduler.get_velocity(latents, noised.noise, noised.timesteps)


def noise_latents(
    latents: Tensor, noise_scheduler: DDPMScheduler, options: LossOptions
) -> NoisedLatents:
    """Draw noise and timesteps, and mix: ``sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise``.

    ``ip_noise_gamma`` perturbs the model's input only; the target keeps the unperturbed noise.

    Source: sd-scripts ``library/train_util.py`` ``get_noise_noisy_latents_and_timesteps``.
    """
    noise = sample_noise(latents, options)
    low, high = timestep_range(options, noise_scheduler.config.num_train_timesteps)
    timesteps = sample_timesteps(len(latents), low=low, high=high)
    timesteps = timesteps.to(latents.device, non_blocking=True)
    input_noise = noise
    if options.ip_noise_gamma:
        strength = options.ip_noise_gamma
        if options.ip_noise_gamma_random_strength:
            strength = torch.rand(1, device=latents.device) * strength
        input_noise = noise + strength * torch.randn_like(latents)
    noisy_latents = noise_scheduler.add_noise(latents, input_noise, timesteps)
    return NoisedLatents(noisy_latents, noise, timesteps)


def sample_noise(latents: Tensor, options: LossOptions) -> Tensor:
    """Gaussian noise of the latents' shape with the offset and pyramid noise of the options."""
    noise = torch.randn_like(latents)
    if options.noise_offset:
        strength = options.noise_offset
        if options.noise_offset_random_strength:
            strength = torch.rand(1, device=latents.device) * strength
        noise = add_offset_noise(
            noise, latents, strength=strength, adaptive_scale=options.adaptive_noise_scale
        )
    if options.multires_noise_iterations:
        noise = add_pyramid_noise(
            noise,
            iterations=options.multires_noise_iterations,
            discount=options.multires_noise_discount,
        )
    return noise


def add_offset_noise(
    noise: Tensor,
    latents: Tensor,
    *,
    strength: float | Tensor,
    adaptive_scale: float | None = None,
) -> Tensor:
    """Shift each image and channel by ``strength * N(0, 1)``, so that brightness is learned too.

    With ``adaptive_scale`` a: ``strength + a * |mean of the channel|``, not below 0.

    Source: sd-scripts ``library/custom_train_functions.py`` ``apply_noise_offset``; the idea:
    https://www.crosslabs.org/blog/diffusion-with-offset-noise
    """
    if adaptive_scale is not None:
        channel_mean = latents.mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + adaptive_scale * channel_mean).clamp(min=0.0)
    return noise + strength * torch.randn((*latents.shape[:2], 1, 1), device=latents.device)


def add_pyramid_noise(noise: Tensor, *, iterations: int, discount: float) -> Tensor:
    """Add coarser and coarser noise, level i with strength ``discount^i``; rescale to std 1.

    A level shrinks by a random factor in [2, 4) to the power i; the last one is 1 wide or high. The
    coarse noise is drawn on the CPU.

    Source: sd-scripts ``library/custom_train_functions.py`` ``pyramid_noise_like``.
    """
    batch_size, channels, height, width = noise.shape
    for level in range(iterations):
        shrink = (random.random() * 2 + 2) ** level
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn(batch_size, channels, *size).to(noise.device, non_blocking=True)
        noise = noise + F.interpolate(coarse, (height, width), mode="bilinear") * discount**level
        if 1 in size:
            break
    return noise / noise.std()


def timestep_range(options: LossOptions, num_timesteps: int) -> tuple[int, int]:
    """First timestep and the one after the last, as the options limit them."""
    low = 0 if options.min_timestep is None else options.min_timestep
    high = num_timesteps if options.max_timestep is None else options.max_timestep
    return low, high


def sample_timesteps(batch_size: int, *, low: int, high: int) -> Tensor:
    """Uniform in ``[low, high)``, or ``high`` itself where the two are equal; ``(B,)`` on the CPU.

    Source: sd-scripts ``library/train_util.py`` ``get_timesteps``.
    """
    if low == high:
        return torch.full((batch_size,), high)
    return torch.randint(low, high, (batch_size,))


def elementwise_loss(
    model_pred: Tensor,
    target: Tensor,
    *,
    loss_type: str = "l2",
    huber_delta_B: Tensor | None = None,
) -> Tensor:
    """Distance of every element, with e = model_pred - target and delta per image.

    ``l2``: e^2. ``l1``: abs(e). ``huber``: 2 delta (sqrt(e^2 + delta^2) - delta), which is e^2 for
    small errors. ``smooth_l1``: 2 (sqrt(e^2 + delta^2) - delta), which is 2 abs(e) for large ones.

    Source: sd-scripts ``library/train_util.py`` ``conditional_loss``.
    """
    error = model_pred - target
    if loss_type == "l2":
        return error**2
    if loss_type == "l1":
        return error.abs()
    assert loss_type in ("huber", "smooth_l1"), loss_type
    delta = huber_delta_B.view(-1, 1, 1, 1)
    distance = 2 * ((error**2 + delta**2).sqrt() - delta)
    return delta * distance if loss_type == "huber" else distance


def huber_delta(
    timesteps: Tensor, noise_scheduler: DDPMScheduler, options: LossOptions
) -> Tensor | None:
    """Where the loss turns from quadratic to linear, ``(B,)``; None for a loss without that.

    ``constant``: c s. ``exponential``: s c^(t/T). ``snr``: (1 - c) / (1 + sigma)^2 + c with
    sigma^2 = (1 - alpha_bar) / alpha_bar, which ``huber_scale`` s does not reach.

    Source: sd-scripts ``library/train_util.py`` ``get_huber_threshold_if_needed``.
    """
    if options.loss_type not in ("huber", "smooth_l1"):
        return None
    c, scale = options.huber_c, options.huber_scale
    if options.huber_schedule == "constant":
        return torch.full(timesteps.shape, c * scale, device=timesteps.device)
    if options.huber_schedule == "exponential":
        decay = -math.log(c) / noise_scheduler.config.num_train_timesteps
        return torch.exp(-decay * timesteps) * scale
    alpha_bar = noise_scheduler.alphas_cumprod[timesteps]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    return (1 - c) / (1 + sigma) ** 2 + c


def masked(loss: Tensor, loss_masks: Tensor) -> Tensor:
    """Multiply by the masks, averaged over the area of a latent pixel.

    The mean is still taken over all pixels: a small mask makes a small loss.

    Source: sd-scripts ``library/custom_train_functions.py`` ``apply_masked_loss``.
    """
    masks = loss_masks.to(loss.device, loss.dtype, non_blocking=True)
    return loss * F.interpolate(masks, size=loss.shape[2:], mode="area")


def mean_where(loss: Tensor, valid_masks: Tensor) -> Tensor:
    """Each image's mean over the pixels where its mask is not 0, ``(B, C, h, w) -> (B,)``.

    A mask weighs by area where it is finer than the latents; one of zeros gives 0.
    """
    masks = valid_masks.to(loss.device, loss.dtype, non_blocking=True)
    masks = F.interpolate(masks, size=loss.shape[2:], mode="area").expand_as(loss)
    return (loss * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def signal_to_noise(alphas_cumprod_T: Tensor) -> Tensor:
    """SNR of every timestep: ``alpha_bar / (1 - alpha_bar)``."""
    return (alphas_cumprod_T.sqrt() / (1 - alphas_cumprod_T).sqrt()) ** 2


def timestep_weight(snr_B: Tensor, options: LossOptions, *, prediction_type: str) -> Tensor | float:
    """Product of all timestep weights in the options; 1.0 without any."""
    v_prediction = prediction_type == "v_prediction"
    weight = 1.0
    if options.min_snr_gamma:
        weight = weight * min_snr_weight(
            snr_B, gamma=options.min_snr_gamma, v_prediction=v_prediction
        )
    if options.scale_v_pred_loss_like_noise_pred:
        weight = weight * velocity_weight(snr_B)
    if options.v_pred_like_loss:
        weight = weight * (1 + options.v_pred_like_loss / velocity_weight(snr_B))
    if options.debiased_estimation_loss:
        weight = weight * debiased_weight(snr_B, v_prediction=v_prediction)
    return weight


def min_snr_weight(snr: Tensor, *, gamma: float, v_prediction: bool = False) -> Tensor:
    """``min(snr, gamma) / snr``, or ``/ (snr + 1)`` for v.

    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4; sd-scripts ``apply_snr_weight``.
    """
    return snr.clamp(max=gamma) / (snr + 1 if v_prediction else snr)


def velocity_weight(snr: Tensor) -> Tensor:
    """``snr / (snr + 1)``: turns the weights of a v loss into those of a noise loss.

    Source: sd-scripts ``library/custom_train_functions.py`` ``get_snr_scale``.
    """
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1)


def debiased_weight(snr: Tensor, *, v_prediction: bool = False) -> Tensor:
    """``1 / sqrt(snr)``, or ``1 / (snr + 1)`` for v.

    Source: Yu et al. 2023, arXiv 2310.08442; sd-scripts ``apply_debiased_estimation``.
    """
    snr = snr.clamp(max=MAX_SNR)
    return 1 / (snr + 1) if v_prediction else 1 / snr.sqrt()


def check_loss_options(options: LossOptions, *, prediction_type: str) -> None:
    """Check what depends on the model or the formula; ``config.checks`` does the rest.

    Raises:
        UserError: A weight that contradicts the prediction type, or an impossible huber_c.
    """
    v_prediction = prediction_type == "v_prediction"
    if options.scale_v_pred_loss_like_noise_pred and not v_prediction:
        raise UserError(
            "scale_v_pred_loss_like_noise_pred is for models that predict v, and this one predicts "
            "noise: leave it out"
        )
    if options.v_pred_like_loss and v_prediction:
        raise UserError(
            f"v_pred_like_loss={options.v_pred_like_loss} is for models that predict noise, and "
            "this one predicts v: leave it out"
        )
    if options.loss_type not in ("huber", "smooth_l1"):
        return
    if options.huber_c <= 0:
        raise UserError(f"huber_c={options.huber_c}: expected a number above 0")
    if options.huber_schedule == "snr" and options.huber_scale != 1.0:
        logger.warning("huber_scale has no effect with huber_schedule=snr")
