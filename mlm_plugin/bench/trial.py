"""One training of the benchmark and what is seen of it: an arm, a concept and a seed.

Trains through the standalone host, as a user would; only the looks on the way are added. Runs with
equal concept and seed share data order, noise and the noise of test pictures, whatever the arm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mlm_plugin.bench.plan import METHOD_FLAGS, Arm, BenchPlan
from mlm_plugin.bench.rivals import RIVALS, OutputPreservation, TextRival
from mlm_plugin.commands.train import build_trainer
from mlm_plugin.config.datasets import Concept as ConceptWords
from mlm_plugin.config.datasets import resolve_datasets
from mlm_plugin.config.loading import load_config
from mlm_plugin.evaluation.measures import mean_cosine_to, paired_cosine
from mlm_plugin.evaluation.metric_models import Clip, load_clip
from mlm_plugin.files import atomic_path
from mlm_plugin.methods import METHODS
from mlm_plugin.methods.checks import check_config
from mlm_plugin.mlm.regularizer import MLMOutput, MLMSchedule
from mlm_plugin.models.checkpoints import StableDiffusion, load_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pocket.build import CONTEXTUALIZER_RECIPE, contextualizer_captions
from mlm_plugin.pocket.concepts import (
    Concept,
    contexts,
    prompt_templates,
    training_scenes,
    write_concept,
)
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.pictures import scene_pixels
from mlm_plugin.pocket.quality import generate
from mlm_plugin.pocket.scores import identity, prompt_fidelity
from mlm_plugin.pocket.shipped import CONTEXTUALIZER
from mlm_plugin.pocket.train_vae import encode
from mlm_plugin.pocket.world import render
from mlm_plugin.pretrain import pretrain
from mlm_plugin.setup.accelerator import create_accelerator
from mlm_plugin.setup.data import create_dataset, find_concepts
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.samples import as_image
from mlm_plugin.training.trainer import Trainer

__all__ = [
    "Look",
    "Scores",
    "Watcher",
    "Workshop",
    "as_images",
    "contact_sheet",
    "look_at_base",
    "measure_base",
    "run_trial",
    "train_and_watch",
]

BATCH_SIZE = 4
MLM_BATCH_SIZE = 16
NUM_CLASS_IMAGES = 40
SHEET_COLUMNS = 8


class Workshop:
    """What all trials share: the model, its judges, folders and contextualizers, made when asked.

    Args:
        model: folder of a pocket model.
        folder: for everything that is written.
        plan: pictures per look and how they are drawn.
    """

    def __init__(self, model: Path, folder: Path, plan: BenchPlan):
        self.model, self.folder, self.plan = Path(model), Path(folder), plan
        self.oracle: Oracle = load_oracle(self.model / "oracle.safetensors")
        self.clip: Clip = load_clip(str(self.model / "clip"))

    def prepare(self, arms: Sequence[Arm], concepts: Sequence[Concept]) -> None:
        """Make what trials share, so that several at once only read it."""
        for concept in concepts:
            self.data(concept)
            for arm in arms:
                self.contexts(concept, arm)
            if any(arm.regularizer == "prior_preservation" for arm in arms):
                _class_images(concept, self)
        for num_blocks in {arm.num_blocks for arm in arms if arm.regularizer == "mlm"}:
            self.contextualizer(num_blocks)

    def data(self, concept: Concept) -> Path:
        """Training pictures of a concept."""
        folder = self.folder / "concepts" / concept.name.replace(" ", "_")
        if not (folder / "train").exists():
            write_concept(concept, folder)
        return folder / "train"

    def contexts(self, concept: Concept, arm: Arm) -> tuple[Path, list[str]]:
        """Prompts of the arm's term, as a file and as texts."""
        choice = arm.contexts
        texts = contexts(concept, number=choice.number, families=choice.families)
        name = f"contexts-{choice.number}-{'-'.join(choice.families)}.txt"
        path = self.data(concept).parent / name
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path, texts

    def contextualizer(self, num_blocks: int) -> Path:
        """A contextualizer of this depth, pretrained on captions of the world."""
        if num_blocks == CONTEXTUALIZER_RECIPE.num_layers:
            return self.model / CONTEXTUALIZER
        path = self.folder / "contextualizers" / f"{num_blocks}_blocks.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pretrain(
                self.frozen_text_encoder(),
                path,
                options=dataclasses.replace(CONTEXTUALIZER_RECIPE, num_layers=num_blocks),
                captions=contextualizer_captions(seed=0),
            )
        return path

    def frozen_text_encoder(self) -> TextEncoder:
        """The text encoder as it came."""
        model = CLIPTextModel.from_pretrained(
            self.model / "text_encoder", torch_dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer")
        return TextEncoder(tokenizer, model.eval().requires_grad_(False))


@dataclass(frozen=True)
class Scores:
    """Means over the test prompts."""

    prompt_fidelity: float
    identity: float
    clip_t: float
    clip_i: float


class Look(NamedTuple):
    """One picture or more per test prompt, ``(B, 3, 64, 64)``, and their scores."""

    scores: Scores
    pictures: Tensor


def run_trial(arm: Arm, concept: Concept, seed: int, workshop: Workshop) -> list[dict[str, Any]]:
    """Train and look: one record per look.

    Raises:
        Stopped: after a signal; nothing of the trial is kept.
        UserError: as the trainer has it.
    """
    folder = workshop.folder / "runs" / arm.name / f"{concept.token}-{seed}"
    watcher = train_and_watch(arm, concept, seed, workshop, folder)
    contact_sheet(watcher.pictures).save(folder / "last.png")
    return [
        {
            "method": arm.method,
            "regularizer": arm.regularizer,
            "weight": arm.weight,
            "variant": arm.variant,
            "concept": concept.name,
            "seed": seed,
            "step": step,
            **dataclasses.asdict(scores),
            "seconds_per_step": watcher.seconds_per_step,
        }
        for step, scores in watcher.scores.items()
    ]


def train_and_watch(
    arm: Arm,
    concept: Concept,
    seed: int,
    workshop: Workshop,
    folder: Path,
    *,
    keep_files: bool = False,
) -> Watcher:
    """Train, and give back what was seen; messages go to ``folder/log.txt``.

    Args:
        arm: how.
        concept: what.
        seed: of training and pictures.
        workshop: what trials share.
        folder: for the log and, with ``keep_files``, the trained file.
        keep_files: whether the trainer writes what it trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _output_to(folder / "log.txt"):
        trainer = _create_trainer(arm, concept, seed, workshop, folder)
        watcher = Watcher(concept, seed, workshop, workshop.plan.looks[arm.method])
        trainer.callbacks = [watcher, *(trainer.callbacks if keep_files else ())]
        trainer.run()
    return watcher


def look_at_base(concept: Concept, words: str, seed: int, workshop: Workshop) -> Look:
    """The untrained model on the test prompts, with ``words`` in the concept's place."""
    models = load_stable_diffusion(str(workshop.model))
    (text_encoder,) = models.text_encoders
    return _look(concept, words, seed, workshop, models, text_encoder.encode_captions)


def measure_base(concept: Concept, seed: int, workshop: Workshop) -> dict[str, Any]:
    """The untrained model with the class word: what fidelity could be."""
    scores = look_at_base(concept, concept.scene.subject, seed, workshop).scores
    return {
        "method": "base", "regularizer": "plain", "weight": 0.0, "variant": "",
        "concept": concept.name, "seed": seed, "step": 0,
        **dataclasses.asdict(scores), "seconds_per_step": 0.0,
    }  # fmt: skip


def flags_of(arm: Arm, concept: Concept, seed: int, workshop: Workshop, folder: Path) -> list[str]:
    """The trainer's command line."""
    flags = {
        "pretrained_model_name_or_path": str(workshop.model),
        "train_data_dir": str(workshop.data(concept)),
        "resolution": "64",
        "output_dir": str(folder),
        "method": arm.method,
        "train_batch_size": str(BATCH_SIZE),
        "max_train_steps": str(workshop.plan.num_train_steps(arm.method)),
        "max_data_loader_n_workers": "0",
        "cache_latents": "true",
        "seed": str(seed),
        "mlm_loss_weight": "0",
        **METHOD_FLAGS[arm.method],
        **arm.flags,
    }
    if arm.regularizer == "mlm":
        flags |= {
            "mlm_loss_weight": str(arm.weight),
            "mlm_batch_size": str(MLM_BATCH_SIZE),
            "mlm_prompt_set": str(workshop.contexts(concept, arm)[0]),
            "mlm_contextualizer": str(workshop.contextualizer(arm.num_blocks)),
        }
    if arm.regularizer == "prior_preservation":
        flags |= {
            "prior_loss_weight": str(arm.weight),
            "reg_data_dir": str(_class_images(concept, workshop)),
        }
    argv = []
    for name, value in flags.items():
        value = concept.scene.subject if value == "CLASS" else value
        argv += [f"--{name}"] if value == "true" else [f"--{name}", value]
    return argv


def _create_trainer(
    arm: Arm, concept: Concept, seed: int, workshop: Workshop, folder: Path
) -> Trainer:
    config = load_config(flags_of(arm, concept, seed, workshop, folder))
    check_config(config)
    datasets = resolve_datasets(config)
    words = find_concepts(config, datasets)
    METHODS[arm.method].check(config, words)
    trainer = build_trainer(
        config,
        accelerator=create_accelerator(config),
        dataset=create_dataset(config, datasets, words, seed=seed),
        concepts=words,
        seed=seed,
    )
    if arm.regularizer in RIVALS:
        trainer.regularizer = _rival(arm, concept, words[0], seed, workshop, trainer)
        trainer.mlm_schedule = MLMSchedule(arm.weight)
    return trainer


def _rival(
    arm: Arm,
    concept: Concept,
    words: ConceptWords,
    seed: int,
    workshop: Workshop,
    trainer: Trainer,
) -> Callable[[int], MLMOutput]:
    if arm.regularizer == "output_preservation":
        return OutputPreservation(
            method=trainer.method,
            network=trainer.method.network,
            caption=words.class_token,
            latents=encode(trainer.models.vae, scene_pixels(training_scenes(concept))),
            add_noise=trainer.models.noise_scheduler.add_noise,
            num_timesteps=trainer.models.noise_scheduler.config.num_train_timesteps,
            batch_size=BATCH_SIZE,
            seed=seed,
        )
    return TextRival(
        arm.regularizer,
        text_encoder=trainer.models.text_encoders[0],
        frozen=workshop.frozen_text_encoder(),
        concept=words,
        contexts=workshop.contexts(concept, arm)[1],
        batch_size=MLM_BATCH_SIZE,
        seed=seed,
    )


def _class_images(concept: Concept, workshop: Workshop) -> Path:
    """Pictures of the class by the base model, for prior preservation."""
    subject = concept.scene.subject
    folder = workshop.folder / "class_images" / subject
    if not folder.exists():
        models = load_stable_diffusion(str(workshop.model))
        pictures = _draw(
            [f"a photo of a {subject}"] * NUM_CLASS_IMAGES,
            seed=0,
            workshop=workshop,
            models=models,
            encode_captions=models.text_encoders[0].encode_captions,
        )
        target = folder / f"1_{subject}"
        target.mkdir(parents=True)
        for number, image in enumerate(as_images(pictures)):
            image.save(target / f"{number}.png")
    return folder


class Watcher(Callback):
    """Looks at the model at the given steps, and keeps the time of the steps between.

    Attributes:
        scores: by step.
        pictures: of the last look, ``(B, 3, 64, 64)``.
    """

    def __init__(self, concept: Concept, seed: int, workshop: Workshop, looks: Sequence[int]):
        self.concept, self.seed, self.workshop = concept, seed, workshop
        self.looks = frozenset(looks)
        self.scores: dict[int, Scores] = {}
        self.pictures = torch.empty(0)
        self.seconds, self.since, self.num_steps = 0.0, 0.0, 0

    @property
    def seconds_per_step(self) -> float:
        """Without the looks and without the first step, which warms up."""
        return round(self.seconds / max(1, self.num_steps), 5)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Look, if it is time."""
        step, now = trainer.progress.current_step, time.perf_counter()
        if step > 1:
            self.seconds += now - self.since
            self.num_steps += 1
        if step in self.looks:
            with trainer.evaluating():
                self.scores[step], self.pictures = _look(
                    self.concept,
                    self.concept.name,
                    self.seed,
                    self.workshop,
                    trainer.models,
                    lambda captions: trainer.method.encode(captions).states,
                )
        self.since = time.perf_counter()


def _look(
    concept: Concept,
    words: str,
    seed: int,
    workshop: Workshop,
    models: StableDiffusion,
    encode_captions: Callable[[Sequence[str]], Tensor],
) -> Look:
    prompts = [
        prompt for prompt in prompt_templates(concept) for _ in range(workshop.plan.num_pictures)
    ]
    pictures = _draw(
        [prompt.text.replace("{}", words) for prompt in prompts],
        seed=1000 * seed,
        workshop=workshop,
        models=models,
        encode_captions=encode_captions,
    )
    with torch.no_grad():
        reading = workshop.oracle(pictures)
    class_texts = [prompt.text.replace("{}", concept.scene.subject) for prompt in prompts]
    features = workshop.clip.image_features(as_images(pictures))
    originals = workshop.clip.image_features(
        [Image.fromarray(render(scene)) for scene in training_scenes(concept)]
    )
    scores = Scores(
        prompt_fidelity=_mean(prompt_fidelity(reading, prompts)),
        identity=_mean(identity(pictures, concept)),
        clip_t=_mean(paired_cosine(features, workshop.clip.text_features(class_texts))),
        clip_i=_mean(mean_cosine_to(features, originals)),
    )
    return Look(scores, pictures)


def _draw(
    texts: Sequence[str],
    *,
    seed: int,
    workshop: Workshop,
    models: StableDiffusion,
    encode_captions: Callable[[Sequence[str]], Tensor],
) -> Tensor:
    return generate(
        texts,
        unet=models.unet,
        vae=models.vae,
        encode_captions=encode_captions,
        seed=seed,
        num_steps=workshop.plan.num_steps,
        guidance=workshop.plan.guidance,
    )


def as_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures in [-1, 1] as Pillow has them."""
    return [as_image(picture) for picture in pictures]


def contact_sheet(pictures: Tensor) -> Image.Image:
    """All pictures in rows of eight."""
    images = as_images(pictures)
    side, rows = images[0].width, -(-len(images) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * side, rows * side), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % SHEET_COLUMNS * side, number // SHEET_COLUMNS * side))
    return sheet


def _mean(values: Tensor) -> float:
    return round(float(values.float().mean()), 5)


@contextlib.contextmanager
def _output_to(path: Path):
    with (
        path.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield
