"""The contextualizer of a text encoder: the given file, the cached one, or a new one.

A new one starts from that of a similar text encoder where the cache holds one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlm_plugin.config.pretraining import SMALL_ENCODER, PretrainOptions
from mlm_plugin.contextualizer_file import (
    POOR_ACCURACY,
    LoadedContextualizer,
    cached_contextualizer_path,
    in_memory,
    load_and_report,
    read_contextualizer,
    related_contextualizer_paths,
)
from mlm_plugin.errors import UserError
from mlm_plugin.files import cache_dir, writable_cache_dir
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.run import (
    NotSaved,
    PretrainingRun,
    Scores,
    Start,
    frozen,
    pretrain,
)

__all__ = ["find_contextualizer", "find_start", "is_small", "pretrain_on_device"]

logger = logging.getLogger(__name__)

MAX_RELATED = 4  # cached contextualizers that are tried as a start
NUM_COMPARED = 128  # held-out prompts on which they are tried
RELATED = 0.5  # share of its accuracy that a contextualizer keeps on a similar text encoder


def find_contextualizer(
    text_encoder: TextEncoder, setting: str, *, show_progress: bool = True
) -> LoadedContextualizer:
    """The given file, or the cached one for ``auto``: pretrained if it is missing or damaged.

    Call it before anything is trained: pretraining needs the untrained text encoder.

    Raises:
        UserError: the given file does not fit the text encoder.
        Interrupted: a signal stopped the pretraining.
    """
    if setting != "auto":
        return load_and_report(setting, text_encoder)
    path = cached_contextualizer_path(text_encoder)
    if path.is_file():
        try:
            return load_and_report(path, text_encoder)
        except UserError as error:
            logger.warning("%s; making it again", error)
    path = writable_cache_dir() / path.relative_to(cache_dir())
    options = SMALL_ENCODER if is_small(text_encoder) else PretrainOptions()
    start = find_start(text_encoder, options)
    if start is None:
        logger.info(
            "no contextualizer for this text encoder yet: pretraining one, only once, in at most "
            "%d steps; the bar says how long it will take",
            options.max_train_steps,
        )
    else:
        options = options.continued()
        logger.info(
            "no contextualizer for this text encoder yet: adapting that of a similar one, which "
            "names %.0f%% of hidden words here (only once)",
            100 * start.accuracy,
        )
    try:
        pretrain_on_device(
            text_encoder, path, options=options, start=start, show_progress=show_progress
        )
    except NotSaved as error:
        logger.warning(
            "%s: the contextualizer cannot be kept (%s); this run uses it from memory, and the "
            "next one makes it again",
            path,
            error.strerror,
        )
        return in_memory(error.network, error.facts)
    return load_and_report(path, text_encoder)


def find_start(text_encoder: TextEncoder, options: PretrainOptions) -> Start | None:
    """Where pretraining can start: the best cached contextualizer that reads this encoder too.

    A fine-tuned text encoder keeps the states of its base so nearly that the contextualizer of one
    reads the other. Which encoders are related is told by that alone.

    Args:
        text_encoder: has none of its own yet.
        options: name the held-out prompts and the sizes.
    """
    paths = related_contextualizer_paths(text_encoder)[:MAX_RELATED]
    if not paths:
        return None
    best: Start | None = None
    run = PretrainingRun(
        text_encoder, paths[0], options=replace(options, num_held_out=NUM_COMPARED)
    )
    for path in paths:
        try:
            network, facts = read_contextualizer(path)
        except UserError as error:
            logger.debug("%s", error)
            continue
        if network.sizes != run.network.sizes:
            continue
        run.network.load_state_dict(network.state_dict())
        with frozen(text_encoder):
            run.evaluate()
        accuracy = run.scores.accuracy
        if accuracy > max(POOR_ACCURACY, RELATED * facts.accuracy, best.accuracy if best else 0):
            best = Start(network, accuracy, facts.text_encoder)
    return best


def is_small(text_encoder: TextEncoder) -> bool:
    """Whether the encoder is far smaller than those of Stable Diffusion (768 and up)."""
    return text_encoder.token_embedding.embedding_dim < 512


def pretrain_on_device(
    text_encoder: TextEncoder,
    path: Path,
    *,
    options: PretrainOptions,
    captions: Sequence[str] = (),
    start: Start | None = None,
    show_progress: bool = True,
) -> Scores:
    """Pretrain on the text encoder's device; in bf16 where the GPU has it, else in fp32."""
    weight = text_encoder.token_embedding.weight
    dtype, device = weight.dtype, weight.device
    if device.type == "cpu" and not is_small(text_encoder):
        logger.warning(
            "pretraining the contextualizer of a full-size text encoder on a CPU takes hours; "
            "a GPU takes minutes, and the file can be carried over (--mlm_contextualizer FILE)"
        )
    text_encoder.model.float()  # lossless for half weights, and undone below
    try:
        return pretrain(
            text_encoder,
            path,
            options=options,
            captions=captions,
            start=start,
            show_progress=show_progress,
        )
    finally:
        text_encoder.model.to(dtype)
