"""From options to the regularizer: prepare, compute targets, attach. Both hosts use it.

Before anything is trained, :class:`MLMSetup` finds the contextualizer of each text encoder and
computes what the untrained model makes of the prompts. :meth:`MLMSetup.attach` returns the
regularizer, on models that hold what the host trains.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import OPTIONS, MLMOptions
from mlm_plugin.contextualizer_file import (
    LoadedContextualizer,
    contextualizer_settings,
)
from mlm_plugin.mlm.contextualizer import Contextualizer
from mlm_plugin.mlm.cross_attention import CrossAttention
from mlm_plugin.mlm.encoder import EncoderHandle, PromptTarget, Variants
from mlm_plugin.mlm.masking import MaskingVocabulary
from mlm_plugin.mlm.next_word import NextWordHead
from mlm_plugin.mlm.prompts import JointPrompts, Member, PromptSet
from mlm_plugin.mlm.regularizer import MLMRegularizer, MLMSchedule
from mlm_plugin.mlm.teacher import (
    MaskSettings,
    compute_targets,
)
from mlm_plugin.models.language_model import AdaptedEncoder, LanguageModelEncoder, T5Encoder
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.find import find_contextualizer
from mlm_plugin.prompt_sets.english import WORDS_WITHOUT_CONTENT, category_of
from mlm_plugin.random_state import preserved_random_state

__all__ = [
    "MLMSetup",
    "PreparedEncoder",
    "mlm_schedule",
    "on_device",
    "prompt_set_names",
    "prompts_for",
    "trigger_of",
]

logger = logging.getLogger(__name__)

NUM_TARGETS = 1024

AnyEncoder = TextEncoder | T5Encoder | LanguageModelEncoder | AdaptedEncoder
Vary = Callable[[Tensor, random.Random], Variants]
"""A method's own variants of encoded prompts."""
Starts = Callable[[Tensor], Sequence[Tensor]]
"""Those of them that differ before training, by layer."""


@dataclass
class PreparedEncoder:
    """A text encoder that the term reads, and what was prepared while it was untrained."""

    text_encoder: AnyEncoder | None  # None: it was let go
    contextualizer: Contextualizer | None = None  # None: states are compared, or it has a head
    is_trained: bool = True  # whether anything before its output is
    targets: list[PromptTarget] | None = None  # not yet computed; empty: not needed
    head: NextWordHead | None = None  # of a language model that reads itself
    token_table: Tensor | None = None  # copy of the untrained embeddings, where they are trained
    kept: EncoderHandle | None = None  # of one that was let go

    @property
    def width(self) -> int:
        """Of its token embeddings."""
        embedding = self.kept.embedding if self.kept else self.text_encoder.token_embedding
        return embedding.embedding_dim

    def let_go(self, handle: EncoderHandle) -> None:
        """Free a frozen encoder that has read the prompts: hosts delete theirs to save memory."""
        width = nn.Embedding(1, handle.embedding.embedding_dim, device="meta")
        self.kept = replace(handle, tokenize=_gone, encode=_gone, embedding=width)
        self.text_encoder = None


