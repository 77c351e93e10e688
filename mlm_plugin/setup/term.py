"""The MLM term of a standalone run: prepared before anything is trained, then attached."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS, WEIGHT_DTYPES, Method
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.mlm_setup import MLMSetup
from mlm_plugin.models.checkpoints import StableDiffusion

__all__ = ["attach_term", "prepare_term"]


def prepare_term(
    config: TrainConfig,
    models: StableDiffusion,
    *,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    accelerator: Accelerator,
    seed: int,
) -> MLMSetup | None:
    """Find or pretrain contextualizers and compute targets; ``None`` where the term is off.

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
    options, num_text_encoders = config.mlm, len(models.text_encoders)
    if options.mlm_loss_weight == 0:
        return None
    method = METHODS[config.schedule.method]
    if reason := method.why_no_gradient(config, num_text_encoders=num_text_encoders):
        raise UserError(f"mlm_loss_weight = {options.mlm_loss_weight:g}: {reason}")
    trained = method.trained_text_encoders(config, num_text_encoders=num_text_encoders)
    reached = zip(models.text_encoders, trained, strict=True)
    setup = MLMSetup(options, seed=seed)
    setup.use_concepts(concepts, captions=_captions(dataset))
    setup.prepare([encoder for encoder, is_trained in reached if is_trained], accelerator)
    return setup


def attach_term(
    setup: MLMSetup, config: TrainConfig, method: Method, *, rank: int
) -> MLMRegularizer:
    """The term on text encoders that hold what the method trains.

    Raises:
        UserError: the method trains nothing before the text encoders' outputs.
    """
    if not method.trains_text_side:
        raise UserError(
            f"mlm_loss_weight = {config.mlm.mlm_loss_weight:g}: this network trains nothing in the "
            "text encoder, the MLM term would do nothing; set mlm_loss_weight = 0 or train it"
        )
    dtype = WEIGHT_DTYPES[config.schedule.mixed_precision]
    return setup.attach(rank=rank, dtype=dtype, tokenize=method.mlm_ids)


def _captions(dataset: TrainDataset) -> list[str]:
    pictures = (info for info in dataset.images if not info.is_reg)
    return [caption for info in pictures for caption in dataset.captions_of(info)]
