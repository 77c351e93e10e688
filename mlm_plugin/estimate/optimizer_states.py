"""What an optimizer keeps between steps and what it needs in a step, in bytes.

Optimizers of PyTorch and transformers take a step on the meta device and are counted. Those of
other packages, which may not be installed here, are described by what they keep per value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.estimate.live_bytes import LiveBytes
from mlm_plugin.estimate.on_meta import OnMeta
from mlm_plugin.training.optimizers import create_optimizer, parse_arguments

__all__ = ["OptimizerBytes", "optimizer_bytes"]

FP32 = 4
BLOCK = 256  # values of an 8-bit state that share one fp32 constant
MIN_8BIT = 4096  # smaller tensors have fp32 states
MIN_PAGED = 100_000  # smaller tensors have states on the GPU


class OptimizerBytes(NamedTuple):
    """Bytes on the GPU."""

    states: int  # between steps, from the first on
    working: int  # more while it steps


class Kind(NamedTuple):
    """An optimizer by what it keeps.

    Attributes:
        copies: states as large as the parameter.
        eight_bit: one byte per value and a constant per block, as bitsandbytes has it.
        paged: large states lie where the GPU takes them from when there is room.
        working: how many tensors as large as a parameter a step makes.
        at_once: for all parameters together, not one after the other.
    """

    copies: float
    eight_bit: bool = False
    paged: bool = False
    working: int = 0
    at_once: bool = False


KINDS: dict[str, Kind] = {
    "adamw8bit": Kind(2, eight_bit=True),
    "pagedadamw": Kind(2, paged=True),
    "pagedadamw8bit": Kind(2, eight_bit=True, paged=True),
    "pagedadamw32bit": Kind(2, paged=True),
    "ademamix8bit": Kind(3, eight_bit=True),
    "pagedademamix8bit": Kind(3, eight_bit=True, paged=True),
    "lion": Kind(1, working=2),
    "lion8bit": Kind(1, eight_bit=True),
    "pagedlion8bit": Kind(1, eight_bit=True, paged=True),
    "sgdnesterov8bit": Kind(1, eight_bit=True),
    "prodigy": Kind(4, working=2),
    "dadaptation": Kind(3, working=2),
    "dadaptadampreprint": Kind(3, working=2),
    "dadaptadagrad": Kind(3, working=2),
    "dadaptadam": Kind(3, working=2),
    "dadaptadan": Kind(5, working=2),
    "dadaptadanip": Kind(5, working=2),
    "dadaptlion": Kind(2, working=2),
    "dadaptsgd": Kind(3, working=2),
    "adamwschedulefree": Kind(2, working=1, at_once=True),
    "radamschedulefree": Kind(2, working=1, at_once=True),
    "sgdschedulefree": Kind(1, working=1, at_once=True),
}
"""By kohya's names in lower case.

Source: bitsandbytes ``optim/optimizer.py``, and the ``step`` of each package.
"""


def optimizer_bytes(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    optimizer_args: Sequence[str] = (),
    learning_rate: float = 1e-4,
) -> OptimizerBytes:
    """What an optimizer takes for parameters.

    Args:
        name: ``optimizer_type``.
        parameters: what is trained, on any device.
        optimizer_args: ``optimizer_args``.
        learning_rate: ``learning_rate``.

    Raises:
        UserError: an optimizer that is not known and cannot be tried on the meta device.
    """
    short = name.lower().rpartition(".")[2]
    kind = KINDS.get(short)
    if kind is None:
        return _tried(name, parameters, optimizer_args, learning_rate)
    settings = parse_arguments("optimizer_args", optimizer_args)
    if short == "prodigy":  # keeps two of its four states for every n-th value only
        kind = kind._replace(copies=2 + 2 / settings.get("slice_p", 1))
    working = [kind.working * parameter.nbytes for parameter in parameters]
    return OptimizerBytes(
        states=sum(_state_bytes(kind, parameter) for parameter in parameters),
        working=sum(working) if kind.at_once else max(working, default=0),
    )


def _tried(
    name: str,
    parameters: Sequence[nn.Parameter],
    optimizer_args: Sequence[str],
    learning_rate: float,
) -> OptimizerBytes:
    """Bytes of an optimizer that takes two steps on the meta device: one makes the states."""
    stand_ins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    live = LiveBytes()
    live.hold(stand_ins, "parameters")
    with live:  # some have their states from the start
        optimizer = create_optimizer(
            name,
            [{"params": stand_ins}],
            learning_rate=learning_rate,
            optimizer_args=optimizer_args,
        )
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = not group.get("fused")  # what it would choose on a GPU
    for parameter in stand_ins:
        parameter.grad = torch.empty_like(parameter)
    live.hold([parameter.grad for parameter in stand_ins], "gradients")
    try:
        with OnMeta(), live:
            optimizer.step()
            live.start_anew()
            optimizer.step()
    except Exception as error:  # whatever the unknown code wants of values
        raise UserError(
            f"optimizer_type = {name!r}: its memory is not known, and it cannot be tried without "
            f"values ({type(error).__name__}); known besides PyTorch's are {', '.join(KINDS)}"
        ) from error
    states = live.live[live.label]
    return OptimizerBytes(states, live.at_peak[live.label] - states)


def _state_bytes(kind: Kind, parameter: Tensor) -> int:
    size = parameter.numel()
    if kind.paged and size >= MIN_PAGED:
        return 0
    if kind.eight_bit and size >= MIN_8BIT:
        return int(kind.copies * (size + FP32 * math.ceil(size / BLOCK)))
    in_fp32 = kind.eight_bit or kind.paged
    return math.ceil(kind.copies * size) * (FP32 if in_fp32 else parameter.element_size())
