"""The standalone trainer: options in, trained files out. It only assembles the parts.

Reading order: :func:`train` is the whole program, :func:`build_trainer` creates the trainer; each
step is in ``mlm_plugin/setup/``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mlm_plugin.commands.rehearsal import (
    CheckedRun,
    lacks_class_images,
    refuse_before_loading,
    rehearse,
    run_identity,
    without_messages,
)
from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import resolve_datasets
from mlm_plugin.config.loading import write_config
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import EpochOrder, TrainDataset
from mlm_plugin.data.dataset_report import dataset_report
from mlm_plugin.evaluation.page_writer import PageLosses, PageWriter, has_page
from mlm_plugin.evaluation.run_page import Curves
from mlm_plugin.evaluation.versions import library_versions
from mlm_plugin.files import require_writable
from mlm_plugin.methods import METHODS
from mlm_plugin.methods.checks import check_config, check_model
from mlm_plugin.mlm_setup import mlm_schedule, trigger_of
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.pretraining.run import Interrupted
from mlm_plugin.setup.accelerator import (
    check_accelerator,
    create_accelerator,
    known_seed,
    launched_processes,
    shared_seed,
    warn_of_launch_settings,
)
from mlm_plugin.setup.best_file import BestFile
from mlm_plugin.setup.builtin_names import with_built_in_paths
from mlm_plugin.setup.class_image_folders import prepare_class_images, with_class_images
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.setup.data import (
    create_dataset,
    create_loader,
    create_order,
    find_concepts,
    print_report,
)
from mlm_plugin.setup.models import (
    cache_latents,
    cached_captions,
    load_models,
    place_models,
    prepare_models,
    warn_of_small_pictures,
    warn_of_zero_terminal_snr,
)
from mlm_plugin.setup.optimization import create_optimization, create_plan
from mlm_plugin.setup.sampling import SampleDrawer, sample_drawer
from mlm_plugin.setup.saving import RunRecord, Saver, require_output_name
from mlm_plugin.setup.term import attach_term, prepare_term
from mlm_plugin.setup.tracking import curve_loggers, drift_watch
from mlm_plugin.setup.watching import watch_context
from mlm_plugin.training.callbacks import Callback, SaveFailed
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.drift import DriftWatch
from mlm_plugin.training.guards import NonFiniteLoss
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.logs import CurveLogger, TrackerCloser
from mlm_plugin.training.plan import MLMTerm, Objective
from mlm_plugin.training.processes import ProcessLost
from mlm_plugin.training.schedulers import rate_jumps
from mlm_plugin.training.trainer import Trainer
from mlm_plugin.training.validation import Validator

__all__ = ["CheckedRun", "build_trainer", "check_run", "train", "trainer_of"]

logger = logging.getLogger(__name__)


ENDS = (Stopped, NonFiniteLoss)  # of a run, during which the last state is saved


def train(config: TrainConfig) -> int:
    """Run a training from its options.

    Returns:
        Exit code: 0, 1 after a non-finite loss, 130 / 143 after SIGINT / SIGTERM.

    Raises:
        UserError: anything the user can fix, before time is spent where possible.
    """
    setup_console(config.logging)
    quiet_libraries()
    if config.run.output_config:
        print(f"wrote {write_config(config)}")
        return 0
    run = check_run(config)
    config, datasets, concepts = run
    if config.run.check:
        return _check(run)
    if config.dataset.debug_dataset:
        _print_data(run)
        return 0
    require_writable(config.output.output_dir, "output_dir")
    require_output_name(config.output)
    accelerator = create_accelerator(config)
    seed = shared_seed(config)
    try:
        dataset = create_dataset(config, datasets, concepts, seed=seed)
        with without_messages():
            rehearse(run, dataset, seed=seed, num_processes=accelerator.num_processes)
        if config.finetune.generate_class_images:
            prepare_class_images(
                config, concepts, models=lambda: load_models(config), accelerator=accelerator
            )
            config, datasets = with_class_images(config, concepts)
            dataset = create_dataset(config, datasets, concepts, seed=seed)
        trainer = build_trainer(
            config, accelerator=accelerator, dataset=dataset, concepts=concepts, seed=seed
        )
        _run(trainer)
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
    if config.finetune.generate_class_images:
        config, datasets = with_class_images(config, concepts)
    return CheckedRun(config, datasets, concepts)


def _run(trainer: Trainer) -> None:
    """Train; errors that cost steps end with code 1."""
    first_step = trainer.progress.current_step
    try:
        trainer.run()
    except Stopped:
        raise
    except Exception as error:
        if trainer.progress.current_step > first_step:
            error.exit_code = 1
        raise


def _check(run: CheckedRun) -> int:
    """``--check``: refuse what the run would refuse, print what it would print, load no weights."""
    config, datasets, concepts = run
    check_accelerator(config)
    warn_of_launch_settings(config)
    if config.output.output_dir is not None:
        require_writable(_existing(Path(config.output.output_dir)), "output_dir")
        require_output_name(config.output)
    seed = known_seed(config) or 0
    dataset = create_dataset(config, datasets, concepts, seed=seed)
    found = rehearse(run, dataset, seed=seed, num_processes=launched_processes(), download=False)
    if found is None:
        _print_data(run)
        for concept in concepts:
            print(f"Concept: {concept.placeholder_token!r} is a {concept.class_token or 'thing'}")
        name = config.model.pretrained_model_name_or_path
        print(f"{name} is not on this machine: nothing was checked that depends on the model.")
        return 0
    warn_of_zero_terminal_snr(config, found.models)
    print_report(config, dataset, concepts, found.models)
    about = "about " if lacks_class_images(config, dataset) else ""
    print(f"Length: {about}{found.plan.num_steps} step(s), {found.plan.num_epochs} epoch(s)")
    print("All checks that need no weights have passed.")
    return 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: nothing is created for a check."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _print_data(run: CheckedRun) -> None:
    """The report of ``debug_dataset``; no model is loaded for it."""
    dataset = create_dataset(*run, seed=run.config.schedule.seed or 0)
    report = dataset_report(dataset, concepts=[concept.text for concept in run.concepts])
    print("\n".join(report.lines()))


def trainer_of(run: CheckedRun) -> Trainer:
    """The trainer of a run whose options name the seed, for a command that resumes it itself."""
    config, datasets, concepts = run
    seed = config.schedule.seed
    trainer = build_trainer(
        config,
        accelerator=create_accelerator(config),
        dataset=create_dataset(config, datasets, concepts, seed=seed),
        concepts=concepts,
        seed=seed,
    )
    for callback in trainer.callbacks:
        if isinstance(callback, Saver):
            callback.how_to_continue = "the same command continues from {}"
    return trainer


def build_trainer(
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    dataset: TrainDataset,
    concepts: Sequence[Concept],
    seed: int,
) -> Trainer:
    """Everything between checked options and the first step."""
    identity = run_identity(
        config, dataset, concepts, seed=seed, num_processes=accelerator.num_processes
    )
    refuse_before_loading(config, dataset, concepts, identity)
    models = _load_base_model(config, dataset, concepts, accelerator)
    term = prepare_term(
        config, models, concepts=concepts, dataset=dataset, accelerator=accelerator, seed=seed
    )
    place_models(config, models, accelerator.device)  # not earlier, as pretraining needs memory
    drift, curves, validators = _measures(config, models, dataset, accelerator, seed)
    datasets = [dataset, *(validator.dataset for validator in validators)]

    set_seed(seed)  # here, so that the adapters start the same with and without the MLM term
    method = METHODS[config.schedule.method].prepare(models, config, concepts)
    regularizer = term and attach_term(term, config, method, accelerator)
    order = _order(config, dataset, accelerator)
    plan = create_plan(config, batches_per_epoch=len(order))
    page = has_page(config, plan.num_steps)
    ranking = watch_context(
        config, method, concepts, dataset, accelerator=accelerator, for_page=page
    )
    prepare_models(config, models, method)
    cache_latents(config, datasets, models, accelerator)
    set_seed((seed + accelerator.process_index) % 2**32)  # noise differs between processes

    dataset.set_max_train_steps(plan.num_steps)
    optimization = create_optimization(config, method, plan, accelerator)
    facts = {"dataset": dataset, "models": models, "concepts": concepts, "seed": seed}
    record = RunRecord(config, **facts, contextualizers=term.contextualizers if term else [])
    drawer = sample_drawer(config, concepts)
    captions = cached_captions(config, datasets, method, drawer, accelerator)
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
        callbacks=[*drift, *validators, *_writers(config, drawer, record, ranking, curves)],
    )
    if page:
        shown = _page_curves(validators, drift)
        writer = _page(config, concepts, accelerator, drawer, ranking, shown)
        trainer.callbacks = [PageLosses(writer.page), *trainer.callbacks, writer]
    _resume(trainer, config.schedule.resume)
    return trainer


def _order(config: TrainConfig, dataset: TrainDataset, accelerator: Accelerator) -> EpochOrder:
    """Which batches this process takes."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return create_order(config, dataset, rank=rank, world_size=world_size)


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


