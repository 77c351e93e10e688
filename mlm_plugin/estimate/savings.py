"""What would save memory in a training: other options, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.methods import METHODS

__all__ = ["Change", "changes_worth_trying"]

QUANTIZED = {"int8": "slower steps", "nf4": "slower steps on a coarser U-Net; needs bitsandbytes"}


class Change(NamedTuple):
    """Options to change, by flat name, and what it costs in a few words."""

    options: dict[str, Any]
    price: str

    @property
    def text(self) -> str:
        """The first option as one would write it into a TOML."""
        name, value = next(iter(self.options.items()))
        return f"{name} = {json.dumps(value)}"


def changes_worth_trying(config: TrainConfig) -> list[Change]:
    """Options of a training that would take less memory, where they are not set already."""
    return [*_free(config), *_smaller(config)]


def _free(config: TrainConfig) -> Iterator[Change]:
    """Changes that leave the result nearly as it is."""
    schedule, data = config.schedule, config.dataset
    caches = data.cache_latents or data.cache_latents_to_disk
    if not schedule.gradient_checkpointing:
        yield Change({"gradient_checkpointing": True}, "slower steps")
    if not (caches or data.color_aug or data.random_crop or data.scale_aug):
        yield Change({"cache_latents": True}, "none")
    if schedule.mixed_precision == "no":
        yield Change({"mixed_precision": "bf16"}, "none on RTX 30 and newer")
    if "8bit" not in config.optimizer.optimizer_type.lower():
        options = {"optimizer_type": "AdamW8bit", "optimizer_args": ()}
        yield Change(options, "needs bitsandbytes")
    if _may_fuse(config):
        yield Change({"fused_backward_pass": True}, "max_grad_norm holds for each tensor")
    if data.vae_batch_size > 1 and caches:
        yield Change({"vae_batch_size": 1}, "slower caching")


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
    """Changes of sizes; the MLM term comes last, since it is what this program is for."""
    schedule, mlm = config.schedule, config.mlm
    method = METHODS[schedule.method]
    if schedule.train_batch_size > 1:
        half = {"train_batch_size": schedule.train_batch_size // 2}
        yield Change(half, "noisier steps, or gradient_accumulation_steps = 2")
    if mlm.mlm_loss_weight and mlm.mlm_batch_size > 1:
        yield Change({"mlm_batch_size": mlm.mlm_batch_size // 2}, "a noisier term")
    rank = config.network.network_dim or 4
    if method.trains_network and rank > 4:
        yield Change({"network_dim": rank // 2}, "less detail")
    if not method.trains_base_weights and config.model.quantize_unet == "no":
        for kind, price in QUANTIZED.items():
            yield Change({"quantize_unet": kind}, price)
    if schedule.mixed_precision == "bf16" and not schedule.full_bf16:
        yield Change({"full_bf16": True}, "coarser weights")
    if mlm.mlm_loss_weight and method.why_no_gradient(config) is None:
        yield Change({"mlm_loss_weight": 0}, "the MLM term")
