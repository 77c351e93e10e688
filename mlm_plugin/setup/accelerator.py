"""Device, precision and processes of a run, through accelerate."""

from __future__ import annotations

import logging
import os
import random
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.setup.tracking import check_trackers, log_folder, tracker_kind
from mlm_plugin.training.state import read_progress

__all__ = ["create_accelerator", "require_device", "shared_seed"]

logger = logging.getLogger(__name__)

SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables that `accelerate launch` sets to split models, which is not supported here."""


def require_device(config: TrainConfig) -> None:
    """Refuse trackers, precision or sharding that this machine cannot serve.

    Raises:
        UserError: names the option.
    """
    check_trackers(config.logging)
    _refuse_sharding()
    if config.schedule.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision = 'fp16' needs a GPU; use 'bf16' or 'no' on a CPU")


def _warn_of_launched_precision(config: TrainConfig) -> None:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.schedule.mixed_precision):
        logger.warning(
            "`accelerate launch` asks for mixed_precision %s, which is not read: this run has "
            "mixed_precision = %r",
            launched,
            config.schedule.mixed_precision,
        )


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Device, precision and trackers.

    Raises:
        UserError: the device does not support the precision, a tracker is not installed, or
            accelerate is set up to split models.
    """
    require_device(config)
    _warn_of_launched_precision(config)
    accelerator = Accelerator(
        mixed_precision=config.schedule.mixed_precision,
        gradient_accumulation_steps=config.schedule.gradient_accumulation_steps,
        log_with=tracker_kind(config.logging),
        project_dir=log_folder(config.logging),
        # others wait while one process pretrains, caches latents or draws samples
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    if config.optimizer.fused_backward_pass and accelerator.num_processes > 1:
        raise UserError(
            f"fused_backward_pass cannot be combined with {accelerator.num_processes} processes, "
            "which exchange gradients after the backward pass; start one, or leave it out"
        )
    if config.schedule.full_fp16:
        _unscale_half_gradients(accelerator)
    if (
        accelerator.device.type == "cuda"
    ):  # TF32 where the GPU supports it; convolutions use it anyway
        torch.set_float32_matmul_precision("high")
    return accelerator


def _refuse_sharding() -> None:
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate is set up for {name}, which cuts models into pieces: not supported; "
                "use `accelerate launch --multi_gpu`, which holds the whole model on every GPU"
            )


def _unscale_half_gradients(accelerator: Accelerator) -> None:
    """Let the gradient scaler accept fp16 gradients, as sd-scripts does for ``full_fp16``."""
    unscale = accelerator.scaler._unscale_grads_

    def unscale_any(optimizer, inv_scale, found_inf, _allow_fp16):
        return unscale(optimizer, inv_scale, found_inf, True)

    accelerator.scaler._unscale_grads_ = unscale_any


def shared_seed(config: TrainConfig) -> int:
    """The seed of the run, the same on all processes: given, of the state to resume, or drawn."""
    seed = config.schedule.seed
    if seed is None and config.schedule.resume:
        return read_progress(Path(config.schedule.resume)).seed
    if seed is None:
        drawn = [random.SystemRandom().randrange(2**32)]
        seed = broadcast_object_list(drawn)[0]
        logger.info("seed %d (give --seed %d to repeat this run)", seed, seed)
    return seed
