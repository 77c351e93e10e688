"""The trials of a comparison: checked before the first, then trained, drawn and scored one by one.

A trial is an arm on a subject with a seed. Its folder is named by everything that determines its
pictures, so that a changed plan makes new ones beside the old. Arms that start from the same model
share the pictures of the untrained one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_plugin.commands.rehearsal import rehearse, without_messages
from mlm_plugin.commands.train import CheckedRun, check_run, trainer_of
from mlm_plugin.compare.identity import with_contents
from mlm_plugin.compare.plan import Arm, Plan
from mlm_plugin.compare.subjects import Subject
from mlm_plugin.config.loading import config_from_values
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import (
    EvaluationPrompt,
    evaluation_prompts,
    load_templates,
)
from mlm_plugin.evaluation.evaluated_model import EvaluatedModel, create_pipeline
from mlm_plugin.evaluation.generate import PICTURES, DrawingSettings, draw_pictures, picture_name
from mlm_plugin.evaluation.image_measures import Judges, score_pictures
from mlm_plugin.files import atomic_path, read_text
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.setup.console import output_to
from mlm_plugin.setup.data import create_dataset
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.guards import NonFiniteLoss
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.samples import SAMPLERS
from mlm_plugin.training.step_bar import StepBar
from mlm_plugin.training.trainer import Trainer

__all__ = ["Trial", "checked_trials", "score_trial", "train_trial"]

DONE, SCORES = "trial.json", "scores.json"
PLACES = ("output_dir", "train_data_dir", "dataset_config")  # photos are compared by content
STARTING_AT_THE_BASE = ("lora", "dreambooth")
"""Methods whose untrained model is the base model."""
ONLY_TRAINED = {
    *("network_dim", "network_alpha", "network_dropout", "scale_weight_norms"),
    *("network_train_unet_only", "network_train_text_encoder_only"),
    *("max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
    "gradient_checkpointing",
    *(
        name
        for name, entry in OPTIONS.items()
        if entry.group in ("optimizer", "mlm", "output", "logging", "sampling", "validation")
    ),
}
"""Options that say nothing about the untrained model."""


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        arm: name of the arm.
        subject: what is learned.
        run: its checked options and data, ``output_dir`` and ``seed`` included.
        photos: the training pictures.
        prompts: what is drawn.
        plan: when and how.
        untrained: folder of the pictures at step 0; arms that start alike have the same.
    """

    arm: str
    subject: Subject
    run: CheckedRun
    photos: tuple[Path, ...]
    prompts: tuple[EvaluationPrompt, ...]
    plan: Plan
    untrained: Path

    @property
    def seed(self) -> int:
        """Of the training, and of the noise of its pictures."""
        return self.run.config.schedule.seed

    @property
    def folder(self) -> Path:
        """Everything that the trial writes, except the pictures at step 0."""
        return Path(self.run.config.output.output_dir)

    @property
    def title(self) -> str:
        """Name in messages."""
        return f"{self.arm}, {self.subject.name}, seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it is trained, and all its pictures are drawn."""
        return (self.folder / DONE).is_file()

    def picture(self, step: int, prompt: int, number: int = 0) -> Path:
        """File of a picture; prompts and pictures are counted from 0."""
        return self.step_folder(step) / PICTURES / picture_name(prompt, number)

    def step_folder(self, step: int) -> Path:
        """Where the pictures of this step are."""
        return self.folder / f"step{step:06d}" if step else self.untrained


def checked_trials(
    plan: Plan, subjects: Sequence[Subject], *, model: str, output: Path, download: bool = True
) -> list[Trial]:
    """All trials, seed by seed, with every option and photo checked.

    Args:
        plan: the arms.
        subjects: what is learned.
        model: the base model.
        output: folder of the comparison.
        download: whether a base model that is not on this machine is fetched for the check.

    Raises:
        UserError: names the arm and the subject.
    """
    if plan.drawing.sampler not in SAMPLERS:
        raise UserError(
            f"sampler = {plan.drawing.sampler!r}: expected one of {', '.join(SAMPLERS)}"
        )
    groups = [
        _trials(arm, subject, plan, model=model, output=output, download=download)
        for subject in subjects
        for arm in plan.arms
    ]
    return [group[i] for i in range(len(plan.seeds)) for group in groups]


def _trials(
    arm: Arm, subject: Subject, plan: Plan, *, model: str, output: Path, download: bool
) -> list[Trial]:
    """An arm on a subject, with every seed."""
    options = {
        **arm.options,
        **subject.options(output),
        "pretrained_model_name_or_path": model,
        "max_train_steps": plan.evaluation_steps[-1],
        "output_dir": str(output),
    }
    try:
        run = check_run(config_from_values(options, place=f"arm {arm.name!r}"))
        dataset = create_dataset(*run, seed=0)
        with without_messages():  # every trial repeats them
            rehearse(run, dataset, seed=0, num_processes=1, download=download)
    except UserError as error:
        raise UserError(f"arm {arm.name!r}, subject {subject.name!r}: {error}") from error
    pictures = [image for image in dataset.images if not image.is_reg]
    prompts = evaluation_prompts(
        load_templates(plan.prompts, class_token=subject.class_token),
        placeholder_token=subject.placeholder_token,
        class_token=subject.class_token,
    )
    drawn = {
        "prompts": prompts,
        "pictures_per_prompt": plan.pictures_per_prompt,
        "drawing": asdict(plan.drawing),
    }
    changed = with_contents({k: v for k, v in run.config.changed().items() if k not in PLACES})
    facts = {
        "options": changed,
        "photos": [(i.path.name, i.facts.digest, i.caption, i.repeats) for i in dataset.images],
        "evaluation_steps": plan.evaluation_steps,
        **drawn,
    }
    untrained = _digest(_untrained(changed, facts) | drawn)
    trials = []
    for seed in plan.seeds:
        of_seed = f"{_file_name(subject.name)}-{seed}"
        name = f"{_file_name(arm.name)}-{of_seed}-{_digest(facts)}"
        config = run.config.replace(seed=seed, output_dir=str(output / "trials" / name))
        photos = tuple(image.path for image in pictures)
        run_of_seed = run._replace(config=config)
        folder = output / "untrained" / f"{of_seed}-{untrained}"
        trials.append(Trial(arm.name, subject, run_of_seed, photos, tuple(prompts), plan, folder))
    return trials