def _measures(
    config: TrainConfig,
    models: StableDiffusion,
    dataset: TrainDataset,
    accelerator: Accelerator,
    seed: int,
) -> tuple[list[DriftWatch], list[CurveLogger], list[Validator]]:
    """What is measured while it trains; call it before the method is prepared."""
    drift = drift_watch(config, models, accelerator)
    curves = curve_loggers(config, accelerator, drift)
    return [drift] if drift else [], curves, _validators(config, dataset, curves, seed)


def _validators(
    config: TrainConfig, dataset: TrainDataset, curves: Sequence[CurveLogger], seed: int
) -> list[Validator]:
    """The callback that validates, if pictures are held out."""
    options = config.validation
    seed = seed if options.validation_seed is None else options.validation_seed
    held_out = dataset.validation_set(seed=seed)
    if held_out is None:
        return []
    return [Validator(held_out, options, seed=seed, curves=curves)]


def _writers(
    config: TrainConfig,
    drawer: SampleDrawer | None,
    record: RunRecord,
    ranking: BestFile | None,
    curves: Sequence[CurveLogger],
) -> list[Callback]:
    """Callbacks that log, draw samples and save, in this order: previews are the newest sample."""
    saver = Saver(
        config,
        record=record,
        newest_sample=lambda: drawer and drawer.newest,
        ranking=ranking,
        curves=curves,
    )
    drawers = [drawer] if drawer else []
    return [*curves, *drawers, saver, *map(TrackerCloser, curves)]


