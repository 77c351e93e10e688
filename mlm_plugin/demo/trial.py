"""One training of a concept on a pocket model, evaluated during training.

Trains through the standalone trainer, as a user would; only the evaluations are added. Runs of one
concept with equal seeds share data order, noise and the noise of test pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mlm_plugin.commands.train import check_run, trainer_of
from mlm_plugin.config.concepts import Concept as ConceptWords
from mlm_plugin.config.loading import load_config
from mlm_plugin.demo.options import as_argv
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import Concept, prompt_templates
from mlm_plugin.pocket.oracle import Oracle
from mlm_plugin.pocket.scores import identity, prompt_fidelity
from mlm_plugin.pocket.text_to_image import Sampling, TextToImage, generate
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.samples import as_image
from mlm_plugin.training.trainer import Trainer

__all__ = [
    "ConceptTest",
    "Evaluation",
    "EvaluationCallback",
    "Scores",
    "as_images",
    "create_trainer",
    "mean_of",
    "pipeline_of",
]


@dataclass(frozen=True)
class Scores:
    """Means over the test prompts."""

    prompt_fidelity: float
    identity: float


class Evaluation(NamedTuple):
    """Pictures for the test prompts, ``(B, 3, 64, 64)`` in [-1, 1], and their scores."""

    scores: Scores
    pictures: Tensor


@dataclass(frozen=True)
class ConceptTest:
    """Draws the test prompts of a concept and scores the pictures.

    Attributes:
        concept: its prompts are drawn.
        seed: determines the noise of the pictures.
        oracle: recognizes what is in a picture.
        sampling: how pictures are drawn.
        num_pictures: number of pictures per prompt.
    """

    concept: Concept
    seed: int
    oracle: Oracle
    sampling: Sampling
    num_pictures: int

    @property
    def prompts(self) -> list[Caption]:
        """The prompt of each picture, with ``{}`` for the concept."""
        return [p for p in prompt_templates(self.concept) for _ in range(self.num_pictures)]

    def evaluate(
        self,
        model: TextToImage,
        words: str | None = None,
        *,
        on_step: Callable[[], object] = lambda: None,
    ) -> Evaluation:
        """Draw every test prompt and score the pictures.

        Args:
            model: draws the pictures.
            words: replace the concept in prompts; ``None``: its name.
            on_step: called after each step of the sampler.
        """
        texts = [prompt.text.replace("{}", words or self.concept.name) for prompt in self.prompts]
        pictures = generate(texts, model, self.sampling, seed=1000 * self.seed, on_step=on_step)
        return Evaluation(self.score(pictures, self.prompts), pictures)

    def score(self, pictures: Tensor, prompts: Sequence[Caption]) -> Scores:
        """Mean scores of pictures, one for each prompt."""
        with torch.no_grad():
            predictions = self.oracle(pictures)
        return Scores(
            prompt_fidelity=mean_of(prompt_fidelity(predictions, prompts)),
            identity=mean_of(identity(pictures, self.concept)),
        )


class EvaluationCallback(Callback):
    """Evaluates the model after the given steps.

    Args:
        test: what is drawn.
        steps: when.
        on_sampler_step: called after each step of the sampler.

    Attributes:
        evaluations: evaluations by step.
    """

    def __init__(
        self,
        test: ConceptTest,
        steps: Collection[int],
        *,
        on_sampler_step: Callable[[], object] = lambda: None,
    ):
        self.test, self.steps = test, frozenset(steps)
        self.on_sampler_step = on_sampler_step
        self.evaluations: dict[int, Evaluation] = {}

    @property
    def last(self) -> Evaluation:
        """The latest evaluation."""
        return self.evaluations[max(self.evaluations)]

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate if this is one of the steps."""
        step = trainer.progress.current_step
        if step in self.steps:
            with trainer.evaluating():
                self.evaluations[step] = self.test.evaluate(
                    _trained_pipeline(trainer), on_step=self.on_sampler_step
                )


def create_trainer(options: Mapping[str, str]) -> tuple[Trainer, Sequence[ConceptWords]]:
    """A trainer from its options, and the concepts as in its prompts.

    Args:
        options: options of the ``train`` command, including ``seed``.

    Raises:
        UserError: as in the ``train`` command.
    """
    run = check_run(load_config(as_argv(options)))
    return trainer_of(run), run.concepts


def pipeline_of(models: StableDiffusion) -> TextToImage:
    """A pipeline of the untrained model."""
    (text_encoder,) = models.text_encoders
    return TextToImage(models.unet, models.vae, text_encoder.encode_captions)


def _trained_pipeline(trainer: Trainer) -> TextToImage:
    models = trainer.models
    return TextToImage(
        models.unet, models.vae, lambda captions: trainer.method.encode(captions).states
    )


def as_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures in [-1, 1] as Pillow images."""
    return [as_image(picture) for picture in pictures]


def mean_of(values: Tensor) -> float:
    """Mean, rounded to five decimals."""
    return round(float(values.float().mean()), 5)
