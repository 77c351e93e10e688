"""When the page of a standalone run is written: ``NAME.html`` beside its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.evaluation.run_page import NOT_SHOWN, Curves, RunFacts, RunPage, Samples
from mlm_plugin.setup.best_file import BestFile
from mlm_plugin.setup.sampling import SampleDrawer
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.trainer import Trainer

__all__ = ["PageLosses", "PageWriter", "has_page"]

MIN_STEPS = 10  # shorter runs have nothing to show


def has_page(config: TrainConfig, num_steps: int) -> bool:
    """Whether a run of this length gets a page."""
    return config.output.mlm_page and num_steps >= MIN_STEPS


class PageLosses(Callback):
    """Notes the losses of every step. Comes before states are saved, which hold them.

    Args:
        page: shows them.
    """

    def __init__(self, page: RunPage):
        self.page = page

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Note them."""
        self.page.add_step(trainer.progress.current_step, result.diffusion, result.mlm)

    def measured(self) -> dict[str, Any]:
        """The losses so far."""
        return self.page.measured()

    def recall(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        """Those before a resume."""
        self.page.recall(measured)


class PageWriter(Callback):
    """Writes the page at every save and sample, and at the end. Comes after what it shows.

    Args:
        config: the options of the run.
        title: the concept, for the heading.
        versions: versions of libraries by name.
        drawer: draws samples, if any are drawn.
        ranking: ranks files by their context, if it does.
        curves: charts besides those of the losses.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        title: str,
        versions: Mapping[str, str],
        drawer: SampleDrawer | None = None,
        ranking: BestFile | None = None,
        curves: Sequence[Curves] = (),
    ):
        name = config.output.output_name or "last"
        changed = {key: value for key, value in config.changed().items() if key not in NOT_SHOWN}
        facts = RunFacts(name, title, changed, "What differs from the defaults.", dict(versions))
        path = Path(config.output.output_dir) / f"{name}.html"
        self.drawer, self.ranking = drawer, ranking
        self.page = RunPage(path, facts, ranking=ranking, samples=self._samples, curves=curves)
        self._shown = (0, 0)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Write the page where a file or a picture has come."""
        self._write_if_new(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Write the page where a file or a picture has come."""
        self._write_if_new(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Write the page for the last time."""
        if self._write(trainer):
            print(f"page of the run: {self.page.path.resolve()}")

    def on_stop(self, trainer: Trainer) -> None:
        """Write what there is."""
        self._write(trainer)

    def _samples(self) -> Samples | None:
        if self.drawer is None:
            return None
        return Samples([prompt.prompt for prompt in self.drawer.prompts], self.drawer.drawn)

    def _write_if_new(self, trainer: Trainer) -> None:
        found = (
            len(self.ranking.files) if self.ranking else 0,
            len(self.drawer.drawn) if self.drawer else 0,
        )
        if found != self._shown:
            self._shown = found
            self._write(trainer)

    def _write(self, trainer: Trainer) -> bool:
        if not trainer.accelerator.is_main_process:
            return False
        step, num_steps = trainer.progress.current_step, trainer.plan.num_steps
        return self.page.write(step=step, num_steps=num_steps)
