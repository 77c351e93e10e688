"""``networks.lora``: the built-in LoRA as a network, on peft layers.

Knows its settings and its weights in a file. Which layers get a LoRA, and its math, is in ``lora``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mlm_plugin.errors import UserError
from mlm_plugin.networks.base import Network, NetworkPlan
from mlm_plugin.networks.lora import (
    Dropouts,
    LoraModule,
    LoraTarget,
    MaxNorm,
    Ranks,
    inject_lora,
    limit_norms,
    lora_targets,
    with_ranks_of,
)
from mlm_plugin.networks.network_args import (
    COMMON_ARGS,
    LoraPlus,
    checked_number,
    describe_unknown,
    number,
)

__all__ = ["BLOCK_ARGS", "PeftLoRANetwork", "create_lora", "fits_lora"]

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
LORA_TENSORS = ("lora_up.weight", "lora_down.weight", "alpha")
EVERY_LAYER = Ranks(1, 1, 1, 1)  # convolutions too


class PeftLoRANetwork(Network):
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
        for members in self.parts().values():
            for parameter in members:
                parameter.data = parameter.data.to(device)

    def train(self, mode: bool) -> None:
        """See ``Network``."""
        self.dropouts.training = mode

    def set_enabled(self, enabled: bool) -> None:
        """See ``Network``."""
        for module in self.modules:
            module.set_enabled(enabled)

    def set_strength(self, *, text_encoder: float, unet: float) -> None:
        """See ``Network``."""
        for module, strength in self._strengths(text_encoder, unet):
            module.set_enabled(strength != 0)
            module.set_strength(strength)

    def apply_max_norm(self, max_norm: float) -> MaxNorm:
        """See ``Network``."""
        return limit_norms(self.modules, max_norm)

    def weights(self) -> dict[str, Tensor]:
        """See ``Network``."""
        weights: dict[str, Tensor] = {}
        for module in self.modules:
            for name, parameter in module.named_parameters():
                weights[f"{module.kohya_name}.{name}"] = parameter
            weights[f"{module.kohya_name}.alpha"] = torch.tensor(float(module.alpha))
        return weights

    @torch.no_grad()
    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """See ``Network``. The file's alpha wins over the configured one; none means the rank."""
        own = self.weights()
        for key, tensor in weights.items():
            own[key].copy_(tensor)
        replaced = []
        for module in self.modules:
            if f"{module.kohya_name}.lora_down.weight" in weights:
                alpha = float(weights.get(f"{module.kohya_name}.alpha", module.rank))
                if alpha != module.alpha:
                    replaced.append((alpha, module.alpha))
                module.alpha = alpha
        if replaced:
            new, old = replaced[0]
            logger.warning(
                "network_weights: alpha %g of the file is used in %d modules, not network_alpha %g",
                new,
                len(replaced),
                old,
            )


def create_lora(plan: NetworkPlan) -> PeftLoRANetwork:
    """Put LoRAs on the layers that the plan names, in place.

    Raises:
        UserError: For a setting that is unknown, out of range or without effect.
    """
    args = plan.args
    _check_args(args)
    dropouts = Dropouts(
        dropout=checked_number(plan.options.network_dropout, name="network_dropout", below=1),
        rank_dropout=number(args, "rank_dropout", below=1),
        module_dropout=number(args, "module_dropout", below=1),
    )
    ranks = _ranks(plan)
    modules = {
        part: inject_lora(model, _targets(plan, part, ranks), dropouts=dropouts)
        for part, model in plan.models.items()
    }
    return PeftLoRANetwork(modules, dropouts=dropouts, loraplus=LoraPlus.from_args(args))


def fits_lora(plan: NetworkPlan) -> bool:
    """Whether the file has nothing but LoRAs of layers that ``networks.lora`` can adapt.

    LyCORIS' default preset adapts more layers than these.
    """
    known = {
        target.kohya_name
        for part, model in plan.models.items()
        for target in lora_targets(model, EVERY_LAYER, name_of=partial(plan.file_name, part))
    }
    names = (key.partition(".") for key in plan.weights or ())
    return all(module in known and tensor in LORA_TENSORS for module, _, tensor in names)


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


def _ranks(plan: NetworkPlan) -> Ranks:
    conv_rank = number(plan.args, "conv_dim", kind=int, at_least=1)
    conv_alpha = number({"conv_alpha": "1", **plan.args}, "conv_alpha")
    if plan.ranks_from is not None:
        for key in ("conv_dim", "conv_alpha"):
            if key in plan.args:
                logger.warning("%s has no effect: dim_from_weights takes it from the file", key)
        conv_rank = plan.rank  # every layer is a candidate
    return Ranks(
        plan.rank, plan.options.network_alpha or plan.rank, conv_rank, conv_alpha or conv_rank
    )


def _targets(plan: NetworkPlan, part: str, ranks: Ranks) -> list[LoraTarget]:
    if not (plan.train_unet if part == "unet" else plan.train_text_encoder):
        return []
    model, name_of = plan.models[part], partial(plan.file_name, part)
    targets = lora_targets(model, ranks, name_of=name_of)
    if plan.ranks_from is None:
        return targets
    chosen = with_ranks_of(plan.ranks_from, targets)
    _warn_of_absent(chosen, lora_targets(model, ranks._replace(conv=None), name_of=name_of), part)
    return chosen


def _warn_of_absent(
    chosen: Sequence[LoraTarget], candidates: Sequence[LoraTarget], part: str
) -> None:
    """Layers that a LoRA usually adapts and the file leaves out stay untrained.

    Args:
        chosen: those that the file has.
        candidates: those without convolutions, which most files lack.
        part: which model, for the message.
    """
    names = {target.kohya_name for target in chosen}
    usual = {target.kohya_name for target in candidates}
    absent = sorted(usual - names)
    if absent and names:
        logger.warning(
            "network_weights: %d of the %d layers of %s that a LoRA adapts are not in the file "
            "and stay as in the model: %s, ...",
            *(len(absent), len(usual), part, absent[0]),
        )
