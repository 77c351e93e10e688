"""``Network``: what the trainer needs of a network, and what LoRA and LyCORIS have in common.

Knows no kind of adapter; its modules are seen through ``named_parameters`` alone. Knows nothing of
losses, optimizers or metadata.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.networks.kohya_names import (
    canonical_name,
    in_file_shape,
    part_of,
    text_encoder_name,
    unet_name,
)
from mlm_plugin.networks.lora import LoraModule, MaxNorm
from mlm_plugin.networks.network_args import LoraPlus

__all__ = ["Network", "NetworkPlan"]

logger = logging.getLogger(__name__)

# Those of networks.lora.
DEFAULT_RANK = 4
NUM_NAMES_SHOWN = 3
TITLES = {
    "textencoder": "text encoder",
    "textencoder1": "first text encoder",
    "textencoder2": "second text encoder",
    "unet": "U-Net",
}


class NetworkPlan(NamedTuple):
    """A network that is to be made."""

    options: NetworkOptions
    args: dict[str, str]  # network_args
    models: dict[str, nn.Module]  # by kohya's names of the parts, text encoders first
    unet_names: Mapping[str, str]  # in SDXL, see ``kohya_names.sdxl_unet_names``; else empty
    weights: dict[str, Tensor] | None  # of the file it starts from, under the names of this model

    @property
    def rank(self) -> int:
        """Of all layers that have no rank of their own."""
        return self.options.network_dim or DEFAULT_RANK

    @property
    def ranks_from(self) -> dict[str, Tensor] | None:
        """Weights that every layer's rank and alpha are taken from."""
        return self.weights if self.options.dim_from_weights else None

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Two in SDXL."""
        return [model for part, model in self.models.items() if part != "unet"]

    @property
    def unet(self) -> nn.Module:
        """The U-Net."""
        return self.models["unet"]

    @property
    def train_unet(self) -> bool:
        """Whether the U-Net is adapted."""
        return not self.options.network_train_text_encoder_only

    @property
    def train_text_encoder(self) -> bool:
        """Whether the text encoders are adapted."""
        return not self.options.network_train_unet_only

    def file_name(self, part: str, module_name: str) -> str:
        """Name in the file of a module, by its path in the model."""
        if part != "unet":
            return text_encoder_name(module_name, part)
        name = unet_name(module_name)
        return self.unet_names.get(name, name)


class Network(ABC):
    """Adapters on frozen models.

    Args:
        modules: adapters by part, under kohya's names: ``textencoder``, or ``textencoder1`` and
            ``textencoder2`` in SDXL, and ``unet`` last.
        loraplus: learning-rate ratios of the up projections.
    """

    def __init__(
        self, modules: Mapping[str, Iterable[LoraModule | nn.Module]], *, loraplus: LoraPlus
    ):
        self.modules_of = {part: list(members) for part, members in modules.items()}
        self.loraplus = loraplus

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move the network's own weights; they stay fp32."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Turn dropout on or off."""

    @abstractmethod
    def set_enabled(self, enabled: bool) -> None:
        """Let every adapter act, or none, so that the base model computes as without them."""

    @abstractmethod
    def set_strength(self, *, text_encoder: float, unet: float) -> None:
        """Multiply what the adapters do, of text encoders and of the U-Net.

        1 = as trained; at 0 the base model computes as without them, bit by bit. The weights stay
        as they are.
        """

    @abstractmethod
    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """Scale down modules whose norm exceeds the limit (``scale_weight_norms``)."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Weights and alphas by their keys in files, in the shapes that they have in memory."""

    @abstractmethod
    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over some or all of :meth:`weights`, in their shapes.

        Raises:
            UserError: For an alpha that this network cannot take over.
        """

    @property
    def modules(self) -> list[LoraModule | nn.Module]:
        """Every adapter, text encoders first."""
        return [module for members in self.modules_of.values() for module in members]

    @property
    def num_text_encoder_modules(self) -> int:
        """Adapted layers of all text encoders."""
        return len(self.modules) - self.num_unet_modules

    @property
    def num_unet_modules(self) -> int:
        """Adapted layers of the U-Net."""
        return len(self.modules_of["unet"])

    def _strengths(
        self, text_encoder: float, unet: float
    ) -> Iterator[tuple[LoraModule | nn.Module, float]]:
        """Every adapter with the strength of its part."""
        for part, modules in self.modules_of.items():
            for module in modules:
                yield module, unet if part == "unet" else text_encoder

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Its own weights by part."""
        return {
            name: [parameter for module in modules for _, parameter in module.named_parameters()]
            for name, modules in self.modules_of.items()
        }

    def parameter_groups(
        self, *, unet_lr: float, text_encoder_lrs: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Optimizer groups ``{"params", "lr", "name"}``, text encoders first.

        Names are those of :meth:`parts`, and with LoRA+ the same with `` plus``. A part with
        learning rate 0 gets no group and no gradient, but stays in the file. Of two text encoders
        each has its own rate, or both the only one given.

        Source: sd-scripts ``networks/lora.py`` ``prepare_optimizer_params``.
        """
        text_parts = [part for part in self.modules_of if part != "unet"]
        rates = dict(zip(text_parts, _per_part(text_encoder_lrs, len(text_parts)), strict=True))
        groups, without_up = [], []
        for name, modules in self.modules_of.items():
            lr = rates.get(name, unet_lr)
            ratio = self.loraplus.unet if name == "unet" else self.loraplus.text_encoder
            named = [item for module in modules for item in module.named_parameters()]
            plus = [p for key, p in named if ratio is not None and "lora_up" in key]
            others = [p for key, p in named if ratio is None or "lora_up" not in key]
            groups.append({"params": others, "lr": lr, "name": name})
            if ratio is not None:
                groups.append({"params": plus, "lr": lr * ratio, "name": f"{name} plus"})
                without_up += [name] if others and not plus else []
        _warn_of_loraplus(without_up)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] != 0)
        return [group for group in groups if group["params"] and group["lr"] != 0]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the base model computes exactly as without the network."""
        try:
            self.set_enabled(False)
            yield
        finally:
            self.set_enabled(True)

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """Contiguous CPU copies of the weights under kohya's keys and in kohya's shapes."""
        return {key: _copy(in_file_shape(key, value)) for key, value in self.weights().items()}

    def load_kohya_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights over from a file.

        Raises:
            UserError: If keys or shapes do not fit this network.
        """
        state, own = self._of_trained_parts(state), self.weights()
        _check_keys(state, known=own)
        self.take_weights(
            {key: _fit_shape(key, tensor, own[key].shape) for key, tensor in state.items()}
        )

    def _of_trained_parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those weights of a file that belong to a model which is adapted, under kohya's names."""
        state = {canonical_name(key): value for key, value in state.items()}
        untrained = {part for part, modules in self.modules_of.items() if not modules}
        kept = {key: value for key, value in state.items() if part_of(key) not in untrained}
        left_out = Counter(part_of(key) for key in state.keys() - kept.keys())
        for part, count in sorted(left_out.items()):
            logger.warning(
                "network_weights: %d tensors of the %s are left out, it is not trained",
                count,
                TITLES[part],
            )
        if not kept:
            raise UserError("network_weights: the file has no weights for what is trained")
        return kept


def _per_part(rates: Sequence[float], count: int) -> list[float]:
    """A learning rate for each of the text encoders; a single one is for all."""
    if len(rates) < 2:
        return [rates[0] if rates else 0.0] * count
    return list(rates[:count])


def _warn_of_loraplus(without_up: Sequence[str]) -> None:
    """Name parts with a LoRA+ ratio whose modules have nothing that it applies to."""
    if without_up:
        parts = " and the ".join(TITLES[name] for name in without_up)
        logger.warning(
            "network_args: the LoRA+ ratio has no effect on the %s: it is for up projections, "
            "which of LyCORIS' algorithms lora and locon have",
            parts,
        )


def _check_keys(state: Mapping[str, Tensor], *, known: Iterable[str]) -> None:
    """Refuse tensors that a network does not know, and halves of modules; warn of missing ones."""
    known = set(known)
    unknown = sorted(state.keys() - known)
    if unknown:
        raise UserError(
            f"network_weights: {len(unknown)} of {len(state)} tensors do not belong to this "
            f"network: {', '.join(unknown[:NUM_NAMES_SHOWN])}, ...; set network_module and "
            "network_args as the file was trained, or use dim_from_weights"
        )
    missing = {key for key in known - state.keys() if not key.endswith(".alpha")}
    refuse_halves(state)
    if missing:
        logger.warning(
            "network_weights: %d tensors are not in the file and start fresh: %s, ...",
            len(missing),
            ", ".join(sorted(missing)[:NUM_NAMES_SHOWN]),
        )


def refuse_halves(state: Mapping[str, Tensor]) -> None:
    """Refuse a file with one of a LoRA's two matrices: the product with fresh ones is noise.

    Raises:
        UserError: names the first such module.
    """
    pairs = (("lora_down.weight", "lora_up.weight"), ("lora_up.weight", "lora_down.weight"))
    for one, other in pairs:
        modules = sorted(key.removesuffix(one) for key in state if key.endswith(f".{one}"))
        halves = [name for name in modules if f"{name}{other}" not in state]
        if halves:
            raise UserError(
                f"network_weights: {len(halves)} of {len(modules)} modules have {one} and no "
                f"{other} ({halves[0].rstrip('.')}, ...): the file is incomplete; get it again"
            )


def _fit_shape(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Bring a tensor of a file into a shape that differs by ones at the end at most."""
    bare = tuple(tensor.shape)
    while len(bare) > len(shape) and bare[-1] == 1:
        bare = bare[:-1]
    bare += (1,) * (len(shape) - len(bare))
    if bare != tuple(shape):
        raise UserError(
            f"network_weights: {key} has shape {tuple(tensor.shape)}, this network needs "
            f"{tuple(shape)}; set network_dim as the file was trained, or use dim_from_weights"
        )
    return tensor.reshape(shape)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
