"""The standalone trainer: options in, trained files out. It only composes the rooms.

Reading order: :func:`train` is the whole program; every step of it is a function below.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)

from mlm_plugin.config.datasets import Concept, resolve_datasets
from mlm_plugin.config.loading import load_config, write_config
from mlm_plugin.config.options import OptimizerOptions, TrainConfig
from mlm_plugin.data.dataset import EpochOrder, TrainDataset, make_loader
from mlm_plugin.data.dataset_report import dataset_report
from mlm_plugin.errors import UserError
from mlm_plugin.files import require_writable
from mlm_plugin.methods import METHODS, STOP_OPTIONS, Method
from mlm_plugin.methods.checks import check_config, check_model
from mlm_plugin.mlm_setup import (
    mlm_schedule,
    trigger_of,
)
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.pretrain import Interrupted
from mlm_plugin.setup.builtin_names import (
    contexts_path,
    contextualizer_path,
    data_path,
    model_path,
)
from mlm_plugin.setup.class_images import prepare_class_images
from mlm_plugin.setup.console import quiet_libraries, setup_console
from mlm_plugin.setup.data import (
    create_dataset,
    find_concepts,
    print_report,
    require_placeholders,
)
from mlm_plugin.setup.mlm_run import create_regularizer, prepare_term
from mlm_plugin.setup.models import (
    cache_latents,
    cached_captions,
    load_models,
    place_models,
    prepare_models,
    warn_of_small_pictures,
)
from mlm_plugin.setup.sampling import SampleDrawer
from mlm_plugin.setup.saving import RunRecord, Saver
from mlm_plugin.setup.tracking import check_trackers, log_folder, start_trackers, tracker_kind
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.drift import TextDrift
from mlm_plugin.training.fused_steps import FusedSteps
from mlm_plugin.training.logs import CurveLogger
from mlm_plugin.training.optimizers import create_optimizer, steps_one_by_one
from mlm_plugin.training.schedulers import create_scheduler
from mlm_plugin.training.state import check_progress, check_settings, read_progress
from mlm_plugin.training.trainer import (
    Listener,
    NonFiniteLoss,
    Stopped,
    Trainer,
    TrainPlan,
)

__all__ = ["build_trainer", "create_accelerator", "train"]

logger = logging.getLogger(__name__)

RESUME_SETTINGS = (
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

SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""What `accelerate launch` sets where it is to split models; here they are not prepared for it."""


def train(argv: Sequence[str]) -> int:
    """Run a training from its command line.

    Returns:
        Exit code: 0, 1 after a non-finite loss, 130 / 143 after SIGINT / SIGTERM.

    Raises:
        UserError: anything the user can repair, before time is spent where that is possible.
    """
    config = load_config(argv)
    setup_console(config.logging)
    quiet_libraries()
    if config.run.output_config:
        print(f"wrote {write_config(config)}")
        return 0
    check_config(config)
    config = with_built_in_paths(config)
    datasets = resolve_datasets(config)
    concepts = find_concepts(config, datasets)
    METHODS[config.schedule.method].check(config, concepts)
    if config.run.check or config.dataset.debug_dataset:
        dataset = create_dataset(config, datasets, concepts, seed=config.schedule.seed or 0)
        report = dataset_report(dataset, concepts=[concept.text for concept in concepts])
        print("\n".join(report.lines()))
        return 0
    require_writable(config.output.output_dir, "output_dir")
    accelerator = create_accelerator(config)
    seed = _shared_seed(config)
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
    except NonFiniteLoss as error:
        accelerator.print(
            f"error: {error}; the last good state is saved. Start again with {error.advice}",
            file=sys.stderr,
        )
        return 1
    accelerator.state.destroy_process_group()
    return 0


