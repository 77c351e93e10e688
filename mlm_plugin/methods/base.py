"""What a method is: what is trained, how text is encoded, what is written.

The trainer and the savers use only the interface of :class:`Method`. Knows no loop and no command
line; the options are read once, in :meth:`Method.prepare`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import OptimizerOptions, TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods.facts import MethodFacts, Part, is_before
from mlm_plugin.mlm.encoder import Variants
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.conditioning import Conditioning, encode_captions

__all__ = [
    "WEIGHT_DTYPES",
    "Export",
    "Method",
    "Part",
    "load_into",
    "load_part",
    "named_parameters",
    "on_cpu",
    "parameter_group",
]

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""``mixed_precision`` and the precision of frozen weights under it."""


class Export(NamedTuple):
    """What writing files needs besides the trained tensors.

    Attributes:
        path: the main file; others are named after it.
        metadata: header entries of a file by its kind and path. Kinds are ``lora``,
            ``textual-inversion``, ``checkpoint`` and ``custom-diffusion``.
        dtype: precision of the files; ``None`` keeps that of the training.
    """

    path: Path
    metadata: Callable[[str, Path], Mapping[str, str]]
    dtype: torch.dtype | None = None


class Method(MethodFacts, ABC):
    """A way to teach a model a concept.

    A method is made by :meth:`prepare`, which puts into the models what it trains and freezes the
    rest. The defaults here suit a method that conditions the U-Net on plain encoded captions.
    """

    def __init__(self, models: StableDiffusion):
        self.models = models
        models.unet.requires_grad_(False)
        for text_encoder in models.text_encoders:
            text_encoder.model.requires_grad_(False)

    @classmethod  # noqa: B027 - some have nothing to check
    def check(cls, config: TrainConfig, concepts: Sequence[Concept]) -> None:
        """Refuse what can be refused before a model is loaded.

        Raises:
            UserError: options or files that do not fit each other or the concepts.
        """

    @classmethod
    @abstractmethod
    def prepare(
        cls, models: StableDiffusion, config: TrainConfig, concepts: Sequence[Concept]
    ) -> Method:
        """Create the method as the options say, on models that are on their device.

        Raises:
            UserError: options or files that do not fit the model or the concepts.
        """

    @abstractmethod
    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Everything that may be trained, grouped by what is frozen together."""

    def parameter_groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        """Optimizer groups with ``params``, ``lr`` and ``name``; parts with rate 0 have none."""
        groups = []
        for part, parameters in self.parts().items():
            groups += parameter_group(part, parameters, self.learning_rate_of(part, options).value)
        return groups

    def state_dict(self) -> dict[str, Tensor]:
        """The contents of a training state: everything that is trained, exactly."""
        return on_cpu(named_parameters(self.parts()))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            UserError: names or shapes that this method does not have.
        """
        load_into(named_parameters(self.parts()), state)

    @abstractmethod
    def export(self, to: Export) -> None:
        """Write the files that other programs load."""

    @abstractmethod
    def files(self, path: Path) -> list[Path]:
        """What :meth:`export` writes for a main file ``path``, which comes first."""

    @abstractmethod
    def verify(self, path: Path) -> str:
        """Read the written files back; returns a short description of their contents.

        Raises:
            UserError: a value is not finite, or a name is unknown to other programs.
        """

    def webui_files(self, path: Path) -> dict[Path, Mapping[str, str]]:
        """The files that WebUIs show to their users, and the words that trigger the concepts there.

        An empty mapping means all concepts, by their placeholders. Otherwise it maps each concept
        in the file to its word in WebUIs. Headers and sidecars both say these words.
        """
        return {path: {}}

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained now, for clipping and averaging over processes."""
        return [p for members in self.parts().values() for p in members if p.requires_grad]

    @property
    def trains_text_side(self) -> bool:
        """Whether anything before the text encoder's output is trained now."""
        return self.trains_before("encoder")

    def trains_before(self, read_at: str) -> bool:
        """Whether anything before the place that the MLM term reads is trained now.

        Args:
            read_at: ``encoder``, ``cross_attention`` or ``both``.
        """
        return any(
            parameter.requires_grad
            for part, members in self.parts().items()
            if is_before(part, read_at)
            for parameter in members
        )

    def freeze(self, part: Part) -> None:
        """Stop training a part; its optimizer state is left alone."""
        for parameter in self.parts()[part]:
            parameter.requires_grad_(False)
            parameter.grad = None

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of the U-Net; joined layers make its states longer (XTI)."""
        return encode_captions(self.models.text_encoders, captions)

    def mlm_variants(self, ids_BL: Tensor, rng: random.Random) -> Variants:
        """Ids of MLM prompts as the method encodes them; ``rng`` is for those with several ways."""
        return Variants(ids_BL)

    def mlm_starts(self, ids_BL: Tensor) -> Sequence[Tensor]:
        """The variants that differ before training, by layer; one where none do."""
        return (ids_BL,)

    def untrained(self) -> AbstractContextManager:
        """Within the block, before the first step, the models compute as without training."""
        return nullcontext()

    def train(self, mode: bool = True) -> None:
        """Training mode (dropout, gradient checkpointing) on or off."""
        self.models.unet.train(mode)
        for text_encoder in self.models.text_encoders:
            text_encoder.model.train(mode)

    def prior_loss(self) -> Tensor | None:
        """A loss of the trained tensors alone, 0-d, that is added to every batch's; or ``None``."""
        return None

    def after_step(self) -> dict[str, Tensor | float]:
        """Called after an optimizer step; returns numbers to log, 0-d where they are tensors."""
        return {}


def named_parameters(parts: Mapping[Part, Sequence[nn.Parameter]]) -> dict[str, Tensor]:
    """Parameters by part and number, e.g. ``unet.0``."""
    return {
        f"{part}.{number}": parameter
        for part, members in parts.items()
        for number, parameter in enumerate(members)
    }


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights ready for a file; those already on the CPU are not copied."""
    return {name: weight.detach().cpu() for name, weight in weights.items()}


@torch.no_grad()
def load_into(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy what :func:`on_cpu` returned into the same weights.

    Raises:
        UserError: tensors are missing, unknown or of another shape; nothing is copied.
    """
    other = [
        name
        for name in weights.keys() | state.keys()
        if name not in weights or name not in state or weights[name].shape != state[name].shape
    ]
    if other:
        raise UserError(
            f"resume: the state does not fit this run: {len(other)} of {len(weights)} tensors are "
            f"missing, unknown or of another shape, e.g. {min(other)}; give the model and the "
            "options of that run"
        )
    for name, weight in weights.items():
        weight.copy_(state[name])


def load_part(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load some weights of a state; returns the rest of it.

    Raises:
        UserError: as for :func:`load_into`.
    """
    load_into(weights, {name: state[name] for name in weights if name in state})
    return {name: tensor for name, tensor in state.items() if name not in weights}


def parameter_group(
    name: Part, parameters: Sequence[nn.Parameter], lr: float
) -> list[dict[str, Any]]:
    """One optimizer group, or none where the rate is 0; such parameters are frozen."""
    for parameter in parameters:
        parameter.requires_grad_(lr != 0)
    if lr == 0 or not parameters:
        return []
    return [{"params": list(parameters), "lr": lr, "name": name}]
