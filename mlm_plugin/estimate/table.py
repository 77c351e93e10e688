"""The table of a predicted peak. Knows bytes and labels, no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlm_plugin.estimate.step import LABELS, Moment

__all__ = ["CUDA_CONTEXT", "Estimate", "Saving", "report_lines", "saving_lines"]

GIB = 2**30
CUDA_CONTEXT = 4 * GIB // 5
"""What CUDA, its libraries and the kernels of a run take, measured on an H100."""

MIN_SAVING = 0.005  # of the peak; less is not worth a line


class Estimate(NamedTuple):
    """Bytes of tensors at the moments of a run that need most."""

    moments: dict[str, Moment]  # by name, e.g. "training step"

    @property
    def worst(self) -> str:
        """The moment with the highest sum."""
        return max(self.moments, key=lambda name: self.moments[name].total())

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return self.moments[self.worst].total()


class Saving(NamedTuple):
    """A change of options and the peak that it leads to."""

    text: str
    price: str
    peak: int


def report_lines(estimate: Estimate, head: str) -> list[str]:
    """One column per moment, one row per part; sums, and what comes on top.

    Args:
        estimate: what was counted.
        head: what it was counted for.
    """
    unit, names = unit_of(estimate), list(estimate.moments)
    width = max(map(len, names)) + 2
    lines = [head, "", f"{unit.name:<26}" + "".join(f"{name:>{width}}" for name in names)]
    for label, meaning in LABELS.items():
        values = [moment[label] for moment in estimate.moments.values()]
        if any(values):
            cells = "".join(f"{unit.number(value):>{width}}" for value in values)
            lines.append(f"{label:<26}{cells}   {meaning}")
    totals = [unit.number(moment.total()) for moment in estimate.moments.values()]
    lines.append(f"{'sum':<26}" + "".join(f"{total:>{width}}" for total in totals))
    on_the_card = (estimate.peak + CUDA_CONTEXT) / GIB
    return [
        *lines,
        "",
        f"peak: {unit.text(estimate.peak)} of tensors, in the {estimate.worst}",
        f"card: {on_the_card:.2f} GiB with {CUDA_CONTEXT / GIB:.2f} for CUDA itself (as on "
        "an H100), and some more for gaps",
        "      between tensors and the scratch space of kernels. Predicted, not measured.",
    ]


def saving_lines(estimate: Estimate, savings: Sequence[Saving]) -> list[str]:
    """Changes of options by what they save, the largest first."""
    useful = [s for s in savings if estimate.peak - s.peak > MIN_SAVING * estimate.peak]
    if not useful:
        return ["no single option would lower the peak"]
    useful.sort(key=lambda saving: saving.peak)
    unit = unit_of(estimate)
    width = max(len(saving.text) for saving in useful) + 2
    return ["what would save memory, each alone:"] + [
        f"  {saving.text:<{width}}{unit.text(saving.peak - estimate.peak):>10}   ({saving.price})"
        for saving in useful
    ]


class Unit(NamedTuple):
    """What bytes are written in."""

    name: str
    size: int

    def number(self, nbytes: int) -> str:
        """Bytes without the unit's name."""
        return f"{nbytes / self.size:.2f}"

    def text(self, nbytes: int) -> str:
        """Bytes with it."""
        return f"{self.number(nbytes)} {self.name}"


def unit_of(estimate: Estimate) -> Unit:
    """GiB, or MiB for a small model."""
    return Unit("GiB", GIB) if estimate.peak >= GIB else Unit("MiB", 2**20)
