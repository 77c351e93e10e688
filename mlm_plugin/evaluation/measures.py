"""The measures as formulas: features in, numbers out.

Knows no models, files or prompts. Shapes: N and M pictures or prompts, D width of the features.
Features need not be normalized; cos(a, b) = a.b / (|a| |b|).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Mean",
    "custom_concept_score",
    "intra_distance",
    "matched_difference",
    "mean_cosine_to",
    "mean_with_interval",
    "paired_cosine",
    "pooled",
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


def pooled(curve_K2: np.ndarray) -> np.ndarray:
    """The curve with points pooled until the first measure rises from each to the next, ``(P, 2)``.

    Args:
        curve_K2: two measures at each evaluation of a training, in its order, such as likeness
            and prompt fidelity.

    Source: pool adjacent violators (Ayer et al. 1955), applied to both coordinates.
    """
    blocks: list[tuple[np.ndarray, int]] = []
    for point in curve_K2:
        mean, count = point, 1
        while blocks and blocks[-1][0][0] >= mean[0]:
            before, num_before = blocks.pop()
            mean = (num_before * before + count * mean) / (num_before + count)
            count += num_before
        blocks.append((mean, count))
    return np.stack([mean for mean, _count in blocks])


def matched_difference(ours_K2: np.ndarray, theirs_K2: np.ndarray) -> float:
    """The second measure of one curve over another at the lower of the first ones that they reach.

    Both are pooled and linear between their points, and exchanging them changes the sign alone.
    The curve that goes further is read between its points. Where it bends down, the straight line
    lies below it, so that the rule favours the curve that ends at less of the first measure.
    """
    ours_P2, theirs_P2 = pooled(ours_K2), pooled(theirs_K2)
    level = min(ours_P2[-1, 0], theirs_P2[-1, 0])
    return float(np.interp(level, *ours_P2.T) - np.interp(level, *theirs_P2.T))
