"""One training of the bench and its evaluations: a setting of an arm, a concept and a seed.

Trains and evaluates like ``mlm-plugin pocket demo``, and adds rivals and times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.config.concepts import Concept as ConceptWords
from mlm_plugin.demo.options import BATCH_SIZE, MLM_BATCH_SIZE, Paths, mlm_options, run_options
from mlm_plugin.demo.trial import (
    ConceptTest,
    EvaluationCallback,
    Scores,
    create_trainer,
    pipeline_of,
)
from mlm_plugin.mlm.regularizer import MLMOutput, MLMSchedule
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.pocket.concepts import TUNING, training_scenes
from mlm_plugin.setup.console import output_to
from mlm_plugin.training.callbacks import StepResult
from mlm_plugin.training.trainer import Trainer
from research.bench.context import BenchContext
from research.bench.plan import Trial
from research.bench.records import key_of
from research.bench.rivals import RIVALS, ContextBatches, OutputPreservation, TextRival
from research.facts import facts_of_here
from research.pocket_model.pictures import scene_pixels
from research.pocket_model.train_vae import encode

__all__ = ["options_of", "run_trial", "trainer_of"]


class TimedEvaluations(EvaluationCallback):
    """Evaluates, and measures the time of the steps between the evaluations."""

    seconds, since, num_steps = 0.0, 0.0, 0

    @property
    def ms_per_step(self) -> float:
        """Mean without the evaluations and the first step, which is warm-up."""
        return round(1000 * self.seconds / max(1, self.num_steps), 1)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Record the time, then evaluate if this is one of the steps."""
        if trainer.progress.current_step > 1:
            self.seconds += time.perf_counter() - self.since
            self.num_steps += 1
        super().on_step_end(trainer, result)
        self.since = time.perf_counter()


def run_trial(trial: Trial, context: BenchContext) -> dict[str, Any]:
    """Train and evaluate; returns the record.

    Raises:
        Stopped: after a signal; the trial is discarded.
        UserError: as in the trainer.
    """
    arm, setting, concept, seed = trial
    began = time.perf_counter()
    test = ConceptTest(concept, seed, context.oracle, context.sampling, num_pictures=1)
    if arm.regularizer == "untrained":
        words = concept.scene.subject if setting["words"] == "class" else None
        untrained = pipeline_of(load_stable_diffusion(str(context.model)))
        found, ms_per_step = {0: test.evaluate(untrained, words=words)}, 0.0
    else:
        folder = context.folder / "runs" / key_of(trial)
        with output_to(folder / "log.txt"):
            trainer = trainer_of(trial, context, folder)
            callback = TimedEvaluations(test, _evaluation_steps(trial, context))
            trainer.callbacks = [callback]
            trainer.run()
        found, ms_per_step = callback.evaluations, callback.ms_per_step
    return {
        "key": key_of(trial),
        "setting": dict(setting),
        "concept": concept.name,
        "seed": seed,
        "evaluations": [_evaluation(step, evaluation.scores) for step, evaluation in found.items()],
        "ms_per_step": ms_per_step,
        "seconds": round(time.perf_counter() - began, 1),
        "commit": facts_of_here(torch.device("cpu"))["commit"],
    }


def _evaluation_steps(trial: Trial, context: BenchContext) -> tuple[int, ...]:
    """On tuning concepts the last alone, as the score of a search needs no more."""
    steps = context.plan.evaluation_steps
    return steps[-1:] if trial.concept in TUNING else steps


def _evaluation(step: int, scores: Scores) -> list[float]:
    return [step, round(scores.prompt_fidelity, 4), round(scores.identity, 4)]


def options_of(trial: Trial, context: BenchContext, folder: Path) -> dict[str, str]:
    """The trainer's options."""
    arm, setting, concept, seed = trial
    paths = Paths(context.model, context.data(concept), folder)
    num_steps = context.plan.evaluation_steps[-1]
    options = run_options(paths, method=arm.family.method, num_steps=num_steps, seed=seed)
    flags = {**arm.family.flags, **arm.flags, **setting}
    weight = flags.pop("weight", "0")
    if arm.regularizer == "mlm":
        options |= mlm_options(
            float(weight),
            prompts=context.prompts(concept, arm.grammar)[0],
            contextualizer=None
            if flags["mlm_target"] == "states"
            else context.contextualizer(arm.grammar),
        )
    if arm.regularizer == "prior_preservation":
        options |= {
            "prior_loss_weight": weight,
            "reg_data_dir": str(context.class_images(concept.scene.subject)),
            "train_data_dir": str(context.data_beside_class_images(concept)),
        }
    subject = concept.scene.subject
    options |= flags
    return {name: subject if value == "CLASS" else value for name, value in options.items()}


def trainer_of(trial: Trial, context: BenchContext, folder: Path) -> Trainer:
    """A trainer with the term of the arm."""
    trainer, concepts = create_trainer(options_of(trial, context, folder))
    if trial.arm.regularizer in RIVALS:
        trainer.regularizer = _rival(trial, concepts[0], trainer, context)
        trainer.mlm_schedule = MLMSchedule(float(trial.setting["weight"]))
    return trainer


def _rival(
    trial: Trial, words: ConceptWords, trainer: Trainer, context: BenchContext
) -> Callable[[int], MLMOutput]:
    arm, _setting, concept, seed = trial
    if arm.regularizer == "output_preservation":
        return OutputPreservation(
            method=trainer.method,
            caption=words.class_token,
            latents=encode(trainer.models.vae, scene_pixels(training_scenes(concept))),
            batch_size=BATCH_SIZE,
            seed=seed,
        )
    texts = context.prompts(concept, arm.grammar)[1]
    return TextRival(
        arm.regularizer,
        text_encoder=trainer.models.text_encoders[0],
        frozen=context.frozen_text_encoder(),
        concept=words,
        prompts=ContextBatches(texts, MLM_BATCH_SIZE, seed),
    )
