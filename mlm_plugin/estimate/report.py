"""The table of a predicted peak. Knows bytes and labels, no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlm_plugin.estimate.step import LABELS, Moment

__all__ = ["CUDA_CONTEXT", "Estimate", "Saving", "report_lines", "saving_lines"]

GIB = 2**30
CUDA_CONTEXT = GIB // 2
"""What CUDA and its libraries take before the first tensor. A common figure, not measured here."""

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
    names = list(estimate.moments)
    width = max(map(len, names)) + 2
    lines = [head, "", f"{'GiB':<26}" + "".join(f"{name:>{width}}" for name in names)]
    for label, meaning in LABELS.items():
        values = [moment[label] for moment in estimate.moments.values()]
        if any(values):
            cells = "".join(f"{_gib(value):>{width}}" for value in values)
            lines.append(f"{label:<26}{cells}   {meaning}")
    sums = "".join(f"{_gib(moment.total()):>{width}}" for moment in estimate.moments.values())
    lines.append(f"{'sum':<26}{sums}")
    return [
        *lines,
        "",
        f"peak: {_gib(estimate.peak)} GiB of tensors, in the {estimate.worst}",
        f"card: {_gib(estimate.peak + CUDA_CONTEXT)} GiB with {_gib(CUDA_CONTEXT)} for CUDA itself "
        "(a common figure), and some more",
        "      for gaps between tensors and the scratch space of kernels. Predicted, not measured.",
    ]


def saving_lines(estimate: Estimate, savings: Sequence[Saving]) -> list[str]:
    """Changes of options by what they save, the largest first."""
    useful = [s for s in savings if estimate.peak - s.peak > MIN_SAVING * estimate.peak]
    if not useful:
        return ["no single option would lower the peak"]
    useful.sort(key=lambda saving: saving.peak)
    width = max(len(saving.text) for saving in useful) + 2
    return ["what would save memory, each alone:"] + [
        f"  {saving.text:<{width}}{_gib(saving.peak - estimate.peak):>6} GiB   ({saving.price})"
        for saving in useful
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
