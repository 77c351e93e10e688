"""From options to the regularizer: prepare, then attach. Both hosts use it.

Before anything is trained, :class:`MLMSetup` finds the contextualizer of each text encoder and
computes the teacher targets. The host then puts into the text encoders what it trains, and
:meth:`MLMSetup.attach` returns the regularizer.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import OPTIONS, MLMOptions
from mlm_plugin.contextualizer_file import LoadedContextualizer, contextualizer_settings
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.contextualizer import Contextualizer
from mlm_plugin.mlm.encoder import EncoderHandle, TeacherTarget
from mlm_plugin.mlm.masking import MaskingVocabulary
from mlm_plugin.mlm.prompts import JointPrompts, Member, PromptSet
from mlm_plugin.mlm.regularizer import MLMRegularizer, MLMSchedule
from mlm_plugin.mlm.teacher import compute_teacher_targets
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretrain import find_contextualizer
from mlm_plugin.prompt_sets.english import FUNCTION_WORDS, NEUTRAL_WORDS, category_of
from mlm_plugin.random_state import preserved_random_state

__all__ = [
    "MLMSetup",
    "PreparedEncoder",
    "build_regularizer",
    "encoder_handle",
    "mlm_schedule",
    "mlm_target",
    "prompt_set_names",
    "prompts_for",
    "teacher_targets_for",
    "trigger_of",
]

logger = logging.getLogger(__name__)

NUM_TARGETS = 1024

Tokenize = Callable[[TextEncoder, list[str], random.Random], Tensor]
"""A method's own way to turn prompts into ids ``(B, L)``."""


@dataclass
class PreparedEncoder:
    """A text encoder that the term acts on, and what was prepared while it was untrained."""

    text_encoder: TextEncoder
    contextualizer: LoadedContextualizer
    teacher_targets: list[TeacherTarget] | None = None  # not yet computed; empty: not needed


class MLMSetup:
    """The term of one run, from its options to the regularizer.

    Concepts (:meth:`use_concepts`) and text encoders (:meth:`prepare`) come in any order, as the
    host has them, and :meth:`attach` ends the set-up.

    Args:
        options: the ``mlm`` group of a run.
        seed: of the run; ``mlm_seed`` takes precedence.

    Attributes:
        encoders: prepared so far.
        concepts: empty until they are known.
        prompts: where prompts come from, once the concepts are known.
    """

    def __init__(self, options: MLMOptions, *, seed: int):
        self.options = options
        self.seed = seed if options.mlm_seed is None else options.mlm_seed
        self.encoders: list[PreparedEncoder] = []
        self.concepts: tuple[Concept, ...] = ()
        self.prompts: JointPrompts | None = None

    def use_concepts(self, concepts: Sequence[Concept], *, captions: Iterable[str] = ()) -> None:
        """Set what is learned; the captions may serve as prompts.

        Raises:
            UserError: a prompt set that cannot be loaded, or captions without the concept.
        """
        self.concepts = tuple(concepts)
        self.prompts = prompts_for(self.options, concepts, captions=captions)

    def prepare(
        self,
        text_encoders: Sequence[TextEncoder],
        accelerator: Accelerator,
        *,
        more_may_come: bool = False,
    ) -> None:
        """Find or pretrain contextualizers, and compute teacher targets.

        The host's random state is not changed.

        Args:
            text_encoders: untrained.
            accelerator: its device does the work; one process pretrains, the others find the file.
            more_may_come: whether the host may prepare further text encoders later.

        Raises:
            UserError: a given file does not fit.
        """
        settings = contextualizer_settings(
            self.options.mlm_contextualizer,
            len(self.encoders) + len(text_encoders),
            more_may_come=more_may_come,
        )[len(self.encoders) :]
        for text_encoder, setting in zip(text_encoders, settings, strict=False):
            with (
                preserved_random_state(accelerator.device),
                accelerator.main_process_first(),
                _on_device(text_encoder.model, accelerator.device),
            ):
                found = find_contextualizer(
                    text_encoder, setting, show_progress=accelerator.is_local_main_process
                )
            self.encoders.append(PreparedEncoder(text_encoder, found))
        self.compute_targets(accelerator)

    def compute_targets(self, accelerator: Accelerator) -> None:
        """Teacher targets of the text encoders that lack them, once the concepts are known."""
        if self.prompts is None:
            return
        for encoder in self.encoders:
            if encoder.teacher_targets is None:
                with _on_device(encoder.text_encoder.model, accelerator.device):
                    encoder.teacher_targets = teacher_targets_for(
                        encoder.text_encoder,
                        encoder.contextualizer.network,
                        self.concepts,
                        self.options,
                        prompts=self.prompts,
                        seed=self.seed,
                    )

    def attach(
        self, *, rank: int, dtype: torch.dtype, tokenize: Tokenize | None = None
    ) -> MLMRegularizer:
        """The term on text encoders that hold what is trained.

        Args:
            rank: rank of this process; each draws its own prompts.
            dtype: precision of the contextualizers; their loss is fp32 in any case.
            tokenize: prompts to ids, if the method has its own way.
        """
        handles = [
            encoder_handle(
                encoder.text_encoder,
                encoder.contextualizer.network,
                self.concepts,
                teacher_targets=encoder.teacher_targets or (),
                tokenize=tokenize,
                dtype=dtype,
            )
            for encoder in self.encoders
        ]
        seed = f"{self.seed}/{rank}"
        return build_regularizer(handles, self.options, prompts=self.prompts, seed=seed)


