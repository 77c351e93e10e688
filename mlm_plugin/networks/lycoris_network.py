"""``lycoris.kohya``: the adapters of the LyCORIS package (LoKr, LoHa, LoCon, ...) as a network.

Knows where LyCORIS expects sd-scripts' own models and makes it work on diffusers'. The package is
imported when such a network is made.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.quantized import QuantizedLinear
from mlm_plugin.networks.base import Network, NetworkPlan
from mlm_plugin.networks.kohya_names import part_of, renamed
from mlm_plugin.networks.lora import MaxNorm
from mlm_plugin.networks.network_args import (
    COMMON_ARGS,
    LoraPlus,
    checked_number,
    describe_unknown,
    is_on,
    number,
)

__all__ = ["LycorisNetwork", "create_lycoris"]

logger = logging.getLogger(__name__)

LYCORIS_ARGS = (
    *COMMON_ARGS,
    "algo", "preset", "dropout", "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp",
    "use_scalar", "block_size", "train_norm", "constraint", "constrain", "rescaled", "dora_wd",
    "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization",
    "decompose_both", "factor", "warn_on_unmatched",
)  # fmt: skip
ADDING_ALGOS = ("lora", "locon", "loha", "lokr")
"""Algorithms that can add to a layer's output and need not read its weight."""
WITHOUT_NORMS = ("ia3", "glora", "full")
"""Algorithms that ``scale_weight_norms`` does nothing to."""


REFUSED_ALGOS = {
    "tlora": "needs the timestep of every step, which LyCORIS networks are not told here, so it "
    "would be an ordinary LoRA",
    "dylora": "writes files and states that LyCORIS cannot read back",
}
NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "conv_dim": {"kind": int},
    "conv_alpha": {},
    "rank_dropout": {"below": 1},
    "module_dropout": {"below": 1},
    "factor": {"kind": int, "at_least": -1},
    "constraint": {},
    "constrain": {},
}
"""Limits of numbers in network_args; ``dropout`` and LoRA+ are checked where they are read."""


class Layer(NamedTuple):
    """A module of one of the models."""

    module: nn.Module
    file_name: str


class LycorisNetwork(Network):
    """A network of the LyCORIS package.

    Presets like ``unet-only`` leave the text encoder without modules.

    Args:
        network: LyCORIS' own network, applied to the models.
        plan: what it was made by.
        layers: modules of the models by LyCORIS' names.
    """

    def __init__(self, network: nn.Module, plan: NetworkPlan, layers: Mapping[str, Layer]):
        adapters = [*network.text_encoder_loras, *network.unet_loras]
        parts = {
            part: [adapter for adapter in adapters if part_of(adapter.lora_name) == part]
            for part in plan.models
        }
        super().__init__(parts, loraplus=LoraPlus.from_args(plan.args))
        self.network = network
        self.file_names = {name: layer.file_name for name, layer in layers.items()}
        self._alphas = {  # a rehearsal has no values later
            f"{self.file_names[adapter.lora_name]}.alpha": float(adapter.alpha)
            for adapter in adapters
            if isinstance(getattr(adapter, "alpha", None), Tensor)
        }

    def to(self, device: torch.device | str) -> None:
        """See ``Network``."""
        self.network.to(device)

    def train(self, mode: bool) -> None:
        """See ``Network``."""
        self.network.train(mode)

    def set_enabled(self, enabled: bool) -> None:
        """See ``Network``."""
        for module in self.modules:
            if enabled:
                _apply_again(module)
            else:
                module.restore()
                module.org_module[0].to(next(module.parameters()).device)  # "full" left it behind

    def set_strength(self, *, text_encoder: float, unet: float) -> None:
        """See ``Network``."""
        for module, strength in self._strengths(text_encoder, unet):
            module.restore()
            module.multiplier = strength
            if strength != 0:
                _apply_again(module)

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """See ``Network``. LyCORIS has its own definition, and none for some algorithms."""
        device = next(self.network.parameters()).device
        scaled, mean, largest = self.network.apply_max_norm_regularization(max_norm, device)
        return MaxNorm(int(scaled), float(mean), float(largest))

    def weights(self) -> dict[str, Tensor]:
        """See ``Network``."""
        return renamed(self.network.state_dict(), self.file_names)

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """See ``Network``. The file's alphas must be the configured ones, LyCORIS keeps them."""
        unscaled = self._without_scale()
        for key, alpha in weights.items():
            if not key.endswith(".alpha") or key.removesuffix(".alpha") in unscaled:
                continue
            if not math.isclose(alpha, own := self._alphas[key], rel_tol=1e-2):
                raise UserError(
                    f"network_weights: {key} is {float(alpha):g}, this network has {own:g}; set "
                    "network_alpha (conv_alpha) as the file was trained"
                )
        if next(self.network.parameters()).is_meta:  # a rehearsal has nowhere to put them
            return
        own_names = {file_name: name for name, file_name in self.file_names.items()}
        self.network.load_state_dict(renamed(weights, own_names), strict=False)

    def _without_scale(self) -> set[str]:
        """Names in the file of LoKr modules of two whole matrices, where LyCORIS ignores alpha."""
        return {
            self.file_names[module.lora_name]
            for module in self.modules
            if getattr(module, "use_w1", False) and getattr(module, "use_w2", False)
        }


