"""Run pairs through the policy: micro-batches for the training loop, and forwards over a whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage.data.packing import MicroBatch, collate, micro_tokens, plan
from sage.data.tokens import TokenizedPairs
from sage.model.engine import Engine, Frozen
from sage.model.logps import LogitStats, PairLogps
from sage.util import ranks
from sage.util.progress import track

COSTS: tuple[str, ...] = (
    "forward_pairs",
    "backward_pairs",
    "forward_tokens",
    "backward_tokens",
    "real_tokens",
    "padded_tokens",
    "snr_pairs",
    "snr_tokens",
)


class Work(NamedTuple):
    """One micro-batch of this rank, of n pairs."""

    positions: np.ndarray  # [n] where its pairs stand among the indices that were asked for
    indices: np.ndarray  # [n] their indices in the pair set
    batch: MicroBatch
    weight: float  # 1, or 0 for a pair that only keeps this rank in step with the others
    reports: bool  # whether this rank adds the pairs' numbers to a sum over ranks, which one rank must do
    last: bool


class PairForward:
    """Runs pairs through the policy in micro-batches of at most `budget` tokens per rank, over all ranks,
    counting the cost.

    `layout` is one of `sage.data.packing.LAYOUTS`. With sequence parallelism all ranks of a group take the
    same pairs, and groups take different ones.
    """

    def __init__(self, engine: Engine | Frozen, budget: int, layout: str):
        policy: Any = engine.policy
        self.engine, self.budget, self.layout, self.group = engine, budget, layout, policy.group
        self.groups = ranks.world_size() // self.group.size
        self.reset_costs()

    def reset_costs(self) -> None:
        self.costs: dict[str, float] = dict.fromkeys(COSTS, 0.0)

    def cost_metrics(self) -> dict[str, float]:
        """The cost of training so far over all ranks, as cost/*."""
        costs = {f"cost/{name}": self.costs[name] for name in COSTS[:4]}
        real, padded = self.costs["real_tokens"], self.costs["padded_tokens"]
        return {**costs, "cost/padding_fraction": 1 - real / padded if padded else 0.0}

    def micro_batches(
        self, pairs: TokenizedPairs, indices: np.ndarray, backward: bool = False
    ) -> Iterator[Work]:
        """This rank's share of the pairs. Every rank yields the same number of items."""
        lengths, keys, prefix = pairs.lengths()[indices], pairs.keys(indices), self.prefix(pairs)
        plans = plan(lengths, self.budget * self.group.size, self.groups, self.layout, prefix, keys)
        micro_batches = [members for rank in plans for members in rank if members]
        tokens = [micro_tokens(lengths[m], keys[m], self.layout, prefix) for m in micro_batches]
        self.count(len(indices), tokens, backward)
        mine = plans[ranks.rank() // self.group.size]
        for i, members in enumerate(mine):
            positions = np.array(members or [0])
            batch = collate([pairs[int(j)] for j in indices[positions]], self.layout, prefix)
            batch = batch.to(self.engine.device)
            weight, reports = float(bool(members)), bool(members) and self.group.rank == 0
            yield Work(positions, indices[positions], batch, weight, reports, i == len(mine) - 1)

    def prefix(self, pairs: TokenizedPairs) -> int:
        """Tokens that this layout computes once a row for all prompts."""
        return pairs.common_prefix if self.layout == "shared" else 0

    def count(self, pairs: int, tokens: list[tuple[int, int]], backward: bool) -> None:
        """Add the cost of a plan, over all ranks: tokens of each micro-batch without padding, and with it."""
        real, padded = map(float, np.sum(tokens, axis=0))
        direction = "backward" if backward else "forward"
        self.costs[f"{direction}_pairs"] += pairs
        self.costs[f"{direction}_tokens"] += real
        self.costs["real_tokens"] += real
        self.costs["padded_tokens"] += padded

    @torch.no_grad()
    def all_logps(
        self,
        pairs: TokenizedPairs,
        indices: np.ndarray,
        description: str | None = None,
        model: Callable[[np.ndarray, MicroBatch], PairLogps] | None = None,
    ) -> PairLogps:
        """Forward only: log-probabilities of n pairs in the order of `indices`, the same on every rank and
        on the CPU, [n] each.

        `description` shows a progress bar; `model` (a Reference) replaces the policy.
        """
        return PairLogps(
            *self.gather(
                pairs,
                indices,
                description,
                4,
                lambda w: model(w.indices, w.batch) if model else self.engine(w.batch),
            )
        )

    @torch.no_grad()
    def all_stats(
        self, pairs: TokenizedPairs, indices: np.ndarray, logit: bool = False
    ) -> tuple[PairLogps, LogitStats | None]:
        """`all_logps` of the policy, with LogitStats if `logit` is set."""
        if not logit:
            return self.all_logps(pairs, indices), None

        def forward(work: Work) -> tuple[Tensor, ...]:
            logps, stats = self.engine(work.batch, logit=True)
            return (*logps, *stats)

        values = self.gather(pairs, indices, None, 7, forward)
        return PairLogps(*values[:4]), LogitStats(*values[4:])

    def size(self, work: Work) -> int:
        """Pairs that all ranks finish with this micro-batch, for the progress bar."""
        return len(work.positions) * self.groups

    def gather(
        self,
        pairs: TokenizedPairs,
        indices: np.ndarray,
        description: str | None,
        width: int,
        forward: Callable[[Work], tuple[Tensor, ...]],
    ) -> Tensor:
        """The `width` numbers that `forward` gives for each pair, from all ranks in the order of `indices`:
        [width, n], on the CPU, where all numbers of a whole set are."""
        out = torch.zeros(width, len(indices), device=self.engine.device)
        for work in track(self.micro_batches(pairs, indices), description, len(indices), self.size):
            values = torch.stack(list(forward(work)))
            if work.reports:
                out[:, work.positions] = values
        return ranks.total(out).cpu()
