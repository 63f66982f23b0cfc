"""Which candidates deserve a gradient: a score per pair, and the global selection.

A scorer is a dataclass with `candidates_per_pair` (how many candidates are scored forward-only for every pair that is
trained on; 1 means no scoring pass at all) and a call that maps PairStats to scores. To add one, write the class here
or anywhere importable and name it by `_target_` in one YAML under conf/scorer/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sage.losses import PairLogps


@dataclass
class PairStats:
    """What a scorer may look at, for n candidate pairs: their log-probabilities and the margin u = beta * m, [n]."""

    policy: PairLogps
    reference: PairLogps
    margin: Tensor


class Scorer(Protocol):
    candidates_per_pair: int

    def __call__(self, stats: PairStats) -> Tensor:
        """Score per candidate, [n] float32: the highest are trained on."""
        ...


@dataclass
class Uniform:
    """Every candidate deserves the same: ordinary DPO, with no scoring pass."""

    candidates_per_pair: int = 1

    def __post_init__(self) -> None:
        if self.candidates_per_pair != 1:
            raise ValueError("scorer.candidates_per_pair: uniform scores nothing, so only 1 makes sense")

    def __call__(self, stats: PairStats) -> Tensor:
        return torch.zeros_like(stats.margin)


def select(scores: Tensor, k: int, seed: int) -> Tensor:
    """Positions of the k highest of n scores, in candidate order: [k] int64.

    Ties are broken by a seeded shuffle, never by the order of the dataset. The scores are the global ones, so every
    rank finds the same answer.
    """
    shuffle = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    ranked = torch.argsort(scores[shuffle], descending=True, stable=True)
    return shuffle[ranked[:k]].sort().values
