"""Where the pairs of a run come from, if it has several sources."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from sage.config import DataConfig
from sage.data.pairs import source_of
from sage.data.tokens import TokenizedPairs
from sage.training.hooks import Hook
from sage.training.selection import Choice

if TYPE_CHECKING:
    from sage.training.run import Run


def count_by_source(pairs: TokenizedPairs) -> dict[str, int]:
    return dict(Counter(map(source_of, pairs.pair_ids())))


def doubtful(pairs: TokenizedPairs) -> list[str]:
    """Lines for the user on training pairs that are there twice or contradict each other."""
    repeated, contradicted = pairs.repeated()
    notes = []
    if repeated:
        notes.append(f"warning: {repeated} pairs are equal to an earlier pair")
    if contradicted:
        notes.append(f"warning: {contradicted} pairs have chosen and rejected of another pair exchanged")
    return notes


def by_source(pairs: TokenizedPairs, data: DataConfig, held_out: bool) -> list[str]:
    """Lines for the user; none if the pairs have one source."""
    if not data.sources or (held_out and data.eval_path is not None):
        return []
    found = count_by_source(pairs)
    notes = ["pairs by source: " + ", ".join(f"{found.get(name, 0)} {name}" for name in data.sources)]
    if empty := [name for name in data.sources if name not in found]:
        notes.append(f"warning: no pair of {', '.join(empty)} is left")
    return notes


class Sources(Hook):
    """Each source's share of the pairs that a step trains on, as sources/NAME."""

    def __init__(self, pairs: TokenizedPairs):
        names, self.numbers = np.unique([source_of(name) for name in pairs.pair_ids()], return_inverse=True)
        self.names = names.tolist()

    def before_step(self, run: Run, choice: Choice) -> dict[str, float]:
        step = run.state.step + 1
        if step % run.cfg.log_every and step != run.steps:
            return {}
        counts = np.bincount(self.numbers[choice.indices], minlength=len(self.names))
        shares = (counts / len(choice.indices)).tolist()
        return {f"sources/{name}": share for name, share in zip(self.names, shares, strict=True)}
