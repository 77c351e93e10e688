"""From options to a regularizer: prompts, contextualizer, taps. Shared by the hosts."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import OPTIONS, MLMOptions
from mlm_plugin.config.pretraining import RECIPE, SMALL_ENCODER, PretrainOptions
from mlm_plugin.errors import UserError
from mlm_plugin.files import cache_dir
from mlm_plugin.mlm.contextualizer import (
    Contextualizer,
    ContextualizerFacts,
    load_contextualizer,
)
from mlm_plugin.mlm.joint_prompts import JointPrompts, Member
from mlm_plugin.mlm.masking import MaskingVocabulary
from mlm_plugin.mlm.prompts import FUNCTION_WORDS, NEUTRAL_WORDS, PromptSet, category_of
from mlm_plugin.mlm.regularizer import MLMRegularizer, MLMSchedule, TextTap
from mlm_plugin.mlm.teacher import Reading, take_readings
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretrain import pretrain

__all__ = [
    "LoadedContextualizer",
    "auto_contextualizer_path",
    "build_regularizer",
    "contextualizer_settings",
    "find_contextualizer",
    "mlm_schedule",
    "mlm_target",
    "pretrain_on_device",
    "prompt_set_names",
    "prompts_for",
    "readings_for",
    "text_tap",
    "trigger_of",
]

logger = logging.getLogger(__name__)

NUM_READINGS = 1024
POOR_ACCURACY = 0.02  # of a contextualizer; about what naming the most frequent word gives


def prompts_for(
    options: MLMOptions, concepts: Sequence[Concept], *, captions: Iterable[str] = ()
) -> JointPrompts:
    """The prompts that ``mlm_prompt_set`` asks for; ``auto`` goes by each class word."""
    captions, texts = list(captions), [concept.text for concept in concepts]
    members = []
    for concept, text in zip(concepts, texts, strict=True):
        name = _prompt_set_name(options, concept)
        if name == "captions":
            others = [other for other in texts if other != text]
            prompt_set = PromptSet.from_captions(captions, concept=text, others=others)
        else:
            prompt_set = PromptSet.load(name, syntax=options.mlm_prompt_syntax)
        members.append(Member(prompt_set, text, concept.class_token or ""))
    logger.info("prompt set: %s", prompt_set_names(options, concepts))
    if len(members) == 1 and options.mlm_joint_share != OPTIONS["mlm_joint_share"].default:
        logger.warning("mlm_joint_share has no effect with one concept")
    return JointPrompts(members, joint_share=options.mlm_joint_share)


def prompt_set_names(options: MLMOptions, concepts: Sequence[Concept]) -> str:
    """Names of the prompt sets in use, for metadata."""
    return "+".join(dict.fromkeys(_prompt_set_name(options, concept) for concept in concepts))


def _prompt_set_name(options: MLMOptions, concept: Concept) -> str:
    """``mlm_prompt_set``, with ``auto`` replaced by the category of the class word."""
    if options.mlm_prompt_set != "auto":
        return options.mlm_prompt_set
    return category_of(concept.class_token)


def trigger_of(concepts: Sequence[Concept]) -> str | None:
    """The words that call what is learned: ``"sks dog"``, several between commas."""
    return ", ".join(concept.text for concept in concepts) or None


def auto_contextualizer_path(text_encoder: TextEncoder) -> Path:
    """Where the contextualizer of a text encoder is kept between runs."""
    made_for = f"{text_encoder.fingerprint()}-{text_encoder.tokenizer_fingerprint()}"
    return cache_dir() / "contextualizers" / f"{made_for}-r{RECIPE}.safetensors"


class LoadedContextualizer(NamedTuple):
    """A contextualizer and where it comes from."""

    network: Contextualizer
    facts: ContextualizerFacts
    digest: str  # of its file, 16 hex digits


def contextualizer_settings(
    setting: str, num_text_encoders: int, *, more_may_come: bool = False
) -> list[str]:
    """``mlm_contextualizer`` of each text encoder; files for several stand between commas.

    Args:
        setting: a file, several, or ``auto``, which serves any number.
        num_text_encoders: how many need one.
        more_may_come: whether further names are for text encoders that are not known yet.

    Raises:
        UserError: another number of files.
    """
    if setting == "auto":
        return [setting] * num_text_encoders
    is_one = Path(setting).is_file()
    settings = [setting] if is_one else [part.strip() for part in setting.split(",")]
    num_extra = len(settings) - num_text_encoders
    if num_extra < 0 or (num_extra > 0 and not more_may_come):
        needed = f"{num_text_encoders}{' or more' if more_may_come else ''}"
        raise UserError(
            f"mlm_contextualizer = {setting!r} names {len(settings)} file(s), needed: {needed}; "
            "give one for each text encoder that is trained, with commas between, or 'auto'"
        )
    return settings


def find_contextualizer(
    text_encoder: TextEncoder, setting: str, *, show_progress: bool = True
) -> LoadedContextualizer:
    """The given file, or with ``auto`` the cached one: made if it is missing or damaged.

    Call it before anything is trained: pretraining needs the text encoder as it came.

    Raises:
        UserError: the given file does not fit the text encoder.
        Interrupted: a signal stopped the pretraining.
    """
    if setting != "auto":
        return _load(Path(setting), text_encoder)
    path = auto_contextualizer_path(text_encoder)
    if path.is_file():
        try:
            return _load(path, text_encoder)
        except UserError as error:
            logger.warning("%s; making it anew", error)
    logger.info("no contextualizer for this text encoder yet: pretraining one (only once)")
    options = SMALL_ENCODER if is_small(text_encoder) else PretrainOptions()
    pretrain_on_device(text_encoder, path, options=options, show_progress=show_progress)
    return _load(path, text_encoder)


def _load(path: Path, text_encoder: TextEncoder) -> LoadedContextualizer:
    network, facts = load_contextualizer(path, text_encoder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    share = f"{path.name} names {facts.accuracy:.0%} of hidden held-out words"
    if facts.accuracy < POOR_ACCURACY:
        logger.warning("%s: it can teach little; pretrain it for longer", share)
    else:
        logger.info("%s", share)
    return LoadedContextualizer(network, facts, digest)


def is_small(text_encoder: TextEncoder) -> bool:
    """Whether the encoder is far smaller than the ones Stable Diffusion has (768 and up)."""
    return text_encoder.token_embedding.embedding_dim < 512


def pretrain_on_device(
    text_encoder: TextEncoder,
    path: Path,
    *,
    options: PretrainOptions,
    captions: Sequence[str] = (),
    show_progress: bool = True,
):
    """Pretrain where the text encoder lies; in bf16 where the GPU has it, else in fp32."""
    weight = text_encoder.token_embedding.weight
    dtype, device = weight.dtype, weight.device
    if device.type == "cpu" and not is_small(text_encoder):
        logger.warning(
            "pretraining the contextualizer of a full-size text encoder on a CPU takes hours; "
            "a GPU takes minutes, and the file can be carried over (--mlm_contextualizer FILE)"
        )
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    text_encoder.model.float()  # lossless for half weights, and undone below
    try:
        return pretrain(
            text_encoder,
            path,
            options=options,
            captions=captions,
            autocast=lambda: torch.autocast("cuda", torch.bfloat16) if use_bf16 else nullcontext(),
            show_progress=show_progress,
        )
    finally:
        text_encoder.model.to(dtype)


def build_regularizer(
    taps: Sequence[TextTap], options: MLMOptions, *, prompts: JointPrompts, seed: int | str
) -> MLMRegularizer:
    """Join prompts, masks and the tapped text encoders.

    Args:
        taps: one for each text encoder, from :func:`text_tap`.
        options: batch size, rate, replacement.
        prompts: where prompts come from.
        seed: names the stream; give each process its own.
    """
    return MLMRegularizer(
        taps,
        lambda rng: prompts.sample(rng).text,
        batch_size=options.mlm_batch_size,
        mlm_probability=options.mlm_probability,
        replace=options.mlm_replace,
        seed=seed,
    )


def mlm_target(options: MLMOptions, concepts: Sequence[Concept]) -> str:
    """``mlm_target`` with ``auto`` decided: ``class`` or ``word``.

    Raises:
        UserError: ``class`` is asked for, and a concept has no class word.
    """
    nameless = [concept.placeholder_token for concept in concepts if not concept.class_token]
    if options.mlm_target == "class" and nameless:
        raise UserError(
            f"mlm_target = 'class': {nameless[0]!r} has no class word; give class_token "
            '(e.g. "dog"), or take mlm_target = word'
        )
    if options.mlm_target != "auto":
        return options.mlm_target
    return "word" if nameless else "class"


def readings_for(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    concepts: Sequence[Concept],
    options: MLMOptions,
    *,
    prompts: JointPrompts,
    seed: int,
) -> list[Reading]:
    """The targets of ``mlm_target = class``; none for ``word``.

    Call it before anything is trained. Text encoders of one run get the same prompts.

    Args:
        text_encoder: as it came.
        contextualizer: made for it; moved to its device.
        concepts: what is never hidden.
        options: target, rate, replacement.
        prompts: where prompts come from.
        seed: of the run; processes share it.
    """
    if mlm_target(options, concepts) == "word":
        return []
    rng = random.Random(f"readings/{seed}")
    pairs = [prompts.sample(rng) for _ in range(NUM_READINGS)]
    return take_readings(
        text_encoder,
        contextualizer.to(text_encoder.token_embedding.weight.device),
        pairs,
        vocabulary=_masking_vocabulary(text_encoder, concepts),
        mlm_probability=options.mlm_probability,
        replace=options.mlm_replace,
        rng=rng,
    )


def text_tap(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    concepts: Sequence[Concept],
    *,
    readings: Sequence[Reading] = (),
    tokenize: Callable[[list[str], random.Random], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextTap:
    """Where the regularizer touches a text encoder.

    Args:
        text_encoder: with everything in place that is trained in it.
        contextualizer: made for it; moved to its device.
        concepts: what is never masked.
        readings: the term's targets, from :func:`readings_for`.
        tokenize: prompts to ids, if the method has its own way.
        dtype: precision of the contextualizer; its loss is fp32 in any case.
    """
    embedding = text_encoder.token_embedding
    # rows that a host added behind the vocabulary are no answers
    table = embedding.weight.detach()[: contextualizer.sizes.vocab_size]
    if embedding.weight.requires_grad:  # the output table must not follow the training
        table = table.clone()
    return TextTap(
        tokenize=tokenize or (lambda prompts, _rng: text_encoder.tokenize_trimmed(prompts)),
        encode=text_encoder.encode_storing,
        embedding=embedding,
        contextualizer=contextualizer.to(table.device, dtype),
        vocabulary=_masking_vocabulary(text_encoder, concepts),
        token_table=table,
        readings=readings,
    )


def _masking_vocabulary(
    text_encoder: TextEncoder, concepts: Sequence[Concept]
) -> MaskingVocabulary:
    protected = [word for concept in concepts for word in concept]
    if text_encoder.learned_tokens is not None:  # no vocabulary holds their tokens: never a target
        protected += text_encoder.learned_tokens.tokens
    return MaskingVocabulary.from_tokenizer(
        text_encoder.tokenizer,
        protected=protected,
        low_priority=FUNCTION_WORDS | NEUTRAL_WORDS,
    )


def mlm_schedule(options: MLMOptions) -> MLMSchedule:
    """When and how strongly the term acts."""
    return MLMSchedule(
        options.mlm_loss_weight,
        every_n_steps=options.mlm_every_n_steps,
        start_step=options.mlm_start_step,
        end_step=options.mlm_end_step,
    )
