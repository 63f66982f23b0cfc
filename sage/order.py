"""Orders of pairs: seeded passes over all of them, and from easy to hard."""

from __future__ import annotations

import numpy as np

DIFFICULTIES = ("auto", "pass_rate", "reference_margin", "length")


class Shuffled:
    """Passes over all pairs, back to back. Each pass is a new seeded permutation."""

    def __init__(self, num_pairs: int, seed: int):
        assert num_pairs > 0
        self.num_pairs, self.seed, self.position = num_pairs, seed, 0
        self.latest: tuple[int, np.ndarray] | None = None  # the pass that was drawn from last

    def draw(self, n: int) -> np.ndarray:
        """Indices of the next n pairs, [n] int64. A draw that spans two passes may name a pair twice."""
        drawn = []
        while n:
            epoch, start = divmod(self.position, self.num_pairs)
            take = self.permutation(epoch)[start : start + n]
            drawn.append(take)
            self.position += len(take)
            n -= len(take)
        return np.concatenate(drawn)

    def permutation(self, epoch: int) -> np.ndarray:
        if self.latest is None or self.latest[0] != epoch:
            self.latest = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_pairs)
        return self.latest[1]


def difficulty_of(
    kind: str, pass_rates: np.ndarray, tokens: np.ndarray, reference_mean: np.ndarray | None = None
) -> np.ndarray | None:
    """The difficulty of n pairs by one of DIFFICULTIES, [n]. None if it needs `reference_mean` and has none.

    pass_rate: 1 minus the share of the model's own answers that were right. reference_margin: minus the
    reference's margin in nats per token. length: tokens of both responses. auto: pass_rate if every pair has
    one, else reference_margin.
    """
    if kind == "length":
        return tokens
    if kind == "pass_rate" or (kind == "auto" and not np.isnan(pass_rates).any()):
        return 1 - pass_rates
    return None if reference_mean is None else -reference_mean


def order_by_difficulty(difficulty: np.ndarray, seed: int) -> np.ndarray:
    """Each pair's rank, [n]: 0 for the easiest and n - 1 for the hardest. A seeded shuffle breaks ties."""
    shuffle = tie_order(len(difficulty), seed)
    ranks = np.empty(len(difficulty), np.int64)
    ranks[shuffle[np.argsort(difficulty[shuffle], kind="stable")]] = np.arange(len(difficulty))
    return ranks


def strata_by_difficulty(difficulty: np.ndarray, strata: int, seed: int) -> np.ndarray:
    """Each pair's stratum, [n] int16: 0 is the easiest quantile of `strata` equal ones, and NaN the hardest.

    The same as `order_by_difficulty(difficulty, seed) * strata // n`, but a sort of values instead of
    indices takes a tenth of the time.
    """
    n, ordered = len(difficulty), np.sort(difficulty)
    if np.isnan(ordered[-1]):  # sorted last
        difficulty = np.where(np.isnan(difficulty), np.inf, difficulty)
        ordered = np.sort(difficulty)
    first = -(-np.arange(1, strata) * n // strata)  # rank of the first pair of each stratum but the easiest
    first = first[first < n]
    lowest, found = ordered[first], np.zeros(n, np.int16)
    for value in lowest:
        found += difficulty >= value
    below = np.searchsorted(ordered, lowest)
    for value in np.unique(lowest[below < first]):  # pairs of equal difficulty on both sides of a cut
        tied, place = np.flatnonzero(difficulty == value), np.empty(n, np.int64)
        place[tie_order(n, seed)] = np.arange(n)
        ranks = np.searchsorted(ordered, value) + np.arange(len(tied))
        found[tied[np.argsort(place[tied])]] = ranks * strata // n
    return found


def tie_order(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 1)).permutation(n)
