"""Which pairs are candidates now.

A curriculum is a dataclass whose fields are its options. It is built from a Setting, which holds what is
known of the pairs before the first step. Every step calls it: `refresh` may redraw its pool, `draw` names
candidates, and `observe` reports the margins that training and scoring saw. Its whole state is one dict of
plain data that goes into the checkpoint. It behaves the same on every rank. The constants are ours.
docs/sage.md gives the reasons.
"""

# No `from __future__ import annotations`: under Python 3.10 OmegaConf cannot resolve an InitVar that is a
# string.
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sage.order import DIFFICULTIES, Shuffled, difficulty_of, order_by_difficulty
from sage.scorers import MARGINS, PairStats, Scorer, margin_of_kind, mean_margin
from sage.util.errors import UserError

StatsOf = Callable[
    [np.ndarray], PairStats
]  # the policy's present statistics of these pairs; a forward of each


class Setting(NamedTuple):
    """What a curriculum knows before the first step, for n pairs."""

    pass_rates: np.ndarray  # [n] float64, NaN if unknown
    tokens: np.ndarray  # [n] int64, of both responses
    steps: int  # of the whole run
    candidates: int  # pairs that one draw asks for
    trained: int  # how many of them will be trained on
    seed: int

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        batch_size: int,
        pass_rates: np.ndarray,
        tokens: np.ndarray,
        steps: int,
        seed: int,
    ) -> "Setting":
        """The setting of a run with this scorer.

        Raises:
            UserError: the scorer asks for more candidates than there are pairs.
        """
        candidates, trained = scorer.draws(batch_size)
        if scorer.scores_at(steps - 1) and candidates > len(tokens):
            raise UserError(
                f"the scorer asks for {candidates} candidates at a time and there are {len(tokens)} pairs: "
                "lower scorer.candidates_per_pair, scorer.score_every or batch_size"
            )
        return cls(pass_rates, tokens, steps, candidates, trained, seed)


