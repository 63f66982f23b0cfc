"""Accuracy of verified attempts, with 95% intervals. Plain numbers in, plain numbers out.

"Right" is a boolean per attempt; problems are rows, samples columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import comb, sqrt

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


def wilson(right: float, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927). It holds for small samples too, and stays within [0, 1]."""
    p, z2 = right / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile interval of the mean, from resampling the problems with replacement."""
    rng, data = np.random.default_rng(0), np.asarray(values, dtype=np.float64)
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def difference_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of paired differences, each in [-1, 1].

    By `bootstrap`, unless all are equal, which it cannot doubt. Then it is that of Bonett and Price (2012)
    for paired shares, which adds one gain and one loss.
    """
    if len({*differences}) > 1:
        return bootstrap(differences)
    n, all_of_them = len(differences) + 2, sum(differences)
    gained, lost = (max(all_of_them, 0) + 1) / n, (max(-all_of_them, 0) + 1) / n
    middle = gained - lost
    half = Z95 * sqrt((gained + lost - middle**2) / n)
    return max(middle - half, -1.0), min(middle + half, 1.0)


def pass_at(k: int, samples: int, right: int) -> float:
    """Chance that one of k samples is right, if they are drawn without replacement.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374).
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right. In a tie, the first to appear wins. None does not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = max(votes, key=lambda answer: votes[answer])  # the first to appear wins a tie
    return right[list(answers).index(winner)]


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value of McNemar's test: losses and gains are equally likely under the null."""
    total = lost + gained
    tail = sum(comb(total, i) for i in range(min(lost, gained) + 1)) / 2**total
    return min(1.0, 2 * tail)


def by_group(
    groups: Sequence[str | None], values: Sequence[float], of: Callable[[Sequence[float]], dict]
) -> dict:
    """`of` applied to the values of each group, in sorted order. Empty if the data has no groups."""
    names = sorted({group for group in groups if group is not None})
    return {name: of([v for v, g in zip(values, groups, strict=True) if g == name]) for name in names}
