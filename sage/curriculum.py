"""Which pairs are candidates now.

A curriculum is a dataclass whose fields are its options. It is built from a Setting (what is known of the pairs before
the first step) and then called in every step: `refresh` may redraw its pool, `draw` names candidates, `observe` tells
it the margins that training and scoring happened to see. Its whole state is one dict of plain data, which goes into
the checkpoint. It runs alike on every rank.

Constants are ours; docs/sage.md gives the reasons.
"""

# No `from __future__ import annotations`: under Python 3.10 OmegaConf cannot resolve an InitVar that is a string.
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sage.scorers import MARGINS, PairStats, mean_margin
from sage.util.errors import UserError

DIFFICULTIES = ("auto", "pass_rate", "reference_margin", "length")
Ask = Callable[
    [np.ndarray], PairStats
]  # what the policy, as it is, makes of these pairs; costs a forward of each


class Setting(NamedTuple):
    """What a curriculum is told before the first step, for n pairs."""

    pass_rates: np.ndarray  # [n] float64, NaN where unknown
    tokens: np.ndarray  # [n] int64, of both responses
    steps: int  # of the whole run
    candidates: int  # pairs that one draw asks for
    trained: int  # how many of them will be trained on
    seed: int


class Shuffled:
    """Passes over all pairs, each pass a new seeded permutation, back to back."""

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


@dataclass
class Curriculum:
    """No curriculum: every pair is a candidate, in seeded random order. The others override what they change."""

    setting: InitVar[Setting]

    def __post_init__(self, setting: Setting) -> None:
        self.size, self.seed = len(setting.tokens), setting.seed
        self.order = Shuffled(self.size, self.seed)
        if setting.candidates > setting.trained and setting.candidates > self.size:
            raise UserError(
                f"the scorer asks for {setting.candidates} candidates at a time and there are {self.size} pairs: lower "
                "scorer.candidates_per_pair, scorer.score_every or batch_size"
            )

    def refresh(self, step: int, ask: Ask) -> None:
        """Called before every step."""

    def draw(self, n: int) -> np.ndarray:
        """Indices of the next candidates: n of them, or all of a smaller pool, or none when it has run dry."""
        return self.order.draw(n)

    def observe(self, indices: np.ndarray, rewards: np.ndarray, means: np.ndarray) -> None:
        """Margins of n pairs as the policy just saw them: implicit rewards, and nats per token, [n] each."""

    def strata_of(self, indices: np.ndarray) -> np.ndarray:
        """The stratum of each pair, for the log, [n]."""
        return np.zeros(len(indices), np.int64)

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.position = state["position"]


def order_by_difficulty(difficulty: np.ndarray, seed: int) -> np.ndarray:
    """Each pair's rank, [n]: 0 for the easiest and n - 1 for the hardest, ties by a seeded shuffle."""
    shuffle = np.random.default_rng((seed, 1)).permutation(len(difficulty))
    ranks = np.empty(len(difficulty), np.int64)
    ranks[shuffle[np.argsort(difficulty[shuffle], kind="stable")]] = np.arange(len(difficulty))
    return ranks


