"""Curricula that know each pair's difficulty before the run and ignore the policy: the usual baselines."""

from dataclasses import dataclass

import numpy as np

from sage.curriculum import ByDifficulty, Setting, StatsOf
from sage.order import Shuffled
from sage.util.errors import UserError


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

    def draw(self, n: int) -> np.ndarray:
        assert self.ranks is not None
        return np.argsort(self.ranks)[self.start + self.order.draw(n)]


@dataclass
class EasyToHard(ByDifficulty):
    """The easiest share `start` of the pairs at first, then more, and all from the share `ramp` of the run
    on."""

    start: float = 0.2
    ramp: float = 0.5

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

    def draw(self, n: int) -> np.ndarray:
        assert self.ranks is not None
        share = min(1.0, self.start + (1 - self.start) * self.step / self.ramp_steps)
        easiest = np.flatnonzero(self.ranks < max(round(share * self.size), n))
        rng = np.random.default_rng((self.seed, 2, self.step))
        return rng.choice(easiest, n, replace=n > len(easiest))

    def metrics(self) -> dict[str, float]:
        return {"curriculum/share": min(1.0, self.start + (1 - self.start) * self.step / self.ramp_steps)}
