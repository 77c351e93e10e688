"""A run's set-up without weights: finds what would end it later, before time is spent.

Models come from their configurations and lie on the meta device. What the data, the options and the
files decide is known afterwards; damaged weights are not.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import DatasetConfig, require_bucket_steps
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.contextualizer_file import contextualizer_settings, read_contextualizer
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.estimate.on_meta import OnMeta
from mlm_plugin.export.thumbnails import thumbnail
from mlm_plugin.methods import METHODS, Method
from mlm_plugin.methods.checks import check_model
from mlm_plugin.mlm_setup import trigger_of
from mlm_plugin.models.checkpoints import StableDiffusion, empty_stable_diffusion, require_weights
from mlm_plugin.models.diffusers_folder import is_elsewhere
from mlm_plugin.networks.create import check_network
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.setup.data import create_order, require_placeholders
from mlm_plugin.setup.models import model_settings, prepare_models, quantize_models
from mlm_plugin.setup.optimization import check_optimization, create_plan
from mlm_plugin.setup.sampling import sample_drawer
from mlm_plugin.setup.term import check_attached, num_read_text_encoders, start_term
from mlm_plugin.setup.tracking import tracker_kind
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.plan import TrainPlan
from mlm_plugin.training.state import RunIdentity, check_state, read_progress
from mlm_plugin.training.validation import check_validation

__all__ = [
    "CheckedRun",
    "Rehearsal",
    "lacks_class_images",
    "refuse_before_loading",
    "rehearse",
    "run_identity",
    "without_messages",
]

META = torch.device("meta")

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


class CheckedRun(NamedTuple):
    """Options that fit each other and the data, the data sets, and what is learned."""

    config: TrainConfig
    datasets: Sequence[DatasetConfig]
    concepts: Sequence[Concept]


class Rehearsal(NamedTuple):
    """What a rehearsal found: the model without weights, and the length of the run."""

    models: StableDiffusion
    plan: TrainPlan


def rehearse(
    run: CheckedRun,
    dataset: TrainDataset,
    *,
    seed: int,
    num_processes: int,
    download: bool = True,
) -> Rehearsal | None:
    """Set a run up without weights, in the order of the run.

    Args:
        run: what is rehearsed.
        dataset: its pictures and captions.
        seed: of the run.
        num_processes: that share an epoch.
        download: whether a base model that is not on this machine is fetched.

    Returns:
        ``None`` where the base model is not on this machine and is not fetched.

    Raises:
        UserError: what the run would refuse.
    """
    config, _, concepts = run
    identity = run_identity(config, dataset, concepts, seed=seed, num_processes=num_processes)
    with preserved_random_state(META):
        refuse_before_loading(config, dataset, concepts, identity)
        _check_late_options(config, concepts)
        if not download and is_elsewhere(config.model.pretrained_model_name_or_path):
            return None
        models = _models(config)
        require_bucket_steps(dataset.datasets, is_sdxl=models.is_sdxl)
        term = start_term(config, models, concepts=concepts, dataset=dataset, seed=seed)
        if term is not None:
            _check_contextualizers(config, num_read_text_encoders(term, config, models))
        method = _method(config, models, concepts)
        if term is not None:
            check_attached(term, config, method)
        order = create_order(config, dataset, rank=0, world_size=num_processes)
        growth = 2 if lacks_class_images(config, dataset) else 1
        plan = create_plan(config, batches_per_epoch=len(order) * growth)
        _require_steps_left(config, plan)
        if dataset.held_out:
            check_validation(config.validation, plan)
        check_optimization(config, method, plan, num_processes=num_processes)
    return Rehearsal(models, plan)


@contextmanager
def without_messages() -> Iterator[None]:
    """Messages of the block are dropped, as the run repeats them."""
    ours = logging.getLogger("mlm_plugin")
    level = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.setLevel(level)


def run_identity(
    config: TrainConfig,
    dataset: TrainDataset,
    concepts: Sequence[Concept],
    *,
    seed: int,
    num_processes: int,
) -> RunIdentity:
    """What a run must have in common with a state that it resumes from."""
    return RunIdentity(seed, num_processes, _settings_of(config, dataset, concepts))


def refuse_before_loading(
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


def lacks_class_images(config: TrainConfig, dataset: TrainDataset) -> bool:
    """Whether class images are still to be drawn, as many as there are training images."""
    return bool(config.finetune.generate_class_images and not dataset.num_reg_images)


def _require_steps_left(config: TrainConfig, plan: TrainPlan) -> None:
    """Refuse a state at or past the end of the run."""
    state, last = config.schedule.resume, plan.num_steps
    if state and (step := read_progress(Path(state)).current_step) >= last:
        raise UserError(
            f"resume: {state} is at step {step}, and the run ends at step {last}: nothing is left "
            "to train; raise max_train_steps or max_train_epochs, or use the file saved beside "
            "the state"
        )


def _check_late_options(config: TrainConfig, concepts: Sequence[Concept]) -> None:
    """Options and files that the run reads late, and that need no model."""
    if METHODS[config.schedule.method].trains_network:
        with without_messages():  # creating the network repeats them
            check_network(config.network)
    sample_drawer(config, concepts)
    _require_thumbnail(config.output.metadata_thumbnail)
    if config.logging.log_tracker_config and tracker_kind(config.logging):
        read_toml(config.logging.log_tracker_config)


def _require_thumbnail(value: str | None) -> None:
    if not value or value.startswith("data:"):
        return
    try:
        thumbnail(value)
    except OSError as error:
        raise UserError(
            f"metadata_thumbnail = {value!r}: {shown_error(error)}; give a picture file "
            "or a data URL"
        ) from error


def _check_contextualizers(config: TrainConfig, num_read: int) -> None:
    """The given files are contextualizers; which text encoder they fit, only its weights tell."""
    options = config.mlm
    if options.mlm_target == "states" or options.mlm_contextualizer == "auto":
        return
    for path in contextualizer_settings(options.mlm_contextualizer, num_read):
        if path != "auto":
            read_contextualizer(path)


def _models(config: TrainConfig) -> StableDiffusion:
    source, settings = config.model.pretrained_model_name_or_path, model_settings(config)
    models = empty_stable_diffusion(source, settings, download=True)
    require_weights(source, settings)
    check_model(config, is_sdxl=models.is_sdxl)
    DiffusionLoss(
        models.noise_scheduler,
        config.loss,
        prediction_type=models.prediction_type,
        device=META,
    )
    return models


def _method(config: TrainConfig, models: StableDiffusion, concepts: Sequence[Concept]) -> Method:
    quantize_models(config, models, META)
    with OnMeta():
        method = METHODS[config.schedule.method].prepare(models, config, concepts)
        prepare_models(config.replace(torch_compile=False), models, method)
    return method


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
