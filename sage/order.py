"""Orders of pairs: seeded passes over all of them, and from easy to hard."""

from __future__ import annotations

import numpy as np

DIFFICULTIES = ("auto", "pass_rate", "reference_margin", "length")


class Shuffled:
    """Passes over all pairs, back to back. Each pass is a new seeded permutation."""

    def __init__(self, num_pairs: int, seed: int):
        assert num_pairs > 0
        self.num_pairs, self.seed, self.position = num_pairs, seed, 0

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
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_pairs)


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
    shuffle = np.random.default_rng((seed, 1)).permutation(len(difficulty))
    ranks = np.empty(len(difficulty), np.int64)
    ranks[shuffle[np.argsort(difficulty[shuffle], kind="stable")]] = np.arange(len(difficulty))
    return ranks
