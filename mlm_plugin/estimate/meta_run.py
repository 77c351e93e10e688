"""A training on the meta device, made of the same options and parts as the real one.

Nothing is loaded: models come from configurations, prompts from the prompt set, and pictures have
the size that the options give. Knows no peaks and no table.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from mlm_plugin.config.concepts import Concept, concepts_of
from mlm_plugin.config.datasets import (
    BUCKET_STEP,
    LATENT_STRIDE,
    DatasetConfig,
    given_resolution,
    require_bucket_steps,
    resolve_datasets,
)
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.config.pretraining import SMALL_ENCODER, PretrainOptions
from mlm_plugin.data.dataset import Batch
from mlm_plugin.estimate.on_meta import OnMeta
from mlm_plugin.estimate.optimizer_states import OptimizerBytes, optimizer_bytes
from mlm_plugin.estimate.step import Training
from mlm_plugin.methods import METHODS, WEIGHT_DTYPES, Method
from mlm_plugin.methods.checks import check_model
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes, default_width
from mlm_plugin.mlm.encoder import EncoderHandle, PromptTarget
from mlm_plugin.mlm.masking import IGNORE_INDEX
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.mlm.teacher import MaskSettings, compared_tokens
from mlm_plugin.mlm_setup import MLMSetup, PreparedEncoder
from mlm_plugin.models.checkpoints import empty_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.find import is_small
from mlm_plugin.setup.models import model_settings, prepare_models, quantize_models
from mlm_plugin.setup.optimization import stepped_in_backward
from mlm_plugin.setup.term import cross_attention_of
from mlm_plugin.training.diffusion_loss import DiffusionLoss

__all__ = ["Pictures", "largest_batch", "meta_training"]

STAND_IN = Concept("sks", "dog")
NUM_DRAWS = 50  # batches of prompts, the longest of which is taken

Pictures = tuple[int, int, int]
"""How many, their width and their height."""


def meta_training(config: TrainConfig, pictures: Pictures) -> Training:
    """The run of checked options, ready for its step.

    Args:
        config: with a model that is on this machine.
        pictures: of one batch, from :func:`largest_batch`.

    Raises:
        UserError: options or files that do not fit the model.
    """
    init_word = (STAND_IN.class_token,) * len(_concepts(config))
    # leave out what needs values: where learned embeddings start, and compilation
    config = config.replace(init_word=init_word, weights=None, torch_compile=False)
    concepts = _concepts(config)
    models = empty_stable_diffusion(
        config.model.pretrained_model_name_or_path, model_settings(config)
    )
    check_model(config, is_sdxl=models.is_sdxl)
    require_bucket_steps(_datasets(config), is_sdxl=models.is_sdxl)
    quantize_models(config, models, torch.device("meta"))
    with OnMeta():
        method = METHODS[config.schedule.method].prepare(models, config, concepts)
        prepare_models(config, models, method)
        regularizer = _regularizer(config, method, concepts)
    diffusion_loss = DiffusionLoss(
        models.noise_scheduler,
        config.loss,
        prediction_type=models.prediction_type,
        device="meta",
    )
    return Training(
        config,
        method,
        diffusion_loss,
        _batch(config, pictures),
        regularizer,
        *_optimizer(config, method),
    )


def largest_batch(config: TrainConfig) -> Pictures:
    """The batch with most pixels: of the data sets, or of the options where none are given.

    Buckets have at most the area of the resolution.

    Raises:
        UserError: data sets that cannot be read, or no resolution.
    """
    sizes = [(one.batch_size, *one.resolution) for one in _datasets(config)]
    sizes = sizes or [(config.schedule.train_batch_size, *given_resolution(config))]
    number, *sides = max(sizes, key=lambda size: size[0] * size[1] * size[2])
    width, height = (max(BUCKET_STEP, side - side % BUCKET_STEP) for side in sides)
    return number, width, height


def _datasets(config: TrainConfig) -> Sequence[DatasetConfig]:
    data = config.dataset
    if data.train_data_dir is None and data.dataset_config is None:
        return ()
    return resolve_datasets(config)


def _concepts(config: TrainConfig) -> list[Concept]:
    """What is learned, with "sks dog" for what is not named."""
    data = config.dataset
    has_data = data.train_data_dir is not None or data.dataset_config is not None
    found = concepts_of(config, resolve_datasets(config) if has_data else (), required=False)
    named = [Concept(c.placeholder_token, c.class_token or STAND_IN.class_token) for c in found]
    return named or [STAND_IN]


def _batch(config: TrainConfig, pictures: Pictures) -> Batch:
    number, width, height = pictures
    data, size = config.dataset, (height, width)
    is_cached = data.cache_latents or data.cache_latents_to_disk
    latent_size = height // LATENT_STRIDE, width // LATENT_STRIDE
    empty = partial(torch.empty, device="meta")
    return Batch(
        pixel_values=None if is_cached else empty(number, 3, *size),
        latents=empty(number, 4, *latent_size) if is_cached else None,
        loss_masks=empty(number, 1, *size) if data.masked_loss else None,
        valid_masks=None,
        loss_weights=torch.ones(number, device="meta"),
        captions=[f"a photo of {STAND_IN.text}"] * number,
        original_sizes=[size] * number,
        crop_top_lefts=[(0, 0)] * number,
        target_sizes=[size] * number,
        is_reg=[False] * number,
        image_paths=[""] * number,
        custom_attributes=[{}] * number,
    )


def _optimizer(
    config: TrainConfig, method: Method
) -> tuple[OptimizerBytes, list[nn.Parameter], int]:
    """The last three fields of :class:`Training`."""
    options = config.optimizer
    groups = method.parameter_groups(options)  # freezes what has no rate
    count = partial(
        optimizer_bytes,
        options.optimizer_type,
        optimizer_args=options.optimizer_args,
        learning_rate=options.learning_rate,
    )
    trained = [parameter for group in groups for parameter in group["params"]]
    whole = count(trained)
    fused = set(stepped_in_backward(config, method)) if options.fused_backward_pass else set()
    stepped = [parameter for parameter in trained if parameter in fused]
    if not stepped:
        return whole, [], 0
    others = [parameter for parameter in trained if parameter not in fused]
    working = count(others).working if others else 0
    largest = max(stepped, key=lambda parameter: parameter.nbytes)
    return whole._replace(working=working), stepped, count([largest]).working


def _regularizer(
    config: TrainConfig, method: Method, concepts: Sequence[Concept]
) -> MLMRegularizer | None:
    """The MLM term at the longest of many batches of prompts."""
    if not config.mlm.mlm_loss_weight:
        return None
    if config.mlm.mlm_prompt_set == "captions":  # not read here; built-in ones are as long
        config = config.replace(mlm_prompt_set="auto")
    setup = _prepared(config, method)
    setup.use_concepts(concepts)
    regularizer = setup.attach(
        rank=0,
        dtype=WEIGHT_DTYPES[config.schedule.mixed_precision],
        device=torch.device("meta"),
        vary=method.mlm_variants,
        cross_attention=cross_attention_of(setup, method),
    )
    longest = _longest_prompts(regularizer)
    if config.mlm.mlm_target == "states" or not all(e.is_trained for e in setup.encoders):
        for encoder in regularizer.encoders:
            encoder.targets = _targets(encoder, longest, regularizer.masks)
    drawn = itertools.cycle(longest)
    regularizer.sample_prompt = lambda _rng: next(drawn)
    return regularizer


def _prepared(config: TrainConfig, method: Method) -> MLMSetup:
    """The set-up of the term, with contextualizers without values."""
    text_encoders, needs_none = method.models.text_encoders, config.mlm.mlm_target == "states"
    count = len(text_encoders)
    read_at = method.mlm_read_at(config, num_text_encoders=count)
    trained = method.trained_text_encoders(config, num_text_encoders=count)
    setup = MLMSetup(config.mlm, seed=0, read_at=read_at)
    setup.encoders = [
        PreparedEncoder(
            text_encoder, None if needs_none else _contextualizer(text_encoder), is_trained
        )
        for text_encoder, is_trained in zip(text_encoders, trained, strict=True)
        if setup.reads(is_trained)
    ]
    return setup


def _targets(
    encoder: EncoderHandle, prompts: Sequence[str], masks: MaskSettings
) -> list[PromptTarget]:
    """Targets of these prompts that have sizes, but no values."""
    width, ids_BL = encoder.embedding.embedding_dim, encoder.tokenize(list(prompts))
    compares_states = encoder.contextualizer is None
    labels_BL = compared_tokens(encoder, ids_BL, masks, random.Random(0)).labels
    empty = partial(torch.empty, device="meta")
    targets = []
    for ids_L, labels_L in zip(ids_BL, labels_BL, strict=True):
        number = int((labels_L != IGNORE_INDEX).sum())
        targets.append(
            PromptTarget(
                ids_L.tolist(),
                labels_L.tolist(),
                empty(number, width),
                empty(1, number, width) if compares_states else empty(1, number),
                None if encoder.is_trained else empty(len(ids_L), width),
            )
        )
    return targets


def _longest_prompts(regularizer: MLMRegularizer) -> list[str]:
    """The batch with the longest prompts of several."""
    rng, size = random.Random(0), regularizer.batch_size
    drawn = ([regularizer.sample_prompt(rng) for _ in range(size)] for _ in range(NUM_DRAWS))
    return max(drawn, key=lambda prompts: regularizer.encoders[0].tokenize(prompts).shape[1])


def _contextualizer(text_encoder: TextEncoder) -> Contextualizer:
    """One of the sizes that pretraining gives it."""
    vocab_size, hidden_size = text_encoder.token_embedding.weight.shape
    recipe = SMALL_ENCODER if is_small(text_encoder) else PretrainOptions()
    sizes = ContextualizerSizes(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        width=default_width(hidden_size),
        num_layers=recipe.num_layers,
        max_length=text_encoder.window,
    )
    with torch.device("meta"):
        return Contextualizer(sizes)
