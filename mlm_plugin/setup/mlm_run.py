"""The MLM term of a standalone run: prepared before anything is trained, joined to a method after.

Between the two the method puts into the text encoders what it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from accelerate import Accelerator

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS, WEIGHT_DTYPES, Method
from mlm_plugin.mlm.joint_prompts import JointPrompts
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.mlm.teacher import Reading
from mlm_plugin.mlm_setup import (
    LoadedContextualizer,
    build_regularizer,
    contextualizer_settings,
    find_contextualizer,
    prompts_for,
    readings_for,
    text_tap,
)
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.text_encoder import TextEncoder

__all__ = ["MLMRun", "PreparedEncoder", "create_regularizer", "prepare_term"]


class PreparedEncoder(NamedTuple):
    """A text encoder that the term reaches."""

    text_encoder: TextEncoder
    contextualizer: LoadedContextualizer
    readings: Sequence[Reading]


@dataclass(frozen=True)
class MLMRun:
    """What the term needs besides the method."""

    config: TrainConfig
    concepts: Sequence[Concept]
    prompts: JointPrompts
    encoders: Sequence[PreparedEncoder]
    seed: int  # of prompts and masks


def prepare_term(
    config: TrainConfig,
    models: StableDiffusion,
    *,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    accelerator: Accelerator,
    seed: int,
) -> MLMRun | None:
    """Find or pretrain contextualizers and take readings; ``None`` where the term is off.

    Args:
        config: of the run.
        models: as they came, on their device.
        concepts: of the run.
        dataset: whose captions may be prompts.
        accelerator: one process pretrains, the others find its file.
        seed: of the run; ``mlm_seed`` goes first.

    Raises:
        UserError: no gradient of the term could reach anything, or a file does not fit.
    """
    options = config.mlm
    if options.mlm_loss_weight == 0:
        return None
    method = METHODS[config.schedule.method]
    if reason := method.why_no_gradient(config, num_text_encoders=len(models.text_encoders)):
        raise UserError(f"mlm_loss_weight = {options.mlm_loss_weight:g}: {reason}")
    seed = seed if options.mlm_seed is None else options.mlm_seed
    prompts = prompts_for(options, concepts, captions=_captions(dataset))
    reached = _reached(config, models)
    settings = contextualizer_settings(options.mlm_contextualizer, len(reached))
    encoders = []
    for text_encoder, setting in zip(reached, settings, strict=True):
        with accelerator.main_process_first():
            found = find_contextualizer(
                text_encoder, setting, show_progress=accelerator.is_local_main_process
            )
        readings = readings_for(
            text_encoder, found.network, concepts, options, prompts=prompts, seed=seed
        )
        encoders.append(PreparedEncoder(text_encoder, found, readings))
    return MLMRun(config, concepts, prompts, encoders, seed)


def create_regularizer(run: MLMRun, method: Method, *, rank: int) -> MLMRegularizer:
    """The term on text encoders that hold what the method trains.

    Args:
        run: what was prepared.
        method: has its own way to make ids of prompts.
        rank: of this process; each draws prompts of its own.

    Raises:
        UserError: the method trains nothing before the text encoders' outputs.
    """
    options = run.config.mlm
    if not method.trains_text_side:
        raise UserError(
            f"mlm_loss_weight = {options.mlm_loss_weight:g}: this network trains nothing in the "
            "text encoder, the MLM term would do nothing; set mlm_loss_weight = 0 or train it"
        )
    taps = [
        text_tap(
            text_encoder,
            contextualizer.network,
            run.concepts,
            readings=readings,
            tokenize=partial(method.mlm_ids, text_encoder),
            dtype=WEIGHT_DTYPES[run.config.schedule.mixed_precision],
        )
        for text_encoder, contextualizer, readings in run.encoders
    ]
    return build_regularizer(taps, options, prompts=run.prompts, seed=f"{run.seed}/{rank}")


def _captions(dataset: TrainDataset) -> list[str]:
    pictures = (info for info in dataset.images if not info.is_reg)
    return [caption for info in pictures for caption in dataset.captions_of(info)]


def _reached(config: TrainConfig, models: StableDiffusion) -> list[TextEncoder]:
    """The text encoders before whose output something is trained."""
    method = METHODS[config.schedule.method]
    trained = method.trained_text_encoders(config, num_text_encoders=len(models.text_encoders))
    return [te for te, is_trained in zip(models.text_encoders, trained, strict=True) if is_trained]