def build_trainer(
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    dataset: TrainDataset,
    concepts: Sequence[Concept],
    seed: int,
) -> Trainer:
    """Everything between checked options and the first step."""
    resume = config.schedule.resume and Path(config.schedule.resume)
    settings = _settings_of(config, dataset, concepts)
    if resume:  # refused before anything is loaded
        check_progress(resume, seed=seed, num_processes=accelerator.num_processes)
        check_settings(resume, settings)
    if METHODS[config.schedule.method].learns_tokens:
        require_placeholders(dataset, concepts)
    if config.dataset.cache_text_encoder_outputs:
        dataset.fixed_captions()  # refuses those that change
    models = load_models(config)
    check_model(config, is_sdxl=models.is_sdxl)
    warn_of_small_pictures(models, dataset)
    if accelerator.is_main_process:
        print_report(config, dataset, concepts, models)
    for text_encoder in models.text_encoders:
        text_encoder.model.to(accelerator.device)
    term = prepare_term(
        config, models, concepts=concepts, dataset=dataset, accelerator=accelerator, seed=seed
    )
    place_models(config, models, accelerator.device)  # not before, for pretraining takes memory
    curves = _curve_logger(config, models, accelerator)
    set_seed(seed)  # here, so that the adapters start alike with and without the MLM term
    method = METHODS[config.schedule.method].prepare(models, config, concepts)
    regularizer = term and create_regularizer(term, method, rank=accelerator.process_index)
    prepare_models(config, models, method)
    if config.dataset.cache_latents or config.dataset.cache_latents_to_disk:
        cache_latents(config, dataset, models, accelerator)
    set_seed((seed + accelerator.process_index) % 2**32)  # noise differs between processes

    order = EpochOrder(
        dataset,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        batches_per_step=config.schedule.gradient_accumulation_steps,
    )
    plan = _plan(config, batches_per_epoch=len(order))
    dataset.set_max_train_steps(plan.num_steps)
    optimizer, scheduler = _create_optimizer(config, method, plan, accelerator)
    fused_steps = _fused_steps(config, method, optimizer)
    if regularizer and config.mlm.mlm_start_step >= plan.num_steps:
        raise UserError(
            f"mlm_start_step = {config.mlm.mlm_start_step}: the run ends after {plan.num_steps} "
            "steps, the MLM term would never act; start it earlier"
        )
    record = RunRecord(
        config,
        dataset=dataset,
        models=models,
        concepts=concepts,
        seed=seed,
        contextualizers=[encoder.contextualizer for encoder in term.encoders] if term else [],
    )
    drawer = _create_drawer(config, concepts)
    trainer = Trainer(
        accelerator=accelerator,
        models=models,
        method=method,
        loader=make_loader(
            order,
            num_workers=min(
                config.schedule.max_data_loader_n_workers, torch.multiprocessing.cpu_count()
            ),
            persistent_workers=config.schedule.persistent_data_loader_workers,
            pin_memory=accelerator.device.type == "cuda",
        ),
        optimizer=optimizer,
        scheduler=scheduler,
        diffusion_loss=DiffusionLoss(
            models.noise_scheduler,
            config.loss,
            prediction_type=models.prediction_type,
            device=accelerator.device,
        ),
        plan=plan,
        seed=seed,
        regularizer=regularizer,
        mlm_schedule=mlm_schedule(config.mlm) if regularizer else None,
        listeners=[*curves, *_listeners(config, drawer, record)],
        settings=settings,
        freeze_at=_freeze_steps(config, method, num_steps=plan.num_steps),
        encode=cached_captions(config, dataset, method, drawer, accelerator),
        fused_steps=fused_steps,
    )
    if resume:
        trainer.load_state(resume)
        logger.info("going on from %s, step %d", resume, trainer.progress.current_step)
    return trainer


