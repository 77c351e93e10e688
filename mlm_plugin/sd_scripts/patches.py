"""The MLM term in scripts without a method to override: textual inversion and whole models.

Their loops are one function each. But all of them call accelerate's ``Accelerator``, and where a
text encoder is trained the text-encoding strategy of sd-scripts, which shows whether it is in this
step; where none is, they load it with ``load_target_model``. These are wrapped while a script runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.errors import UserError
from mlm_plugin.models.cross_attention import cross_attention_names
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.sd_scripts.accelerator_hooks import shown_in_progress_bar, wrapped
from mlm_plugin.sd_scripts.arguments import read_at, read_mlm_options
from mlm_plugin.sd_scripts.mixin import bind, require_methods
from mlm_plugin.sd_scripts.term import MLMTerm
from mlm_plugin.sd_scripts.text_encoders import is_clip_text_model, is_t5, wrap_text_encoder

__all__ = [
    "MLMEmbeddingMixin",
    "ScriptFacts",
    "collected_text_encoders",
    "frozen_text_encoders",
    "summed_backward",
    "with_mlm_embedding",
]

logger = logging.getLogger(__name__)

NEEDED = {
    "train": {"args"},
    "get_tokenizers": set(),
    "load_target_model": {"args", "accelerator"},
    "save_weights": {"metadata"},
}
"""Methods of the textual-inversion trainers that are overridden, and the parameters read."""


@contextmanager
def summed_backward(
    term: MLMTerm, strategies: Sequence[type], *, trains_text: bool = True
) -> Iterator[None]:
    """Make ``Accelerator.backward`` add the term, once for each training batch.

    Entered after :func:`collected_text_encoders` or :func:`frozen_text_encoders`, whose encoders it
    then knows when the data come.

    Args:
        term: what is added.
        strategies: text-encoding strategies; a call of ``encode_tokens`` with gradient means that
            the text encoder is trained on this batch.
        trains_text: whether it is trained at all; otherwise the term is added to every batch.
    """
    announced = False

    def encode_tokens(original: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal announced
            announced = announced or torch.is_grad_enabled()
            return original(*args, **kwargs)

        return wrapped

    def backward(original: Callable) -> Callable:
        def wrapped(self, loss, *args, **kwargs):
            nonlocal announced
            if announced or not trains_text:
                announced = False
                loss = term.add_to(loss, self)
            elif not term.call:
                raise UserError(
                    no_gradient_message(term.options, "this run does not train the text encoder")
                )
            return original(self, loss, *args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        for strategy in strategies:
            stack.enter_context(wrapped(strategy, "encode_tokens", encode_tokens))
        stack.enter_context(wrapped(Accelerator, "backward", backward))
        stack.enter_context(wrapped(Accelerator, "log", partial(_with_parts, term)))
        stack.enter_context(_after_prepare(partial(_take_data, term)))
        stack.enter_context(shown_in_progress_bar(term))
        yield


def _after_prepare(
    use: Callable[[Accelerator, Sequence[Any]], None],
) -> AbstractContextManager[None]:
    """Every ``Accelerator.prepare`` is followed by ``use(accelerator, what it was given)``."""

    def prepare(original: Callable) -> Callable:
        def wrapped(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            use(self, args)
            return result

        return wrapped

    return wrapped(Accelerator, "prepare", prepare)


def _with_parts(term: MLMTerm, log: Callable) -> Callable:
    """``Accelerator.log`` with the parts of the loss beside it."""

    def wrapped(self, values, *args, **kwargs):
        if "loss" in values and term.parts:
            values = values | term.parts.logs()
        return log(self, values, *args, **kwargs)

    return wrapped


def _take_data(term: MLMTerm, accelerator: Accelerator, prepared: Sequence[Any]) -> None:
    """Of the first loader among what the trainer prepares; the text encoders are known here."""
    for loader in prepared:
        if isinstance(loader, DataLoader) and not term.setup.concepts:
            term.use_data(loader.dataset)
            term.attach(accelerator)
            accelerator.print(term.describe())


class ScriptFacts(NamedTuple):
    """Of a script that trains whole models.

    Attributes:
        arch: architecture of its model.
        clip_skip: of the run.
        tokenizers: returns the current tokenizers, one for each text encoder.
    """

    arch: str
    clip_skip: int | None
    tokenizers: Callable[[], list[Any]]

    def wrap(self, model: nn.Module, *, number: int | None = None) -> TextEncoder:
        """A CLIP text encoder as the term reads it.

        Args:
            model: of the script.
            number: which of the tokenizers is its own. Of SDXL's two encoders, the second is the
                one with a projection.
        """
        if number is None:
            number = int(hasattr(model, "text_projection"))
        tokenizer = self.tokenizers()[number]
        return wrap_text_encoder(model, tokenizer, arch=self.arch, clip_skip=self.clip_skip)


@contextmanager
def frozen_text_encoders(
    term: MLMTerm, facts: ScriptFacts, loaders: Sequence[Any]
) -> Iterator[None]:
    """Give the term the U-Net when it is prepared, and the frozen text encoders that were loaded.

    Args:
        term: reads at the cross-attention alone.
        facts: of the script.
        loaders: modules whose ``load_target_model`` the script calls.
    """
    loaded: list[nn.Module] = []

    def load_target_model(original: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            loaded.extend(filter(is_clip_text_model, result))
            return result

        return wrapped

    def use(accelerator: Accelerator, prepared: Sequence[Any]) -> None:
        for model in prepared:
            if isinstance(model, nn.Module) and cross_attention_names(model):
                term.read_at("cross_attention", model, keep_copies=True)
                frozen = [facts.wrap(one) for one in loaded]
                term.add_text_encoders(frozen, accelerator, trained=[False] * len(frozen))

    with ExitStack() as stack:
        for loader in loaders:
            stack.enter_context(wrapped(loader, "load_target_model", load_target_model))
        stack.enter_context(_after_prepare(use))
        yield


@contextmanager
def collected_text_encoders(term: MLMTerm, facts: ScriptFacts) -> Iterator[None]:
    """Pass the CLIP text encoders and the U-Net in ``Accelerator.prepare`` to the term.

    Raises:
        UserError: ``mlm_read_at`` is a place that the image model does not have.
    """
    is_sd3 = facts.arch == "sd3"
    # sdxl_train may train one text encoder, and the U-Net reads both
    place = read_at(term.options, arch=facts.arch, trains_text=True, trains_unet=False)
    if place != "encoder" and is_sd3:
        raise UserError(
            f"mlm_read_at = {place}: where SD 3 is trained as a whole, the term reads its text "
            "encoders alone; leave mlm_read_at out"
        )

    def use(accelerator: Accelerator, prepared: Sequence[Any]) -> None:
        for model in prepared:
            if isinstance(model, nn.Module) and cross_attention_names(model):
                term.read_at(place, model, keep_copies=True)
            if is_t5(model):  # which runs with dropout here
                logger.warning("MLM term: T5 is trained too, but the term reads CLIP alone")
            if is_clip_text_model(model):
                _join_backward_passes(model)
                # SD 3 trains CLIP-L and G or none
                number = len(term.setup.encoders) if is_sd3 else None
                term.add_text_encoders([facts.wrap(model, number=number)], accelerator)

    with _after_prepare(use):
        yield


def _join_backward_passes(text_encoder: nn.Module) -> None:
    """Let gradient checkpointing, which is kept, do without a backward pass of its own.

    In such a pass ("reentrant", the default of older transformers) the gradients of the diffusion
    loss would arrive apart from the term's. Fused optimizers would step twice, and DDP would fail.
    """
    if text_encoder.is_gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable({"use_reentrant": False})


class MLMEmbeddingMixin:
    """Textual inversion: contextualizers before the vocabulary grows, metadata in the file."""

    mlm_arch = "sd"
    mlm_strategies: Sequence[type] = ()
    mlm: MLMTerm | None = None
    _tokenizers: list[Any] = []

    def train(self, args):
        """The host's training, with the term in its backward pass."""
        options = read_mlm_options(args)
        if not options.mlm_loss_weight:
            return super().train(args)
        self.mlm = MLMTerm(
            options,
            seed=args.seed,
            expand=lambda word: _token_strings(args, word),
            mixed_precision=getattr(args, "mixed_precision", None),
        )
        self.mlm.class_word = args.init_word
        with summed_backward(self.mlm, self.mlm_strategies):
            return super().train(args)

    def get_tokenizers(self, *args, **kwargs):
        """Keep the tokenizers, one for each text encoder."""
        self._tokenizers = super().get_tokenizers(*args, **kwargs)
        return self._tokenizers

    def load_target_model(self, *args, **kwargs):
        """Find the contextualizers before embeddings are added and trained."""
        result = super().load_target_model(*args, **kwargs)
        if self.mlm:
            given = bind(super().load_target_model, args, kwargs)
            place = read_at(
                self.mlm.options, arch=self.mlm_arch, trains_text=True, trains_unet=False
            )
            self.mlm.read_at(place, result[3])
            for model, tokenizer in zip(result[1], self._tokenizers, strict=False):
                text_encoder = wrap_text_encoder(
                    model, tokenizer, arch=self.mlm_arch, clip_skip=given["args"].clip_skip
                )
                self.mlm.add_text_encoders([text_encoder], given["accelerator"])
        return result

    def save_weights(self, *args, **kwargs):
        """Add ``ss_mlm_*`` to the metadata, where the format has any."""
        given = bind(super().save_weights, args, kwargs)
        if self.mlm and isinstance(given.get("metadata"), dict):
            given["metadata"].update(self.mlm.metadata())
        return super().save_weights(**given)


def _token_strings(args: Any, word: str) -> str:
    """The words by which the host replaces ``token_string`` (one for each vector)."""
    if word != args.token_string:
        return word
    return " ".join([word, *(f"{word}{i}" for i in range(1, args.num_vectors_per_token))])


def with_mlm_embedding(trainer: type, *, arch: str, strategies: Sequence[type]) -> type:
    """The textual-inversion trainer's class with the mixin in front.

    Raises:
        UserError: the class lacks a method or a parameter that the mixin reads.
    """
    require_methods(trainer, NEEDED)
    members = {"mlm_arch": arch, "mlm_strategies": tuple(strategies)}
    return type(f"MLM{trainer.__name__}", (MLMEmbeddingMixin, trainer), members)