@dataclass
class ByDifficulty(Curriculum):
    """What the curricula share that know how difficult a pair is.

    `difficulty`: pass_rate, 1 less the share of the model's own answers that were right; reference_margin, minus the
    reference's margin in nats per token; length, tokens of both responses; auto, the first where every pair has a pass
    rate, else the second. `ranks` [n] is 0 for the easiest pair and size - 1 for the hardest, ties by a seeded shuffle.
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
                f"curriculum.difficulty=pass_rate: {len(missing)} of {self.size} pairs have no pass rate (the first is "
                f"number {missing[0] + 1} of those kept); give pass_rate in the data, or choose difficulty=reference_margin"
            )
        self.ranks: np.ndarray | None = None
        if self.difficulty == "length":
            self.rank(setting.tokens)
        elif self.difficulty != "reference_margin" and not len(missing):
            self.rank(1 - setting.pass_rates)

    def rank(self, difficulty: np.ndarray) -> None:
        if difficulty.min() == difficulty.max():
            raise UserError(
                "all pairs are equally difficult, so there is nothing to order them by: choose another "
                f"curriculum.difficulty than {self.difficulty}, or curriculum=none"
            )
        self.ranks = order_by_difficulty(difficulty, self.seed)

    def refresh(self, step: int, ask: Ask) -> None:
        if self.ranks is None:  # at the first step, when the policy still is the reference
            self.rank(-mean_margin(ask(np.arange(self.size)).policy).cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": torch.from_numpy(self.ranks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranks = state["ranks"].numpy()


@dataclass
class SageCurriculum(ByDifficulty):
    """Pools at the frontier of the policy's competence.

    Pairs fall into `strata` equal quantiles of difficulty. Every `every` steps the policy is asked for the margins of
    `probe` fixed pairs of each stratum, which are never trained on; competence is the exponential mean (`momentum`) of
    the share of positive margins. A new pool of the share `pool` of all pairs is then drawn, in which the strata get
    quotas: at least `floor` of the pool each, and the rest in proportion to
    exp(-((competence - target) / width)^2 / 2). A pair whose latest margin exceeds `mastered_above` is retired; as many
    retired pairs as there are probes, those not seen for longest, are asked for at every refresh, and come back
    if they slipped. When too few are left, `when_dry` stops the run, or widens the pool by the least mastered.
    `margin` is which margin all this looks at: implicit_reward, policy_mean or mixed.
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
                f"{self.size} pairs in curriculum.strata={self.strata} strata are {self.size // self.strata} each, too "
                f"few for curriculum.probe={self.probe} probes and as many to train on: lower either"
            )
        self.pool_size = min(round(self.pool * self.size), self.size - self.strata * self.probe)
        if self.pool_size < setting.candidates:
            raise UserError(
                f"curriculum.pool={self.pool} makes a pool of {self.pool_size} pairs, and {setting.candidates} "
                "candidates are drawn at a time: raise it, or lower scorer.candidates_per_pair"
            )
        self.trained, self.candidates = setting.trained, setting.candidates
        self.step, self.refreshed = 0, -1
        self.latest = np.full(self.size, np.nan)  # the margin when last seen
        self.seen = np.full(self.size, -1, np.int64)  # and at which step that was
        self.competence = np.full(self.strata, np.nan)
        self.members = np.empty(0, np.int64)  # the pool
        self.quota = np.zeros(self.strata, np.int64)

    def rank(self, difficulty: np.ndarray) -> None:
        super().rank(difficulty)
        self.stratify()

    def stratify(self) -> None:
        """stratum [n] from the ranks, and `probes` [strata, probe]: fixed by the seed."""
        assert self.ranks is not None
        self.stratum = self.ranks * self.strata // self.size
        rng = np.random.default_rng((self.seed, 3))
        self.probes = np.stack(
            [
                rng.choice(np.flatnonzero(self.stratum == k), self.probe, replace=False)
                for k in range(self.strata)
            ]
        )

    def refresh(self, step: int, ask: Ask) -> None:
        super().refresh(step, ask)
        self.step = step
        if self.refreshed >= 0 and step < self.refreshed + self.every:
            return
        self.refreshed = step
        retired = np.flatnonzero(self.retired())
        again = retired[np.argsort(self.seen[retired], kind="stable")][: self.probes.size]
        stats = ask(np.concatenate([self.probes.ravel(), again]))
        margins = stats.margin_by(self.margin).double().cpu().numpy()
        probed, rechecked = np.split(margins, [self.probes.size])
        self.latest[again], self.seen[again] = rechecked, step
        # Before the first step implicit rewards are all 0: such a tie is half right.
        accuracy = ((np.sign(probed) + 1) / 2).reshape(self.probes.shape).mean(1)
        old = np.where(np.isnan(self.competence), accuracy, self.competence)
        self.competence = self.momentum * old + (1 - self.momentum) * accuracy
        self.redraw()

    def retired(self) -> np.ndarray:
        return self.latest > self.mastered_above  # never seen is NaN, which is not greater

    def redraw(self) -> None:
        """A new pool by quota, out of the pairs that are neither probes nor retired."""
        rng = np.random.default_rng((self.seed, 4, self.refreshed))
        trainable = np.ones(self.size, bool)
        trainable[self.probes] = False
        alive = trainable & ~self.retired()
        if alive.sum() < self.trained:
            least = np.argsort(
                np.where(trainable, self.latest, np.inf), kind="stable"
            )  # NaN sorts last, and is alive
            least = least[trainable[least] & ~alive[least]][: self.candidates - alive.sum()]
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

    def observe(self, indices: np.ndarray, rewards: np.ndarray, means: np.ndarray) -> None:
        self.latest[indices] = {"implicit_reward": rewards, "policy_mean": means, "mixed": rewards + means}[
            self.margin
        ]
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
        """Takes the state of another interval or pool size as it is, and of another number of strata by pair."""
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
    """Each stratum's share of the pool, [k], summing to 1: a floor, and a bump where competence is near the target."""
    exponent = -(((competence - target) / width) ** 2) / 2
    bump = np.exp(exponent - exponent.max())
    return floor + (1 - floor * len(competence)) * bump / bump.sum()


def allot(shares: np.ndarray, available: np.ndarray, total: int) -> np.ndarray:
    """Whole quotas [k] near shares * total; what a stratum cannot give, the others give by their shares."""
    quota = np.zeros(len(shares), np.int64)
    while (left := min(total, available.sum()) - quota.sum()) > 0:
        wanted = np.where(quota < available, np.maximum(shares, 1e-9), 0.0)
        more = np.floor(left * wanted / wanted.sum()).astype(np.int64)
        if not more.any():
            more[wanted.argmax()] = 1
        quota = np.minimum(quota + more, available)
    return quota
