"""The page of a run: curves, samples, sentences, files, settings, warnings.

It is written again whenever there is something new, and needs nothing from outside. Knows no
trainer: ``page_writer.py`` writes it in the standalone one, ``sd_scripts/run_watch.py`` in kohya's.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mlm_plugin.errors import shown_error
from mlm_plugin.evaluation.rendering import embed_picture, render
from mlm_plugin.files import atomic_path
from mlm_plugin.setup.best_file import BestFile
from mlm_plugin.setup.console import kept_warnings

__all__ = ["NOT_SHOWN", "Curves", "RunFacts", "RunPage", "Samples", "can_draw_curves"]

logger = logging.getLogger(__name__)

MAX_COLUMNS, MAX_TILES = 12, 120
NUM_SENTENCES = 6
NOT_SHOWN = ("wandb_api_key", "huggingface_token", "config_file")
"""Options whose values are nobody's business."""


class Samples(NamedTuple):
    """Pictures drawn so far.

    Attributes:
        prompts: one for each row.
        drawn: pictures in the order of the prompts by step, or by what else says when.
    """

    prompts: Sequence[str]
    drawn: Mapping[Any, Sequence[Path | None]]


class Curves(NamedTuple):
    """What is measured now and then, in one chart.

    Attributes:
        caption: what they show.
        y_title: of the axis.
        values: by name and step; they grow with the run.
    """

    caption: str
    y_title: str
    values: Mapping[str, Mapping[int, float]]

    @property
    def is_one(self) -> bool:
        """Whether there are points enough to draw."""
        return any(len(values) > 1 for values in self.values.values())

    def chart(self) -> Markup:
        """The chart as SVG."""
        from mlm_plugin.evaluation.charts import line_chart

        points = {name: list(values.items()) for name, values in self.values.items()}
        return line_chart(points, x_title="step", y_title=self.y_title)


class RunFacts(NamedTuple):
    """What does not change during a run.

    Attributes:
        title: its name.
        concept: what it learns, as in prompts.
        settings: values by option.
        settings_note: which options these are.
        versions: versions of libraries by name.
    """

    title: str
    concept: str
    settings: Mapping[str, Any]
    settings_note: str
    versions: dict[str, str]


class RunPage:
    """Collects what a run reports and writes its page.

    Args:
        path: of the page.
        facts: of the run.
        ranking: ranks files by their context, if it does.
        samples: the pictures drawn so far, if any are.
        curves: charts besides those of the losses.

    Attributes:
        best_copy: name of a copy of the best file, where one is kept.
    """

    def __init__(
        self,
        path: Path,
        facts: RunFacts,
        *,
        ranking: BestFile | None = None,
        samples: Callable[[], Samples | None] = lambda: None,
        curves: Sequence[Curves] = (),
    ):
        self.path, self.facts, self.curves = path, facts, curves
        self.ranking, self.samples = ranking, samples
        self.diffusion: list[tuple[float, float]] = []
        self.term: list[tuple[float, float]] = []
        self.best_copy: str | None = None
        self.pictures: dict[Path, Any] = {}  # embedded, by path

    def add_step(self, step: int, diffusion: float, mlm: float | None) -> None:
        """Note the losses of a step; ``None`` where the term did not act."""
        self.diffusion.append((step, diffusion))
        if mlm is not None:
            self.term.append((step, mlm))

    def measured(self) -> dict[str, list]:
        """The losses so far, for the state of a run."""
        return {"diffusion": self.diffusion, "term": self.term}

    def recall(self, measured: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Take up what :meth:`measured` told."""
        self.diffusion[:0] = [(step, loss) for step, loss in measured["diffusion"]]
        self.term[:0] = [(step, loss) for step, loss in measured["term"]]

    def write(self, *, step: int, num_steps: int) -> bool:
        """Replace the page, and say whether; one that cannot be written does not end a run."""
        if not self.diffusion:
            return False
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_text(self._page(step, num_steps), encoding="utf-8")
        except Exception as error:  # whatever it is
            shown = shown_error(error)
            logger.warning("%s could not be saved (%s); training continues", self.path, shown)
            return False
        return True

    def _page(self, step: int, num_steps: int) -> str:
        facts = self.facts
        return render(
            "run.html",
            title=facts.title,
            concept=facts.concept,
            step=step,
            num_steps=num_steps,
            written=time.strftime("%Y-%m-%d %H:%M"),
            charts=self._charts(),
            samples=self._tiles(),
            files=self._files(),
            best=self.ranking.best if self.ranking else None,
            best_copy=self.best_copy,
            sentences=self.ranking.score.sentences(NUM_SENTENCES) if self._has_files else [],
            settings=[(name, _shown(value)) for name, value in facts.settings.items()],
            settings_note=facts.settings_note,
            versions=facts.versions,
            warnings=kept_warnings(),
        )

    @property
    def _has_files(self) -> bool:
        return self.ranking is not None and bool(self.ranking.files)

    def _charts(self) -> list[tuple[Markup, str]]:
        if not can_draw_curves():
            return []
        from mlm_plugin.evaluation.charts import line_chart

        charts = [
            (
                line_chart({"diffusion": self.diffusion}, x_title="step", y_title="loss"),
                "Diffusion loss of every step, and its running mean over a tenth of the steps.",
            )
        ]
        if self.term:
            chart = line_chart({"MLM term": self.term}, x_title="step", y_title="loss")
            charts.append((chart, "The MLM term before its weight."))
        charts += [(curves.chart(), curves.caption) for curves in self.curves if curves.is_one]
        if self._has_files and len(self.ranking.files) > 1:
            caption = (
                "Context kept by the saved files: in the text encoder's states, and in the keys "
                "and values that the U-Net makes of them."
            )
            charts.append((self._context_chart(), caption))
        return charts

    def _context_chart(self) -> Markup:
        from mlm_plugin.evaluation.charts import Point, scatter_chart

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

    def _tiles(self) -> dict[str, Any] | None:
        """Prompts by steps; long runs are thinned out evenly."""
        samples = self.samples()
        if samples is None or not samples.drawn:
            return None
        prompts, drawn = samples
        columns = max(2, min(MAX_COLUMNS, MAX_TILES // max(1, len(prompts))))
        steps = _evenly(list(drawn), columns)
        return {
            "steps": steps,
            "left_out": len(drawn) - len(steps),
            "rows": [
                (prompt, [self._picture(drawn[step], row) for step in steps])
                for row, prompt in enumerate(prompts[:MAX_TILES])
            ],
        }

    def _picture(self, paths: Sequence[Path | None], row: int) -> Any:
        """A picture is read and scaled down once."""
        if row >= len(paths) or paths[row] is None:
            return None
        if paths[row] not in self.pictures:
            self.pictures[paths[row]] = embed_picture(paths[row])
        return self.pictures[paths[row]]

    def _files(self) -> list[tuple[str, int, str, str]]:
        if not self._has_files:
            return []
        return [
            (name, step, f"{reading.cross_attention:.0%}", f"{reading.encoder:.0%}")
            for name, (step, reading) in self.ranking.there.items()
        ]


def can_draw_curves() -> bool:
    """Whether matplotlib is here, which sd-scripts does not install."""
    return importlib.util.find_spec("matplotlib") is not None


def _evenly(steps: Sequence[Any], number: int) -> list[Any]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= number:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
