"""Which pairs are candidates now.

A curriculum is a dataclass whose fields are its options. It is built from a Setting, which holds what is
known of the pairs before the first step. Every step calls it: `refresh` may redraw its pool, `draw` names
candidates, and `observe` reports the margins that training and scoring saw. Its whole state is one dict of
plain data that goes into the checkpoint. It behaves the same on every rank. The constants are ours.
docs/sage.md gives the reasons.
"""

# No `from __future__ import annotations`: under Python 3.10 OmegaConf cannot resolve an InitVar that is a
# string.
import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from sage.order import Shuffled, strata_by_difficulty
from sage.scorers import MARGINS, PairStats, margin_of_kind
from sage.util.errors import UserError
from sage.util.progress import console

MOST_STRATA = 1000  # a redraw looks at all pairs once for each
# The policy's present statistics of these pairs. It costs a forward of each.
StatsOf = Callable[[np.ndarray], PairStats]


class Setting(NamedTuple):
    """What a curriculum knows before the first step, for n pairs."""

    pass_rates: np.ndarray  # [n] float64, NaN if unknown
    tokens: np.ndarray  # [n] int64, of both responses
    steps: int  # of the whole run
    candidates: int  # pairs that one draw asks for, which may be more than n
    trained: int  # how many of them will be trained on, fewer than n
    interval: int  # steps from draw to draw
    seed: int


@dataclass
class Curriculum:
    """No curriculum: every pair is a candidate, in seeded random order. The others subclass it."""

    setting: InitVar[Setting]
    uses_steps: ClassVar[bool] = False  # Setting.steps; then a run that has begun cannot get more steps

    def __post_init__(self, setting: Setting) -> None:
        self.size, self.seed = len(setting.tokens), setting.seed
        self.order = Shuffled(self.size, self.seed)

    def refresh(self, step: int, stats_of: StatsOf) -> None:
        """Called before every step."""

    def draw(self, n: int) -> np.ndarray:
        """Indices of the next n candidates; a pair may be named twice.

        Two draws in a row must name at least `Setting.trained` different pairs.
        """
        return self.order.draw(n)

    def observe(self, indices: np.ndarray, u: np.ndarray, policy_mean: np.ndarray) -> None:
        """Learn the margins that the policy just gave n pairs: u, and in nats per token, [n] each."""

    def strata_of(self, indices: np.ndarray) -> np.ndarray:
        """The stratum of each pair, for the log, [n]."""
        return np.zeros(len(indices), np.int64)

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.position = state["position"]