def _untrained(changed: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a trial's facts determines its untrained model; all where something is drawn new."""
    if changed.get("method", OPTIONS["method"].default) not in STARTING_AT_THE_BASE:
        return dict(facts)
    return {"options": {k: v for k, v in changed.items() if k not in ONLY_TRAINED}}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+]+", "_", text)


def _digest(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- training and drawing -------------------------------------------------------------------


def train_trial(trial: Trial) -> None:
    """Train and draw; continues from the state of a stopped run.

    Raises:
        Stopped: after a signal; the state is saved, or the trial was at its end and is done.
        UserError: as in the trainer, or the loss is not finite.
    """
    config, folder = trial.run.config, trial.folder
    states = sorted(folder.glob("*-state"))
    if states:
        config = config.replace(resume=str(states[-1]))
    else:
        shutil.rmtree(folder, ignore_errors=True)  # pictures of a run that left no state
    bar = StepBar("  training")
    try:
        with output_to(folder / "log.txt", append=bool(states)):
            trainer = trainer_of(trial.run._replace(config=config))
            trainer.callbacks[:0] = [bar, DrawAtSteps(trial)]
            trainer.run()
            stop_code = trainer.stop_code
    except NonFiniteLoss as error:
        raise UserError(f"{trial.title}: {error}; {error.advice}") from error
    except UserError as error:
        raise UserError(f"{trial.title}: {error}") from error
    finally:
        trainer = None
        gc.collect()  # the trainer and its callbacks know each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    options = {name: str(value) for name, value in trial.run.config.changed().items()}
    _write_json(folder / DONE, {"trial": trial.title, "options": options})
    for state in states:
        shutil.rmtree(state)
    if stop_code:
        raise Stopped(stop_code)


class DrawAtSteps(Callback):
    """Draws the prompts at the steps of the plan."""

    def __init__(self, trial: Trial):
        self.trial = trial
        plan = trial.plan
        drawing = asdict(plan.drawing)
        self.sampler = drawing.pop("sampler")
        self.settings = DrawingSettings(plan.pictures_per_prompt, trial.seed, **drawing)

    def on_train_start(self, trainer: Trainer) -> None:
        """Evaluate the untrained model, or finish an evaluation that has failed."""
        self._evaluate(trainer)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Draw, if this is one of the steps."""
        self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        step = trainer.progress.current_step
        if step not in self.trial.plan.evaluation_steps:
            return
        with drawing_model(trainer, self.sampler) as model:
            draw_pictures(
                self.trial.step_folder(step),
                self.trial.prompts,
                self.settings,
                load=lambda: model,
                show_progress=False,
            )


@contextmanager
def drawing_model(trainer: Trainer, sampler: str) -> Iterator[EvaluatedModel]:
    """The model in training, ready to draw; the training continues as if nothing had been drawn.

    The VAE works in fp32, as in `evaluate`.
    """
    models, vae, device = trainer.models, trainer.models.vae, trainer.accelerator.device
    place, dtype = vae.device, vae.dtype
    with preserved_random_state(device), trainer.evaluating():
        torch.nn.Module.to(vae, device, torch.float32)  # diffusers' own warns of its precision
        try:
            yield EvaluatedModel(
                create_pipeline(models, sampler),
                models.text_encoders,
                [],
                trainer.method.encode,
                models.family,
                trainer.accelerator.autocast,
            )
        finally:
            torch.nn.Module.to(vae, place, dtype)


# --- scores ---------------------------------------------------------------------------------


def score_trial(
    trial: Trial, names: Mapping[str, str], *, load: Callable[[], Judges]
) -> list[dict[str, Any]]:
    """A record with the measures of each evaluation; those that the same judges gave are kept.

    Args:
        trial: is done.
        names: of the judges.
        load: returns the judges, on their device.

    Returns:
        ``arm``, ``subject``, ``seed``, ``step``, and ``measures`` by name.
    """
    path = trial.folder / SCORES
    known = json.loads(read_text(path)) if path.is_file() else {}
    if known.get("judges") != dict(names):
        by_step = {str(step): _scores(trial, step, load()) for step in trial.plan.evaluation_steps}
        known = {"judges": dict(names), "measures": by_step}
        _write_json(path, known)
    return [
        {
            "arm": trial.arm,
            "subject": trial.subject.name,
            "seed": trial.seed,
            "step": step,
            "measures": known["measures"][str(step)],
        }
        for step in trial.plan.evaluation_steps
    ]


def _scores(trial: Trial, step: int, judges: Judges) -> dict[str, float]:
    pictures = [
        [trial.picture(step, i, j) for j in range(trial.plan.pictures_per_prompt)]
        for i in range(len(trial.prompts))
    ]
    found = score_pictures(pictures, trial.prompts, trial.photos, judges, masks={})
    return {name: measure["mean"] for name, measure in found["measures"].items()}


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
