"""The data of a run: concepts, data set, the order of its batches, and the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from mlm_plugin.config.concepts import Concept, concepts_of
from mlm_plugin.config.datasets import DatasetConfig
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import Batch, EpochOrder, TrainDataset, make_loader
from mlm_plugin.data.dataset_report import dataset_report
from mlm_plugin.data.templates import load_templates
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.token_embeddings import placeholder_pattern
from mlm_plugin.prompt_sets.english import is_ordinary_word

__all__ = [
    "captions_of",
    "create_dataset",
    "create_loader",
    "create_order",
    "find_concepts",
    "print_report",
    "require_placeholders",
]

logger = logging.getLogger(__name__)


def find_concepts(config: TrainConfig, datasets: Sequence[DatasetConfig]) -> tuple[Concept, ...]:
    """What is learned, which token embeddings and the MLM term need to know.

    Raises:
        UserError: it is needed and not known.
    """
    learns_tokens = METHODS[config.schedule.method].learns_tokens
    ranks_files = config.output.mlm_keep_best or config.output.mlm_stop_below is not None
    required = learns_tokens or config.mlm.mlm_loss_weight > 0 or ranks_files
    concepts = concepts_of(config, datasets, required=required)
    for concept in concepts:
        if is_ordinary_word(concept.placeholder_token):
            logger.warning(
                "placeholder_token %r is an ordinary word, which will mean the concept afterwards; "
                "take a rare one, such as sks",
                concept.placeholder_token,
            )
    return concepts


def captions_of(dataset: TrainDataset) -> list[str]:
    """The captions of all pictures but those of regularization, before anything is drawn."""
    pictures = (info for info in dataset.images if not info.is_reg)
    return [caption for info in pictures for caption in dataset.captions_of(info)]


def create_dataset(
    config: TrainConfig,
    datasets: Sequence[DatasetConfig],
    concepts: Sequence[Concept],
    *,
    seed: int,
) -> TrainDataset:
    """The pictures and captions of the run."""
    data = config.dataset
    kind = "object" if data.use_object_template else "style"
    uses_templates = data.use_object_template or data.use_style_template
    return TrainDataset(
        datasets,
        seed=seed,
        prior_loss_weight=data.prior_loss_weight,
        masked_loss=data.masked_loss,
        templates=load_templates(kind) if uses_templates else (),
        concept=concepts[0].text if len(concepts) == 1 else None,
    )


def create_order(
    config: TrainConfig, dataset: TrainDataset, *, rank: int, world_size: int
) -> EpochOrder:
    """Which batches one of the processes takes, epoch by epoch."""
    return EpochOrder(
        dataset,
        rank=rank,
        world_size=world_size,
        batches_per_step=config.schedule.gradient_accumulation_steps,
    )


def create_loader(
    config: TrainConfig, order: EpochOrder, *, device: torch.device
) -> DataLoader[Batch]:
    """A loader of those batches, for training on ``device``."""
    workers = config.schedule.max_data_loader_n_workers
    return make_loader(
        order,
        num_workers=min(workers, torch.multiprocessing.cpu_count()),
        persistent_workers=config.schedule.persistent_data_loader_workers,
        pin_memory=device.type == "cuda",
    )


def require_placeholders(dataset: TrainDataset, concepts: Sequence[Concept]) -> None:
    """Refuse placeholders that are in no caption: they would learn nothing from the pictures.

    Raises:
        UserError: names the placeholder and the first caption.
    """
    captions = captions_of(dataset)
    for concept in concepts:
        pattern = placeholder_pattern([concept.placeholder_token])
        if not any(map(pattern.search, captions)):
            raise UserError(
                f"placeholder_token = {concept.placeholder_token!r}: none of the {len(captions)} "
                f"captions holds it (the first is {captions[0]!r}), so nothing would be learned; "
                "write it into the captions, or set placeholder_token to the word they hold"
            )


def print_report(
    config: TrainConfig,
    dataset: TrainDataset,
    concepts: Sequence[Concept],
    models: StableDiffusion,
) -> None:
    """Print what was found: pictures, captions, buckets, concepts."""
    text_encoder = models.text_encoders[0]  # a second one has the same vocabulary
    learned = METHODS[config.schedule.method].learns_tokens
    num_vectors = config.embedding.num_vectors_per_token

    def count_tokens(caption: str) -> int:
        placeholders = [concept.placeholder_token for concept in concepts] if learned else []
        found = placeholder_pattern(placeholders).findall(caption) if placeholders else []
        return text_encoder.count_tokens(caption) + (num_vectors - 1) * len(found)

    report = dataset_report(
        dataset,
        concepts=[concept.text for concept in concepts],
        count_tokens=count_tokens,
        max_tokens=config.model.max_token_length or 75,
    )
    print("\n".join(report.lines()))
    for concept in concepts:
        name = concept.placeholder_token
        if learned:
            read = f"learned as {num_vectors} vector(s)"
        else:
            tokens = text_encoder.tokenizer.tokenize(name)
            read = f"the tokenizer reads it as {len(tokens)} token(s): {' '.join(tokens)}"
        print(f"Concept: {name!r} is a {concept.class_token or 'thing'}; {read}")
