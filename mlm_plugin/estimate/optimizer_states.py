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


COPIES: dict[str, int] = {
    "adamw8bit": 2,
    "pagedadamw": 2,
    "pagedadamw8bit": 2,
    "pagedadamw32bit": 2,
    "ademamix8bit": 3,
    "pagedademamix8bit": 3,
    "lion": 1,
    "lion8bit": 1,
    "pagedlion8bit": 1,
    "sgdnesterov8bit": 1,
    "prodigy": 4,
    "dadaptation": 3,
    "dadaptadampreprint": 3,
    "dadaptadagrad": 3,
    "dadaptadam": 3,
    "dadaptadan": 5,
    "dadaptadanip": 5,
    "dadaptlion": 2,
    "dadaptsgd": 3,
    "adamwschedulefree": 2,
    "radamschedulefree": 2,
    "sgdschedulefree": 1,
}
"""How many states as large as the parameter an optimizer keeps; by kohya's names in lower case.

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
    if short not in COPIES:
        return _tried(name, parameters, optimizer_args, learning_rate)
    copies, settings = COPIES[short], parse_arguments("optimizer_args", optimizer_args)
    if short == "prodigy":  # keeps two of its four states for every n-th value only
        copies = 2 + 2 / settings.get("slice_p", 1)
    states = sum(_state_bytes(short, copies, parameter) for parameter in parameters)
    sizes = [parameter.nbytes for parameter in parameters]
    if "8bit" in short or "paged" in short:  # one kernel does all
        return OptimizerBytes(states, working=0)
    if "schedulefree" in short:  # one more tensor for all parameters together
        return OptimizerBytes(states, working=sum(sizes))
    return OptimizerBytes(states, working=2 * max(sizes, default=0))


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
            live.reset_peak()
            optimizer.step()
    except Exception as error:  # whatever the unknown code wants of values
        raise UserError(
            f"optimizer_type = {name!r}: its memory is not known, and it cannot be tried without "
            f"values ({type(error).__name__}); known besides PyTorch's are {', '.join(COPIES)}"
        ) from error
    states = live.live[live.label]
    return OptimizerBytes(states, live.at_peak[live.label] - states)


def _state_bytes(name: str, copies: float, parameter: Tensor) -> int:
    size, paged, eight_bit = parameter.numel(), "paged" in name, "8bit" in name
    if paged and size >= MIN_PAGED:
        return 0  # in the CPU's memory, from where the GPU takes them
    if eight_bit and size >= MIN_8BIT:  # a byte per value and a constant per block
        return int(copies * (size + FP32 * math.ceil(size / BLOCK)))
    return math.ceil(copies * size) * (FP32 if eight_bit or paged else parameter.element_size())
