"""Figures with confidence intervals: of a proportion (Wilson), of a mean (bootstrap); pass@k and win rates.

All intervals are at 95 %. They say how the figure would scatter with other prompts, and nothing of other training runs.
"""

from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

Z = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % on either side."""
RESAMPLES = 2000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


def proportion(successes: int, n: int) -> Estimate:
    """successes / n with Wilson's score interval (Wilson, 1927), which stays within [0, 1] and has a width at 0 and 1 too.

    centre = (p + z²/2n) / (1 + z²/n);  half width = z √(p (1 - p) / n + z²/4n²) / (1 + z²/n)
    """
    p, inflation = successes / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / inflation
    half = Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / inflation
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: np.ndarray, seed: int) -> Estimate:
    """The mean, with the 2.5 % and 97.5 % quantiles of the means of RESAMPLES samples drawn with replacement (Efron, 1979).

    `values` (n,) must be independent: one for each prompt.
    """
    draws = np.random.default_rng(seed)
    means = [float(values[draws.integers(0, len(values), len(values))].mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n samples of which so many are correct, that one of k is: 1 - C(n - correct, k) / C(n, k) (arXiv:2107.03374)."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, found {n}")
    return 1 - comb(n - correct, k) / comb(n, k)


def wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each prompt 1 where `scores` is higher, 0 where the other is, 0.5 for a tie."""
    return np.where(scores > others, 1.0, np.where(scores < others, 0.0, 0.5))
