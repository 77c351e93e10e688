"""The page of a run, ``NAME.html`` beside its file: curves, samples, sentences, settings, warnings.

It is written again at every save and sample, and at the end, and needs nothing from outside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.evaluation.charts import Point, line_chart, scatter_chart
from mlm_plugin.evaluation.rendering import embed_picture, render
from mlm_plugin.files import atomic_path
from mlm_plugin.setup.best_file import BestFile
from mlm_plugin.setup.console import kept_warnings
from mlm_plugin.setup.sampling import SampleDrawer
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.trainer import Trainer
from mlm_plugin.training.validation import Validator

__all__ = ["RunPage", "has_page"]

logger = logging.getLogger(__name__)

MIN_STEPS = 10  # shorter runs have nothing to show
MAX_COLUMNS, MAX_TILES = 12, 120
NUM_SENTENCES = 6
NOT_SHOWN = ("wandb_api_key", "huggingface_token", "config_file")


def has_page(config: TrainConfig, num_steps: int) -> bool:
    """Whether a run of this length gets a page."""
    return config.output.mlm_page and num_steps >= MIN_STEPS


class RunPage(Callback):
    """Collects what a run reports and writes its page. Comes behind the callbacks it shows.

    Args:
        config: the options of the run.
        title: the concept, for the heading.
        versions: versions of libraries by name.
        drawer: draws samples, if any are drawn.
        ranking: ranks files by their context, if it does.
        validator: measures the loss of held-out pictures, if there are any.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        title: str,
        versions: Mapping[str, str],
        drawer: SampleDrawer | None = None,
        ranking: BestFile | None = None,
        validator: Validator | None = None,
    ):
        self.name = config.output.output_name or "last"
        self.path = Path(config.output.output_dir) / f"{self.name}.html"
        self.settings = {
            name: value for name, value in config.changed().items() if name not in NOT_SHOWN
        }
        self.title, self.versions = title, versions
        self.drawer, self.ranking, self.validator = drawer, ranking, validator
        self.diffusion: list[tuple[float, float]] = []
        self.term: list[tuple[float, float]] = []
        self.pictures: dict[Path, Any] = {}  # embedded, by path
        self._shown = (0, 0)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Note the losses; write the page where a file or a picture has come."""
        step = trainer.progress.current_step
        self.diffusion.append((step, result.diffusion))
        if result.mlm is not None:
            self.term.append((step, result.mlm))
        self._write_if_new(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Write the page where a file or a picture has come."""
        self._write_if_new(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Write the page for the last time."""
        if self._write(trainer):
            print(f"page of the run: {self.path.resolve()}")

    def on_stop(self, trainer: Trainer) -> None:
        """Write what there is."""
        self._write(trainer)

    def _write_if_new(self, trainer: Trainer) -> None:
        found = (
            len(self.ranking.files) if self.ranking else 0,
            len(self.drawer.drawn) if self.drawer else 0,
        )
        if found != self._shown:
            self._shown = found
            self._write(trainer)

    def _write(self, trainer: Trainer) -> bool:
        """Replace the page, and say whether; one that cannot be written does not end a run."""
        if not trainer.accelerator.is_main_process or not self.diffusion:
            return False
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_text(self._page(trainer), encoding="utf-8")
        except OSError as error:
            logger.warning("%s could not be saved (%s); training continues", self.path, error)
            return False
        return True

    def _page(self, trainer: Trainer) -> str:
        return render(
            "run.html",
            title=self.name,
            concept=self.title,
            step=trainer.progress.current_step,
            num_steps=trainer.plan.num_steps,
            written=time.strftime("%Y-%m-%d %H:%M"),
            charts=self._charts(),
            samples=self._samples(),
            files=self._files(),
            best=self.ranking.best if self.ranking else None,
            sentences=self.ranking.score.sentences(NUM_SENTENCES) if self._has_files else [],
            settings=[(name, _shown(value)) for name, value in self.settings.items()],
            versions=self.versions,
            warnings=kept_warnings(),
        )

    @property
    def _has_files(self) -> bool:
        return self.ranking is not None and bool(self.ranking.files)

    def _charts(self) -> list[tuple[Markup, str]]:
        charts = [
            (
                line_chart({"diffusion": self.diffusion}, x_title="step", y_title="loss"),
                "Diffusion loss of every step, and its running mean over a tenth of the steps.",
            )
        ]
        if self.term:
            chart = line_chart({"MLM term": self.term}, x_title="step", y_title="loss")
            charts.append((chart, "The MLM term before its weight."))
        if self.validator and len(self.validator.losses) > 1:
            charts.append(self._validation_chart())
        if self._has_files and len(self.ranking.files) > 1:
            caption = (
                "Context kept by the saved files: in the text encoder's states, and in the keys "
                "and values that the U-Net makes of them."
            )
            charts.append((self._context_chart(), caption))
        return charts

    def _validation_chart(self) -> tuple[Markup, str]:
        number = len(self.validator.dataset.images)
        caption = (
            f"Diffusion loss of {number} picture(s) that are not trained on, always with the same "
            "noise and timesteps."
        )
        curve = {"validation": list(self.validator.losses.items())}
        return line_chart(curve, x_title="step", y_title="loss"), caption

    def _context_chart(self) -> Markup:
        last = next(reversed(self.ranking.files))
        points = [
            Point(
                step,
                100 * share,
                f"{name}, {place}: {share:.0%}",
                series,
                label=place if name == last else "",
                curve=place,
            )
            for name, (step, reading) in self.ranking.files.items()
            for series, (place, share) in enumerate(
                (("keys and values", reading.cross_attention), ("text encoder", reading.encoder))
            )
        ]
        return scatter_chart(points, x_title="step", y_title="context kept, %", joined=True)

    def _samples(self) -> dict[str, Any] | None:
        """Prompts by steps; long runs are thinned out evenly."""
        if self.drawer is None or not self.drawer.drawn:
            return None
        prompts = [prompt.prompt for prompt in self.drawer.prompts]
        columns = max(2, min(MAX_COLUMNS, MAX_TILES // max(1, len(prompts))))
        steps = _evenly(sorted(self.drawer.drawn), columns)
        shown = {step: self.drawer.drawn[step] for step in steps}
        return {
            "steps": steps,
            "left_out": len(self.drawer.drawn) - len(steps),
            "rows": [
                (prompt, [self._picture(shown[step], row) for step in steps])
                for row, prompt in enumerate(prompts[:MAX_TILES])
            ],
        }

    def _picture(self, paths: Sequence[Path], row: int) -> Any:
        """A picture is read and scaled down once."""
        if row >= len(paths):
            return None
        if paths[row] not in self.pictures:
            self.pictures[paths[row]] = embed_picture(paths[row])
        return self.pictures[paths[row]]

    def _files(self) -> list[tuple[str, int, str, str]]:
        if not self._has_files:
            return []
        return [
            (name, step, f"{reading.cross_attention:.0%}", f"{reading.encoder:.0%}")
            for name, (step, reading) in self.ranking.files.items()
        ]


def _evenly(steps: Sequence[int], number: int) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= number:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