class MLMSetup:
    """The term of one run, from its options to the regularizer.

    Concepts (:meth:`use_concepts`) and text encoders (:meth:`prepare`) come in any order, as the
    host has them. Then come :meth:`compute_targets`, before the first step, and :meth:`attach`.

    Args:
        options: the ``mlm`` group of a run.
        seed: of the run; ``mlm_seed`` takes precedence.
        read_at: ``encoder``, ``cross_attention`` or ``both``.
        num_targets: prompts that the untrained model reads.

    Attributes:
        encoders: prepared so far.
        contextualizers: found for them; none where states are compared or the model reads itself.
        concepts: empty until they are known.
        prompts: where prompts come from, once the concepts are known.
    """

    def __init__(
        self,
        options: MLMOptions,
        *,
        seed: int,
        read_at: str = "encoder",
        num_targets: int = NUM_TARGETS,
    ):
        self.options = options
        self.num_targets = num_targets
        self.seed = seed if options.mlm_seed is None else options.mlm_seed
        self.read_at = read_at
        self.encoders: list[PreparedEncoder] = []
        self.contextualizers: list[LoadedContextualizer] = []
        self.concepts: tuple[Concept, ...] = ()
        self.prompts: JointPrompts | None = None

    @property
    def reads_cross_attention(self) -> bool:
        """Whether the U-Net's keys and values are read."""
        return self.read_at != "encoder"

    def reads(self, is_trained: bool) -> bool:
        """Whether a text encoder is read; the U-Net reads all of them together."""
        return is_trained or self.reads_cross_attention

    def use_concepts(self, concepts: Sequence[Concept], *, captions: Iterable[str] = ()) -> None:
        """Set what is learned; the captions may serve as prompts.

        Raises:
            UserError: a prompt set that cannot be loaded, or captions without the concept.
        """
        self.concepts = tuple(concepts)
        self.prompts = prompts_for(self.options, concepts, captions=captions)

    def prepare(
        self,
        text_encoders: Sequence[AnyEncoder],
        accelerator: Accelerator,
        *,
        trained: Sequence[bool] | None = None,
        more_may_come: bool = False,
    ) -> None:
        """Find or pretrain the contextualizers of text encoders, unless states are compared.

        A language model reads itself. Text encoders that are not read are left out. The host's
        random state is not changed.

        Args:
            text_encoders: untrained.
            accelerator: its device does the work; one process pretrains, the others find the file.
            trained: for each, whether anything before its output will be trained; default all.
            more_may_come: whether the host may prepare further text encoders later.

        Raises:
            UserError: a given file does not fit.
        """
        trained = trained or [True] * len(text_encoders)
        read = [
            (text_encoder, is_trained)
            for text_encoder, is_trained in zip(text_encoders, trained, strict=True)
            if self.reads(is_trained)
        ]
        networks: list[Contextualizer | None] = [None] * len(read)
        heads: list[NextWordHead | None] = [None] * len(read)
        has_reader = self.options.mlm_target != "states"
        if has_reader and any(text_encoder.reads_itself for text_encoder, _ in read):
            heads = [text_encoder.next_word_head() for text_encoder, _ in read]
        elif has_reader:
            settings = contextualizer_settings(
                self.options.mlm_contextualizer,
                len(self.encoders) + len(read),
                more_may_come=more_may_come,
            )[len(self.encoders) :]
            found = [
                _contextualizer_for(text_encoder, setting, accelerator)
                for (text_encoder, _), setting in zip(read, settings, strict=False)
            ]
            self.contextualizers += found
            networks = [contextualizer.network for contextualizer in found]
        self.encoders += [
            PreparedEncoder(text_encoder, network, is_trained, head=head)
            for (text_encoder, is_trained), network, head in zip(read, networks, heads, strict=True)
        ]

    def compute_targets(
        self, device: torch.device, *, dtype: torch.dtype, starts: Starts | None = None
    ) -> None:
        """What the untrained text encoders make of the prompts, where it is not known yet.

        Placeholders with embeddings of their own must be in place. Does nothing as long as the
        concepts are not known. Call it in the precision of the training, as anything else would
        round otherwise, and the term would not start at zero.

        Args:
            device: does the work.
            dtype: precision of the contextualizers, as for :meth:`attach`.
            starts: a method's variants of a prompt that differ before training, if it has any.
        """
        if self.prompts is None:
            return
        for encoder in self.encoders:
            if encoder.targets is None:
                handle = encoder_handle(
                    encoder, self.concepts, dtype=dtype, device=device, starts=starts
                )
                with preserved_random_state(device), on_device(encoder.text_encoder.models, device):
                    encoder.targets = self._targets_of(handle)
                if not (handle.is_trained or handle.is_in_image_model):
                    encoder.let_go(handle)

    def _targets_of(self, handle: EncoderHandle) -> list[PromptTarget]:
        """The same prompts and masks for every text encoder and process."""
        with_teacher = self.options.mlm_target != "word"
        if not with_teacher and all(encoder.is_trained for encoder in self.encoders):
            return []  # fresh prompts are drawn
        rng = random.Random(f"readings/{self.seed}")  # part of the result: do not change the name
        pairs = [self.prompts.sample(rng) for _ in range(self.num_targets)]
        masks = mask_settings(self.options)
        return compute_targets(handle, pairs, rng, masks=masks, with_teacher=with_teacher)

    def attach(
        self,
        *,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        vary: Vary | None = None,
        cross_attention: CrossAttention | None = None,
    ) -> MLMRegularizer:
        """The term on models that hold what is trained.

        Args:
            rank: rank of this process; each draws its own prompts.
            dtype: precision of the contextualizers; their loss is fp32 in any case.
            device: where the term is computed.
            vary: a method's own variants of a prompt, if it has any.
            cross_attention: the U-Net's, where it is read.
        """
        if cross_attention and not any(encoder.is_trained for encoder in self.encoders):
            cross_attention = cross_attention.trained_part()
        handles = [
            encoder_handle(encoder, self.concepts, dtype=dtype, device=device, vary=vary)
            for encoder in self.encoders
        ]
        for handle in handles:
            handle.is_read = (
                handle.is_trained
                and self.read_at != "cross_attention"
                and not handle.is_in_image_model
            )
        options = self.options
        return MLMRegularizer(
            handles,
            lambda rng: self.prompts.sample(rng).text,
            batch_size=options.mlm_batch_size,
            masks=mask_settings(options),
            seed=f"{self.seed}/{rank}",
            cross_attention=cross_attention,
        )


