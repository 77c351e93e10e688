"""``network_args``: the ``key=value`` settings of a network module, and checks of their values.

Knows which settings the network modules share. What a single one knows besides stands in its file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.errors import UserError

__all__ = [
    "COMMON_ARGS",
    "LoraPlus",
    "checked_number",
    "describe_unknown",
    "is_on",
    "number",
    "parse_network_args",
    "warn_of_output_norms",
]

logger = logging.getLogger(__name__)

COMMON_ARGS = (
    "conv_dim",
    "conv_alpha",
    "rank_dropout",
    "module_dropout",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)


DORA_ALGOS = ("lora", "locon", "loha", "lokr")
"""Algorithms of LyCORIS that train norms of their own with ``dora_wd``."""


class LoraPlus(NamedTuple):
    """LoRA+ ratios: the learning rate of up projections is that of down projections times these."""

    unet: float | None = None
    text_encoder: float | None = None

    @classmethod
    def from_args(cls, args: Mapping[str, str]) -> LoraPlus:
        """Read from network_args; a part's own ratio wins over the common one."""
        common = number(args, "loraplus_lr_ratio")
        return cls(
            unet=number(args, "loraplus_unet_lr_ratio") or common,
            text_encoder=number(args, "loraplus_text_encoder_lr_ratio") or common,
        )


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


def number(args: Mapping[str, str], key: str, **limits: Any) -> Any:
    """The value of a numeric setting; see ``checked_number``."""
    return checked_number(args.get(key), name=f"network_args: {key}", **limits)


def checked_number(
    value: str | float | None,
    *,
    name: str,
    kind: type = float,
    at_least: float = 0,
    below: float = float("inf"),
) -> Any:
    """A number within its limits; ``None``, for not given, stays.

    Args:
        value: as given.
        name: what errors call it.
        kind: ``int`` for whole numbers.
        at_least: smallest value allowed.
        below: the value must be smaller than this.

    Raises:
        UserError: For any other value.
    """
    if value is None:
        return None
    try:
        result = kind(value)
    except ValueError:
        result = None
    if result is None or not at_least <= result < below:
        noun = "a whole number" if kind is int else "a number"
        limit = "" if below == float("inf") else f" and below {below}"
        raise UserError(f"{name}={value}: expected {noun} of at least {at_least}{limit}")
    return result


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """What an error says of an unknown name: all that are allowed, and the nearest one."""
    known = sorted(known)
    return f"{name!r} is not known, allowed are {', '.join(known)}{did_you_mean(name, known)}"


def is_on(args: Mapping[str, str], key: str, default: str = "false") -> bool:
    """Whether LyCORIS takes a setting as true: everything but "false" is."""
    return args.get(key, default).lower() != "false"


def warn_of_output_norms(args: Mapping[str, str]) -> None:
    """Name what A1111 makes of the norms that ``dora_wd`` trains by default, one for each output.

    A1111 divides by the norms of the inputs instead (docs/method.md, What is written).
    """
    algo = args.get("algo", "lora").lower()
    if algo in DORA_ALGOS and is_on(args, "dora_wd") and is_on(args, "wd_on_output", "true"):
        logger.warning(
            "network_args: dora_wd trains a norm for each output, which A1111 (1.10.1) takes for "
            "those of the inputs: its pictures will be wrong; for A1111 add wd_on_output=False"
        )
