"""`mlm-plugin pocket demo`: one concept learned twice, and the effect on prompts.

Every finished part is kept in the output folder and reused; a stopped training goes on from its
state.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from mlm_plugin.demo.options import (
    FOUND_RATES,
    LORA,
    MLM_WEIGHT,
    RECOMMENDED_TERM,
    Paths,
    mlm_options,
    run_options,
)
from mlm_plugin.demo.picture import Column, comparison_picture, prompts_to_show, selection_line
from mlm_plugin.demo.trial import (
    ConceptTest,
    EvaluationCallback,
    create_trainer,
    pipeline_of,
)
from mlm_plugin.demo.verdict import judge, verdict_lines
from mlm_plugin.evaluation.generate import claim_folder
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.weights_files import read_weights, write_weights
from mlm_plugin.pocket.concepts import Concept, write_concept
from mlm_plugin.pocket.oracle import load_oracle
from mlm_plugin.pocket.text_to_image import Sampling
from mlm_plugin.setup.console import output_to
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.step_bar import LateBar, StepBar

__all__ = ["DemoSettings", "run_demo"]

SOME_PROMPTS, ALL_PROMPTS = "demo.png", "all_prompts.png"
NUM_SHOWN = 8  # prompts in the first of these pictures
TITLES = {
    "base": "before training",
    "class_word": "before training, class word",
    "without_term": "without the term",
    "with_term": "with the term",
}
"""The parts, in order."""


class DemoSettings(NamedTuple):
    """How a demo is trained and drawn; as in the bench (``research/bench/PLAN.md``).

    Attributes:
        seed: of training and pictures.
        num_train_steps: steps of each training.
        sampling: how pictures are drawn.
    """

    seed: int = 0
    num_train_steps: int = 200
    sampling: Sampling = Sampling(num_steps=10, guidance=4.0)


def run_demo(
    concept: Concept, *, model: Path, output: Path, settings: DemoSettings | None = None
) -> int:
    """Train without and with the term, and write files and pictures; returns the exit code.

    Args:
        concept: what is learned.
        model: folder of a pocket model.
        output: new files go here; finished parts are found here.
        settings: seed, length, sampler; ``None``: those of the bench.

    Raises:
        UserError: the folder holds another demo.
    """
    settings = settings or DemoSettings()
    made_for = {"concept": concept.name, "model": str(model), **settings._asdict()}
    claim_folder(output, made_for)
    demo = _Demo(concept, model, output, settings)
    try:
        pictures = {
            "base": demo.untrained("base"),
            "class_word": demo.untrained("class_word", words=concept.scene.subject),
            "without_term": demo.trained("without_term"),
            "with_term": demo.trained("with_term", **demo.term()),
        }
    except (Stopped, KeyboardInterrupt) as stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return getattr(stopped, "exit_code", 130)
    demo.report(pictures)
    return 0


class _Demo:
    """The parts of a demo; each gives pictures ``(B, 3, 64, 64)`` in [-1, 1]."""

    def __init__(self, concept: Concept, model: Path, output: Path, settings: DemoSettings):
        self.concept, self.model, self.output = concept, model, output
        self.settings = settings
        self.stop_code = 0  # of a signal in the last step of a training, which is finished
        self.oracle = load_oracle(model / "oracle.safetensors")
        self.test = ConceptTest(
            concept, settings.seed, self.oracle, settings.sampling, num_pictures=1
        )
        self.data = output / "concept"
        if not (self.data / "contexts.txt").is_file():
            write_concept(concept, self.data)

    def term(self) -> dict[str, str]:
        """Options of the recommended term."""
        return {
            **mlm_options(MLM_WEIGHT, prompts=self.data / "contexts.txt"),
            **RECOMMENDED_TERM,
        }

    def untrained(self, name: str, words: str | None = None) -> Tensor:
        """Pictures of the base model; ``words`` in place of the concept."""

        def draw() -> Tensor:
            base = pipeline_of(load_stable_diffusion(str(self.model)))
            return self.test.evaluate(base, words, on_step=self._drawing_bar(name)).pictures

        return self._kept(name, draw)

    def trained(self, name: str, **term: str) -> Tensor:
        """Pictures after a training, whose files are in the folder of this name."""
        paths = Paths(self.model, self.data / "train", self.output / name)
        steps, seed = self.settings.num_train_steps, self.settings.seed
        options = run_options(paths, method="lora", num_steps=steps, seed=seed)
        return self._kept(
            name, lambda: self._train(name, {**options, **LORA, **FOUND_RATES, **term})
        )

    def _train(self, name: str, options: dict[str, str]) -> Tensor:
        """Train, or go on from the state of a stopped training, and draw after the last step."""
        folder = self.output / name
        states = sorted(folder.glob("*-state"))
        if states:
            options = {**options, "resume": str(states[-1])}
        steps = [self.settings.num_train_steps]
        drawing = EvaluationCallback(self.test, steps, on_sampler_step=self._drawing_bar(name))
        bar = StepBar(f"{TITLES[name]}: training")
        with output_to(folder / "log.txt"):
            trainer, _ = create_trainer(options)
            trainer.callbacks = [bar, drawing, *trainer.callbacks]
            trainer.run()
        self.stop_code = trainer.stop_code
        for state in states:
            shutil.rmtree(state)
        return drawing.last.pictures

    def _drawing_bar(self, name: str) -> LateBar:
        title = f"{TITLES[name]}: {len(self.test.prompts)} pictures"
        return LateBar(title, self.settings.sampling.num_steps)

    def _kept(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """The pictures of a part that was finished before, or new ones, which are kept."""
        path = self.output / name / "pictures.safetensors"
        number = f"{list(TITLES).index(name) + 1}/{len(TITLES)} {TITLES[name]}"
        if path.is_file():
            print(f"{number}: done before", flush=True)
        else:
            print(number, flush=True)
            write_weights(path, {"pictures": draw().contiguous()}, metadata={})
        if self.stop_code:
            raise Stopped(self.stop_code)
        return read_weights(path)["pictures"]

    def report(self, pictures: dict[str, Tensor]) -> None:
        """Write both pictures, and print what the oracle saw."""
        judged = {
            name: judge(found, self.test.prompts, self.oracle, self.concept)
            for name, found in pictures.items()
        }
        lines = verdict_lines(judged["without_term"], judged["with_term"])
        ceiling = judged.pop("class_word")
        columns = [Column(TITLES[name], pictures[name], judged[name]) for name in judged]
        self._write(ALL_PROMPTS, columns, lines, number=len(self.test.prompts))
        path = self._write(SOME_PROMPTS, columns, lines, number=NUM_SHOWN)
        print("\n".join(lines))
        print(
            f"For comparison, an ordinary {self.concept.scene.subject} before training: everything "
            f"as asked in {ceiling.num_right} of {len(ceiling.wrong)}."
        )
        print(f"picture: {path}, and with all prompts: {ALL_PROMPTS} beside it")
        print("trained: " + " and ".join(f"{n}/last.safetensors" for n in pictures if "term" in n))

    def _write(
        self, name: str, columns: Sequence[Column], lines: Sequence[str], *, number: int
    ) -> Path:
        """The comparison of some prompts; returns the absolute path."""
        texts = [prompt.text.replace("{}", self.concept.name) for prompt in self.test.prompts]
        shown = prompts_to_show(columns, number)
        lines = [*lines, *selection_line(columns, shown)]
        picture = comparison_picture(self.concept, texts, columns, shown=shown, verdict=lines)
        small = picture.quantize(256, kmeans=5, dither=Image.Dither.NONE)  # a third of the size
        path = self.output / name
        with atomic_path(path) as temporary:
            small.save(temporary, format="PNG", optimize=True)
        return path.resolve()