def _contextualizer_for(
    text_encoder: TextEncoder, setting: str, accelerator: Accelerator
) -> LoadedContextualizer:
    with (
        preserved_random_state(accelerator.device),
        accelerator.main_process_first(),
        on_device(text_encoder.models, accelerator.device),
    ):
        return find_contextualizer(
            text_encoder, setting, show_progress=accelerator.is_local_main_process
        )


def mask_settings(options: MLMOptions) -> MaskSettings:
    """How words are masked."""
    return MaskSettings(options.mlm_probability, options.mlm_replace)


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
    return category_of(concept.class_token or "")


def trigger_of(concepts: Sequence[Concept]) -> str | None:
    """The words that trigger what is learned: ``"sks dog"``, several separated by commas."""
    return ", ".join(concept.text for concept in concepts) or None


def mlm_schedule(options: MLMOptions) -> MLMSchedule:
    """When and how strongly the term acts."""
    return MLMSchedule(
        options.mlm_loss_weight,
        every_n_steps=options.mlm_every_n_steps,
        start_step=options.mlm_start_step,
        end_step=options.mlm_end_step,
    )


def encoder_handle(
    encoder: PreparedEncoder,
    concepts: Sequence[Concept],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    vary: Vary | None = None,
    starts: Starts | None = None,
) -> EncoderHandle:
    """A text encoder as the regularizer sees it.

    Args:
        encoder: untrained for the teacher, else with what is trained in place.
        concepts: what is never masked.
        dtype: precision of the contextualizer, which is moved to the device.
        device: where the term is computed.
        vary: a method's own variants of a prompt, if it has any.
        starts: those that differ before training.
    """
    network = encoder.contextualizer
    if network is not None:
        network.to(device, dtype)
    if encoder.kept is not None:
        return replace(encoder.kept, targets=encoder.targets, vary=vary or encoder.kept.vary)
    text_encoder = encoder.text_encoder
    reader = {}
    if network is not None:
        reader = {
            "contextualizer": network,
            "token_table": _token_table(encoder, network.sizes.vocab_size, device),
        }
    reader |= {name: f for name, f in (("vary", vary), ("starts", starts)) if f is not None}
    return EncoderHandle(
        tokenize=text_encoder.tokenize_trimmed,
        encode=text_encoder.encode_storing,
        embedding=text_encoder.token_embedding,
        vocabulary=_masking_vocabulary(text_encoder, concepts),
        pad_token_id=text_encoder.tokenizer.pad_token_id,
        device=device,
        head=encoder.head,
        targets=encoder.targets or (),
        is_trained=encoder.is_trained,
        is_in_image_model=isinstance(text_encoder, AdaptedEncoder),
        **reader,
    )


def _gone(*_args: object) -> NoReturn:
    raise AssertionError("a text encoder that was let go is asked")


def _token_table(encoder: PreparedEncoder, vocab_size: int, device: torch.device) -> Tensor:
    """The output table; embeddings that a host added after the vocabulary are never predicted."""
    if encoder.token_table is not None:
        return encoder.token_table.to(device)
    weight_VD = encoder.text_encoder.token_embedding.weight
    table_VD = weight_VD.detach()[:vocab_size].to(device)
    if weight_VD.requires_grad:  # the output table must not follow the training
        encoder.token_table = table_VD = table_VD.clone()
    return table_VD


def _masking_vocabulary(text_encoder: AnyEncoder, concepts: Sequence[Concept]) -> MaskingVocabulary:
    protected = [word for concept in concepts for word in concept]
    if text_encoder.learned_tokens is not None:  # their ids are in no vocabulary: never a target
        protected += text_encoder.learned_tokens.tokens
    return MaskingVocabulary.from_tokenizer(
        text_encoder.tokenizer,
        protected=protected,
        low_priority=WORDS_WITHOUT_CONTENT,
        prefix=text_encoder.prefix,
    )


@contextmanager
def on_device(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Models on a device inside the block; hosts place their models themselves."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_moved(model, device))
        yield


@contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    before = next(model.parameters()).device
    try:
        model.to(device)
    except torch.cuda.OutOfMemoryError:  # T5-XXL beside a transformer that is there already
        logger.warning(
            "%s does not fit on %s beside the image model: it reads the prompts of the MLM term "
            "where it is (%s), which takes longer",
            type(model).__name__,
            device,
            before,
        )
        model.to(before)
    try:
        yield
    finally:
        model.to(before)