def import_lycoris() -> ModuleType:
    """LyCORIS's network module.

    Raises:
        UserError: the package is missing.
    """
    try:
        module = importlib.import_module("lycoris.kohya")
    except ImportError as error:
        raise UserError(
            "network_module: lycoris.kohya needs the LyCORIS package; `pip install lycoris-lora`"
        ) from error
    _quiet(logging.getLogger("LyCORIS"))
    return module


def _quiet(lycoris: logging.Logger) -> None:
    """Its warnings alone, to stderr: its own handler keeps the stdout of the first import."""
    lycoris.setLevel(logging.WARNING)  # we count the modules ourselves
    lycoris.handlers.clear()
    lycoris.propagate = True


def create_lycoris(plan: NetworkPlan) -> LycorisNetwork:
    """Put LyCORIS adapters on the models, in place.

    Raises:
        UserError: If the package is missing, or for an algo or preset that it does not have.
    """
    lycoris = import_lycoris()
    _check_args(plan.args, lycoris)
    _check_packed_weights(plan)
    _refuse_norms(plan)
    dropout, layers = _dropout(plan), _layers(plan)
    clips = plan.text_encoders if len(plan.text_encoders) == 2 else plan.text_encoders[0]
    models = (clips, plan.unet)
    with _preset_for_diffusers(lycoris, plan.args.get("preset", "full")):
        if plan.ranks_from is None:
            settings = {"warn_on_unmatched": False, **plan.args, "dropout": dropout}
            alpha = plan.options.network_alpha
            network = lycoris.create_network(1.0, plan.rank, alpha, None, *models, **settings)
        else:
            _refuse_input_norms(plan.ranks_from)
            _warn_of_settings(plan)
            network = _rebuilt(lycoris, models, _named_as_in_memory(plan.ranks_from, layers))
    for module in network.unet_loras:
        # LyCORIS adds to the weight otherwise. Only here: on convolutions LoKr of 3.2 fails so.
        if isinstance(module.org_module[0], QuantizedLinear):
            module.bypass_mode = True
    network.apply_to(*models, plan.train_text_encoder, plan.train_unet)
    made = LycorisNetwork(network, plan, layers)
    made.to(next(plan.unet.parameters()).device)
    return made


def _rebuilt(lycoris: ModuleType, models: tuple, weights: dict[str, Tensor]) -> nn.Module:
    """The network of a file, with the ranks of its modules.

    Raises:
        UserError: LyCORIS cannot read these modules back, as those of boft and ia3.
    """
    try:
        network, _ = lycoris.create_network_from_weights(
            1.0, None, None, *models, weights_sd=weights
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            "dim_from_weights: LyCORIS cannot make modules of this kind from a file "
            f"({type(error).__name__}: {error}); for training give network_dim, network_alpha and "
            "the network_args of the file instead"
        ) from error
    return network


@torch.no_grad()
def _apply_again(module: nn.Module) -> None:
    """``apply_to`` of "full" adds the layer's weights to its own, which hold them already."""
    kept = {}
    if module.name == "full":
        kept = {name: parameter.clone() for name, parameter in module.named_parameters()}
    module.apply_to()
    for name, value in kept.items():
        module.get_parameter(name).copy_(value)


def _check_args(args: Mapping[str, str], lycoris: ModuleType) -> None:
    for key in args:
        if key not in LYCORIS_ARGS:  # a newer LyCORIS may know it
            unknown = describe_unknown(key, LYCORIS_ARGS)
            logger.warning("network_args, passed on to LyCORIS: %s", unknown)
    algo, preset = args.get("algo", "lora").lower(), args.get("preset", "full")
    _check_numbers(args)
    _refuse_algos(algo, preset, lycoris)
    if is_on(args, "rs_lora") and "lokr" in (algo, *_algos_of_preset(preset, lycoris)):
        raise UserError(
            "network_args: rs_lora with algo=lokr: LyCORIS trains layers that are stored whole at "
            "a scale that no reader of the file applies; leave rs_lora out"
        )
    if algo not in lycoris.network_module_dict:
        known = lycoris.network_module_dict
        raise UserError(f"network_args: algo: {describe_unknown(algo, known)}")
    if preset not in lycoris.PRESET and not Path(preset).is_file():
        unknown = describe_unknown(preset, lycoris.PRESET)
        raise UserError(f"network_args: preset, a name or a TOML file: {unknown}")


def _check_numbers(args: Mapping[str, str]) -> None:
    """Refuse what is no number, or out of range, before LyCORIS meets it."""
    for key, limits in NUMBERS.items():
        number(args, key, **limits)


def _refuse_algos(algo: str, preset: str, lycoris: ModuleType) -> None:
    """Refuse algorithms that cannot work here; a preset may choose them for single modules.

    Raises:
        UserError: one of ``REFUSED_ALGOS`` is asked for.
    """
    for refused in {algo, *_algos_of_preset(preset, lycoris)} & set(REFUSED_ALGOS):
        raise UserError(f"network_args: algo={refused} {REFUSED_ALGOS[refused]}; take algo=lora")


