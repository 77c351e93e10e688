"""What would save memory in a training: other options, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.methods import METHODS

__all__ = ["Change", "changes_worth_trying"]

EIGHT_BIT = "AdamW8bit"
QUANTIZED = {"int8": "slower steps", "nf4": "slower steps on a coarser U-Net; needs bitsandbytes"}


class Change(NamedTuple):
    """Options to change, and what that is called.

    Attributes:
        text: as one would write it into a TOML.
        options: by flat name.
        price: what it costs, in a few words.
    """

    text: str
    options: dict[str, Any]
    price: str


def changes_worth_trying(config: TrainConfig) -> list[Change]:
    """Options of a training that would take less memory, where they are not set already."""
    return [*_free(config), *_smaller(config), *_without_term(config)]


def _free(config: TrainConfig) -> Iterator[Change]:
    """Changes that leave the result nearly as it is."""
    schedule, data = config.schedule, config.dataset
    if not schedule.gradient_checkpointing:
        yield Change(
            "gradient_checkpointing = true", {"gradient_checkpointing": True}, "slower steps"
        )
    if not (data.cache_latents or data.cache_latents_to_disk):
        if not (data.color_aug or data.random_crop or data.scale_aug):
            yield Change("cache_latents = true", {"cache_latents": True}, "none")
    if schedule.mixed_precision == "no":
        yield Change(
            'mixed_precision = "bf16"', {"mixed_precision": "bf16"}, "none on RTX 30 and newer"
        )
    if "8bit" not in config.optimizer.optimizer_type.lower():
        yield Change(
            f'optimizer_type = "{EIGHT_BIT}"',
            {"optimizer_type": EIGHT_BIT, "optimizer_args": ()},
            "needs bitsandbytes",
        )
    if _may_fuse(config):
        yield Change(
            "fused_backward_pass = true",
            {"fused_backward_pass": True},
            "max_grad_norm holds for each tensor",
        )
    if data.vae_batch_size > 1 and (data.cache_latents or data.cache_latents_to_disk):
        yield Change("vae_batch_size = 1", {"vae_batch_size": 1}, "slower caching")


def _may_fuse(config: TrainConfig) -> bool:
    """Whether steps inside the backward pass are possible and not asked for yet."""
    schedule, optimizer = config.schedule, config.optimizer
    kind = optimizer.optimizer_type.lower()
    return (
        METHODS[schedule.method].supports_fused_backward
        and not optimizer.fused_backward_pass
        and schedule.gradient_accumulation_steps == 1
        and schedule.mixed_precision != "fp16"
        and not any(family in kind for family in ("prodigy", "dadapt", "schedulefree"))
    )


def _smaller(config: TrainConfig) -> Iterator[Change]:
    """Changes of sizes."""
    schedule, mlm = config.schedule, config.mlm
    method = METHODS[schedule.method]
    if schedule.train_batch_size > 1:
        half = schedule.train_batch_size // 2
        yield Change(
            f"train_batch_size = {half}",
            {"train_batch_size": half},
            "noisier steps, or gradient_accumulation_steps = 2",
        )
    if mlm.mlm_loss_weight and mlm.mlm_batch_size > 1:
        half = mlm.mlm_batch_size // 2
        yield Change(f"mlm_batch_size = {half}", {"mlm_batch_size": half}, "a noisier term")
    rank = config.network.network_dim or 4
    if method.trains_network and rank > 4:
        yield Change(f"network_dim = {rank // 2}", {"network_dim": rank // 2}, "less detail")
    if not method.trains_base_weights and config.model.quantize_unet == "no":
        for kind, price in QUANTIZED.items():
            yield Change(f'quantize_unet = "{kind}"', {"quantize_unet": kind}, price)
    for precision in ("fp16", "bf16"):
        full = f"full_{precision}"
        if schedule.mixed_precision == precision == "bf16" and not getattr(schedule, full):
            yield Change(f"{full} = true", {full: True}, "coarser weights")


def _without_term(config: TrainConfig) -> Iterator[Change]:
    """What the MLM term costs; it is what this program is for, so it comes last."""
    method = METHODS[config.schedule.method]
    if config.mlm.mlm_loss_weight and method.why_no_gradient(config) is None:
        yield Change("mlm_loss_weight = 0", {"mlm_loss_weight": 0.0}, "the MLM term")
