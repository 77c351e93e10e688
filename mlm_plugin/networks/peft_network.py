"""``networks.lora``: the built-in LoRA as a network, on peft layers.

Knows its settings and its weights in a file. Which layers get a LoRA, and its math, is in ``lora``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.networks.base import (
    AdapterNetwork,
    NetworkPlan,
    as_in_file,
    check_keys,
    fit_shape,
)
from mlm_plugin.networks.lora import (
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
from mlm_plugin.networks.network_args import (
    COMMON_ARGS,
    LoraPlus,
    describe_unknown,
    number,
    probability,
)

__all__ = ["BLOCK_ARGS", "PeftLoRANetwork", "create_lora"]

logger = logging.getLogger(__name__)

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


class PeftLoRANetwork(AdapterNetwork):
    """LoRA as sd-scripts' ``networks.lora`` has it, on peft layers.

    Args:
        modules: LoRAs by part, text encoders first and ``unet`` last.
        dropouts: shared by all of them.
        loraplus: learning-rate ratios of the up projections.
    """

    def __init__(
        self,
        modules: Mapping[str, Sequence[LoraModule]],
        *,
        dropouts: Dropouts,
        loraplus: LoraPlus,
    ):
        super().__init__(modules, loraplus=loraplus)
        self.dropouts = dropouts

    def to(self, device: torch.device | str) -> None:
        """See ``Network``."""
        for module in self.modules:
            for _, parameter in module.named_parameters():
                parameter.data = parameter.data.to(device)

    def train(self, mode: bool) -> None:
        """See ``Network``."""
        self.dropouts.training = mode

    def set_enabled(self, enabled: bool) -> None:
        """See ``AdapterNetwork``."""
        for module in self.modules:
            module.set_enabled(enabled)

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """See ``Network``."""
        state = {}
        for module in self.modules:
            for name, parameter in module.named_parameters():
                key = f"{module.kohya_name}.{name}"
                state[key] = as_in_file(key, parameter)
            state[f"{module.kohya_name}.alpha"] = torch.tensor(module.alpha)
        return state

    @torch.no_grad()
    def load_kohya_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See ``Network``. The file's alpha wins over the configured one; none means the rank."""
        state = self.of_trained_parts(state)
        slots = {
            f"{module.kohya_name}.{name}": parameter
            for module in self.modules
            for name, parameter in module.named_parameters()
        }
        alphas = {f"{module.kohya_name}.alpha": module for module in self.modules}
        check_keys(state, known=slots.keys() | alphas.keys())
        fitting = {
            key: fit_shape(key, state[key], slot.shape)
            for key, slot in slots.items()
            if key in state
        }
        for key, tensor in fitting.items():
            slots[key].copy_(tensor)
        _take_alphas(alphas, state)

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """See ``Network``."""
        return limit_norms(self.modules, max_norm)


def create_lora(plan: NetworkPlan) -> PeftLoRANetwork:
    """Put LoRAs on the layers that the plan names, in place.

    Raises:
        UserError: For a setting that is unknown, out of range or without effect.
    """
    _check_args(plan.args)
    dropouts = Dropouts(
        dropout=probability(plan.dropout, name="network_dropout"),
        rank_dropout=probability(plan.args.get("rank_dropout"), name="network_args: rank_dropout"),
        module_dropout=probability(
            plan.args.get("module_dropout"), name="network_args: module_dropout"
        ),
    )
    targets = {part: _text_encoder_targets(plan, part) for part in plan.text_parts}
    targets["unet"] = _unet_targets(plan)
    return PeftLoRANetwork(
        {
            part: inject_lora(model, targets[part], dropouts=dropouts)
            for part, model in {**plan.text_parts, "unet": plan.unet}.items()
        },
        dropouts=dropouts,
        loraplus=LoraPlus.from_args(plan.args),
    )


def _check_args(args: Mapping[str, str]) -> None:
    for key in args:
        if key in BLOCK_ARGS:
            raise UserError(
                f"network_args: {key} is not supported, layers of a kind share rank and learning "
                "rate here; drop it, or give ranks by network_weights with dim_from_weights"
            )
        if key not in COMMON_ARGS:
            raise UserError(f"network_args: {describe_unknown(key, COMMON_ARGS)}")
    if "conv_alpha" in args and "conv_dim" not in args:
        raise UserError(
            "network_args: conv_alpha has no effect without conv_dim; give conv_dim too"
        )


def _text_encoder_targets(plan: NetworkPlan, part: str) -> list[LoraTarget]:
    if not plan.train_text_encoder:
        return []
    targets = text_encoder_targets(
        plan.text_parts[part], rank=plan.dim, alpha=plan.alpha or plan.dim, part=part
    )
    return targets if plan.dims_from is None else weight_targets(targets, plan.dims_from)


def _unet_targets(plan: NetworkPlan) -> list[LoraTarget]:
    conv_rank = number(plan.args, "conv_dim", kind=int, at_least=1)
    conv_alpha = number(plan.args, "conv_alpha", default=1.0)
    if plan.dims_from is not None:
        for key in ("conv_dim", "conv_alpha"):
            if key in plan.args:
                logger.warning("%s has no effect: dim_from_weights takes it from the file", key)
        conv_rank = plan.dim  # every layer is a candidate
    if not plan.train_unet:
        return []
    targets = unet_targets(
        plan.unet,
        rank=plan.dim,
        alpha=plan.alpha or plan.dim,
        conv_rank=conv_rank,
        conv_alpha=conv_alpha or conv_rank,
        name_of=plan.unet_name,
    )
    return targets if plan.dims_from is None else weight_targets(targets, plan.dims_from)


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
