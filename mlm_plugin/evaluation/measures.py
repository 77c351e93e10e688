"""The measures as formulas: features in, numbers out.

Knows no models, files or prompts. Shapes: N and M pictures or prompts, D width of the features.
Features need not be normalized; cos(a, b) = a.b / (|a| |b|).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Mean",
    "best_at_level",
    "custom_concept_score",
    "intra_distance",
    "mean_cosine_to",
    "mean_with_interval",
    "paired_cosine",
    "sign_flip_p_value",
    "student_t_quantile",
]

NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %
NUM_FLIPS = 10_000


class Mean(NamedTuple):
    """A mean, half the width of its 95 % interval (None below two values), and the count."""

    mean: float
    interval: float | None
    n: int


def paired_cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """``cos(a_i, b_i)``, ``(N,)``: row by row.

    CLIP-T with a picture's features and those of its prompt; drift with the states of two encoders.

    Source: CLIP-T of DreamBooth (arXiv 2208.12242) section 4.1; raw cosine, not scaled.
    """
    return F.cosine_similarity(a_ND.float(), b_ND.float(), dim=-1)


def mean_cosine_to(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """``1/M sum_j cos(a_i, b_j)``, ``(N,)``: mean similarity of each picture to a set.

    CLIP-I and DINO with the features of generated pictures and of photos; the mean over i is the
    mean over all pairs.

    Source: DreamBooth (arXiv 2208.12242) section 4.1, "average pairwise cosine similarity".
    """
    a_ND, b_MD = F.normalize(a_ND.float(), dim=-1), F.normalize(b_MD.float(), dim=-1)
    return a_ND @ b_MD.mean(dim=0)


def intra_distance(a_ND: Tensor) -> float | None:
    """``2 / (N (N - 1)) sum_{i<j} (1 - cos(a_i, a_j))``; None for fewer than two rows.

    Diversity for the pictures of one prompt (0: all the same); the spread of prompts for their
    pooled states (small: the prompts have collapsed).

    Source: diversity after DreamBooth's DIV (supplement), which uses LPIPS instead of cosines;
    the spread of prompts after "semantic collapse" (Embedding-Adjustment), intra-set distance.
    """
    n = len(a_ND)
    if n < 2:
        return None
    a_ND = F.normalize(a_ND.double(), dim=-1)
    off_diagonal = (a_ND @ a_ND.T).sum() - a_ND.square().sum()
    return 1 - off_diagonal.item() / (n * (n - 1))


def custom_concept_score(cosine: float) -> float:
    """``2.5 max(cos, 0)``: CLIP-T as CustomConcept101 writes it.

    Source: CLIPScore (arXiv 2104.08718); adobe-research/custom-diffusion customconcept101.
    """
    return 2.5 * max(cosine, 0.0)


def mean_with_interval(values: Tensor) -> Mean:
    """``mean +- t s / sqrt(n)``, the 95 % interval by Student's distribution.

    Args:
        values: ``(n,)`` independent values: one per prompt, not one per picture, as pictures of the
            same prompt are alike.
    """
    values, n = values.double(), len(values)
    assert n > 0, "the mean of nothing"
    mean = values.mean().item()
    if n < 2:
        return Mean(mean, None, n)
    half = student_t_quantile(n - 1) * values.std().item() / math.sqrt(n)
    return Mean(mean, half, n)


def student_t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's distribution; error below 1 % from three degrees on.

    Exact for one and two degrees of freedom, else the expansion at the normal quantile z:
    ``z + (z^3 + z)/4df + (5z^5 + 16z^3 + 3z)/96df^2 + (3z^7 + 19z^5 + 17z^3 - 15z)/384df^3``.

    Source: Abramowitz and Stegun 26.7.5.
    """
    if df == 1:
        return math.tan(math.pi * 0.475)
    if df == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z = NORMAL_QUANTILE
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


def sign_flip_p_value(differences: Tensor, *, seed: int = 0) -> float:
    """Probability of a mean at least as far from 0 if the sign of each difference were random.

    Two-sided. Up to n = 13 exact, over all 2^n signs s: ``#{|mean(s d)| >= |mean(d)|} / 2^n``.
    Else ``(1 + #{...}) / (1 + R)`` over R = 10 000 random s. The smallest possible value is
    2 / 2^n: 0.25 for three differences, 0.03 for six.

    Args:
        differences: ``(n,)``, independent: the same prompt and noise, or the same subject, under
            two models.
        seed: seed of the random signs.

    Source: the paired randomization test (Fisher 1935); Phipson and Smyth 2010 for the 1.
    """
    d_n = differences.double()
    n = len(d_n)
    is_exact = 2**n <= NUM_FLIPS
    if is_exact:
        bits_Rn = torch.arange(2**n)[:, None] >> torch.arange(n) & 1
    else:
        generator = torch.Generator().manual_seed(seed)
        bits_Rn = torch.randint(0, 2, (NUM_FLIPS, n), generator=generator)
    sums_R = (bits_Rn.double() * 2 - 1) @ d_n
    num_reached = int((sums_R.abs() >= d_n.sum().abs() - 1e-12).sum())
    return num_reached / 2**n if is_exact else (1 + num_reached) / (1 + NUM_FLIPS)


def best_at_level(level: float, points: Sequence[tuple[float, float]]) -> float:
    """The best second measure among models whose first is at least ``level``.

    Linear between the Pareto-optimal points. Below their lowest first measure it is their highest
    second one; above the highest it is ``nan``.

    Args:
        level: of the first measure, such as likeness.
        points: both measures of each model, such as likeness and prompt fidelity; higher is better.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    xs, ys = zip(*reversed(front), strict=True)
    return float(np.interp(level, xs, ys, right=np.nan))