@dataclass
class Curriculum:
    """No curriculum: every pair is a candidate, in seeded random order. The others subclass it."""

    setting: InitVar[Setting]

    def __post_init__(self, setting: Setting) -> None:
        self.size, self.seed = len(setting.tokens), setting.seed
        self.order = Shuffled(self.size, self.seed)

    def refresh(self, step: int, stats_of: StatsOf) -> None:
        """Called before every step."""

    def draw(self, n: int) -> np.ndarray:
        """Indices of the next n candidates. A smaller pool gives all it has, and one that ran dry gives none.

        Two draws in a row must name at least `Setting.trained` different pairs, unless the pool has run dry.
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
        if self.ranks is None:  # only at the first step, when the policy still is the reference
            self.rank(-mean_margin(stats_of(np.arange(self.size)).policy).cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": torch.from_numpy(self.ranks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranks = state["ranks"].numpy()


@dataclass
class SageCurriculum(ByDifficulty):
    """Pools at the frontier of the policy's competence.

    Pairs are split into `strata` equal quantiles of difficulty. Every `every` steps the policy's margins on
    `probe` fixed pairs of each stratum are measured. Probes are never trained on. Competence is the
    exponential mean (`momentum`) of the share of positive margins. Then a new pool is drawn that holds the
    share `pool` of all pairs. Each stratum gets at least `floor` of the pool, and the rest is divided in
    proportion to exp(-((competence - target) / width)^2 / 2). A pair whose latest margin exceeds
    `mastered_above` is retired. Every refresh measures again as many retired pairs as there are probes, those
    not seen for longest. They come back if their margin has fallen. If too few pairs are left, `when_dry`
    stops the run, or widens the pool by the pairs that are mastered least. `margin` is the margin that all
    this looks at: implicit_reward, policy_mean or mixed.
    """

    every: int = 25
    strata: int = 4
    pool: float = 0.5
    probe: int = 16
    momentum: float = 0.5
    target: float = 0.6
    width: float = 0.5
    floor: float = 0.05
    margin: str = "policy_mean"
    mastered_above: float = 1.0
    when_dry: str = "stop"

    def __post_init__(self, setting: Setting) -> None:
        super().__post_init__(setting)
        for name, low, high in (
            ("momentum", 0, 1),
            ("target", 0, 1),
            ("pool", 0, 1),
            ("floor", 0, 1 / self.strata),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"curriculum.{name}={getattr(self, name)}: must lie between {low} and {high:.3g}"
                )
        for name in ("every", "strata", "probe", "width"):
            if not getattr(self, name) > 0:
                raise UserError(f"curriculum.{name}={getattr(self, name)}: must be positive")
        if self.margin not in MARGINS or self.when_dry not in ("stop", "widen"):
            raise UserError(
                f"curriculum.margin={self.margin} must be one of {', '.join(MARGINS)}, and "
                f"curriculum.when_dry={self.when_dry} stop or widen"
            )
        if self.size // self.strata < 2 * self.probe:
            raise UserError(
                f"{self.size} pairs in curriculum.strata={self.strata} strata are "
                f"{self.size // self.strata} each, too few for curriculum.probe={self.probe} probes and as "
                "many pairs to train on: lower one of them"
            )
        self.pool_size = min(round(self.pool * self.size), self.size - self.strata * self.probe)
        if self.pool_size < setting.candidates:
            raise UserError(
                f"curriculum.pool={self.pool} makes a pool of {self.pool_size} pairs, and "
                f"{setting.candidates} candidates are drawn at a time: raise it, or lower "
                "scorer.candidates_per_pair"
            )
        self.trained, self.candidates = setting.trained, setting.candidates
        self.step, self.refreshed = 0, -1
        self.latest = np.full(self.size, np.nan)  # the margin when the pair was last seen
        self.seen = np.full(self.size, -1, np.int64)  # the step at which that was
        self.competence = np.full(self.strata, np.nan)
        self.members = np.empty(0, np.int64)  # the pool
        self.quota = np.zeros(self.strata, np.int64)

    def rank(self, difficulty: np.ndarray) -> None:
        super().rank(difficulty)
        self.stratify()

    def stratify(self) -> None:
        """Set `stratum` [n], `probes` [strata, probe] and `trainable` [n] from the ranks and the seed."""
        assert self.ranks is not None
        self.stratum = self.ranks * self.strata // self.size
        rng = np.random.default_rng((self.seed, 3))
        self.probes = np.stack(
            [
                rng.choice(np.flatnonzero(self.stratum == k), self.probe, replace=False)
                for k in range(self.strata)
            ]
        )
        self.trainable = np.ones(self.size, bool)
        self.trainable[self.probes] = False

    def refresh(self, step: int, stats_of: StatsOf) -> None:
        super().refresh(step, stats_of)
        self.step = step
        if self.refreshed >= 0 and step < self.refreshed + self.every:
            return
        self.refreshed = step
        retired = np.flatnonzero(self.retired())
        again = retired[np.argsort(self.seen[retired], kind="stable")][: self.probes.size]
        stats = stats_of(np.concatenate([self.probes.ravel(), again]))
        margins = stats.margin(self.margin).double().cpu().numpy()
        probed, rechecked = np.split(margins, [self.probes.size])
        self.latest[again], self.seen[again] = rechecked, step
        probed = probed.reshape(self.probes.shape)
        if np.isnan(probed).all(1).any():
            raise UserError(
                f"step {step}: all {self.probe} probes of a stratum have a NaN margin, so its competence is "
                "unknown: lower optimizer.lr, or use model.dtype=float32"
            )
        # Before the first step implicit rewards are all 0. Such a tie counts as half right.
        accuracy = np.nanmean((np.sign(probed) + 1) / 2, axis=1)
        old = np.where(np.isnan(self.competence), accuracy, self.competence)
        self.competence = self.momentum * old + (1 - self.momentum) * accuracy
        self.redraw()

    def retired(self) -> np.ndarray:
        """Which pairs are mastered, [n] bool. Probes are never trained on, so they do not count."""
        return self.trainable & (
            self.latest > self.mastered_above
        )  # NaN, of pairs never seen, is not greater

    def redraw(self) -> None:
        """Draw a new pool by quota from the pairs that are neither probes nor retired."""
        rng = np.random.default_rng((self.seed, 4, self.refreshed))
        alive = self.trainable & ~self.retired()
        if alive.sum() < self.trained:
            least = np.argsort(np.where(self.retired(), self.latest, np.inf), kind="stable")
            least = least[self.retired()[least]][: self.candidates - alive.sum()]
            alive[least] = self.when_dry == "widen"
        shares = frontier_shares(self.competence, self.target, self.width, self.floor)
        available = np.bincount(self.stratum[alive], minlength=self.strata)
        self.quota = allot(shares, available, self.pool_size)
        self.members = np.concatenate(
            [
                rng.choice(np.flatnonzero(alive & (self.stratum == k)), quota, replace=False)
                for k, quota in enumerate(self.quota)
            ]
        )
        if len(self.members) < self.trained:
            self.members = self.members[:0]
        self.order = Shuffled(max(len(self.members), 1), self.seed + self.refreshed)

    def draw(self, n: int) -> np.ndarray:
        return self.members[self.order.draw(min(n, len(self.members)))] if len(self.members) else self.members

    def observe(self, indices: np.ndarray, u: np.ndarray, policy_mean: np.ndarray) -> None:
        self.latest[indices] = margin_of_kind(self.margin, u, policy_mean)
        self.seen[indices] = self.step

    def strata_of(self, indices: np.ndarray) -> np.ndarray:
        return self.stratum[indices]

    def metrics(self) -> dict[str, float]:
        numbers = {"curriculum/pool_size": len(self.members), "curriculum/retired": int(self.retired().sum())}
        for k in range(self.strata):
            numbers |= {
                f"curriculum/competence_{k}": self.competence[k],
                f"curriculum/quota_{k}": self.quota[k],
            }
        return {name: float(value) for name, value in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        arrays = {
            name: torch.from_numpy(getattr(self, name))
            for name in ("latest", "seen", "competence", "members", "quota")
        }
        return {**super().state_dict(), **arrays, "refreshed": self.refreshed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. It may come from a run with a different interval or pool size.

        If the number of strata changed, competence is averaged pair by pair.
        """
        super().load_state_dict(state)
        self.stratify()
        for name in ("latest", "seen", "competence", "members", "quota"):
            setattr(self, name, state[name].numpy())
        self.refreshed = state["refreshed"]
        self.order = Shuffled(max(len(self.members), 1), self.seed + self.refreshed)
        self.order.position = state["position"]
        if len(self.competence) != self.strata:
            assert self.ranks is not None
            by_pair = self.competence[self.ranks * len(self.competence) // self.size]
            self.competence = np.array([by_pair[self.stratum == k].mean() for k in range(self.strata)])
            self.quota = np.bincount(self.stratum[self.members], minlength=self.strata)


def frontier_shares(competence: np.ndarray, target: float, width: float, floor: float) -> np.ndarray:
    """Each stratum's share of the pool, [k], summing to 1: a floor, and a bump near the target."""
    exponent = -(((competence - target) / width) ** 2) / 2
    bump = np.exp(exponent - exponent.max())
    return floor + (1 - floor * len(competence)) * bump / bump.sum()


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
