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

__all__ = [
    "check_accelerator",
    "create_accelerator",
    "known_seed",
    "launched_processes",
    "shared_seed",
    "warn_of_launch_settings",
]

logger = logging.getLogger(__name__)

LAUNCH_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
}
"""Variables that `accelerate launch` sets, and the options that decide instead."""

SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables that `accelerate launch` sets to split models, which is not supported here."""


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Device, precision and trackers.

    Raises:
        UserError: the device does not support the precision, a tracker is not installed, or
            accelerate is set up to split models.
    """
    check_accelerator(config)
    warn_of_launch_settings(config)
    accelerator = Accelerator(
        mixed_precision=config.schedule.mixed_precision,
        gradient_accumulation_steps=config.schedule.gradient_accumulation_steps,
        log_with=tracker_kind(config.logging),
        project_dir=log_folder(config.logging),
        # others wait while one process pretrains, caches latents or draws samples
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    _refuse_fused_steps(config, accelerator.num_processes)
    if config.schedule.full_fp16:
        _unscale_half_gradients(accelerator)
    if (
        accelerator.device.type == "cuda"
    ):  # TF32 where the GPU supports it; convolutions use it anyway
        torch.set_float32_matmul_precision("high")
    return accelerator


def check_accelerator(config: TrainConfig) -> None:
    """What :func:`create_accelerator` refuses, without creating one.

    Raises:
        UserError: as there.
    """
    check_trackers(config.logging)
    _refuse_sharding()
    if config.schedule.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision = 'fp16' needs a GPU; use 'bf16' or 'no' on a CPU")
    _refuse_fused_steps(config, launched_processes())


def warn_of_launch_settings(config: TrainConfig) -> None:
    """Name settings of `accelerate launch` that are not read, where the options differ."""
    flat = config.to_flat()
    for variable, option in LAUNCH_SETTINGS.items():
        given = os.environ.get(variable, "").lower()
        if given not in ("", "no", "1", str(flat[option]).lower()):
            logger.warning(
                "accelerate launch asks for %s = %s, which is not read: this run has %s; give "
                "--%s %s after the script's name",
                *(option, given, flat[option], option, given),
            )


def launched_processes() -> int:
    """How many processes `accelerate launch` or `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _refuse_fused_steps(config: TrainConfig, num_processes: int) -> None:
    if config.optimizer.fused_backward_pass and num_processes > 1:
        raise UserError(
            f"fused_backward_pass cannot be combined with {num_processes} processes, "
            "which exchange gradients after the backward pass; start one, or leave it out"
        )


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


def known_seed(config: TrainConfig) -> int | None:
    """The seed that is given, or that of the state to resume; ``None`` if one will be drawn.

    Raises:
        UserError: the folder to resume is not a state.
    """
    if config.schedule.seed is None and config.schedule.resume:
        return read_progress(Path(config.schedule.resume)).seed
    return config.schedule.seed


def shared_seed(config: TrainConfig) -> int:
    """The seed of the run, the same on all processes: given, of the state to resume, or drawn."""
    seed = known_seed(config)
    if seed is None:
        drawn = [random.SystemRandom().randrange(2**32)]
        seed = broadcast_object_list(drawn)[0]
        logger.info("seed %d (give --seed %d to repeat this run)", seed, seed)
    return seed
