"""What the oracle says about pictures: right or wrong each, and counts in a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import ASKED, Concept
from mlm_plugin.pocket.oracle import Oracle
from mlm_plugin.pocket.scores import identity, prompt_fidelity, seen_right

__all__ = ["Judgement", "judge", "verdict_lines"]


@dataclass(frozen=True)
class Judgement:
    """Of the pictures of all prompts by one model.

    Attributes:
        wrong: for each picture, what was asked for and is not seen: attribute -> what is seen.
        right: attribute -> number of pictures that show it as asked.
        asked: attribute -> number of prompts that ask for it.
        fidelity: mean share of what a prompt asks for that is seen.
        likeness: mean likeness to the concept, 0 to 1.
    """

    wrong: Sequence[dict[str, str]]
    right: dict[str, int]
    asked: dict[str, int]
    fidelity: float
    likeness: float

    @property
    def num_right(self) -> int:
        """Pictures that show everything that was asked for."""
        return sum(not wrong for wrong in self.wrong)


def judge(
    pictures: Tensor, prompts: Sequence[Caption], oracle: Oracle, concept: Concept
) -> Judgement:
    """Compare pictures ``(B, 3, 64, 64)`` in [-1, 1] with what their prompts ask for."""
    with torch.no_grad():
        predictions = oracle(pictures)
    right = {name: seen_right(predictions, prompts)[name] for name in ASKED}
    seen = {name: predictions.values(name) for name in ASKED}
    return Judgement(
        [
            {name: seen[name][i] for name in ASKED if right[name][i] == 0}
            for i in range(len(prompts))
        ],
        {name: int(right[name].nansum()) for name in ASKED},
        {name: int((~right[name].isnan()).sum()) for name in ASKED},
        float(prompt_fidelity(predictions, prompts).mean()),
        float(identity(pictures, concept).mean()),
    )


def verdict_lines(without: Judgement, with_term: Judgement) -> list[str]:
    """The counts of both trainings side by side, most important first."""
    total = len(without.wrong)
    counts = (
        f"{name.capitalize()} as asked: {without.right[name]} of {without.asked[name]} without, "
        f"{with_term.right[name]} of {with_term.asked[name]} with it."
        for name in ASKED
    )
    return [
        f"Everything as asked: {without.num_right} of {total} without the term, "
        f"{with_term.num_right} of {total} with it.",
        *counts,
        f"Likeness to the training pictures: {without.likeness:.0%} without, "
        f"{with_term.likeness:.0%} with it.",
    ]
