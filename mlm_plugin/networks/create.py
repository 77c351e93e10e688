"""``network_module``: the trained network behind one interface, ours on peft or LyCORIS.

Knows what the trainer needs from a network and how to make one. Knows nothing of losses, optimizers
or metadata.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models import weights_files
from mlm_plugin.networks.base import NetworkPlan
from mlm_plugin.networks.kohya_names import BUNDLE_PREFIX, canonical_name, sdxl_unet_names
from mlm_plugin.networks.lora import MaxNorm
from mlm_plugin.networks.lycoris_network import create_lycoris
from mlm_plugin.networks.network_args import parse_network_args
from mlm_plugin.networks.peft_network import create_lora

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlm_plugin.models.checkpoints import StableDiffusion

__all__ = [
    "NETWORK_MODULES",
    "MaxNorm",
    "Network",
    "create_network",
    "parse_network_args",
    "read_weights",
]

logger = logging.getLogger(__name__)

# Those of networks.lora.
DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0


class Network(Protocol):
    """What the trainer needs from a trained network."""

    num_text_encoder_modules: int
    num_unet_modules: int

    def parameter_groups(
        self, *, unet_lr: float, text_encoder_lrs: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Optimizer groups ``{"params", "lr", "name"}``, text encoders first.

        Names are those of :meth:`parts`, and with LoRA+ the same with `` plus``. A part with
        learning rate 0 gets no group and no gradient, but stays in the file. Of two text encoders
        each has its own rate, or both the only one given.
        """

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Its own weights by model, under kohya's names.

        ``textencoder``, or ``textencoder1`` and ``textencoder2`` in SDXL, and ``unet``.
        """

    def parameters(self) -> list[nn.Parameter]:
        """The weights that are trained."""

    def to(self, device: torch.device | str) -> None:
        """Move the network's own weights; they stay fp32."""

    def train(self, mode: bool) -> None:
        """Turn dropout on or off."""

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """Contiguous CPU copies of the weights under kohya's keys and in kohya's shapes."""

    def load_kohya_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights over from a file.

        Raises:
            UserError: If keys or shapes do not fit this network.
        """

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """Scale down modules whose norm exceeds the limit (``scale_weight_norms``)."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within the block the base model computes exactly as without the network."""


def create_network(
    module: str,
    *,
    models: StableDiffusion,
    dim: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    network_args: Sequence[str] = (),
    train_unet: bool = True,
    train_text_encoder: bool = True,
    weights: str | os.PathLike | None = None,
    dim_from_weights: bool = False,
) -> Network:
    """Put a network on the models in place and freeze everything else.

    Call it when the models are on their device and in their precision: a later ``.to(dtype)`` of a
    model would take the LoRA weights along.

    Args:
        module: ``networks.lora`` or ``lycoris.kohya``.
        models: text encoders and U-Net.
        dim: rank; ``None`` is 4, as in ``networks.lora``.
        alpha: 0 is the rank; ``None`` is 1, as in ``networks.lora``.
        dropout: ``network_dropout``.
        network_args: ``key=value`` of the module.
        train_unet: adapt the U-Net.
        train_text_encoder: adapt the text encoders.
        weights: file the network starts from.
        dim_from_weights: rank and alpha of every layer from that file.

    Raises:
        UserError: For a module, argument or file that cannot be used.
    """
    if module not in NETWORK_MODULES:
        raise UserError(
            f"network_module: got {module!r}, allowed are {' and '.join(NETWORK_MODULES)}; DyLoRA, "
            "OFT and others come with lycoris.kohya and network_args algo=dylora, algo=diag-oft"
        )
    if not (train_unet or train_text_encoder):
        raise UserError(
            "network_train_unet_only and network_train_text_encoder_only leave nothing to train; "
            "drop one of them"
        )
    if dim_from_weights and weights is None:
        raise UserError("dim_from_weights: network_weights is not given; name the file or drop it")
    text_encoders, unet = tuple(te.model for te in models.text_encoders), models.unet
    for model in (*text_encoders, unet):
        model.requires_grad_(False)
    unet_names = {}
    if len(text_encoders) == 2:
        unet_names = sdxl_unet_names(name for name, _ in unet.named_parameters())
    state = None
    if weights is not None:
        state = _renamed(_without_bundle(read_weights(weights), path=weights), unet_names)
    if dim_from_weights:
        _warn_of_ranks(dim, alpha)
    plan = NetworkPlan(
        text_encoders=text_encoders,
        unet=unet,
        train_text_encoder=train_text_encoder,
        train_unet=train_unet,
        dim=DEFAULT_RANK if dim is None else dim,
        alpha=DEFAULT_ALPHA if alpha is None else alpha,
        dropout=dropout,
        args=parse_network_args(network_args),
        dims_from=state if dim_from_weights else None,
        unet_names=unet_names,
    )
    network = NETWORK_MODULES[module](plan)
    if network.num_text_encoder_modules + network.num_unet_modules == 0:
        raise UserError(
            f"network_module: {module} finds no layer to adapt; change preset in network_args, or "
            "name a network_weights file of this model"
        )
    if state is not None:
        network.load_kohya_state_dict(state)
    logger.info(
        "%s: %d text encoder modules, %d U-Net modules",
        module,
        network.num_text_encoder_modules,
        network.num_unet_modules,
    )
    return network


def _without_bundle(state: Mapping[str, Tensor], *, path: str | os.PathLike) -> dict[str, Tensor]:
    adapters = {key: value for key, value in state.items() if not key.startswith(BUNDLE_PREFIX)}
    if len(adapters) < len(state):
        logger.warning("%s: the embedding inside is left out, give it as a file of its own", path)
    return adapters


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under other names of their modules, where there is another."""
    renamed = {}
    for key, tensor in state.items():
        module, dot, rest = key.partition(".")
        renamed[f"{names.get(module, module)}{dot}{rest}"] = tensor
    return renamed


def _warn_of_ranks(dim: int | None, alpha: float | None) -> None:
    if dim is not None:
        logger.warning("network_dim has no effect: dim_from_weights takes the ranks of the file")
    # Options say the default where nobody gave an alpha.
    if alpha not in (None, DEFAULT_ALPHA):
        logger.warning("network_alpha has no effect: dim_from_weights takes the alphas of the file")


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a LoRA file on the CPU, under kohya's names with ``text_model_``.

    Raises:
        UserError: If the file is missing or unreadable; see ``weights_files.read_weights``.
    """
    if not Path(path).is_file():
        raise UserError(f"network_weights: there is no file {path}")
    try:
        state = weights_files.read_weights(path)
    except UserError as error:
        raise UserError(f"network_weights: {error}") from error
    return {canonical_name(key): value for key, value in state.items()}


NETWORK_MODULES: dict[str, Callable[..., Network]] = {
    "networks.lora": create_lora,
    "lycoris.kohya": create_lycoris,
}
