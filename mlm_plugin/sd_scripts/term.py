"""The MLM term of one run inside a trainer of sd-scripts.

Knows accelerate, but no trainer and no module of sd-scripts: it gets text encoders, tokenizers and
data sets of sd-scripts as arguments.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mlm_plugin import __version__
from mlm_plugin.config.checks import mlm_warnings, no_gradient_message
from mlm_plugin.config.concepts import Concept, concepts_of
from mlm_plugin.config.datasets import DatasetConfig
from mlm_plugin.config.options import OPTIONS, MLMOptions, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path
from mlm_plugin.mlm.cross_attention import CrossAttention
from mlm_plugin.mlm.regularizer import MLMOutput, MLMRegularizer
from mlm_plugin.mlm_setup import (
    AnyEncoder,
    MLMSetup,
    mlm_schedule,
    prompt_set_names,
)
from mlm_plugin.models.key_values import read_cross_attention, read_image_transformer
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.sd_scripts.data import (
    built_data,
    count_captions,
    require_in_captions,
)
from mlm_plugin.training.callbacks import mlm_curves

__all__ = ["LossParts", "MLMTerm"]

logger = logging.getLogger(__name__)

STATE_FILE = "mlm_state.json"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class LossParts(NamedTuple):
    """Parts of the last loss; tensors stay on the device until a logger reads them."""

    diffusion: Tensor
    term: MLMOutput | None = None  # None where the term did not act
    weight: float = 0.0

    def logs(self) -> dict[str, float]:
        """Values under the tags of the standalone trainer."""
        values = {"loss/diffusion": self.diffusion.item()}
        if self.term is not None:
            mlm = self.term.loss.item()
            values |= {"loss/mlm": mlm, "loss/mlm_weighted": self.weight * mlm}
            values |= mlm_curves({name: part.item() for name, part in self.term.parts.items()})
        return values


class MLMTerm:
    """Adds ``weight * MLM loss`` to the diffusion loss of each micro-batch of training.

    The mixin or patch passes the text encoders before they are trained (:meth:`add_text_encoders`),
    the data (:meth:`use_data`) and then every loss (:meth:`add_to`). Weights and random streams of
    the host are not changed.

    Args:
        options: the ``mlm`` group of a run.
        seed: seed of the run; names the stream of prompts and masks. Drawn if ``None``.
        expand: returns a placeholder as in the host's captions (several vectors: "sks sks1").
        mixed_precision: of the run, in which the untrained text encoders are read too.
        weighted_captions: whether the host reads weights in the captions, as in ``(word:1.2)``.

    Attributes:
        step: optimizer steps so far, for the schedule.
        call: micro-batches so far; names the prompts.
        captions: of the pictures to learn from, once they are known.
        class_word: class of the concept where neither options nor data name it.
        parts: parts of the last loss, for loggers.
    """

    def __init__(
        self,
        options: MLMOptions,
        *,
        seed: int | None,
        expand: Callable[[str], str] = str,
        mixed_precision: str | None = None,
        weighted_captions: bool = False,
    ):
        for warning in mlm_warnings(options):
            logger.warning("MLM term: %s", warning)
        self.options = options
        self.schedule = mlm_schedule(options)
        if seed is None:
            seed = random.SystemRandom().randrange(2**32)
        self.setup = MLMSetup(options, seed=seed)
        self.expand = expand
        self.mixed_precision = mixed_precision
        self.weighted_captions = weighted_captions
        self.step = 0
        self.call = 0
        self.captions: list[str] = []
        self.class_word: str | None = None
        self.parts: LossParts | None = None
        self._cross_attention: CrossAttention | None = None
        self._regularizer: MLMRegularizer | None = None

    def add_text_encoders(
        self,
        text_encoders: Sequence[AnyEncoder],
        accelerator: Accelerator,
        *,
        trained: Sequence[bool] | None = None,
    ) -> None:
        """Prepare text encoders, which are still untrained; more may follow.

        Args:
            text_encoders: untrained.
            accelerator: its device does the work.
            trained: for each, whether it will be trained; default all. Where one is not, all must
                come together.

        Raises:
            UserError: the given contextualizer does not fit, or the weights cannot be read.
        """
        for text_encoder in text_encoders:
            _refuse_raw_fp8(text_encoder)
        self.setup.prepare(text_encoders, accelerator, trained=trained, more_may_come=True)
        self._compute_targets(accelerator.device)

    def _compute_targets(self, device: torch.device) -> None:
        dtype = DTYPES.get(self.mixed_precision, torch.float32)
        with _autocast(device, self.mixed_precision):
            self.setup.compute_targets(device, dtype=dtype)

    def read_at(self, place: str, unet: nn.Module, *, keep_copies: bool = False) -> None:
        """Set where the term reads.

        Args:
            place: ``encoder``, ``cross_attention`` or ``both``.
            unet: still untrained.
            keep_copies: whether its own weights will be trained.

        Raises:
            UserError: the model has no cross-attention that can be read.
        """
        self.setup.read_at = place
        if self.setup.reads_cross_attention:
            self._cross_attention = read_cross_attention(unet, keep_copies=keep_copies)
            if self._cross_attention is None:
                raise UserError(
                    f"mlm_read_at = {place!r}: this model has no cross-attention layers, only "
                    "Stable Diffusion 1, 2 and XL have; leave it out"
                )

    def read_transformer(self, place: str, transformer: nn.Module, groups: list[list[int]]) -> None:
        """:meth:`read_at` for a diffusion transformer.

        Args:
            place: ``cross_attention`` or ``both``.
            transformer: still untrained.
            groups: text encoders in the order in which they are added, as in
                :class:`CrossAttention`.

        Raises:
            UserError: the model has no text layers that can be read.
        """
        self.setup.read_at = place
        self._cross_attention = read_image_transformer(transformer, groups)
        if self._cross_attention is None:
            raise UserError(
                f"mlm_read_at = {place!r}: the text layers of this transformer are not known; "
                "take mlm_read_at = encoder if a text encoder is trained"
            )

    def require_states(self, why: str) -> None:
        """Refuse another ``mlm_target`` where only states can be compared.

        Args:
            why: the reason, for the error.

        Raises:
            UserError: ``mlm_target`` is not ``states``.
        """
        if self.options.mlm_target != "states":
            raise UserError(
                f"mlm_target = {self.options.mlm_target}: {why}; take mlm_target = states"
            )

    def use_data(self, dataset_group: Any) -> None:
        """Take concepts and captions from data sets that sd-scripts has built.

        Raises:
            UserError: the concept is not known.
        """
        self.use_datasets(*built_data(dataset_group, weighted=self.weighted_captions))

    def use_datasets(self, datasets: Sequence[DatasetConfig], captions: Iterable[str]) -> None:
        """Take concepts and captions from the data, unless the options name them.

        Args:
            datasets: their subsets may name concepts.
            captions: of the pictures to learn from; none where they are not known.

        Raises:
            UserError: the concept is not known, or in no caption.
        """
        captions = list(captions)
        self._use_class_word(datasets)
        found = concepts_of(TrainConfig(mlm=self.options), datasets, required=True)
        if captions:
            require_in_captions(captions, found)
        texts = {c.placeholder_token: self.expand(c.placeholder_token) for c in found}
        self.captions = [_replaced(caption, texts) for caption in captions]
        self.setup.use_concepts(
            [Concept(texts[c.placeholder_token], c.class_token) for c in found],
            captions=self.captions,
        )

    def _use_class_word(self, datasets: Sequence[DatasetConfig]) -> None:
        known = concepts_of(TrainConfig(mlm=self.options), datasets, required=False)
        if self.class_word and [concept.class_token for concept in known] == [None]:
            self.options = replace(self.options, class_token=(self.class_word,))
            self.setup.options = self.options

    def describe(self) -> str:
        """What it does, in one line for the log."""
        number = len(self.setup.encoders)
        return (
            f"MLM term: {', '.join(map(self._described, self.setup.concepts))}, weight "
            f"{self.options.mlm_loss_weight:g}, target {self.options.mlm_target}, read at "
            f"{self.setup.read_at}, {number} text encoder{'' if number == 1 else 's'}"
        )

    def _described(self, concept: Concept) -> str:
        told = [f"class word {concept.class_token!r}"] if concept.class_token else []
        if self.captions:
            count = count_captions(self.captions, concept.placeholder_token)
            told.append(f"in {count} of {len(self.captions)} captions")
        return f"concept {concept.text!r}" + (f" ({', '.join(told)})" if told else "")

    def attach(self, accelerator: Accelerator) -> None:
        """Prepare for the first step, and save counters beside the states that kohya saves.

        States without them load, and plain trainers load states with them, as the file is separate
        from those of accelerate.
        """
        self._compute_targets(accelerator.device)

        def save(_models, _weights, output_dir):
            with atomic_path(Path(output_dir) / STATE_FILE) as temporary:
                temporary.write_text(json.dumps({"step": self.step, "call": self.call}))

        def load(_models, input_dir):
            path = Path(input_dir) / STATE_FILE
            if path.is_file():
                self.step, self.call = _read_counters(path)
                logger.info("MLM term: continuing from step %d", self.step)
            else:
                logger.info("MLM term: %s has no %s, counting from 0", input_dir, STATE_FILE)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def add_to(self, loss: Tensor, accelerator: Accelerator) -> Tensor:
        """``loss + weight * MLM loss``, 0-d; the loss itself in steps without the term.

        Raises:
            UserError: nothing that the term reads is trained.
        """
        weight = self.schedule.weight_at(self.step)
        self.parts = LossParts(loss.detach())
        if weight:
            # dropout of the network draws here too: the host's noise must not depend on it
            with preserved_random_state(accelerator.device), torch.enable_grad():
                with accelerator.autocast():
                    output = self._regularizer_for(accelerator)(self.call)
            if not output.loss.requires_grad:
                raise UserError(
                    no_gradient_message(self.options, "nothing that the term reads is trained")
                )
            self.parts = LossParts(loss.detach(), _detached(output), weight)
            loss = loss + weight * output.loss.to(loss.device)
        self.call += 1
        if accelerator.sync_gradients:
            self.step += 1
        return loss

    def metadata(self) -> dict[str, str]:
        """``ss_mlm_*`` of the saved file."""
        concepts = self.setup.concepts
        values: dict[str, Any] = {
            f"ss_{name}": getattr(self.options, name)
            for name, entry in OPTIONS.items()
            if entry.group == "mlm" and name.startswith("mlm_")
        }
        values |= {
            "ss_mlm_read_at": self.setup.read_at,
            "ss_mlm_prompt_set": prompt_set_names(self.options, concepts),
            "ss_mlm_contextualizer": ", ".join(
                contextualizer.digest for contextualizer in self.setup.contextualizers
            ),
            "ss_mlm_seed": self.setup.seed,
            "ss_mlm_version": __version__,
            "ss_mlm_host": "sd-scripts",
            "ss_mlm_placeholder_token": ", ".join(c.placeholder_token for c in concepts),
            "ss_mlm_class_token": ", ".join(c.class_token for c in concepts),
        }
        return {key: str(value) for key, value in values.items()}

    def _regularizer_for(self, accelerator: Accelerator) -> MLMRegularizer:
        """Created on first use, when models have their device, precision and trained weights."""
        if self._regularizer is None:
            if self._cross_attention is not None:
                self._require_all_text_encoders(self._cross_attention)
            dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
            self._regularizer = self.setup.attach(
                rank=accelerator.process_index,
                dtype=dtype,
                device=accelerator.device,
                cross_attention=self._cross_attention,
            )
        return self._regularizer

    def _require_all_text_encoders(self, cross_attention: CrossAttention) -> None:
        widths = [encoder.width for encoder in self.setup.encoders]
        if cross_attention.groups is None and sum(widths) != cross_attention.width:
            raise UserError(
                f"mlm_read_at = {self.setup.read_at!r}: this script trains {len(widths)} of the "
                "text encoders, and the U-Net reads all of them; train all, or take "
                "mlm_read_at = encoder"
            )


@contextmanager
def _autocast(device: torch.device, mixed_precision: str | None) -> Iterator[None]:
    """The precision of a run, for the text encoders on its device and one kept on the CPU."""
    dtype = DTYPES.get(mixed_precision)
    with ExitStack() as stack:
        for kind in {device.type, "cpu"} if dtype else ():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


def _refuse_raw_fp8(text_encoder: AnyEncoder) -> None:
    """Refuse weights that no layer can use until the trainer has prepared them.

    Source: sd-scripts ``flux_train_network.py`` and ``sd3_train_network.py``,
    ``prepare_text_encoder_fp8``, which casts the embeddings back.
    """
    weight = text_encoder.token_embedding.weight
    if weight.is_floating_point() and weight.element_size() == 1:
        raise UserError(
            f"{type(text_encoder.models[0]).__name__} is still in fp8 when the MLM term reads it "
            "first; add cache_text_encoder_outputs, take a file in fp16, or give fp8_base_unet in "
            "place of fp8_base"
        )


def _read_counters(path: Path) -> tuple[int, int]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return int(state["step"]), int(state["call"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"resume: {path} is damaged ({type(error).__name__}); delete it to count the steps of "
            "the MLM term from 0, or resume from an earlier state"
        ) from error


def _detached(output: MLMOutput) -> MLMOutput:
    parts = {name: part.detach() for name, part in output.parts.items()}
    return output._replace(loss=output.loss.detach(), parts=parts)


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        if new not in text:  # templates hold it already
            text = text.replace(old, new)
    return text
