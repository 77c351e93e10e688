"""``network_module``: makes the network that the options ask for, ours on peft or LyCORIS."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.models import weights_files
from mlm_plugin.networks.base import Network, NetworkPlan
from mlm_plugin.networks.kohya_names import (
    BUNDLE_PREFIX,
    TEXT_ENCODER_PARTS,
    canonical_name,
    renamed,
    sdxl_unet_names,
)
from mlm_plugin.networks.lycoris_network import create_lycoris
from mlm_plugin.networks.network_args import parse_network_args, warn_of_output_norms
from mlm_plugin.networks.peft_network import create_lora, fits_lora

if TYPE_CHECKING:
    from mlm_plugin.models.checkpoints import StableDiffusion

__all__ = [
    "NETWORK_MODULES",
    "Network",
    "check_network",
    "create_network",
    "is_lora",
    "read_weights",
]

logger = logging.getLogger(__name__)

LARGEST_LORA = 10_000  # no layer of a supported model is as wide

NETWORK_MODULES: dict[str, Callable[[NetworkPlan], Network]] = {
    "networks.lora": create_lora,
    "lycoris.kohya": create_lycoris,
}


def create_network(models: StableDiffusion, options: NetworkOptions) -> Network:
    """Put a network on the models in place and freeze everything else.

    Call it when the models are on their device and in their precision: a later ``.to(dtype)`` of a
    model would take the LoRA weights along.

    Args:
        models: text encoders and U-Net.
        options: the ``network`` group of the configuration.

    Raises:
        UserError: For a module, argument or file that cannot be used.
    """
    check_network(options)
    plan = _plan(models, options)
    if options.network_module == "networks.lora" and plan.ranks_from and not fits_lora(plan):
        raise UserError(
            f"network_weights: {options.network_weights} has layers or tensors that networks.lora "
            "does not know; if it is a LyCORIS file, set network_module = lycoris.kohya"
        )
    for model in plan.models.values():
        model.requires_grad_(False)
    network = NETWORK_MODULES[options.network_module](plan)
    if not network.modules:
        raise UserError(
            f"network_module: {options.network_module} finds no layer to adapt; change preset in "
            "network_args, or name a network_weights file of this model"
        )
    if plan.weights is not None:
        network.load_kohya_state_dict(plan.weights)
    logger.info(
        "%s: %d text encoder modules, %d U-Net modules",
        options.network_module,
        network.num_text_encoder_modules,
        network.num_unet_modules,
    )
    return network


def is_lora(models: StableDiffusion, state: Mapping[str, Tensor]) -> bool:
    """Whether ``networks.lora`` can read all of a file; else it is one of LyCORIS.

    Args:
        models: the kind of model that it is for.
        state: of ``read_weights``.
    """
    plan = _plan(models, NetworkOptions())
    adapters = {key: value for key, value in state.items() if not key.startswith(BUNDLE_PREFIX)}
    return fits_lora(plan._replace(weights=renamed(adapters, plan.unet_names)))


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


def check_network(options: NetworkOptions) -> None:
    """Refuse what no network can be made of, and name options without effect.

    Options that contradict each other are refused in ``config.checks``.

    Raises:
        UserError: what can be refused without a model.
    """
    if options.network_module not in NETWORK_MODULES:
        raise UserError(
            f"network_module: got {options.network_module!r}, allowed are "
            f"{' and '.join(NETWORK_MODULES)}; OFT and others come with lycoris.kohya and "
            "network_args algo=diag-oft"
        )
    if options.network_module == "networks.lora" and (options.network_dim or 0) > LARGEST_LORA:
        raise UserError(
            f"network_dim = {options.network_dim}: a LoRA of that rank is larger than the layers "
            f"it adapts; at most {LARGEST_LORA}, 4 to 128 are usual"
        )
    if options.network_module == "lycoris.kohya":
        warn_of_output_norms(parse_network_args(options.network_args))
    if not options.dim_from_weights:
        return
    if options.network_dim is not None:
        logger.warning("network_dim has no effect: dim_from_weights takes the ranks of the file")
    if options.network_alpha != NetworkOptions.network_alpha:
        logger.warning("network_alpha has no effect: dim_from_weights takes the alphas of the file")


def _plan(models: StableDiffusion, options: NetworkOptions) -> NetworkPlan:
    text_encoders = [encoder.model for encoder in models.text_encoders]
    parts = (*TEXT_ENCODER_PARTS[len(text_encoders)], "unet")
    unet_names, weights = {}, None
    if len(text_encoders) == 2:
        unet_names = sdxl_unet_names(name for name, _ in models.unet.named_parameters())
    if options.network_weights is not None:
        path = options.network_weights
        weights = renamed(_without_bundle(read_weights(path), path=path), unet_names)
    return NetworkPlan(
        options=options,
        args=parse_network_args(options.network_args),
        models=dict(zip(parts, [*text_encoders, models.unet], strict=True)),
        unet_names=unet_names,
        weights=weights,
    )


def _without_bundle(state: Mapping[str, Tensor], *, path: str | os.PathLike) -> dict[str, Tensor]:
    adapters = {key: value for key, value in state.items() if not key.startswith(BUNDLE_PREFIX)}
    if len(adapters) < len(state):
        logger.warning("%s: the embedding inside is left out, give it as a file of its own", path)
    return adapters
