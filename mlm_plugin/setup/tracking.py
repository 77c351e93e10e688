"""Where curves go: TensorBoard and Weights & Biases through accelerate, in kohya's folders."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

from accelerate import Accelerator

from mlm_plugin.config.options import LogOptions, TrainConfig
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.files import require_writable
from mlm_plugin.methods import METHODS
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.training.drift import DriftWatch, TextDrift
from mlm_plugin.training.logs import CurveLogger

__all__ = [
    "check_trackers",
    "curve_loggers",
    "drift_watch",
    "log_folder",
    "start_trackers",
    "tracker_kind",
]

TRACKER_NAME = "network_train"  # kohya's, so that old dashboards find the runs
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def tracker_kind(options: LogOptions) -> str | None:
    """``log_with``, or TensorBoard where only ``logging_dir`` is given."""
    return options.log_with or ("tensorboard" if options.logging_dir else None)


def check_trackers(options: LogOptions) -> None:
    """Refuse trackers that cannot work.

    Raises:
        UserError: a missing folder or package.
    """
    kind = tracker_kind(options)
    if kind in ("tensorboard", "all") and not options.logging_dir:
        raise UserError(f"log_with = {kind!r} needs logging_dir, the folder for the curves")
    if options.logging_dir:
        require_writable(options.logging_dir, "logging_dir")
    for name in PACKAGES if kind == "all" else filter(None, [kind]):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"log_with = {kind!r}: {name} is not installed; pip install {name}")


def log_folder(options: LogOptions) -> str | None:
    """``{logging_dir}/{log_prefix}{time}``. Source: sd-scripts ``prepare_accelerator``."""
    if options.logging_dir is None:
        return None
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
    return str(Path(options.logging_dir) / f"{options.log_prefix or ''}{stamp}")


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """Open the trackers; with ``log_config`` they get the options of the run.

    Raises:
        UserError: a tracker cannot write.
    """
    options = config.logging
    if options.wandb_api_key:
        os.environ["WANDB_API_KEY"] = options.wandb_api_key
    settings = read_toml(options.log_tracker_config) if options.log_tracker_config else {}
    if options.wandb_run_name:
        settings.setdefault("wandb", {})["name"] = options.wandb_run_name
    values = {name: str(v) for name, v in config.changed().items() if name != "wandb_api_key"}
    try:
        accelerator.init_trackers(
            options.log_tracker_name or TRACKER_NAME,
            config=values if options.log_config else None,
            init_kwargs=settings,
        )
    except OSError as error:
        raise UserError(
            f"logging_dir = {options.logging_dir!r}: the curves cannot be written "
            f"({shown_error(error)}); choose another, or leave it out"
        ) from error


def drift_watch(
    config: TrainConfig, models: StableDiffusion, accelerator: Accelerator
) -> DriftWatch | None:
    """Measures the drift of the text encoders; ``None`` where nobody sees it or none is trained.

    Call it before the method is prepared: drift is measured from the untrained encoders.
    """
    is_seen = config.output.mlm_page or tracker_kind(config.logging)
    method, number = METHODS[config.schedule.method], len(models.text_encoders)
    if not is_seen or method.why_text_untrained(config, num_text_encoders=number) is not None:
        return None
    numbers = [""] if number == 1 else ["1", "2"]
    return DriftWatch(
        {
            f"te{number}/drift_cos": TextDrift(text_encoder, autocast=accelerator.autocast)
            for number, text_encoder in zip(numbers, models.text_encoders, strict=True)
        }
    )


def curve_loggers(
    config: TrainConfig, accelerator: Accelerator, drift: DriftWatch | None
) -> list[CurveLogger]:
    """Start the trackers and create the callbacks that log to them; empty without logging."""
    if not tracker_kind(config.logging):
        return []
    start_trackers(config, accelerator)
    return [CurveLogger(drift)]
