"""Curricula that know each pair's difficulty before the run and ignore the policy: the usual baselines."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from sage.curriculum import Curriculum, Setting, StatsOf
from sage.order import DIFFICULTIES, Shuffled, difficulty_of, order_by_difficulty
from sage.scorers import mean_margin
from sage.util.errors import UserError


@dataclass
class ByDifficulty(Curriculum):
    """What curricula share that know how difficult a pair is.

    `difficulty` is one of DIFFICULTIES, see `difficulty_of`. `ranks` [n] is 0 for the easiest pair and size -
    1 for the hardest. A seeded shuffle breaks ties.
    """

    difficulty: str = "auto"

    def __post_init__(self, setting: Setting) -> None:
        super().__post_init__(setting)
        if self.difficulty not in DIFFICULTIES:
            raise UserError(
                f"curriculum.difficulty={self.difficulty}: must be one of {', '.join(DIFFICULTIES)}"
            )
        missing = np.flatnonzero(np.isnan(setting.pass_rates))
        if self.difficulty == "pass_rate" and len(missing):
            raise UserError(
                f"curriculum.difficulty=pass_rate: {len(missing)} of {self.size} pairs have no pass rate "
                f"(the first is number {missing[0] + 1} of those kept): give pass_rate in the data, "
                "or choose curriculum.difficulty=reference_margin"
            )
        self.ranks: np.ndarray | None = None
        difficulty = difficulty_of(self.difficulty, setting.pass_rates, setting.tokens)
        if difficulty is not None:
            self.rank(difficulty)

    def rank(self, difficulty: np.ndarray) -> None:
        if missing := int(np.isnan(difficulty).sum()):
            raise UserError(
                f"{missing} of {self.size} pairs have no difficulty: the reference's log-probabilities of "
                "them are not finite; try model.dtype=float32, or choose curriculum.difficulty=length"
            )
        if difficulty.min() == difficulty.max():
            raise UserError(
                "all pairs are equally difficult, so they cannot be ordered: choose another "
                f"curriculum.difficulty than {self.difficulty}, or curriculum=none"
            )
        self.ranks = order_by_difficulty(difficulty, self.seed)

    def refresh(self, step: int, stats_of: StatsOf) -> None:
        if self.ranks is None:  # only at the first step
            stats = stats_of(np.arange(self.size))
            # A loss without a reference has zeros in its place.
            before = stats.reference if stats.reference.chosen.any() else stats.policy
            self.rank(-mean_margin(before).numpy())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": torch.from_numpy(self.ranks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranks = state["ranks"].numpy()


@dataclass
class StaticFilter(ByDifficulty):
    """The pairs whose difficulty lies between two quantiles, in seeded random order, for the whole run."""

    low: float = 0.67
    high: float = 1.0

    def __post_init__(self, setting: Setting) -> None:
        super().__post_init__(setting)
        start, end = round(self.low * self.size), round(self.high * self.size)
        if not 0 <= self.low < self.high <= 1 or end - start < setting.candidates:
            raise UserError(
                f"curriculum.low={self.low} and curriculum.high={self.high} keep {max(end - start, 0)} of "
                f"{self.size} pairs, and {setting.candidates} candidates are drawn at a time: keep more"
            )
        self.start, self.order = start, Shuffled(end - start, self.seed)
        self.by_rank: np.ndarray | None = None

    def draw(self, n: int) -> np.ndarray:
        assert self.ranks is not None
        if self.by_rank is None:
            self.by_rank = np.argsort(self.ranks)
        return self.by_rank[self.start + self.order.draw(n)]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.by_rank = None


@dataclass
class EasyToHard(ByDifficulty):
    """The easiest share `start` of the pairs at first, and all of them after the share `ramp` of the run."""

    start: float = 0.2
    ramp: float = 0.5
    uses_steps: ClassVar[bool] = True

    def __post_init__(self, setting: Setting) -> None:
        super().__post_init__(setting)
        if not (0 < self.start <= 1 and 0 < self.ramp <= 1):
            raise UserError(
                f"curriculum.start={self.start}, curriculum.ramp={self.ramp}: shares, above 0 and up to 1"
            )
        self.ramp_steps, self.step = self.ramp * setting.steps, 0

    def refresh(self, step: int, stats_of: StatsOf) -> None:
        super().refresh(step, stats_of)
        self.step = step

    def share(self) -> float:
        """The share of the pairs that this step may draw from."""
        return min(1.0, self.start + (1 - self.start) * self.step / self.ramp_steps)

    def draw(self, n: int) -> np.ndarray:
        assert self.ranks is not None
        easiest = np.flatnonzero(self.ranks < max(round(self.share() * self.size), n))
        rng = np.random.default_rng((self.seed, 2, self.step))
        if n <= len(easiest):
            return rng.choice(easiest, n, replace=False)
        return np.concatenate([rng.permutation(easiest) for _ in range(-(-n // len(easiest)))])[:n]

    def metrics(self) -> dict[str, float]:
        return {"curriculum/share": self.share()}
