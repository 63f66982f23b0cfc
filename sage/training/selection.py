"""Which pairs each step trains on: candidates, their scores, the choice among them, and its log.

It runs on every rank, on numbers that are the same on every rank. So the choice does not depend on how many
ranks there are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sage.curriculum import Curriculum
from sage.data.tokens import TokenizedPairs
from sage.losses import Loss
from sage.model.forward import PairForward
from sage.model.logps import LogitStats
from sage.model.reference import METADATA_KEY, Reference, known_policy, reference_logps
from sage.scorers import PairStats, Scorer, curvature, select, signal
from sage.training.metrics import PER_PAIR
from sage.training.pair_log import PairLog
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.progress import console

U, POLICY_MEAN = PER_PAIR.index("rewards/margins"), PER_PAIR.index("policy_margins")


class Choice(NamedTuple):
    """What one step trains on."""

    indices: np.ndarray  # [batch_size] int64
    objective: Loss  # the loss of these pairs
    candidates: np.ndarray  # what they were chosen from, [m] int64


class Selection:
    """Names the pairs of each step. Its state_dict holds everything that decides the next choices."""

    def __init__(
        self,
        scorer: Scorer,
        curriculum: Curriculum,
        loss: Loss,
        pairs: TokenizedPairs,
        forward: PairForward,
        reference: Reference,
        log: PairLog,
        batch_size: int,
        seed: int,
    ):
        self.scorer, self.curriculum, self.loss, self.log = scorer, curriculum, loss, log
        self.pairs, self.forward, self.reference = pairs, forward, reference
        self.batch_size, self.seed, self.step = batch_size, seed, 0
        self.latest = Choice(np.empty(0, np.int64), loss, np.empty(0, np.int64))
        self.queue = self.latest.indices  # chosen, and not yet trained on
        self.dropped = 0  # candidates without a finite score, so far
        self.numbers: dict[str, float] = {}  # of the latest scoring; empty if the queue was not scored
        self.other_margin = ranks.main_only(lambda: margins_of(scorer, loss, pairs))

    def choose(self, step: int) -> Choice:
        """The pairs of this step. Called once for every step, in order."""
        self.step = step
        self.curriculum.refresh(step, self.stats_of)
        if not len(self.queue):
            self.latest = self.score() if self.scorer.scores_at(step) else self.draw()
            self.queue = self.latest.indices
        indices, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return self.latest._replace(indices=indices)

    def draw(self) -> Choice:
        """A batch of candidates without a score."""
        self.numbers = {}
        candidates = self.curriculum.draw(self.batch_size)
        return Choice(candidates, self.loss, candidates)

    def score(self) -> Choice:
        """Score candidates, and line up the best of them for the next `score_every` steps."""
        scorer, (asked, wanted) = self.scorer, self.scorer.draws(self.batch_size)
        candidates = np.unique(self.curriculum.draw(asked))
        if len(candidates) < wanted:  # a draw that spans two passes may name a pair twice
            candidates = np.union1d(candidates, self.curriculum.draw(asked))
        if len(candidates) < wanted:
            raise UserError(
                f"step {self.step}: the curriculum's pool has only {len(candidates)} different pairs, and "
                f"{wanted} are chosen at a time: lower batch_size or scorer.score_every, or give "
                "the curriculum a larger pool"
            )
        stats = self.stats_of(candidates)
        scores, admitted = scorer(stats), scorer.admitted(stats)
        self.report_broken(candidates[~scores.isfinite().numpy()], len(candidates))
        picked = select(scores, wanted, self.seed + self.step, scorer.noise(scores), admitted)
        if len(picked) < wanted:
            raise UserError(
                f"step {self.step}: only {len(picked)} of {len(candidates)} candidates have a score, and "
                f"{wanted} are needed"
            )
        objective = scorer.objective(self.loss, stats, picked)
        assert type(objective) is type(self.loss), "a scorer changes the loss's options, not its class"
        self.numbers = {
            "selection/candidates": len(candidates),
            "selection/share": wanted / len(candidates),
            "selection/mean_score": scores[scores.isfinite()].mean().item(),
            "selection/mean_score_selected": scores[picked].mean().item(),
            "selection/mean_margin_selected": stats.margin(scorer.margin)[picked].mean().item(),
            "selection/gated_share": 1 - admitted.float().mean().item(),
            "selection/beta": objective.beta,
        }
        if self.log.wants(self.step // scorer.score_every):
            selected = torch.zeros(len(candidates), dtype=torch.bool)
            selected[picked] = True
            self.write(candidates, stats.u, stats.margin("policy_mean"), selected, scores)
        winners = candidates[picked.numpy()]
        passes = [
            np.random.default_rng((self.seed, self.step, i)).permutation(winners) for i in range(scorer.reuse)
        ]
        order = np.concatenate(passes) if scorer.score_every > 1 else winners
        return Choice(order, objective, candidates)

    def stats_of(self, indices: np.ndarray) -> PairStats:
        """The policy's present statistics of these pairs, on the CPU. The curriculum observes them too.

        Costs a forward of each pair. The first step is free under a cached reference, since the policy still
        is the reference.
        """
        reference, logit = reference_logps(self.reference, self.forward, self.pairs, indices), None
        cache = known_policy(self.reference, self.step)
        if cache and (cache.logit or not self.scorer.needs_logit):
            policy = reference
            logit = cache.logit and LogitStats(*(values[torch.from_numpy(indices)] for values in cache.logit))
        else:
            policy, logit = self.forward.all_stats(self.pairs, indices, logit=self.scorer.needs_logit)
        stats = PairStats.of(self.loss, policy, reference, logit)
        if self.other_margin is not None:
            stats.other_margin = self.other_margin[indices]
        self.curriculum.observe(indices, stats.u.numpy(), stats.margin("policy_mean").numpy())
        return stats

    def observe(self, indices: np.ndarray, seen: Tensor) -> None:
        """Note what training saw of the step's n pairs: PER_PAIR from all ranks, [len(PER_PAIR), n].

        The curriculum has seen scored pairs among all candidates. The chosen ones alone would mislead it.
        """
        if self.numbers:
            return
        u, policy_mean = seen[U].cpu(), seen[POLICY_MEAN].cpu()
        self.curriculum.observe(indices, u.numpy(), policy_mean.numpy())
        if self.log.wants(self.step):
            self.write(indices, u, policy_mean, torch.ones(len(indices), dtype=torch.bool))

    def report_broken(self, broken: np.ndarray, candidates: int) -> None:
        """Name and count the pairs whose score is NaN or infinite. `select` passes them over."""
        if not len(broken):
            return
        self.dropped += len(broken)
        names = ", ".join(self.pairs.pair_ids(broken[:5]))
        message = (
            f"step {self.step}: {len(broken)} of {candidates} candidates have no finite score, "
            f"for example {names}"
        )
        if len(broken) > self.scorer.max_nan * candidates:
            raise UserError(
                f"{message}: more than scorer.max_nan={self.scorer.max_nan} of them; look at these pairs, "
                "lower optimizer.lr, or use model.dtype=float32"
            )
        console.print(f"{message}; dropped")

    def write(
        self,
        indices: np.ndarray,
        u: Tensor,
        policy_mean: Tensor,
        selected: Tensor,
        scores: Tensor | None = None,
    ) -> None:
        """Log n pairs, with tensors [n]."""
        scored = (
            {} if scores is None else {"score": scores.numpy(), "ranked_by": [self.scorer.ranked_by] * len(u)}
        )
        self.log.add(
            self.step + 1,
            pair_id=self.pairs.pair_ids(indices),
            stratum=self.curriculum.strata_of(indices),
            margin=u.numpy(),
            policy_mean=policy_mean.numpy(),
            signal=signal(u, self.loss.beta).numpy(),
            curvature=curvature(u, self.loss.beta).numpy(),
            selected=selected.numpy(),
            **scored,
        )

    def metrics(self) -> dict[str, float]:
        return {**self.numbers, "selection/dropped_nan": float(self.dropped), **self.curriculum.metrics()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "candidates": torch.from_numpy(self.latest.candidates),
            "objective": asdict(self.latest.objective),
            "queue": torch.from_numpy(self.queue),
            "numbers": self.numbers,
            "dropped": self.dropped,
            "curriculum": self.curriculum.state_dict(),
            "scorer": self.scorer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        objective = replace(self.loss, **state["objective"])
        self.queue = state["queue"].numpy()
        self.latest = Choice(self.queue, objective, state["candidates"].numpy())
        self.numbers, self.dropped = state["numbers"], state["dropped"]
        self.curriculum.load_state_dict(state["curriculum"])
        self.scorer.load_state_dict(state["scorer"])


def margins_of(scorer: Scorer, loss: Loss, pairs: TokenizedPairs) -> Tensor | None:
    """The margins of the model that the scorer compares with, [pairs] float32; None if it has none.

    Raises:
        UserError: see `read_margins`; or the scorer compares losses, and the margins are those of another
            one.
    """
    if scorer.margins_from is None:
        return None
    margins = read_margins(scorer.margins_from, pairs)
    metadata = pq.read_table(scorer.margins_from, columns=[]).schema.metadata or {}
    there = json.loads(metadata.get(METADATA_KEY.encode(), b"{}")).get("loss")
    if not scorer.compares_losses or there is None:
        return margins
    name = f"{type(loss).__module__}.{type(loss).__qualname__}"
    if there["_target_"] != name:
        raise UserError(
            f"scorer.margins_from={scorer.margins_from}: its margins are those of {there['_target_']}, and "
            f"this run's loss is {name}: score the pairs with the same loss"
        )
    if (beta := there.get("beta", loss.beta)) != loss.beta:
        console.print(
            f"warning: the margins of scorer.margins_from={scorer.margins_from} are those of loss.beta="
            f"{beta}, and this run has loss.beta={loss.beta}",
            markup=False,
        )
    return margins


def read_margins(file: str, pairs: TokenizedPairs) -> Tensor:
    """The column `margin` of a Parquet file or folder, in the order of `pairs`: [n] float32.

    A pair is found by its texts where the file has their hashes, as `sage score-dataset` writes them. So
    neither another order nor other ids matter. Elsewhere it is found by its pair_id.

    Raises:
        UserError: it is no such file, a margin is no number, an id occurs twice, or a pair is not in it.
    """
    title = f"scorer.margins_from={file}"
    try:
        table = pq.read_table(file)
        by_text = "text_hash" in table.column_names
        key = "text_hash" if by_text else "pair_id"
        names, margins = table[key].to_pylist(), table["margin"].to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError) as e:
        raise UserError(f"{title}: not Parquet with columns pair_id and margin: {e}") from e
    found: dict[str | int, float] = {}
    for name, margin in zip(names, margins, strict=True):
        if not isinstance(margin, int | float):
            raise UserError(f"{title}: the margin of pair {name!r} is {margin!r}, no number")
        if name in found and not by_text:
            raise UserError(f"{title}: pair {name!r} occurs twice: keep one margin for each pair")
        found[name] = margin
    ids = pairs.pair_ids().tolist()
    wanted = pairs.text_hashes().tolist() if by_text else ids
    if missing := [pair_id for pair_id, name in zip(ids, wanted, strict=True) if name not in found]:
        raise UserError(
            f"{title}: {len(missing)} of {len(ids)} training pairs are not in it, for example "
            f"{missing[0]!r}: it was made from other data"
        )
    if len({found[name] for name in wanted}) == 1 < len(wanted):
        raise UserError(
            f"{title}: all margins are {found[wanted[0]]:g}, so they rank nothing. A `sage score-dataset` "
            "without reference_model=MODEL measures a model against itself: give it one"
        )
    return torch.tensor([found[name] for name in wanted], dtype=torch.float32)
