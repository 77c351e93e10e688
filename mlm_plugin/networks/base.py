"""What the networks have in common: the plan they are made by, learning rates, weights of a file.

Knows no kind of adapter; its modules are seen through ``named_parameters`` alone.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.networks.kohya_names import (
    TEXT_ENCODER_PARTS,
    canonical_name,
    in_file_shape,
    part_of,
    unet_name,
)
from mlm_plugin.networks.lora import LoraModule
from mlm_plugin.networks.network_args import LoraPlus

__all__ = ["AdapterNetwork", "NetworkPlan", "as_in_file", "check_keys", "fit_shape"]

logger = logging.getLogger(__name__)

NUM_NAMES_SHOWN = 3
TITLES = {
    "textencoder": "text encoder",
    "textencoder1": "first text encoder",
    "textencoder2": "second text encoder",
    "unet": "U-Net",
}


class NetworkPlan(NamedTuple):
    """What ``create_network`` was asked for, checked and with defaults filled in."""

    text_encoders: tuple[nn.Module, ...]  # two in SDXL
    unet: nn.Module
    train_text_encoder: bool
    train_unet: bool
    dim: int
    alpha: float  # 0 means dim
    dropout: float | None
    args: dict[str, str]
    dims_from: dict[str, Tensor] | None
    unet_names: Mapping[str, str]  # in SDXL, see ``kohya_names.sdxl_unet_names``; else empty

    @property
    def text_parts(self) -> dict[str, nn.Module]:
        """Text encoders by kohya's names."""
        names = TEXT_ENCODER_PARTS[len(self.text_encoders)]
        return dict(zip(names, self.text_encoders, strict=True))

    def unet_name(self, module_name: str) -> str:
        """Name in the file of a U-Net module."""
        name = unet_name(module_name)
        return self.unet_names.get(name, name)


class AdapterNetwork(ABC):
    """The part of ``networks.Network`` that is the same for every kind of adapter.

    Args:
        modules: adapters by part, text encoders first and ``unet`` last.
        loraplus: learning-rate ratios of the up projections.
    """

    def __init__(
        self,
        modules: Mapping[str, Iterable[LoraModule | nn.Module]],
        *,
        loraplus: LoraPlus,
    ):
        self.modules_of = {part: list(members) for part, members in modules.items()}
        self.loraplus = loraplus

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

    def parameter_groups(
        self, *, unet_lr: float, text_encoder_lrs: Sequence[float]
    ) -> list[dict[str, Any]]:
        """See ``Network``. Source: sd-scripts ``networks/lora.py`` ``prepare_optimizer_params``."""
        text_parts = [part for part in self.modules_of if part != "unet"]
        rates = dict(zip(text_parts, _per_part(text_encoder_lrs, len(text_parts)), strict=True))
        groups = []
        for name, modules in self.modules_of.items():
            lr = rates.get(name, unet_lr)
            ratio = self.loraplus.unet if name == "unet" else self.loraplus.text_encoder
            split: dict[str, list[nn.Parameter]] = {name: [], f"{name} plus": []}
            for module in modules:
                for tensor_name, parameter in module.named_parameters():
                    is_plus = ratio is not None and "lora_up" in tensor_name
                    split[f"{name} plus" if is_plus else name].append(parameter)
            for group_name, parameters in split.items():
                group_lr = lr * ratio if group_name != name and ratio is not None else lr
                for parameter in parameters:
                    parameter.requires_grad_(group_lr != 0)
                if parameters and group_lr != 0:
                    groups.append({"params": parameters, "lr": group_lr, "name": group_name})
        return groups

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """See ``Network``."""
        return {
            name: [parameter for module in modules for _, parameter in module.named_parameters()]
            for name, modules in self.modules_of.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """See ``Network``."""
        members = [parameter for part in self.parts().values() for parameter in part]
        return [parameter for parameter in members if parameter.requires_grad]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See ``Network``."""
        try:
            self.set_enabled(False)
            yield
        finally:
            self.set_enabled(True)

    @abstractmethod
    def set_enabled(self, enabled: bool) -> None:
        """Let every adapter act, or none, so that the base model computes as without them."""

    def of_trained_parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those weights of a file that belong to a model which is adapted, under kohya's names.

        Raises:
            UserError: If there are none.
        """
        state = {canonical_name(key): value for key, value in state.items()}
        untrained = {part for part, modules in self.modules_of.items() if not modules}
        kept = {key: value for key, value in state.items() if part_of(key) not in untrained}
        for part in sorted({part_of(key) for key in state.keys() - kept.keys()}):
            logger.warning(
                "network_weights: %d tensors of the %s are left out, it is not trained",
                sum(part_of(key) == part for key in state),
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


def as_in_file(key: str, tensor: Tensor) -> Tensor:
    """A contiguous CPU copy of a weight in the shape that it has in kohya's files."""
    return _copy(in_file_shape(key, tensor))


def check_keys(state: Mapping[str, Tensor], *, known: Iterable[str]) -> None:
    """Refuse tensors that a network does not know, and warn of those that it lacks.

    Raises:
        UserError: With the number of unknown tensors and the first names.
    """
    known = set(known)
    unknown = sorted(state.keys() - known)
    if unknown:
        raise UserError(
            f"network_weights: {len(unknown)} of {len(state)} tensors do not belong to this "
            f"network: {', '.join(unknown[:NUM_NAMES_SHOWN])}, ...; set network_module and "
            "network_args as the file was trained, or use dim_from_weights"
        )
    missing = {key for key in known - state.keys() if not key.endswith(".alpha")}
    if missing:
        logger.warning(
            "network_weights: %d tensors are not in the file and start fresh: %s, ...",
            len(missing),
            ", ".join(sorted(missing)[:NUM_NAMES_SHOWN]),
        )


def fit_shape(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Bring a tensor of a file into a shape that differs by ones at the end at most.

    Raises:
        UserError: If it differs by more.
    """
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
