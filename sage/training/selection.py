"""The one place where pairs are chosen: the curriculum's candidates, their scores, the global choice, what is logged.

It runs alike on every rank, from numbers that are the same on every rank, so the choice does not depend on how many
ranks there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sage.curriculum import Curriculum
from sage.data.tokens import TokenizedPairs
from sage.losses import Loss
from sage.model.forward import PairForward
from sage.model.logps import LogitStats, PairLogps
from sage.model.reference import Cached, Reference, ask
from sage.scorers import PairStats, Scorer, Uniform, curvature, select, signal
from sage.training.metrics import PER_PAIR
from sage.training.samples import SampleLog
from sage.util.errors import UserError
from sage.util.progress import console

REWARDS, MEANS = PER_PAIR.index("rewards/margins"), PER_PAIR.index("policy_margins")


class Selection:
    """Names the pairs of each step. What decides the next choices is in its state_dict."""

    def __init__(
        self,
        scorer: Scorer | Uniform,
        curriculum: Curriculum,
        loss: Loss,
        pairs: TokenizedPairs,
        forward: PairForward,
        reference: Reference,
        batch_size: int,
        seed: int,
    ):
        self.scorer, self.curriculum, self.base_loss, self.loss = scorer, curriculum, loss, loss
        self.pairs, self.pair_ids, self.forward, self.reference = pairs, pairs.pair_ids(), forward, reference
        self.batch_size, self.seed, self.step = batch_size, seed, 0
        self.candidates = np.empty(0, np.int64)  # those of the latest choice
        self.queue = self.candidates  # chosen, and not yet trained on
        self.dropped = 0  # candidates whose score was NaN, so far
        self.numbers: dict[str, float] = {}  # of the latest scoring
        self.other_margin = None
        if isinstance(scorer, Scorer) and scorer.margins_from:
            self.other_margin = read_margins(scorer.margins_from, self.pair_ids)

    def batch(self, step: int, log: SampleLog) -> np.ndarray:
        """Indices of the pairs that this step trains on, [batch_size] int64; none when the pool has run dry.

        `self.loss` is their objective.
        """
        self.step, self.loss = step, self.base_loss
        self.curriculum.refresh(step, self.ask)
        scorer, size = self.scorer, self.batch_size
        if not len(self.queue):
            if isinstance(scorer, Uniform) or step < scorer.warmup_steps:
                self.numbers = {}
                self.queue = self.candidates = self.curriculum.draw(size)
            else:
                self.queue = self.score(scorer, log)
            if not len(self.queue) and step == 0:
                raise UserError(
                    "the curriculum finds every pair mastered before the first step: raise its mastered_above"
                )
        chosen, self.queue = self.queue[:size], self.queue[size:]
        return chosen

    def score(self, scorer: Scorer, log: SampleLog) -> np.ndarray:
        """Score candidates and line up the best of them for the next `score_every` steps."""
        asked, wanted = draws(scorer, self.batch_size)
        candidates = np.unique(self.curriculum.draw(asked))
        while 0 < len(candidates) < wanted:  # a draw that straddles two passes may name a pair twice
            candidates = np.union1d(candidates, self.curriculum.draw(asked))
        self.candidates = candidates
        if not len(candidates):
            return candidates
        stats = self.ask(candidates)
        scores, admitted = scorer(stats), scorer.admitted(stats)
        self.drop(scorer, candidates[~scores.isfinite().numpy()], len(candidates))
        picked = select(scores, wanted, self.seed + self.step, scorer.noise(scores), admitted)
        if len(picked) < wanted:
            raise UserError(
                f"step {self.step}: only {len(picked)} of {len(candidates)} candidates have a score, {wanted} are needed"
            )
        self.loss = scorer.objective(self.base_loss, stats, picked)
        selected = torch.zeros(len(candidates), dtype=torch.bool)
        selected[picked] = True
        margin = stats.margin_by(scorer.margin)
        self.numbers = {
            "selection/candidates": len(candidates),
            "selection/mean_score": scores[scores.isfinite()].mean().item(),
            "selection/mean_score_selected": scores[picked].mean().item(),
            "selection/mean_margin_selected": margin[picked].mean().item(),
            "selection/gated_share": 1 - admitted.float().mean().item(),
            "selection/beta": self.loss.beta,
        }
        if log.wants(self.step // scorer.score_every):
            self.write(log, candidates, stats.beta, margin, scores, selected)
        winners = candidates[picked.numpy()]
        passes = [
            np.random.default_rng((self.seed, self.step, i)).permutation(winners) for i in range(scorer.reuse)
        ]
        return np.concatenate(passes) if scorer.score_every > 1 else winners

    def ask(self, indices: np.ndarray) -> PairStats:
        """What the policy makes of these pairs, on the CPU; the curriculum hears it too.

        Costs a forward of each, but for the first step under a cached reference: the policy still is the reference.
        """
        needs_logit = isinstance(self.scorer, Scorer) and self.scorer.needs_logit
        reference, logit = ask(self.reference, self.forward, self.pairs, indices), None
        cache = self.reference if self.step == 0 and isinstance(self.reference, Cached) else None
        if cache and (cache.logit or not needs_logit):
            policy = reference
            logit = cache.logit and LogitStats(*(values[torch.from_numpy(indices)] for values in cache.logit))
        else:
            policy, logit = self.forward.all_stats(self.pairs, indices, logit=needs_logit)
        policy, reference = PairLogps(*map(Tensor.cpu, policy)), PairLogps(*map(Tensor.cpu, reference))
        logit = logit and LogitStats(*map(Tensor.cpu, logit))
        stats = PairStats.of(self.base_loss, policy, reference, logit)
        if self.other_margin is not None:
            stats.other_margin = self.other_margin[indices]
        self.curriculum.observe(indices, stats.margin.numpy(), stats.margin_by("policy_mean").numpy())
        return stats

    def observe(self, chosen: np.ndarray, seen: Tensor, log: SampleLog) -> None:
        """Take note of what training saw of this step's pairs: PER_PAIR numbers, [len(PER_PAIR), n] from all ranks."""
        rewards, means = seen[REWARDS].cpu(), seen[MEANS].cpu()
        self.curriculum.observe(chosen, rewards.numpy(), means.numpy())
        if not self.numbers and log.wants(self.step):
            self.write(
                log, chosen, self.base_loss.beta, rewards, None, torch.ones(len(chosen), dtype=torch.bool)
            )

    def drop(self, scorer: Scorer, broken: np.ndarray, candidates: int) -> None:
        """Name and count the pairs whose score is NaN or infinite; `select` passes them over."""
        if not len(broken):
            return
        self.dropped += len(broken)
        names = ", ".join(self.pair_ids[broken[:5]])
        message = f"step {self.step}: {len(broken)} of {candidates} candidates have no finite score, for example {names}"
        if len(broken) > scorer.max_nan * candidates:
            raise UserError(
                f"{message}: more than scorer.max_nan={scorer.max_nan} of them; look at these pairs, lower optimizer.lr, "
                "or use model.dtype=float32"
            )
        console.print(f"{message}; dropped")

    def write(
        self,
        log: SampleLog,
        indices: np.ndarray,
        beta: float,
        u: Tensor,
        scores: Tensor | None,
        selected: Tensor,
    ) -> None:
        columns = {} if scores is None else {"score": scores.numpy()}
        log.add(
            self.step + 1,
            pair_id=self.pair_ids[indices],
            stratum=self.curriculum.strata_of(indices),
            margin=u.numpy(),
            signal=signal(u, beta).numpy(),
            curvature=curvature(u, beta).numpy(),
            selected=selected.numpy(),
            **columns,
        )

    def metrics(self) -> dict[str, float]:
        return {**self.numbers, "selection/dropped_nan": float(self.dropped), **self.curriculum.metrics()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "candidates": torch.from_numpy(self.candidates),
            "queue": torch.from_numpy(self.queue),
            "dropped": self.dropped,
            "curriculum": self.curriculum.state_dict(),
            "scorer": self.scorer.state_dict() if isinstance(self.scorer, Scorer) else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.candidates, self.queue = state["candidates"].numpy(), state["queue"].numpy()
        self.dropped = state["dropped"]
        self.curriculum.load_state_dict(state["curriculum"])
        if isinstance(self.scorer, Scorer):
            self.scorer.load_state_dict(state["scorer"])


def draws(scorer: Scorer | Uniform, batch_size: int) -> tuple[int, int]:
    """How many candidates are asked for at a time, and how many distinct ones of them are wanted."""
    wanted = batch_size * scorer.score_every // scorer.reuse
    return round(scorer.candidates_per_pair * wanted), wanted


def read_margins(file: str, pair_ids: np.ndarray) -> Tensor:
    """The column `margin` of a Parquet file or folder, in the order of `pair_ids`: [n] float32."""
    try:
        columns = pq.read_table(file, columns=["pair_id", "margin"]).to_pydict()
    except (OSError, pa.ArrowInvalid, KeyError) as e:
        raise UserError(
            f"scorer.margins_from={file}: not Parquet with columns pair_id and margin: {e}"
        ) from e
    found = dict(zip(columns["pair_id"], columns["margin"], strict=True))
    if missing := [name for name in pair_ids if name not in found]:
        raise UserError(
            f"scorer.margins_from={file}: {len(missing)} of {len(pair_ids)} training pairs are not in it, for example "
            f"{missing[0]!r}: it was made from other data"
        )
    return torch.tensor([found[name] for name in pair_ids], dtype=torch.float32)
