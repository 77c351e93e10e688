"""``lycoris.kohya``: the adapters of the LyCORIS package (LoKr, LoHa, LoCon, ...) as a network.

Knows where LyCORIS expects sd-scripts' own models and makes it work on diffusers'. The package is
imported when such a network is made.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.quantized import QuantizedLinear
from mlm_plugin.networks.base import (
    AdapterNetwork,
    NetworkPlan,
    as_in_file,
    check_keys,
    fit_shape,
)
from mlm_plugin.networks.kohya_names import canonical_name, part_of
from mlm_plugin.networks.lora import MaxNorm
from mlm_plugin.networks.network_args import (
    COMMON_ARGS,
    LoraPlus,
    describe_unknown,
    probability,
)

__all__ = ["LycorisNetwork", "create_lycoris"]

logger = logging.getLogger(__name__)

LYCORIS_ARGS = (
    *COMMON_ARGS,
    "algo",
    "preset",
    "dropout",
    "use_tucker",
    "use_cp",
    "use_conv_cp",
    "disable_conv_cp",
    "use_scalar",
    "block_size",
    "train_norm",
    "constraint",
    "constrain",
    "rescaled",
    "dora_wd",
    "wd_on_output",
    "full_matrix",
    "bypass_mode",
    "rs_lora",
    "unbalanced_factorization",
    "decompose_both",
    "factor",
    "warn_on_unmatched",
)
ADDING_ALGOS = ("lora", "locon", "loha", "lokr")
"""Algorithms that can add to a layer's output and need not read its weight."""


class LycorisNetwork(AdapterNetwork):
    """A network of the LyCORIS package.

    Presets like ``unet-only`` leave the text encoder without modules.

    Args:
        network: LyCORIS' own network, applied to the models.
        text_parts: names of the text encoders.
        file_names: names of modules in files, by LyCORIS' own.
        loraplus: learning-rate ratios of the up projections.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        text_parts: Iterable[str],
        file_names: Mapping[str, str],
        loraplus: LoraPlus,
    ):
        modules = {
            part: [m for m in network.text_encoder_loras if part_of(m.lora_name) == part]
            for part in text_parts
        }
        super().__init__({**modules, "unet": network.unet_loras}, loraplus=loraplus)
        self.network = network
        self.file_names = file_names

    def to(self, device: torch.device | str) -> None:
        """See ``Network``."""
        self.network.to(device)

    def train(self, mode: bool) -> None:
        """See ``Network``."""
        self.network.train(mode)

    def set_enabled(self, enabled: bool) -> None:
        """See ``AdapterNetwork``."""
        for module in self.modules:
            if enabled:
                module.apply_to()
            else:
                module.restore()

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """See ``Network``."""
        return {key: as_in_file(key, value) for key, (_, value) in self._own_weights().items()}

    def load_kohya_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See ``Network``. The file's alphas must be the configured ones, LyCORIS keeps them."""
        state = self.of_trained_parts(state)
        own = self._own_weights()
        check_keys(state, known=own.keys())
        loaded = {}
        for key, tensor in state.items():
            own_key, value = own[key]
            if key.endswith(".alpha") and not math.isclose(tensor, value, rel_tol=1e-2):
                raise UserError(
                    f"network_weights: {key} is {float(tensor):g}, this network has "
                    f"{float(value):g}; set network_alpha (conv_alpha) as the file was trained"
                )
            loaded[own_key] = fit_shape(key, tensor, value.shape)
        self.network.load_state_dict(loaded, strict=False)

    def _own_weights(self) -> dict[str, tuple[str, Tensor]]:
        """LyCORIS' own names and weights, by the names in files."""
        own = {}
        for key, value in self.network.state_dict().items():
            module, dot, rest = key.partition(".")
            own[f"{self.file_names.get(module, module)}{dot}{rest}"] = key, value
        return own

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """See ``Network``. LyCORIS has its own definition, and none for some algorithms."""
        device = next(self.network.parameters()).device
        scaled, mean, largest = self.network.apply_max_norm_regularization(max_norm, device)
        return MaxNorm(int(scaled), float(mean), float(largest))


