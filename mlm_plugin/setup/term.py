"""The MLM term of a standalone run: prepared before anything is trained, then attached."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS, WEIGHT_DTYPES, Method
from mlm_plugin.mlm.cross_attention import CrossAttention
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.mlm_setup import MLMSetup
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.key_values import read_cross_attention
from mlm_plugin.networks.kohya_names import TEXT_ENCODER_PARTS
from mlm_plugin.setup.data import captions_of

__all__ = [
    "attach_term",
    "check_attached",
    "cross_attention_of",
    "num_read_text_encoders",
    "prepare_term",
    "start_term",
]


def prepare_term(
    config: TrainConfig,
    models: StableDiffusion,
    *,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    accelerator: Accelerator,
    seed: int,
) -> MLMSetup | None:
    """Find or pretrain contextualizers; ``None`` where the term is off.

    Args:
        config: options of the run.
        models: untrained, on their device.
        concepts: what is learned.
        dataset: its captions may serve as prompts.
        accelerator: one process pretrains, the others find its file.
        seed: seed of the run.

    Raises:
        UserError: the term would have no gradient, or a file does not fit.
    """
    setup = start_term(config, models, concepts=concepts, dataset=dataset, seed=seed)
    if setup is not None:
        setup.prepare(models.text_encoders, accelerator, trained=_trained(config, models))
    return setup


def start_term(
    config: TrainConfig,
    models: StableDiffusion,
    *,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    seed: int,
) -> MLMSetup | None:
    """The set-up of the term before a text encoder is read; ``None`` where the term is off.

    Args: as in :func:`prepare_term`; the models need no weights.

    Raises:
        UserError: the term would have no gradient, or a prompt set cannot be used.
    """
    options, num_text_encoders = config.mlm, len(models.text_encoders)
    if options.mlm_loss_weight == 0:
        return None
    method = METHODS[config.schedule.method]
    if reason := method.why_no_gradient(config, num_text_encoders=num_text_encoders):
        raise UserError(no_gradient_message(options, reason, elsewhere=True))
    read_at = method.mlm_read_at(config, num_text_encoders=num_text_encoders)
    setup = MLMSetup(options, seed=seed, read_at=read_at)
    setup.use_concepts(concepts, captions=captions_of(dataset))
    return setup


def num_read_text_encoders(setup: MLMSetup, config: TrainConfig, models: StableDiffusion) -> int:
    """How many text encoders need a contextualizer."""
    return sum(map(setup.reads, _trained(config, models)))


def _trained(config: TrainConfig, models: StableDiffusion) -> Sequence[bool]:
    method = METHODS[config.schedule.method]
    return method.trained_text_encoders(config, num_text_encoders=len(models.text_encoders))


def attach_term(
    setup: MLMSetup, config: TrainConfig, method: Method, accelerator: Accelerator
) -> MLMRegularizer:
    """The term on models that hold what the method trains.

    Raises:
        UserError: the method trains nothing before the place that is read.
    """
    cross_attention = check_attached(setup, config, method)
    _mark_untrained(setup, method)
    method.train(False)
    dtype = WEIGHT_DTYPES[config.schedule.mixed_precision]
    with method.untrained(), accelerator.autocast():
        setup.compute_targets(accelerator.device, dtype=dtype, starts=method.mlm_starts)
    return setup.attach(
        rank=accelerator.process_index,
        dtype=dtype,
        device=accelerator.device,
        vary=method.mlm_variants,
        cross_attention=cross_attention,
    )


def _mark_untrained(setup: MLMSetup, method: Method) -> None:
    """A network may have no module in a text encoder; then that is read through the U-Net alone."""
    parts, text_encoders = method.parts(), method.models.text_encoders
    names = TEXT_ENCODER_PARTS[len(text_encoders)]
    trained = {
        id(text_encoder): bool(parts.get(name) or parts.get("embedding"))
        for text_encoder, name in zip(text_encoders, names, strict=True)
    }
    for encoder in setup.encoders:
        encoder.is_trained = encoder.is_trained and trained[id(encoder.text_encoder)]


def check_attached(setup: MLMSetup, config: TrainConfig, method: Method) -> CrossAttention | None:
    """The U-Net's keys and values, where they are read; refused where nothing read is trained.

    Raises:
        UserError: the method trains nothing before the place that is read.
    """
    cross_attention = cross_attention_of(setup, method)
    if not (method.trains_text_side or (cross_attention and cross_attention.is_trained)):
        place = "U-Net's keys and values" if cross_attention else "text encoder"
        raise UserError(
            f"mlm_loss_weight = {config.mlm.mlm_loss_weight:g}: this network trains nothing in the "
            f"{place}, the MLM term would do nothing; set mlm_loss_weight = 0 or train it"
        )
    return cross_attention


def cross_attention_of(setup: MLMSetup, method: Method) -> CrossAttention | None:
    """The U-Net's keys and values, where the term reads them."""
    if not setup.reads_cross_attention:
        return None
    return read_cross_attention(method.models.unet, keep_copies=method.trains_base_weights)
