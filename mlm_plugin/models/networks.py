"""``network_module``: the trained network behind one interface, ours on peft or LyCORIS.

Knows how kohya names, groups, loads and limits the weights of a network. Knows nothing of losses,
optimizers or metadata.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.kohya_names import (
    canonical_name,
    in_file_shape,
    is_text_encoder_name,
)
from mlm_plugin.models.lora import (
    Dropouts,
    LoraModule,
    LoraTarget,
    MaxNorm,
    inject_lora,
    limit_norms,
    text_encoder_targets,
    unet_targets,
    weight_targets,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlm_plugin.models.checkpoints import StableDiffusion

__all__ = [
    "NETWORK_MODULES",
    "LycorisNetwork",
    "MaxNorm",
    "Network",
    "PeftLoRANetwork",
    "create_network",
    "parse_network_args",
    "read_weights",
]

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
NUM_NAMES_SHOWN = 3

LORA_ARGS = (
    "conv_dim",
    "conv_alpha",
    "rank_dropout",
    "module_dropout",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)
BLOCK_ARGS = (
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
)
LYCORIS_ARGS = (
    *LORA_ARGS,
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


class Network(Protocol):
    """What the trainer needs from a trained network."""

    num_text_encoder_modules: int
    num_unet_modules: int

    def parameter_groups(
        self, *, unet_lr: float, text_encoder_lrs: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Optimizer groups ``{"params", "lr", "name"}``, text encoder first.

        Names are kohya's: ``textencoder``, ``unet``, and with LoRA+ the same with `` plus``. A part
        with learning rate 0 gets no group and no gradient, but stays in the file.
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


class LoraPlus(NamedTuple):
    """LoRA+ ratios: the learning rate of up projections is that of down projections times these."""

    unet: float | None = None
    text_encoder: float | None = None

    @classmethod
    def from_args(cls, args: Mapping[str, str]) -> LoraPlus:
        """Read from network_args; the part's own ratio wins over the common one."""
        common = _number(args, "loraplus_lr_ratio")
        return cls(
            unet=_number(args, "loraplus_unet_lr_ratio") or common,
            text_encoder=_number(args, "loraplus_text_encoder_lr_ratio") or common,
        )


