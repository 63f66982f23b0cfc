"""Which pairs are candidates now.

A curriculum is built with the number of training pairs and the seed; `draw(n)` names the next n candidates, and its
whole state is a small dict that goes into the checkpoint. It runs alike on every rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Curriculum(Protocol):
    def draw(self, n: int) -> np.ndarray:
        """Indices of the next n candidate pairs, [n] int64."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Shuffled:
    """No curriculum: passes over all pairs, each pass a new seeded permutation, back to back."""

    def __init__(self, num_pairs: int, seed: int):
        self.num_pairs, self.seed, self.position = num_pairs, seed, 0

    def draw(self, n: int) -> np.ndarray:
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

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