def create_lycoris(plan: NetworkPlan) -> LycorisNetwork:
    """Put LyCORIS adapters on the models, in place.

    Raises:
        UserError: If the package is missing, or for an algo or preset that it does not have.
    """
    try:
        lycoris = importlib.import_module("lycoris.kohya")
    except ImportError as error:
        raise UserError(
            "network_module: lycoris.kohya needs the LyCORIS package; `pip install lycoris-lora`"
        ) from error
    _check_args(plan.args, lycoris)
    _check_packed_weights(plan)
    dropout = _dropout(plan)
    clips = list(plan.text_encoders) if len(plan.text_encoders) == 2 else plan.text_encoders[0]
    models = (clips, plan.unet)
    file_names = _file_names(plan)
    with _preset_for_diffusers(lycoris, plan.args.get("preset", "full")):
        if plan.dims_from is None:
            arguments = {"warn_on_unmatched": False, **plan.args, "dropout": dropout}
            network = lycoris.create_network(1.0, plan.dim, plan.alpha, None, *models, **arguments)
        else:
            _warn_of_settings(plan)
            network, _ = lycoris.create_network_from_weights(
                1.0, None, None, *models, weights_sd=_named_as_in_memory(plan, file_names)
            )
    _spare_packed_weights(network)
    network.apply_to(*models, plan.train_text_encoder, plan.train_unet)
    network.to(next(plan.unet.parameters()).device)
    return LycorisNetwork(
        network,
        text_parts=plan.text_parts,
        file_names=file_names,
        loraplus=LoraPlus.from_args(plan.args),
    )


def _check_args(args: Mapping[str, str], lycoris) -> None:
    for key in args:
        if key not in LYCORIS_ARGS:  # a newer LyCORIS may know it
            unknown = describe_unknown(key, LYCORIS_ARGS)
            logger.warning("network_args, passed on to LyCORIS: %s", unknown)
    algo, preset = args.get("algo", "lora").lower(), args.get("preset", "full")
    if algo not in lycoris.network_module_dict:
        known = lycoris.network_module_dict
        raise UserError(f"network_args: algo: {describe_unknown(algo, known)}")
    if preset not in lycoris.PRESET and not Path(preset).is_file():
        unknown = describe_unknown(preset, lycoris.PRESET)
        raise UserError(f"network_args: preset, a name or a TOML file: {unknown}")


def _check_packed_weights(plan: NetworkPlan) -> None:
    """Refuse adapters that have to read the layers' weights, where the U-Net's are packed.

    Raises:
        UserError: with the setting.
    """
    if not any(isinstance(layer, QuantizedLinear) for layer in plan.unet.modules()):
        return
    args = plan.args
    algo, needed = args.get("algo", "lora").lower(), None
    if algo not in ADDING_ALGOS:
        needed = f"network_args algo={algo}"
    elif args.get("dora_wd", "false").lower() != "false":
        needed = "network_args dora_wd"
    elif args.get("bypass_mode", "true").lower() == "false":
        needed = "network_args bypass_mode=False"
    elif plan.dims_from is not None:
        needed = "dim_from_weights with lycoris.kohya"
    if needed:
        raise UserError(
            f"{needed} reads the U-Net's weights, which quantize_unet has packed; leave one of "
            f"them out (algo={', '.join(ADDING_ALGOS)} need no weights)"
        )


def _spare_packed_weights(network: nn.Module) -> None:
    """Let adapters of packed layers add to the output: LyCORIS else adds to the weight.

    Only these: on convolutions LoKr of LyCORIS 3.2 fails in that mode.
    """
    for module in network.unet_loras:
        if isinstance(module.org_module[0], QuantizedLinear):
            module.bypass_mode = True