def build_regularizer(
    encoders: Sequence[EncoderHandle],
    options: MLMOptions,
    *,
    prompts: JointPrompts,
    seed: int | str,
) -> MLMRegularizer:
    """Join prompts, masks and text encoders.

    Args:
        encoders: one for each text encoder, from :func:`encoder_handle`.
        options: batch size, rate, replacement.
        prompts: where prompts come from.
        seed: names the stream; give each process its own.
    """
    return MLMRegularizer(
        encoders,
        lambda rng: prompts.sample(rng).text,
        batch_size=options.mlm_batch_size,
        mlm_probability=options.mlm_probability,
        replace=options.mlm_replace,
        seed=seed,
    )


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
    """The words that trigger what is learned: ``"sks dog"``, several separated by commas."""
    return ", ".join(concept.text for concept in concepts) or None


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


def mlm_schedule(options: MLMOptions) -> MLMSchedule:
    """When and how strongly the term acts."""
    return MLMSchedule(
        options.mlm_loss_weight,
        every_n_steps=options.mlm_every_n_steps,
        start_step=options.mlm_start_step,
        end_step=options.mlm_end_step,
    )


def teacher_targets_for(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    concepts: Sequence[Concept],
    options: MLMOptions,
    *,
    prompts: JointPrompts,
    seed: int,
) -> list[TeacherTarget]:
    """The teacher targets of ``mlm_target = class``; none for ``word``.

    Text encoders of one run get the same prompts.

    Args:
        text_encoder: untrained.
        contextualizer: made for it; moved to its device.
        concepts: what is never masked.
        options: target, rate, replacement.
        prompts: where prompts come from.
        seed: of the run; processes share it.
    """
    if mlm_target(options, concepts) == "word":
        return []
    rng = random.Random(f"readings/{seed}")  # the name is part of the result: do not change it
    pairs = [prompts.sample(rng) for _ in range(NUM_TARGETS)]
    own_dtype = contextualizer.mask_vector.dtype  # half precision in a small file, kept
    return compute_teacher_targets(
        encoder_handle(text_encoder, contextualizer, concepts, dtype=own_dtype),
        pairs,
        mlm_probability=options.mlm_probability,
        replace=options.mlm_replace,
        rng=rng,
    )


def encoder_handle(
    text_encoder: TextEncoder,
    contextualizer: Contextualizer,
    concepts: Sequence[Concept],
    *,
    teacher_targets: Sequence[TeacherTarget] = (),
    tokenize: Tokenize | None = None,
    dtype: torch.dtype = torch.float32,
) -> EncoderHandle:
    """A text encoder as the regularizer sees it.

    Args:
        text_encoder: untrained for the teacher, else with what is trained in place.
        contextualizer: made for it; moved to its device.
        concepts: what is never masked.
        teacher_targets: from :func:`teacher_targets_for`.
        tokenize: prompts to ids, if the method has its own way.
        dtype: precision of the contextualizer.
    """
    embedding = text_encoder.token_embedding
    # embeddings that a host added after the vocabulary are never predicted
    table = embedding.weight.detach()[: contextualizer.sizes.vocab_size]
    if embedding.weight.requires_grad:  # the output table must not follow the training
        table = table.clone()

    def token_ids(prompts: list[str], rng: random.Random) -> Tensor:
        if tokenize is not None:
            return tokenize(text_encoder, prompts, rng)
        return text_encoder.tokenize_trimmed(prompts)

    return EncoderHandle(
        tokenize=token_ids,
        encode=text_encoder.encode_storing,
        embedding=embedding,
        contextualizer=contextualizer.to(table.device, dtype),
        vocabulary=_masking_vocabulary(text_encoder, concepts),
        token_table=table,
        teacher_targets=teacher_targets,
    )


def _masking_vocabulary(
    text_encoder: TextEncoder, concepts: Sequence[Concept]
) -> MaskingVocabulary:
    protected = [word for concept in concepts for word in concept]
    if text_encoder.learned_tokens is not None:  # their ids are in no vocabulary: never a target
        protected += text_encoder.learned_tokens.tokens
    return MaskingVocabulary.from_tokenizer(
        text_encoder.tokenizer,
        protected=protected,
        low_priority=FUNCTION_WORDS | NEUTRAL_WORDS,
    )


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device inside the block; hosts place their models themselves."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