def _refuse_norms(plan: NetworkPlan) -> None:
    algo = plan.args.get("algo", "lora").lower()
    if plan.options.scale_weight_norms is not None and algo in WITHOUT_NORMS:
        raise UserError(
            f"scale_weight_norms: LyCORIS has no norm for algo={algo}, it would do nothing; "
            "leave it out"
        )


def _algos_of_preset(preset: str, lycoris: ModuleType) -> Iterator[str]:
    """The algorithms that a preset names for kinds of modules, or for single ones."""
    known = lycoris.PRESET.get(preset) or {}
    if not known and Path(preset).is_file():
        known = lycoris.read_preset(preset) or {}
    for table in ("module_algo_map", "name_algo_map"):
        for settings in (known.get(table) or {}).values():
            yield str(settings.get("algo", "")).lower()


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
    elif is_on(args, "dora_wd"):
        needed = "network_args dora_wd"
    elif not is_on(args, "bypass_mode", "true"):
        needed = "network_args bypass_mode=False"
    elif plan.ranks_from is not None:
        needed = "dim_from_weights with lycoris.kohya"
    if needed:
        raise UserError(
            f"{needed} reads the U-Net's weights, which quantize_unet has packed; leave one of "
            f"them out (algo={', '.join(ADDING_ALGOS)} need no weights)"
        )


def _dropout(plan: NetworkPlan) -> float | None:
    """The value of network_dropout, which LyCORIS users also write into network_args."""
    common = checked_number(plan.options.network_dropout, name="network_dropout", below=1)
    own = number(plan.args, "dropout", below=1)
    if None not in (common, own) and common != own:
        raise UserError(
            f"network_dropout={common:g} and network_args: dropout={own:g} are the same setting; "
            "give it once"
        )
    return common if own is None else own


def _refuse_input_norms(state: Mapping[str, Tensor]) -> None:
    """LyCORIS makes every DoRA layer from a file with a norm for each output.

    Raises:
        UserError: the file has norms for the inputs.
    """
    norms = [tensor for key, tensor in state.items() if key.endswith(".dora_scale")]
    if any(tensor.shape[0] == 1 and tensor.numel() > 1 for tensor in norms):
        raise UserError(
            "dim_from_weights: the file was trained with wd_on_output=False, which LyCORIS cannot "
            "tell from it; instead of dim_from_weights give network_dim, network_alpha and the "
            "network_args of its training"
        )


def _warn_of_settings(plan: NetworkPlan) -> None:
    """Name what LyCORIS does not ask for when it makes layers from weights."""
    names = ["network_dropout"] if plan.options.network_dropout is not None else []
    names += [f"network_args: {key}" for key in plan.args if not key.startswith("loraplus_")]
    for name in names:
        logger.warning(
            "%s has no effect: with dim_from_weights LyCORIS makes its layers from the file alone",
            name,
        )


@contextmanager
def _preset_for_diffusers(lycoris: ModuleType, name: str) -> Iterator[None]:
    """Within the block LyCORIS' preset chooses in a diffusers U-Net what it means to choose.

    LyCORIS names the classes of sd-scripts' own U-Net, where attention is ``CrossAttention``; and
    4.1 lists ``TimestepEmbedding`` beside the two layers in it, then stops at the duplicate. Its
    own lists and all settings of the class are put back at the end.
    """
    network_class, presets = lycoris.LycorisNetworkKohya, lycoris.PRESET
    own_presets = dict(presets)
    own_settings = {name: getattr(network_class, name) for name in dir(network_class)
                    if name.isupper()}  # fmt: skip
    preset = lycoris.read_preset(name) if name not in presets else presets[name]
    if preset is None:
        raise UserError(f"network_args: preset: {name} cannot be read as a LyCORIS preset in TOML")
    presets[name] = _with_diffusers_classes(preset)
    network_class.UNET_TARGET_REPLACE_MODULE = _diffusers_classes(
        own_settings["UNET_TARGET_REPLACE_MODULE"]
    )
    try:
        yield
    finally:
        for setting, value in own_settings.items():
            setattr(network_class, setting, value)
        presets.clear()
        presets.update(own_presets)


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


def _layers(plan: NetworkPlan) -> dict[str, Layer]:
    """Modules of the models by the names that LyCORIS makes of their paths."""
    return {
        f"lora_{part.replace('textencoder', 'te')}_{path}".replace(".", "_"): Layer(
            module, plan.file_name(part, path)
        )
        for part, model in plan.models.items()
        for path, module in model.named_modules()
    }


def _named_as_in_memory(
    state: Mapping[str, Tensor], layers: Mapping[str, Layer]
) -> dict[str, Tensor]:
    """Names and shapes that LyCORIS finds by the modules' own paths."""
    weights = renamed(state, {layer.file_name: name for name, layer in layers.items()})
    for key, tensor in weights.items():
        layer = layers.get(key.partition(".")[0])
        if layer and isinstance(layer.module, nn.Linear) and tensor.ndim == 4:
            weights[key] = tensor[..., 0, 0]
    return weights
