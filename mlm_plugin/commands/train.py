"""The standalone trainer: options in, trained files out. It only assembles the parts.

Reading order: :func:`train` is the whole program, :func:`build_trainer` creates the trainer; each
step is in ``mlm_plugin/setup/``.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mlm_plugin.config.datasets import Concept, DatasetConfig, resolve_datasets
from mlm_plugin.config.loading import load_config, write_config
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import EpochOrder, TrainDataset
from mlm_plugin.data.dataset_report import dataset_report
from mlm_plugin.errors import UserError
from mlm_plugin.files import require_writable
from mlm_plugin.methods import METHODS
from mlm_plugin.methods.checks import check_config, check_model
from mlm_plugin.mlm_setup import mlm_schedule, trigger_of
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.pretrain import Interrupted
from mlm_plugin.setup.accelerator import create_accelerator, shared_seed
from mlm_plugin.setup.builtin_names import with_built_in_paths
from mlm_plugin.setup.class_image_folders import prepare_class_images
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.setup.data import (
    create_dataset,
    create_loader,
    create_order,
    find_concepts,
    print_report,
    require_placeholders,
)
from mlm_plugin.setup.early_checks import require_what_is_named
from mlm_plugin.setup.models import (
    cache_latents,
    cached_captions,
    load_models,
    place_models,
    prepare_models,
    warn_of_small_pictures,
)
from mlm_plugin.setup.optimization import create_optimization, create_plan
from mlm_plugin.setup.sampling import SampleDrawer, sample_drawer
from mlm_plugin.setup.saving import RunRecord, Saver, require_output_name
from mlm_plugin.setup.term import attach_term, prepare_term
from mlm_plugin.setup.tracking import curve_loggers
from mlm_plugin.training.callbacks import Callback, SaveFailed
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.guards import NonFiniteLoss
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.plan import MLMTerm, Objective
from mlm_plugin.training.processes import ProcessLost
from mlm_plugin.training.schedulers import rate_jumps
from mlm_plugin.training.state import RunIdentity, check_state
from mlm_plugin.training.trainer import Trainer

__all__ = ["CheckedRun", "build_trainer", "check_run", "train", "trainer_of"]

logger = logging.getLogger(__name__)

ENDS = (Stopped, NonFiniteLoss)  # of a run, during which the last state is saved

COMMON_STATE_OPTIONS = (
    "method",
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "optimizer_type",
    "optimizer_args",
    "lr_scheduler",
    "lr_scheduler_type",
    "lr_scheduler_args",
    "lr_warmup_steps",
)
"""What every training state depends on; ``Method.state_options`` has the rest."""


def train(argv: Sequence[str]) -> int:
    """Run a training from its command line.

    Returns:
        Exit code: 0, 1 after a non-finite loss, 130 / 143 after SIGINT / SIGTERM.

    Raises:
        UserError: anything the user can fix, before time is spent where possible.
    """
    config = load_config(argv)
    setup_console(config.logging)
    quiet_libraries()
    if config.run.output_config:
        print(f"wrote {write_config(config)}")
        return 0
    config, datasets, concepts = check_run(config)
    if config.run.check or config.dataset.debug_dataset:
        _print_data(config, datasets, concepts)
        return 0
    require_writable(config.output.output_dir, "output_dir")
    require_output_name(config.output)
    accelerator = create_accelerator(config)
    seed = shared_seed(config)
    try:
        if config.finetune.generate_class_images:
            config = prepare_class_images(
                config, concepts, models=lambda: load_models(config), accelerator=accelerator
            )
            datasets = resolve_datasets(config)
        dataset = create_dataset(config, datasets, concepts, seed=seed)
        trainer = build_trainer(
            config, accelerator=accelerator, dataset=dataset, concepts=concepts, seed=seed
        )
        trainer.run()
    except (Stopped, Interrupted) as stopped:
        accelerator.print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except SaveFailed as error:
        first = f"{error.__context__}; " if isinstance(error.__context__, ENDS) else ""
        accelerator.print(f"error: {first}{error}", file=sys.stderr)
        return 1
    except ProcessLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except NonFiniteLoss as error:
        accelerator.print(
            f"error: {error}; {error.saved}. Start again with {error.advice}",
            file=sys.stderr,
        )
        return 1
    accelerator.state.destroy_process_group()
    return 0


class CheckedRun(NamedTuple):
    """Options that fit each other and the data, the data sets, and what is learned."""

    config: TrainConfig
    datasets: Sequence[DatasetConfig]
    concepts: Sequence[Concept]


def check_run(config: TrainConfig) -> CheckedRun:
    """Check everything that can be checked without a model or a picture.

    Raises:
        UserError: options that contradict each other or the data, or name what is not there.
    """
    check_config(config)
    config = with_built_in_paths(config)
    datasets = resolve_datasets(config)
    concepts = find_concepts(config, datasets)
    METHODS[config.schedule.method].check(config, concepts)
    require_what_is_named(config, concepts)
    return CheckedRun(config, datasets, concepts)


def _print_data(
    config: TrainConfig, datasets: Sequence[DatasetConfig], concepts: Sequence[Concept]
) -> None:
    """The report of ``--check``: data, concepts and length; no model is loaded for it.

    The length is that of one process.
    """
    dataset = create_dataset(config, datasets, concepts, seed=config.schedule.seed or 0)
    report = dataset_report(dataset, concepts=[concept.text for concept in concepts])
    print("\n".join(report.lines()))
    for concept in concepts:
        print(f"Concept: {concept.placeholder_token!r} is a {concept.class_token or 'thing'}")
    accumulated = config.schedule.gradient_accumulation_steps
    order = EpochOrder(dataset, rank=0, world_size=1, batches_per_step=accumulated)
    plan = create_plan(config, batches_per_epoch=len(order))
    print(f"Length: {plan.num_steps} steps, {plan.num_epochs} epochs")


def trainer_of(run: CheckedRun) -> Trainer:
    """The trainer of a run whose options name the seed, in a process of its own."""
    config, datasets, concepts = run
    seed = config.schedule.seed
    return build_trainer(
        config,
        accelerator=create_accelerator(config),
        dataset=create_dataset(config, datasets, concepts, seed=seed),
        concepts=concepts,
        seed=seed,
    )


def build_trainer(
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    dataset: TrainDataset,
    concepts: Sequence[Concept],
    seed: int,
) -> Trainer:
    """Everything between checked options and the first step."""
    identity = RunIdentity(seed, accelerator.num_processes, _settings_of(config, dataset, concepts))
    _refuse_before_loading(config, dataset, concepts, identity)
    models = _load_base_model(config, dataset, concepts, accelerator)
    term = prepare_term(
        config, models, concepts=concepts, dataset=dataset, accelerator=accelerator, seed=seed
    )
    place_models(config, models, accelerator.device)  # not earlier, as pretraining needs memory
    curves = curve_loggers(config, models, accelerator)

    set_seed(seed)  # here, so that the adapters start the same with and without the MLM term
    method = METHODS[config.schedule.method].prepare(models, config, concepts)
    regularizer = term and attach_term(term, config, method, accelerator)
    prepare_models(config, models, method)
    cache_latents(config, dataset, models, accelerator)
    set_seed((seed + accelerator.process_index) % 2**32)  # noise differs between processes

    order = create_order(config, dataset, accelerator)
    plan = create_plan(config, batches_per_epoch=len(order))
    dataset.set_max_train_steps(plan.num_steps)
    optimization = create_optimization(config, method, plan, accelerator)
    record = RunRecord(
        config,
        dataset=dataset,
        models=models,
        concepts=concepts,
        seed=seed,
        contextualizers=term.contextualizers if term else [],
    )
    drawer = sample_drawer(config, concepts)
    captions = cached_captions(config, dataset, method, drawer, accelerator)
    trainer = Trainer(
        accelerator=accelerator,
        method=method,
        loader=create_loader(config, order, device=accelerator.device),
        objective=Objective(
            _diffusion_loss(config, models, accelerator.device),
            mlm=regularizer and MLMTerm(regularizer, mlm_schedule(config.mlm), term.read_at),
            encode=captions,
        ),
        optimization=optimization,
        plan=plan,
        identity=identity,
        callbacks=[*curves, *_writers(config, drawer, record)],
    )
    _resume(trainer, config.schedule.resume)
    return trainer


def _refuse_before_loading(
    config: TrainConfig, dataset: TrainDataset, concepts: Sequence[Concept], identity: RunIdentity
) -> None:
    """Check state, captions and options as far as possible without a model.

    Raises:
        UserError: says what is wrong.
    """
    if config.schedule.resume:
        check_state(Path(config.schedule.resume), identity)
    if METHODS[config.schedule.method].learns_tokens:
        require_placeholders(dataset, concepts)
    if config.dataset.cache_text_encoder_outputs:
        dataset.fixed_captions()  # raises if they change between draws


def _load_base_model(
    config: TrainConfig,
    dataset: TrainDataset,
    concepts: Sequence[Concept],
    accelerator: Accelerator,
) -> StableDiffusion:
    """The base model, its text encoders on the device; prints a report."""
    models = load_models(config)
    check_model(config, is_sdxl=models.is_sdxl)
    warn_of_small_pictures(models, dataset)
    if accelerator.is_main_process:
        print_report(config, dataset, concepts, models)
    for text_encoder in models.text_encoders:
        text_encoder.model.to(accelerator.device)
    return models


def _diffusion_loss(
    config: TrainConfig, models: StableDiffusion, device: torch.device
) -> DiffusionLoss:
    return DiffusionLoss(
        models.noise_scheduler,
        config.loss,
        prediction_type=models.prediction_type,
        device=device,
    )


def _writers(config: TrainConfig, drawer: SampleDrawer | None, record: RunRecord) -> list[Callback]:
    """Callbacks that draw samples and save files, in this order: previews are the newest sample."""
    if drawer is None:
        return [Saver(config, record=record)]
    return [drawer, Saver(config, record=record, newest_sample=lambda: drawer.newest)]


def _resume(trainer: Trainer, state: str | None) -> None:
    """Continue from the state that ``resume`` names, if any."""
    if state:
        trainer.load_state(Path(state))
        step, last = trainer.progress.current_step, trainer.plan.num_steps
        if step >= last:
            raise UserError(
                f"resume: {state} is at step {step}, and the run ends at step {last}: nothing is "
                "left to train; raise max_train_steps or max_train_epochs, or use the file saved "
                "beside the state"
            )
        logger.info("resuming from %s, step %d", state, step)
        for old, new in rate_jumps(trainer.scheduler)[:1]:
            logger.warning(
                "resume: the schedule now spans %d steps, and the run before had another length: "
                "the learning rate goes from %.3g to %.3g after step %d, which no single run does",
                *(last, old, new, step),
            )


def _settings_of(
    config: TrainConfig, dataset: TrainDataset, concepts: Sequence[Concept]
) -> dict[str, str]:
    """Options that must be the same when a run is resumed, as the state depends on them."""
    options = config.to_flat()
    # those of all methods, so that states of different methods can be compared
    names = {*COMMON_STATE_OPTIONS}.union(*(method.state_options() for method in METHODS.values()))
    pictures = "".join(f"{i.path.name}/{i.repeats}/{i.bucket}" for i in dataset.images)
    digest = hashlib.sha256(pictures.encode()).hexdigest()[:16]
    return {name: str(options[name]) for name in sorted(names)} | {
        "concepts": str(trigger_of(concepts)),
        "pictures": digest,
    }
