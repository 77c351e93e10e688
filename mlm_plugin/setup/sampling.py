"""When samples are drawn during training, and with which models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.mlm_setup import trigger_of
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.samples import (
    SampleFiles,
    SampleModels,
    generate_samples,
    parse_sample_prompts,
    sample_due,
)
from mlm_plugin.training.trainer import Trainer

__all__ = ["SampleDrawer", "sample_drawer"]


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

    @property
    def captions(self) -> list[str]:
        """Every text that will be encoded."""
        return [text for p in self.prompts for text in (p.negative_prompt, p.prompt)]

    def on_train_start(self, trainer: Trainer) -> None:
        """``sample_at_first``."""
        if trainer.progress.current_step == 0:
            self._draw_if_due(trainer, epoch=None)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """``sample_every_n_steps``."""
        self._draw_if_due(trainer, epoch=None)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """``sample_every_n_epochs``."""
        self._draw_if_due(trainer, epoch=trainer.progress.current_epoch)

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
        models = trainer.models
        with trainer.evaluating():
            paths = generate_samples(
                self.prompts,
                SampleModels(
                    models.unet,
                    models.vae,
                    trainer.encode,
                    models.noise_scheduler,
                    models.prediction_type,
                    accelerator.autocast,
                ),
                SampleFiles(self.folder, trainer.progress.current_step, epoch, self.name),
                sampler=options.sample_sampler,
            )
        self.newest = paths[0] if paths else self.newest


def sample_drawer(config: TrainConfig, concepts: Sequence[Concept]) -> SampleDrawer | None:
    """The callback that draws samples, or ``None`` where none would be drawn.

    Raises:
        UserError: the prompt file cannot be read.
    """
    options = config.sampling
    is_due = options.sample_every_n_steps or options.sample_every_n_epochs
    if not options.sample_prompts or not (is_due or options.sample_at_first):
        return None
    return SampleDrawer(config, trigger=trigger_of(concepts))