def _page_curves(validators: Sequence[Validator], drifts: Sequence[DriftWatch]) -> list[Curves]:
    """What a page shows besides the losses, if it is measured."""
    found = []
    for validator in validators:
        number = len(validator.dataset.images)
        caption = (
            f"Diffusion loss of {number} picture(s) that are not trained on, always with the same "
            "noise and timesteps."
        )
        found.append(Curves(caption, "loss", {"validation": validator.losses}))
    caption = (
        "Drift: cosine between the states of everyday prompts now and before training; 1 = text "
        "without the concept is read as before."
    )
    return [*found, *(Curves(caption, "cosine", drift.cosines) for drift in drifts)]


def _page(
    config: TrainConfig,
    concepts: Sequence[Concept],
    accelerator: Accelerator,
    drawer: SampleDrawer | None,
    ranking: BestFile | None,
    curves: Sequence[Curves],
) -> PageWriter:
    return PageWriter(
        config,
        title=trigger_of(concepts) or "",
        versions=library_versions(accelerator.device),
        drawer=drawer,
        ranking=ranking,
        curves=curves,
    )


def _resume(trainer: Trainer, state: str | None) -> None:
    """Continue from the state that ``resume`` names, if any."""
    if state:
        trainer.load_state(Path(state))
        step, last = trainer.progress.current_step, trainer.plan.num_steps
        logger.info("resuming from %s, step %d", state, step)
        for old, new in rate_jumps(trainer.scheduler)[:1]:
            logger.warning(
                "resume: the schedule now spans %d steps, and the run before had another length: "
                "the learning rate goes from %.3g to %.3g after step %d, which no single run does",
                *(last, old, new, step),
            )