def _dropout(plan: NetworkPlan) -> float | None:
    """The value of network_dropout, which LyCORIS users also write into network_args."""
    common = probability(plan.dropout, name="network_dropout")
    own = probability(plan.args.get("dropout"), name="network_args: dropout")
    if None not in (common, own) and common != own:
        raise UserError(
            f"network_dropout={common:g} and network_args: dropout={own:g} are the same setting; "
            "give it once"
        )
    return common if own is None else own


def _warn_of_settings(plan: NetworkPlan) -> None:
    """Name what LyCORIS does not ask for when it makes layers from weights."""
    names = ["network_dropout"] if plan.dropout is not None else []
    names += [f"network_args: {key}" for key in plan.args if not key.startswith("loraplus_")]
    for name in names:
        logger.warning(
            "%s has no effect: with dim_from_weights LyCORIS makes its layers from the file alone",
            name,
        )


@contextmanager
def _preset_for_diffusers(lycoris, name: str) -> Iterator[None]:
    """Within the block LyCORIS' preset chooses in a diffusers U-Net what it means to choose.

    LyCORIS names the classes of sd-scripts' own U-Net, where attention is ``CrossAttention``; and
    4.1 lists ``TimestepEmbedding`` beside the two layers in it, then stops at the duplicate. Its
    own lists are put back at the end.
    """
    network_class, presets = lycoris.LycorisNetworkKohya, lycoris.PRESET
    original, class_targets = presets.get(name), network_class.UNET_TARGET_REPLACE_MODULE
    preset = lycoris.read_preset(name) if original is None else original
    if preset is None:
        raise UserError(f"network_args: preset: {name} cannot be read as a LyCORIS preset in TOML")
    presets[name] = _with_diffusers_classes(preset)
    network_class.UNET_TARGET_REPLACE_MODULE = _diffusers_classes(class_targets)
    try:
        yield
    finally:
        network_class.UNET_TARGET_REPLACE_MODULE = class_targets
        if original is None:
            del presets[name]
        else:
            presets[name] = original


def _with_diffusers_classes(preset: Mapping[str, Any]) -> dict[str, Any]:
    adapted = dict(preset)
    if "unet_target_module" in adapted:
        adapted["unet_target_module"] = _diffusers_classes(adapted["unet_target_module"])
    algos = adapted.get("module_algo_map") or {}
    if "CrossAttention" in algos:
        adapted["module_algo_map"] = {"Attention": algos["CrossAttention"], **algos}
    return adapted


def _diffusers_classes(names: Sequence[str]) -> list[str]:
    classes = [name for name in names if name != "TimestepEmbedding"]
    return [*classes, "Attention"] if "CrossAttention" in classes else classes


def _layers(plan: NetworkPlan) -> dict[str, nn.Module]:
    """Modules by the names that LyCORIS makes of their paths."""
    return {
        f"lora_{prefix}_{name}".replace(".", "_"): module
        for prefix, model in (
            *((part.replace("textencoder", "te"), m) for part, m in plan.text_parts.items()),
            ("unet", plan.unet),
        )
        for name, module in model.named_modules()
    }


def _file_names(plan: NetworkPlan) -> dict[str, str]:
    """Names of modules in files by LyCORIS' own, made of the paths in diffusers' models."""
    return {name: canonical_name(plan.unet_names.get(name, name)) for name in _layers(plan)}


def _named_as_in_memory(plan: NetworkPlan, file_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Names and shapes that LyCORIS finds by the modules' own paths."""
    layers = _layers(plan)
    own_names = {name: own for own, name in file_names.items()}
    renamed = {}
    for key, tensor in plan.dims_from.items():
        name, _, part = key.partition(".")
        own_name = own_names.get(name, name)
        if isinstance(layers.get(own_name), nn.Linear) and tensor.ndim == 4:
            tensor = tensor[..., 0, 0]
        renamed[f"{own_name}.{part}"] = tensor
    return renamed
