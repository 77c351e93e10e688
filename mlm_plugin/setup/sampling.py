"""When samples are drawn during training, and with which models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import shown_error
from mlm_plugin.files import remove_temporaries
from mlm_plugin.mlm_setup import trigger_of
from mlm_plugin.training.callbacks import Callback, StepResult, by_step
from mlm_plugin.training.samples import (
    SAMPLES,
    SampleFiles,
    SampleModels,
    SamplePrompt,
    generate_samples,
    parse_sample_prompts,
    sample_due,
)
from mlm_plugin.training.trainer import Trainer

__all__ = ["SampleDrawer", "sample_drawer"]

logger = logging.getLogger(__name__)


class SampleDrawer(Callback):
    """Draws the prompts of ``sample_prompts`` into ``{output_dir}/sample``.

    Args:
        config: intervals, prompts, sampler.
        trigger: text that replaces ``[trigger]``.
    """

    def __init__(self, config: TrainConfig, *, trigger: str | None):
        self.options = config.sampling
        self.prompts = parse_sample_prompts(self.options.sample_prompts, trigger=trigger)
        self.folder = Path(config.output.output_dir)
        self.name = config.output.output_name
        self.newest: Path | None = None
        self.drawn: dict[int, list[Path]] = {}  # pictures by step, in the order of the prompts

    @property
    def captions(self) -> list[str]:
        """Every text that will be encoded."""
        return [text for p in self.prompts for text in (p.negative_prompt, p.prompt)]

    def measured(self) -> dict[str, Any]:
        """Names of the pictures, by step."""
        return {
            "drawn": {step: [path.name for path in paths] for step, paths in self.drawn.items()}
        }

    def recall(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        """The pictures of before a resume, as far as they are there."""
        for step, names in by_step(measured["drawn"]).items():
            paths = [self.folder / SAMPLES / name for name in names]
            self._note(step, [path for path in paths if path.is_file()])

    def on_train_start(self, trainer: Trainer) -> None:
        """Remove leftovers of killed runs; ``sample_at_first``."""
        start = f"{self.name}_" if self.name else ""
        remove_temporaries(self.folder / SAMPLES, lambda name: name.startswith(start))
        if trainer.progress.current_step == 0:
            self._draw_if_due(trainer, epoch=None)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """``sample_every_n_steps``."""
        self._draw_if_due(trainer, epoch=None)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """``sample_every_n_epochs``."""
        self._draw_if_due(trainer, epoch=trainer.progress.current_epoch)

    def on_train_end(self, trainer: Trainer) -> None:
        """Say where the pictures are."""
        if self.newest:
            print(f"samples: {self.newest.parent.resolve()}")

    def _draw_if_due(self, trainer: Trainer, *, epoch: int | None) -> None:
        options, accelerator = self.options, trainer.accelerator
        if not accelerator.is_main_process or not sample_due(
            trainer.progress.current_step,
            epoch=epoch,
            every_n_steps=options.sample_every_n_steps,
            every_n_epochs=options.sample_every_n_epochs,
            at_first=options.sample_at_first,
        ):
            return
        self._note(trainer.progress.current_step, self._draw(trainer, epoch=epoch))

    def _note(self, step: int, paths: list[Path]) -> None:
        self.drawn[step] = paths
        if paths and step:  # the base model's pictures show nothing
            self.newest = paths[0]

    def _draw(self, trainer: Trainer, *, epoch: int | None) -> list[Path]:
        models, accelerator = trainer.models, trainer.accelerator
        with trainer.evaluating():
            return generate_samples(
                self.prompts,
                SampleModels(
                    models.unet,
                    models.vae,
                    trainer.encode,
                    models.noise_scheduler,
                    models.prediction_type,
                    accelerator.autocast,
                    models.zero_terminal_snr,
                ),
                SampleFiles(self.folder, trainer.progress.current_step, epoch, self.name),
                sampler=self.options.sample_sampler,
                on_error=_warn,
            )


def _warn(prompt: SamplePrompt, error: Exception) -> None:
    """Pictures are not worth a run."""
    text = shown_error(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()  # else the training would meet what the picture took
        text = f"out of memory at {prompt.width} x {prompt.height}; give smaller --w and --h"
    logger.warning("the sample %r is left out (%s); training continues", prompt.prompt, text)


def _draws_samples(config: TrainConfig) -> bool:
    """Whether any picture will be drawn; a prompt file alone draws none."""
    options = config.sampling
    when = (options.sample_every_n_steps, options.sample_every_n_epochs, options.sample_at_first)
    return bool(options.sample_prompts and any(when))


def sample_drawer(config: TrainConfig, concepts: Sequence[Concept]) -> SampleDrawer | None:
    """The callback that draws samples, or ``None`` where none are due.

    Raises:
        UserError: the prompt file cannot be read.
    """
    if not _draws_samples(config):
        return None
    return SampleDrawer(config, trigger=trigger_of(concepts))