def _settings_of(
    config: TrainConfig, dataset: TrainDataset, concepts: Sequence[Concept]
) -> dict[str, str]:
    """What must be the same when a run is resumed: it is in the state, or names positions in it."""
    options = config.to_flat()
    # of all methods, so that states can be compared whatever each was trained with
    names = {*RESUME_SETTINGS}.union(*(method.state_options() for method in METHODS.values()))
    pictures = "".join(f"{i.path.name}/{i.repeats}/{i.bucket}" for i in dataset.images)
    digest = hashlib.sha256(pictures.encode()).hexdigest()[:16]
    return {name: str(options[name]) for name in sorted(names)} | {
        "concepts": str(trigger_of(concepts)),
        "pictures": digest,
    }


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Device, precision and trackers.

    Raises:
        UserError: the device does not have the precision, a tracker is not installed, or
            accelerate is set up to cut models into pieces.
    """
    check_trackers(config.logging)
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate is set up for {name}, which cuts models into pieces: not supported; "
                "use `accelerate launch --multi_gpu`, which holds the whole model on every GPU"
            )
    precision = config.schedule.mixed_precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision = 'fp16' needs a GPU; use 'bf16' or 'no' on a CPU")
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.schedule.gradient_accumulation_steps,
        log_with=tracker_kind(config.logging),
        project_dir=log_folder(config.logging),
        # others wait while one process pretrains, caches latents or draws samples
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    if config.optimizer.fused_backward_pass and accelerator.num_processes > 1:
        raise UserError(
            f"fused_backward_pass cannot go with {accelerator.num_processes} processes, which "
            "exchange gradients after the backward pass; start one, or leave it out"
        )
    if config.schedule.full_fp16:
        _unscale_half_gradients(accelerator)
    if accelerator.device.type == "cuda":  # where the card has it; convolutions do so anyway
        torch.set_float32_matmul_precision("high")
    return accelerator


def _unscale_half_gradients(accelerator: Accelerator) -> None:
    """Let the gradient scaler accept fp16 gradients, as sd-scripts does for ``full_fp16``."""
    unscale = accelerator.scaler._unscale_grads_

    def unscale_any(optimizer, inv_scale, found_inf, _allow_fp16):
        return unscale(optimizer, inv_scale, found_inf, True)

    accelerator.scaler._unscale_grads_ = unscale_any


def with_built_in_paths(config: TrainConfig) -> TrainConfig:
    """The options with ``toy`` and ``pocket`` replaced by the paths that they stand for."""
    return config.replace(
        pretrained_model_name_or_path=model_path(config.model.pretrained_model_name_or_path),
        train_data_dir=data_path(config.dataset.train_data_dir),
        mlm_prompt_set=contexts_path(config.mlm.mlm_prompt_set),
        mlm_contextualizer=contextualizer_path(config.mlm.mlm_contextualizer),
    )


def _shared_seed(config: TrainConfig) -> int:
    seed = config.schedule.seed
    if seed is None and config.schedule.resume:
        return read_progress(Path(config.schedule.resume)).seed
    if seed is None:
        drawn = [random.SystemRandom().randrange(2**32)]
        seed = broadcast_object_list(drawn)[0]
        logger.info("seed %d (give --seed %d to repeat this run)", seed, seed)
    return seed


def _plan(config: TrainConfig, *, batches_per_epoch: int) -> TrainPlan:
    schedule = config.schedule
    steps_per_epoch = math.ceil(batches_per_epoch / schedule.gradient_accumulation_steps)
    num_steps = schedule.max_train_steps
    if schedule.max_train_epochs is not None:
        num_steps = schedule.max_train_epochs * steps_per_epoch
    return TrainPlan(
        num_steps=num_steps,
        batches_per_epoch=batches_per_epoch,
        gradient_accumulation_steps=schedule.gradient_accumulation_steps,
        max_grad_norm=config.optimizer.max_grad_norm,
    )


def _create_optimizer(
    config: TrainConfig, method: Method, plan: TrainPlan, accelerator: Accelerator
):
    options = config.optimizer
    groups = method.parameter_groups(options)
    optimizer = create_optimizer(
        options.optimizer_type,
        groups,
        learning_rate=options.learning_rate,
        optimizer_args=options.optimizer_args,
    )
    scheduler = create_scheduler(
        optimizer,
        options,
        num_training_steps=plan.num_steps,
        num_processes=accelerator.num_processes,
    )
    return accelerator.prepare(optimizer, scheduler)


def _fused_steps(config: TrainConfig, method: Method, optimizer) -> FusedSteps | None:
    """Steps of the U-Net inside the backward pass, where ``fused_backward_pass`` asks for them.

    Raises:
        UserError: an optimizer that cannot step tensors one by one.
    """
    options = config.optimizer
    if not options.fused_backward_pass:
        return None
    if not steps_one_by_one(optimizer):
        raise UserError(
            f"fused_backward_pass cannot go with optimizer_type = {options.optimizer_type!r}, "
            "which is not known to step tensors one by one; use Adafactor, AdamW or AdamW8bit"
        )
    unet = method.parts()["unet"]  # the text encoders' gradients are complete after both losses
    return FusedSteps(unet, optimizer, max_grad_norm=options.max_grad_norm)


def _freeze_steps(config: TrainConfig, method: Method, *, num_steps: int) -> dict[str, int]:
    """From which step a part is trained no more; shares are of the whole run."""
    trained = [
        part
        for part, members in method.parts().items()
        if any(parameter.requires_grad for parameter in members)
    ]
    stops = {part: _stop_of(part, config.optimizer) for part in method.parts()}
    steps = {}
    for option, stop in dict.fromkeys(found for found in stops.values() if found):
        step = stop if stop >= 1 else round(stop * num_steps)
        parts = [part for part in trained if stops[part] == (option, stop)]
        if not parts:
            logger.warning("%s = %g has no effect: nothing there is trained", option, stop)
        elif step >= num_steps:
            logger.warning("%s = %g has no effect: the run ends at %d", option, stop, num_steps)
        else:
            steps |= dict.fromkeys(parts, step)

    def end_of(parts: Sequence[str]) -> int:
        return max((steps.get(part, num_steps) for part in parts), default=0)

    if end_of(trained) < num_steps:
        raise UserError(
            f"{', '.join(dict.fromkeys(stops[part][0] for part in steps))}: nothing is trained "
            f"from step {end_of(trained)} of {num_steps} on; let one part go on, or shorten the run"
        )
    text_end = end_of([part for part in trained if part != "unet"])
    if config.mlm.mlm_loss_weight and text_end <= config.mlm.mlm_start_step:
        raise UserError(
            f"mlm_start_step = {config.mlm.mlm_start_step}: nothing before the text encoder's "
            f"output is trained from step {text_end} on, so the MLM term would never act; start it "
            "earlier, or train the text side for longer"
        )
    return steps


def _stop_of(part: str, options: OptimizerOptions) -> tuple[str, float] | None:
    """The option that says when a part is trained no more, and its value."""
    for option in STOP_OPTIONS[part]:
        value = getattr(options, option)
        if value is not None:
            return option, value
    return None


def _curve_logger(
    config: TrainConfig, models: StableDiffusion, accelerator: Accelerator
) -> list[Listener]:
    """Made before the method, whose training the drift is measured from."""
    if not tracker_kind(config.logging):
        return []
    start_trackers(config, accelerator)
    if config.dataset.cache_text_encoder_outputs:  # the text encoders are away, and do not move
        return [CurveLogger({})]
    numbers = [""] if len(models.text_encoders) == 1 else ["1", "2"]
    drifts = {
        f"te{number}/drift_cos": TextDrift(text_encoder, autocast=accelerator.autocast)
        for number, text_encoder in zip(numbers, models.text_encoders, strict=True)
    }
    return [CurveLogger(drifts)]


def _create_drawer(config: TrainConfig, concepts: Sequence[Concept]) -> SampleDrawer | None:
    if not config.sampling.sample_prompts:
        return None
    return SampleDrawer(config, trigger=trigger_of(concepts))


def _listeners(
    config: TrainConfig, drawer: SampleDrawer | None, record: RunRecord
) -> list[Listener]:
    if drawer is None:
        return [Saver(config, record=record)]
    return [drawer, Saver(config, record=record, newest_sample=lambda: drawer.newest)]
