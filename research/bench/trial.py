"""One training of the benchmark and its evaluations: a setting, a concept and a seed.

Trains and evaluates like ``mlm-plugin pocket demo``, and adds rivals, CLIP scores and step times.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from mlm_plugin.config.datasets import Concept as ConceptWords
from mlm_plugin.demo.options import BATCH_SIZE, MLM_BATCH_SIZE, Paths, mlm_options, run_options
from mlm_plugin.demo.trial import (
    ConceptTest,
    EvaluationCallback,
    as_images,
    create_trainer,
    mean_of,
    pipeline_of,
)
from mlm_plugin.demo.trial import Scores as OracleScores
from mlm_plugin.evaluation.measures import mean_cosine_to, paired_cosine
from mlm_plugin.evaluation.metric_models import Clip
from mlm_plugin.mlm.regularizer import MLMOutput, MLMSchedule
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import Concept, training_scenes
from mlm_plugin.pocket.world import render
from mlm_plugin.setup.console import output_to
from mlm_plugin.training.callbacks import StepResult
from mlm_plugin.training.trainer import Trainer
from research.bench.context import BenchContext
from research.bench.plan import METHOD_FLAGS, Setting
from research.bench.rivals import RIVALS, ContextBatches, OutputPreservation, TextRival
from research.pocket_model.pictures import scene_pixels
from research.pocket_model.train_vae import encode

__all__ = ["Trial", "contact_sheet", "run_trial"]

SHEET_COLUMNS = 8


class Trial(NamedTuple):
    """A setting, or ``None`` for the untrained model, on a concept with a seed."""

    setting: Setting | None
    concept: Concept
    seed: int


@dataclass(frozen=True)
class Scores(OracleScores):
    """Means over the test prompts, including those by the pocket CLIP."""

    clip_t: float
    clip_i: float


@dataclass(frozen=True)
class BenchTest(ConceptTest):
    """The test of a concept with CLIP as a second judge."""

    clip: Clip

    def score(self, pictures: Tensor, prompts: Sequence[Caption]) -> Scores:
        """Mean scores of pictures, one for each prompt."""
        class_texts = [p.text.replace("{}", self.concept.scene.subject) for p in prompts]
        features = self.clip.image_features(as_images(pictures))
        originals = self.clip.image_features(
            [Image.fromarray(render(scene)) for scene in training_scenes(self.concept)]
        )
        return Scores(
            **dataclasses.asdict(super().score(pictures, prompts)),
            clip_t=mean_of(paired_cosine(features, self.clip.text_features(class_texts))),
            clip_i=mean_of(mean_cosine_to(features, originals)),
        )


class TimedEvaluations(EvaluationCallback):
    """Evaluates, and measures the time of the steps between the evaluations."""

    seconds, since, num_steps = 0.0, 0.0, 0

    @property
    def seconds_per_step(self) -> float:
        """Mean without the evaluations and the first step, which is warm-up."""
        return round(self.seconds / max(1, self.num_steps), 5)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Record the time, then evaluate if this is one of the steps."""
        if trainer.progress.current_step > 1:
            self.seconds += time.perf_counter() - self.since
            self.num_steps += 1
        super().on_step_end(trainer, result)
        self.since = time.perf_counter()


def run_trial(trial: Trial, context: BenchContext) -> list[dict[str, Any]]:
    """Train and evaluate: one record per evaluation.

    Raises:
        Stopped: after a signal; the trial is discarded.
        UserError: as in the trainer.
    """
    setting, concept, seed = trial
    plan = context.plan
    test = BenchTest(
        concept, seed, context.oracle, context.sampling, plan.num_pictures, context.clip
    )
    if setting is None:  # the ceiling of fidelity: the untrained model with the class word
        base = pipeline_of(load_stable_diffusion(str(context.model)))
        scores = test.evaluate(base, words=concept.scene.subject).scores
        return [_record(trial, 0, scores, seconds_per_step=0.0)]
    folder = context.folder / "runs" / setting.name / f"{concept.token}-{seed}"
    with output_to(folder / "log.txt"):
        trainer = trainer_of(trial, context, folder)
        callback = TimedEvaluations(test, plan.evaluation_steps[setting.method])
        trainer.callbacks = [callback]
        trainer.run()
    contact_sheet(callback.last.pictures).save(folder / "last.png")
    return [
        _record(trial, step, evaluation.scores, seconds_per_step=callback.seconds_per_step)
        for step, evaluation in callback.evaluations.items()
    ]


def _record(trial: Trial, step: int, scores: Scores, *, seconds_per_step: float) -> dict[str, Any]:
    setting = trial.setting or Setting("base")
    return {
        "method": setting.method,
        "regularizer": setting.regularizer,
        "weight": setting.weight,
        "variant": setting.variant,
        "concept": trial.concept.name,
        "seed": trial.seed,
        "step": step,
        **dataclasses.asdict(scores),
        "seconds_per_step": seconds_per_step,
    }


def options_of(trial: Trial, context: BenchContext, folder: Path) -> dict[str, str]:
    """The trainer's options."""
    setting, concept, seed = trial
    num_steps = context.plan.num_train_steps(setting.method)
    paths = Paths(context.model, context.data(concept), folder)
    options = run_options(paths, method=setting.method, num_steps=num_steps, seed=seed)
    options |= {**METHOD_FLAGS[setting.method], **setting.flags}
    if setting.regularizer == "mlm":
        options |= mlm_options(
            setting.weight,
            prompts=context.prompts(concept, setting)[0],
            contextualizer=context.contextualizer(setting.num_blocks),
        )
    if setting.regularizer == "prior_preservation":
        options |= {
            "prior_loss_weight": str(setting.weight),
            "reg_data_dir": str(context.class_images(concept.scene.subject)),
        }
    subject = concept.scene.subject
    return {name: subject if value == "CLASS" else value for name, value in options.items()}


def trainer_of(trial: Trial, context: BenchContext, folder: Path) -> Trainer:
    """A trainer with the term of the setting."""
    setting = trial.setting
    trainer, concepts = create_trainer(options_of(trial, context, folder))
    if setting.regularizer in RIVALS:
        trainer.regularizer = _rival(trial, concepts[0], trainer, context)
        trainer.mlm_schedule = MLMSchedule(setting.weight)
    return trainer


def _rival(
    trial: Trial, words: ConceptWords, trainer: Trainer, context: BenchContext
) -> Callable[[int], MLMOutput]:
    setting, concept, seed = trial
    if setting.regularizer == "output_preservation":
        return OutputPreservation(
            method=trainer.method,
            caption=words.class_token,
            latents=encode(trainer.models.vae, scene_pixels(training_scenes(concept))),
            batch_size=BATCH_SIZE,
            seed=seed,
        )
    return TextRival(
        setting.regularizer,
        text_encoder=trainer.models.text_encoders[0],
        frozen=context.frozen_text_encoder(),
        concept=words,
        prompts=ContextBatches(context.prompts(concept, setting)[1], MLM_BATCH_SIZE, seed),
    )


def contact_sheet(pictures: Tensor) -> Image.Image:
    """All pictures, eight side by side."""
    images = as_images(pictures)
    side, num_lines = images[0].width, -(-len(images) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * side, num_lines * side), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % SHEET_COLUMNS * side, number // SHEET_COLUMNS * side))
    return sheet