@dataclass
class SageCurriculum(Curriculum):
    """Pools that lean towards what the policy has wrong, so that fewer candidates need a score.

    All pairs are split into `strata` equal quantiles of the margin that each had when it was last seen: under
    the reference before the first step, later in scoring, or in training where nothing is scored. This costs
    no pass of its own. The competence of a stratum is the share of its pairs that turned out to be right when
    they were seen again. Every `every` steps the strata are cut anew and a pool is drawn. It holds as many
    pairs as will be candidates until the next refresh, but at most half of all. The share `floor` of it is
    divided evenly, and the rest in proportion to 1 - competence. `margin` is the margin that all this looks
    at: implicit_reward, policy_mean or mixed.
    """

    every: int = 10
    strata: int = 8
    floor: float = 0.3
    margin: str = "policy_mean"
    PRIOR: ClassVar[int] = 8  # pairs that the competence before a refresh counts for
    STATE: ClassVar = ("latest", "stratum", "competence", "right", "seen", "quota", "members")  # arrays

    def __post_init__(self, setting: Setting) -> None:
        super().__post_init__(setting)
        for name in ("every", "strata"):
            if not getattr(self, name) > 0:
                raise UserError(f"curriculum.{name}={getattr(self, name)}: must be positive")
        if self.strata > MOST_STRATA:
            raise UserError(f"curriculum.strata={self.strata}: must be at most {MOST_STRATA}")
        if not 0 <= self.floor <= 1:
            raise UserError(f"curriculum.floor={self.floor}: must lie between 0 and 1")
        if self.margin not in MARGINS:
            raise UserError(f"curriculum.margin={self.margin}: must be one of {', '.join(MARGINS)}")
        wanted = setting.candidates * math.ceil(self.every / setting.interval)
        self.pool_size = min(self.size, max(setting.candidates, min(wanted, self.size // 2)))
        if self.size < 2 * self.strata:
            self.strata = max(self.size // 2, 1)
            console.print(f"with only {self.size} pairs, the curriculum uses {self.strata} strata")
        self.refreshed = -1  # the step of the latest refresh
        self.latest = np.full(self.size, np.nan)  # the margin when the pair was last seen
        self.stratum = np.zeros(self.size, np.int16)  # 0 is the easiest
        self.competence = np.full(self.strata, np.nan)
        self.seen = np.zeros(self.strata)  # pairs seen since the refresh
        self.right = np.zeros(self.strata)  # those of them that were right; a tie is half right
        self.quota = np.zeros(self.strata, np.int64)
        self.members = np.empty(0, np.int64)  # the pool

    def refresh(self, step: int, stats_of: StatsOf) -> None:
        begun = self.refreshed >= 0
        if begun and step < self.refreshed + self.every:
            return
        if not begun:
            self.latest = stats_of(np.arange(self.size)).margin(self.margin).double().numpy()
            self.cut()
            self.count(np.arange(self.size), self.latest)
            self.competence = self.right / np.maximum(self.seen, 1)
        else:
            self.competence = (self.right + self.PRIOR * self.competence) / (self.seen + self.PRIOR)
            self.cut()
        self.right, self.seen = np.zeros(self.strata), np.zeros(self.strata)
        self.refreshed = step
        wrong = np.maximum(1 - self.competence, 1e-3)
        shares = self.floor / self.strata + (1 - self.floor) * wrong / wrong.sum()
        sizes = np.bincount(self.stratum, minlength=self.strata)
        self.quota = allot(shares, sizes, self.pool_size)
        rng = np.random.default_rng((self.seed, 4, step))
        strata = np.split(np.argsort(self.stratum, kind="stable"), np.cumsum(sizes)[:-1])
        chosen = [rng.choice(s, quota, replace=False) for s, quota in zip(strata, self.quota, strict=True)]
        self.members = np.concatenate(chosen)
        self.order = Shuffled(len(self.members), self.seed + step)

    def cut(self) -> None:
        """Split the pairs into strata by their latest margins. Those without a finite one count as easy."""
        difficulty = np.where(np.isfinite(self.latest), -self.latest, -np.inf)
        self.stratum = strata_by_difficulty(difficulty, self.strata, self.seed)

    def count(self, indices: np.ndarray, margins: np.ndarray) -> None:
        finite = np.isfinite(margins)
        strata = self.stratum[indices[finite]]
        np.add.at(self.right, strata, (np.sign(margins[finite]) + 1) / 2)
        np.add.at(self.seen, strata, 1)

    def draw(self, n: int) -> np.ndarray:
        return self.members[self.order.draw(n)]

    def observe(self, indices: np.ndarray, u: np.ndarray, policy_mean: np.ndarray) -> None:
        if self.refreshed < 0:
            return  # the pass over all pairs before the first pool, which `refresh` reads itself
        self.latest[indices] = margins = margin_of_kind(self.margin, u, policy_mean)
        self.count(indices, margins)

    def strata_of(self, indices: np.ndarray) -> np.ndarray:
        return self.stratum[indices]

    def metrics(self) -> dict[str, float]:
        numbers = {"curriculum/pool_size": float(len(self.members))}
        for k in range(self.strata):
            numbers[f"curriculum/competence_{k}"] = float(self.competence[k])
            numbers[f"curriculum/quota_{k}"] = float(self.quota[k])
        return numbers

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in self.STATE}
        return {**super().state_dict(), **arrays, "refreshed": self.refreshed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name].numpy().astype(getattr(self, name).dtype))
        self.refreshed = state["refreshed"]
        self.order = Shuffled(len(self.members), self.seed + self.refreshed)
        super().load_state_dict(state)


def allot(shares: np.ndarray, available: np.ndarray, total: int) -> np.ndarray:
    """Whole quotas [k] near shares * total. If a stratum has too few pairs, the others make up for it."""
    quota = np.zeros(len(shares), np.int64)
    while (left := min(total, available.sum()) - quota.sum()) > 0:
        wanted = np.where(quota < available, np.maximum(shares, 1e-9), 0.0)
        more = np.floor(left * wanted / wanted.sum()).astype(np.int64)
        if not more.any():
            more[wanted.argmax()] = 1
        quota = np.minimum(quota + more, available)
    return quota