class PeftLoRANetwork:
    """LoRA as sd-scripts' ``networks.lora`` has it, on peft layers.

    Args:
        text_encoder_modules: LoRAs of the text encoder.
        unet_modules: LoRAs of the U-Net.
        dropouts: shared by all of them.
        loraplus: learning-rate ratios of the up projections.
    """

    def __init__(
        self,
        text_encoder_modules: Sequence[LoraModule],
        unet_modules: Sequence[LoraModule],
        *,
        dropouts: Dropouts,
        loraplus: LoraPlus,
    ):
        self.text_encoder_modules = list(text_encoder_modules)
        self.unet_modules = list(unet_modules)
        self.dropouts = dropouts
        self.loraplus = loraplus

    @property
    def modules(self) -> list[LoraModule]:
        """Every LoRA, text encoder first."""
        return self.text_encoder_modules + self.unet_modules

    @property
    def num_text_encoder_modules(self) -> int:
        """Adapted layers of the text encoder."""
        return len(self.text_encoder_modules)

    @property
    def num_unet_modules(self) -> int:
        """Adapted layers of the U-Net."""
        return len(self.unet_modules)

    def parameter_groups(
        self, *, unet_lr: float, text_encoder_lrs: Sequence[float]
    ) -> list[dict[str, Any]]:
        """See ``Network``."""
        return _parameter_groups(self, unet_lr=unet_lr, text_encoder_lrs=text_encoder_lrs)

    def parameters(self) -> list[nn.Parameter]:
        """See ``Network``."""
        return _trained(self.modules)

    def to(self, device: torch.device | str) -> None:
        """See ``Network``."""
        for module in self.modules:
            for _, parameter in module.named_parameters():
                parameter.data = parameter.data.to(device)

    def train(self, mode: bool) -> None:
        """See ``Network``."""
        self.dropouts.training = mode

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """See ``Network``."""
        state = {}
        for module in self.modules:
            for name, parameter in module.named_parameters():
                key = f"{module.kohya_name}.{name}"
                state[key] = _copy(in_file_shape(key, parameter))
            state[f"{module.kohya_name}.alpha"] = torch.tensor(module.alpha)
        return state

    @torch.no_grad()
    def load_kohya_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See ``Network``. The file's alpha wins over the configured one; none means the rank."""
        state = _of_trained_parts(self, state)
        slots = {
            f"{module.kohya_name}.{name}": parameter
            for module in self.modules
            for name, parameter in module.named_parameters()
        }
        alphas = {f"{module.kohya_name}.alpha": module for module in self.modules}
        _check_keys(state, known=slots.keys() | alphas.keys())
        fitting = {
            key: _fit(key, state[key], slot.shape) for key, slot in slots.items() if key in state
        }
        for key, tensor in fitting.items():
            slots[key].copy_(tensor)
        _take_alphas(alphas, state)

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """See ``Network``."""
        return limit_norms(self.modules, max_norm)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See ``Network``."""
        try:
            for module in self.modules:
                module.set_enabled(False)
            yield
        finally:
            for module in self.modules:
                module.set_enabled(True)


class LycorisNetwork:
    """A network of the LyCORIS package (LoKr, LoHa, LoCon, ...).

    Args:
        network: LyCORIS' own network, applied to the models.
        loraplus: learning-rate ratios of the up projections.
    """

    def __init__(self, network: nn.Module, *, loraplus: LoraPlus):
        self.network = network
        self.loraplus = loraplus

    @property
    def text_encoder_modules(self) -> list[nn.Module]:
        """Adapters of the text encoder; none with presets like ``unet-only``."""
        return self.network.text_encoder_loras

    @property
    def unet_modules(self) -> list[nn.Module]:
        """Adapters of the U-Net."""
        return self.network.unet_loras

    @property
    def num_text_encoder_modules(self) -> int:
        """Adapted layers of the text encoder."""
        return len(self.text_encoder_modules)

    @property
    def num_unet_modules(self) -> int:
        """Adapted layers of the U-Net."""
        return len(self.unet_modules)

    def parameter_groups(
        self, *, unet_lr: float, text_encoder_lrs: Sequence[float]
    ) -> list[dict[str, Any]]:
        """See ``Network``."""
        return _parameter_groups(self, unet_lr=unet_lr, text_encoder_lrs=text_encoder_lrs)

    def parameters(self) -> list[nn.Parameter]:
        """See ``Network``."""
        return _trained([*self.text_encoder_modules, *self.unet_modules])

    def to(self, device: torch.device | str) -> None:
        """See ``Network``."""
        self.network.to(device)

    def train(self, mode: bool) -> None:
        """See ``Network``."""
        self.network.train(mode)

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """See ``Network``."""
        named = ((canonical_name(key), value) for key, value in self.network.state_dict().items())
        return {key: _copy(in_file_shape(key, value)) for key, value in named}

    def load_kohya_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See ``Network``. The file's alphas must be the configured ones, LyCORIS keeps them."""
        state = _of_trained_parts(self, state)
        own = {
            canonical_name(key): (key, value) for key, value in self.network.state_dict().items()
        }
        _check_keys(state, known=own.keys())
        loaded = {}
        for key, tensor in state.items():
            own_key, value = own[key]
            if key.endswith(".alpha") and not math.isclose(tensor, value, rel_tol=1e-2):
                raise UserError(
                    f"network_weights: {key} is {float(tensor):g}, this network has "
                    f"{float(value):g}; set network_alpha (conv_alpha) as the file was trained"
                )
            loaded[own_key] = _fit(key, tensor, value.shape)
        self.network.load_state_dict(loaded, strict=False)

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """See ``Network``. LyCORIS has its own definition, and none for some algorithms."""
        device = next(self.network.parameters()).device
        scaled, mean, largest = self.network.apply_max_norm_regularization(max_norm, device)
        return MaxNorm(int(scaled), float(mean), float(largest))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See ``Network``."""
        modules = [*self.text_encoder_modules, *self.unet_modules]
        try:
            for module in modules:
                module.restore()
            yield
        finally:
            for module in modules:
                module.apply_to()


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
        models: text encoder and U-Net.
        dim: rank; ``None`` is 4, as in ``networks.lora``.
        alpha: 0 is the rank; ``None`` is 1, as in ``networks.lora``.
        dropout: ``network_dropout``.
        network_args: ``key=value`` of the module.
        train_unet: adapt the U-Net.
        train_text_encoder: adapt the text encoder.
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
    assert len(models.text_encoders) == 1, "Stable Diffusion 1 and 2 have one text encoder"
    text_encoder, unet = models.text_encoders[0].model, models.unet
    text_encoder.requires_grad_(False)
    unet.requires_grad_(False)
    state = None if weights is None else read_weights(weights)
    if dim_from_weights and dim is not None:
        logger.warning("network_dim has no effect: dim_from_weights takes the ranks of the file")
    plan = _Plan(
        text_encoder=text_encoder,
        unet=unet,
        train_text_encoder=train_text_encoder,
        train_unet=train_unet,
        dim=DEFAULT_RANK if dim is None else dim,
        alpha=1.0 if alpha is None else alpha,
        dropout=dropout,
        args=parse_network_args(network_args),
        dims_from=state if dim_from_weights else None,
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


def parse_network_args(network_args: Sequence[str]) -> dict[str, str]:
    """``["conv_dim=4", ...]`` as a dict of strings.

    Raises:
        UserError: For an entry without ``=``.
    """
    parsed = {}
    for entry in network_args:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f"network_args: got {entry!r}, expected key=value, e.g. conv_dim=4")
        parsed[key.strip()] = value.strip()
    return parsed


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a LoRA file on the CPU, under kohya's names with ``text_model_``.

    Raises:
        UserError: If the file is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"network_weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"network_weights: {path} cannot be read as LoRA file: {error}") from error
    return {canonical_name(key): value for key, value in state.items() if isinstance(value, Tensor)}


class _Plan(NamedTuple):
    """What ``create_network`` was asked for, checked and with defaults filled in."""

    text_encoder: nn.Module
    unet: nn.Module
    train_text_encoder: bool
    train_unet: bool
    dim: int
    alpha: float  # 0 means dim
    dropout: float | None
    args: dict[str, str]
    dims_from: dict[str, Tensor] | None


def _create_lora(plan: _Plan) -> PeftLoRANetwork:
    _check_lora_args(plan.args)
    dropouts = Dropouts(
        dropout=_probability({"network_dropout": plan.dropout}, "network_dropout"),
        rank_dropout=_probability(plan.args, "rank_dropout"),
        module_dropout=_probability(plan.args, "module_dropout"),
    )
    text_encoder, unet = _text_encoder_targets(plan), _unet_targets(plan)
    return PeftLoRANetwork(
        inject_lora(plan.text_encoder, text_encoder, dropouts=dropouts),
        inject_lora(plan.unet, unet, dropouts=dropouts),
        dropouts=dropouts,
        loraplus=LoraPlus.from_args(plan.args),
    )


def _text_encoder_targets(plan: _Plan) -> list[LoraTarget]:
    if not plan.train_text_encoder:
        return []
    targets = text_encoder_targets(plan.text_encoder, rank=plan.dim, alpha=plan.alpha or plan.dim)
    return targets if plan.dims_from is None else weight_targets(targets, plan.dims_from)


def _unet_targets(plan: _Plan) -> list[LoraTarget]:
    conv_rank = _number(plan.args, "conv_dim", kind=int, at_least=1)
    conv_alpha = _number(plan.args, "conv_alpha", default=1.0)
    if plan.dims_from is not None:
        if conv_rank is not None:
            logger.warning("conv_dim has no effect: dim_from_weights takes the ranks of the file")
        conv_rank = plan.dim  # every layer is a candidate
    if not plan.train_unet:
        return []
    targets = unet_targets(
        plan.unet,
        rank=plan.dim,
        alpha=plan.alpha or plan.dim,
        conv_rank=conv_rank,
        conv_alpha=conv_alpha or conv_rank,
    )
    return targets if plan.dims_from is None else weight_targets(targets, plan.dims_from)


def _create_lycoris(plan: _Plan) -> LycorisNetwork:
    try:
        lycoris = importlib.import_module("lycoris.kohya")
    except ImportError as error:
        raise UserError(
            "network_module: lycoris.kohya needs the LyCORIS package; `pip install lycoris-lora`"
        ) from error
    _check_lycoris_args(plan.args, lycoris)
    models = (plan.text_encoder, plan.unet)
    with _preset_for_diffusers(lycoris, plan.args.get("preset", "full")):
        if plan.dims_from is None:
            arguments = {"dropout": plan.dropout, "warn_on_unmatched": False, **plan.args}
            network = lycoris.create_network(1.0, plan.dim, plan.alpha, None, *models, **arguments)
        else:
            network, _ = lycoris.create_network_from_weights(
                1.0, None, None, *models, weights_sd=_named_as_in_memory(plan.dims_from, *models)
            )
    network.apply_to(*models, plan.train_text_encoder, plan.train_unet)
    network.to(next(plan.unet.parameters()).device)
    return LycorisNetwork(network, loraplus=LoraPlus.from_args(plan.args))


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


NETWORK_MODULES: dict[str, Callable[..., Network]] = {
    "networks.lora": _create_lora,
    "lycoris.kohya": _create_lycoris,
}


def _check_lora_args(args: Mapping[str, str]) -> None:
    for key in args:
        if key in BLOCK_ARGS:
            raise UserError(
                f"network_args: {key} is not supported, layers of a kind share rank and learning "
                "rate here; drop it, or give ranks by network_weights with dim_from_weights"
            )
        if key not in LORA_ARGS:
            raise UserError(f"network_args: {_unknown(key, LORA_ARGS)}")
    if "conv_alpha" in args and "conv_dim" not in args:
        raise UserError(
            "network_args: conv_alpha has no effect without conv_dim; give conv_dim too"
        )


def _check_lycoris_args(args: Mapping[str, str], lycoris) -> None:
    for key in args:
        if key not in LYCORIS_ARGS:  # a newer LyCORIS may know it
            logger.warning("network_args: %s; passed on to LyCORIS", _unknown(key, LYCORIS_ARGS))
    algo, preset = args.get("algo", "lora").lower(), args.get("preset", "full")
    if algo not in lycoris.network_module_dict:
        raise UserError(f"network_args: algo: {_unknown(algo, lycoris.network_module_dict)}")
    if preset not in lycoris.PRESET and not Path(preset).is_file():
        raise UserError(f"network_args: preset: {_unknown(preset, lycoris.PRESET)}, or a TOML file")


def _unknown(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{name!r} is not known, {hint}allowed are {', '.join(known)}"


def _number(
    args: Mapping[str, Any],
    key: str,
    *,
    kind: type = float,
    default: float | None = None,
    at_least: float = 0,
) -> Any:
    value = args.get(key)
    if value is None:
        return default
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not at_least <= number < float("inf"):
        noun = "a whole number" if kind is int else "a number"
        raise UserError(f"network_args: {key}={value}: expected {noun} of at least {at_least}")
    return number


def _probability(args: Mapping[str, Any], key: str) -> float | None:
    value = _number(args, key)
    if value is not None and value >= 1:
        raise UserError(f"{key}: got {value:g}, expected a probability of at least 0 and below 1")
    return value


def _parameter_groups(
    network: PeftLoRANetwork | LycorisNetwork, *, unet_lr: float, text_encoder_lrs: Sequence[float]
) -> list[dict[str, Any]]:
    """Source: sd-scripts ``networks/lora.py`` ``prepare_optimizer_params``."""
    text_encoder_lr = text_encoder_lrs[0] if text_encoder_lrs else 0.0
    ratios = network.loraplus
    parts = (
        ("textencoder", network.text_encoder_modules, text_encoder_lr, ratios.text_encoder),
        ("unet", network.unet_modules, unet_lr, ratios.unet),
    )
    groups = []
    for name, modules, lr, ratio in parts:
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


def _trained(modules: Iterable[LoraModule | nn.Module]) -> list[nn.Parameter]:
    named = (parameter for module in modules for _, parameter in module.named_parameters())
    return [parameter for parameter in named if parameter.requires_grad]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _of_trained_parts(
    network: PeftLoRANetwork | LycorisNetwork, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    state = {canonical_name(key): value for key, value in state.items()}
    has_modules = {True: network.num_text_encoder_modules, False: network.num_unet_modules}
    kept = {key: value for key, value in state.items() if has_modules[is_text_encoder_name(key)]}
    if len(kept) < len(state):
        part = "text encoder" if has_modules[True] == 0 else "U-Net"
        logger.warning(
            "network_weights: %d tensors of the %s are left out, it is not trained",
            len(state) - len(kept),
            part,
        )
    if not kept:
        raise UserError("network_weights: the file has no weights for what is trained")
    return kept


def _check_keys(state: Mapping[str, Tensor], *, known: Iterable[str]) -> None:
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


def _fit(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
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


def _take_alphas(alphas: Mapping[str, LoraModule], state: Mapping[str, Tensor]) -> None:
    changed = {}
    for key, module in alphas.items():
        down_key = key.replace(".alpha", ".lora_down.weight")
        if down_key not in state:
            continue
        alpha = float(state.get(key, module.rank))
        if alpha != module.alpha:
            changed[key] = (module.alpha, alpha)
        module.alpha = alpha
    if changed:
        old, new = next(iter(changed.values()))
        logger.warning(
            "network_weights: alpha %g of the file is used in %d modules, not network_alpha %g",
            new,
            len(changed),
            old,
        )


def _named_as_in_memory(
    state: Mapping[str, Tensor], text_encoder: nn.Module, unet: nn.Module
) -> dict[str, Tensor]:
    """Names and shapes that LyCORIS finds by the modules' own paths."""
    layers = {
        f"{prefix}_{name}".replace(".", "_"): module
        for prefix, model in (("lora_te", text_encoder), ("lora_unet", unet))
        for name, module in model.named_modules()
    }
    own_names = {canonical_name(name): name for name in layers}
    renamed = {}
    for key, tensor in state.items():
        name, _, part = key.partition(".")
        own_name = own_names.get(name, name)
        if isinstance(layers.get(own_name), nn.Linear) and tensor.ndim == 4:
            tensor = tensor[..., 0, 0]
        renamed[f"{own_name}.{part}"] = tensor
    return renamed
