"""`mlm-plugin estimate`: how much GPU memory a run will need, before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress

from tqdm import tqdm

from mlm_plugin.config.options import LogOptions, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.estimate.meta_run import largest_batch, meta_training
from mlm_plugin.estimate.options import FAMILIES, EstimateCommand
from mlm_plugin.estimate.savings import changes_worth_trying
from mlm_plugin.estimate.step import caching_peak, optimizer_peak, step_peak
from mlm_plugin.estimate.table import Estimate, Saving, report_lines, saving_lines
from mlm_plugin.methods.checks import check_config
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.setup.builtin_names import contexts_path, data_path, model_path
from mlm_plugin.setup.console import quiet_libraries, setup_console

__all__ = ["estimate_of", "run_estimate"]


def run_estimate(command: EstimateCommand) -> int:
    """Print the table of a training, and what would save memory; returns the exit code.

    Raises:
        UserError: options that the training would refuse too, or a model that is not local.
    """
    setup_console(LogOptions(console_log_level="ERROR"))
    quiet_libraries()
    config = _readable(command)
    check_config(config)
    estimate = estimate_of(config, show_progress=True)
    print("\n".join(report_lines(estimate, _head(config, command))))
    for remark in _remarks(config):
        print(f"note: {remark}")
    if command.savings:
        sys.stdout.flush()  # the table is read while the list is made
        print("\n".join(["", *saving_lines(estimate, list(_savings(config)))]))
    return 0


def estimate_of(config: TrainConfig, *, show_progress: bool = False) -> Estimate:
    """Peaks of the moments of a run: caching latents, the step, the optimizer's step.

    Raises:
        UserError: options or files that do not fit the model.
    """
    counts = {"training step": step_peak, "optimizer step": optimizer_peak}
    if config.dataset.cache_latents or config.dataset.cache_latents_to_disk:
        counts = {"caching": caching_peak, **counts}
    with _bar("counting", len(counts) + 1, disable=not show_progress) as bar:
        training = meta_training(config, largest_batch(config))
        moments = {}
        for name, count in counts.items():
            bar.update()
            moments[name] = count(training)
        return Estimate(moments)


def _bar(title: str, total: int, *, disable: bool = False) -> tqdm:
    """On stderr; it disappears at its end."""
    return tqdm(desc=title, total=total, leave=False, disable=disable)


def _readable(command: EstimateCommand) -> TrainConfig:
    """The options with built-in paths resolved; what does not affect memory may be missing.

    Raises:
        UserError: no model.
    """
    config = command.config
    model = model_path(config.model.pretrained_model_name_or_path)
    if command.architecture:
        model = str(ARCHITECTURES / command.architecture)
    if model is None:
        raise UserError(
            "pretrained_model_name_or_path is missing: give the base model, or --architecture "
            f"{', '.join(FAMILIES)}"
        )
    return config.replace(
        pretrained_model_name_or_path=model,
        train_data_dir=data_path(config.dataset.train_data_dir),
        output_dir=config.output.output_dir or "output",
        mlm_prompt_set=contexts_path(config.mlm.mlm_prompt_set),
        mlm_contextualizer="auto",
    )


def _savings(config: TrainConfig) -> Iterator[Saving]:
    changes = changes_worth_trying(config)
    with _bar("what would save memory", len(changes)) as bar:
        for change in changes:
            bar.set_postfix_str(change.text)
            changed = config.replace(**change.options)
            with suppress(UserError):  # what the training would refuse saves nothing
                check_config(changed)
                yield Saving(change.text, change.price, estimate_of(changed).peak)
            bar.update()


def _head(config: TrainConfig, command: EstimateCommand) -> str:
    number, width, height = largest_batch(config)
    schedule = config.schedule
    model = command.architecture or config.model.pretrained_model_name_or_path
    return (
        f"{schedule.method} on {model}: batches of {number}, {width} x {height} pixels, "
        f"mixed_precision {schedule.mixed_precision}, "
        f"{config.optimizer.optimizer_type or 'AdamW'}, gradient checkpointing "
        f"{'on' if schedule.gradient_checkpointing else 'off'}"
    )


def _remarks(config: TrainConfig) -> Iterator[str]:
    """Parts of the run that are not in the table."""
    if config.mlm.mlm_loss_weight and config.mlm.mlm_target != "states":
        yield "pretraining a contextualizer (once per text encoder, before the rest) is not counted"
    if config.sampling.sample_prompts:
        yield "drawing samples is not counted"
    if config.finetune.generate_class_images:
        yield "drawing class pictures, before the training, is not counted"
    if config.model.torch_compile:
        yield "torch_compile is left out: it changes what is kept"
    if config.optimizer.optimizer_type.lower().startswith("paged"):
        yield "the paged optimizer's large states are counted as lying in the CPU's memory"
