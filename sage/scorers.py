"""Which candidates deserve a gradient: a score per pair, from the forward pass alone.

A scorer is a dataclass whose fields are its options. Calling it maps PairStats to scores, and the pairs with
the highest scores are trained on. `Ranking` holds what all scorers that rank share: how many candidates, when
they are scored, gates and sampling. `select` makes the choice. To add a scorer, subclass `Ranking` here or in
any importable module, and name the class by `_target_` in one YAML under conf/scorer/.

The formulas and constants are ours. docs/sage.md gives the reasons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from sage.losses import Loss
from sage.model.logps import LogitStats, PairLogps

MARGINS = ("implicit_reward", "policy_mean", "mixed")
Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass
class PairStats:
    """What a scorer may look at, for n candidate pairs. Tensors are [n] float32, the same on every rank."""

    policy: PairLogps
    reference: PairLogps
    beta: float  # of the loss
    u: Tensor  # beta * m, the margin of the implicit rewards
    logit: LogitStats | None = None  # if the scorer's needs_logit asks for it
    other_margin: Tensor | None = None  # of another model, if the scorer's margins_from names a file

    @classmethod
    def of(
        cls, loss: Loss, policy: PairLogps, reference: PairLogps, logit: LogitStats | None = None
    ) -> PairStats:
        return cls(policy, reference, loss.beta, loss.u(policy, reference), logit)

    def margin(self, kind: str) -> Tensor:
        """The margin that decides which pairs are errors, and how confident, [n]: see `margin_of_kind`."""
        return margin_of_kind(kind, self.u, mean_margin(self.policy))


def mean_margin(logps: PairLogps) -> Tensor:
    """The length-normalised margin in nats per token, [n].

    log pi(chosen)/|chosen| - log pi(rejected)/|rejected|, without a reference.
    """
    return logps.chosen / logps.chosen_tokens - logps.rejected / logps.rejected_tokens


def margin_of_kind(kind: str, u: Array, policy_mean: Array) -> Array:
    """One of MARGINS, [n].

    implicit_reward is u, which is 0 for every pair before the first step. policy_mean is the policy's
    `mean_margin` and needs no reference. mixed is their sum: the policy's own preference decides it at first,
    and its movement later.
    """
    if kind == "implicit_reward":
        return u
    return policy_mean if kind == "policy_mean" else policy_mean + u


def signal(u: Tensor, beta: float) -> Tensor:
    """g = beta * sigmoid(-u): minus the derivative of the DPO loss by the margin m = u / beta."""
    return beta * torch.sigmoid(-u)


def curvature(u: Tensor, beta: float) -> Tensor:
    """h = beta^2 * sigmoid(u) * sigmoid(-u): its second derivative by m."""
    return beta**2 * torch.sigmoid(u) * torch.sigmoid(-u)


def uncertainty(stats: PairStats) -> Tensor:
    """U per token of both responses, in [0, 1): how unsure the policy is of its next token, [n]."""
    assert stats.logit
    tokens = stats.policy.chosen_tokens + stats.policy.rejected_tokens
    return (stats.logit.chosen_uncertainty + stats.logit.rejected_uncertainty) / tokens


class Scorer(ABC):
    """What selection asks of a scorer. The attributes are constants that a subclass may make options."""

    makes_scores: bool = True  # without scores, steps train on all that the curriculum draws
    candidates_per_pair: float = 1.0
    score_every: int = 1
    reuse: int = 1
    warmup_steps: int = 0
    margin: str = "implicit_reward"
    temperature: float = 0.0
    max_nan: float = 0.0
    margins_from: str | None = None
    compares_losses: bool = False  # whether the size of other margins counts, not only their order
    needs_logit: bool = False
    ranked_by: str | None = None  # the name of the margin that scores depend on, for the log

    @abstractmethod
    def __call__(self, stats: PairStats) -> Tensor:
        """One score per candidate, [n] float32: the highest are trained on. It looks at each pair alone."""

    def scores_at(self, step: int) -> bool:
        """Whether this step scores candidates. If not, it trains on all that the curriculum draws."""
        return self.makes_scores and step >= self.warmup_steps

    def draws(self, batch_size: int) -> tuple[int, int]:
        """The number of candidates drawn at a time, and how many of them are chosen."""
        chosen = batch_size * self.score_every // self.reuse
        return round(self.candidates_per_pair * chosen), chosen

    def admitted(self, stats: PairStats) -> Tensor:
        """Which candidates pass the gates, [n] bool."""
        return torch.ones_like(stats.u, dtype=torch.bool)

    def noise(self, scores: Tensor) -> float:
        """The temperature in units of the scores."""
        return self.temperature * deviation(scores)

    def objective(self, loss: Loss, stats: PairStats, chosen: Tensor) -> Loss:
        """The loss of the candidates at the positions `chosen`. A scorer may change its options."""
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the scorer remembers from step to step. Most remember nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027, most have nothing to restore
        """Restore what `state_dict` gave."""


@dataclass
class Uniform(Scorer):
    """Every candidate gets a gradient: ordinary DPO, with no scoring pass and no options."""

    makes_scores: ClassVar[bool] = False

    def __call__(self, stats: PairStats) -> Tensor:
        return torch.zeros_like(stats.u)


@dataclass
class Ranking(Scorer):
    """Scorers that rank candidates: how many are scored and when, and how the best of them are chosen.

    `candidates_per_pair` candidates are scored for every pair that will be trained on. Scoring happens every
    `score_every` steps, so no score is older than that. Each chosen pair is trained on `reuse` times before
    the next scoring. A step therefore costs candidates_per_pair / reuse forward passes per trained pair. The
    first `warmup_steps` steps are uniform.

    Gates shut candidates out. Those are taken only if the others do not fill the batch. Every gate is off by
    default. `mastered_above` shuts out margins above this value. `drop_curvature` shuts out the share with
    the highest curvature, which lies nearest to the decision boundary. `drop_uncertainty` shuts out the share
    whose tokens the policy is least sure of (U per token). `drop_negative` shuts out the share with the most
    negative implicit rewards: training on the other pairs has turned the policy against these, so their
    labels may be wrong.

    With a `temperature`, pairs are drawn without replacement, with probabilities proportional to exp(score /
    temperature) (Gumbel top-k, arXiv 1903.06059). Its unit is the standard deviation of the scores. At 0 the
    best pairs are taken.
    """

    candidates_per_pair: float = 3.0
    score_every: int = 1
    reuse: int = 1
    warmup_steps: int = 0
    margin: str = "implicit_reward"
    temperature: float = 0.0
    mastered_above: float | None = None
    drop_curvature: float = 0.0
    drop_uncertainty: float = 0.0
    drop_negative: float = 0.0
    max_nan: float = 0.1  # a larger share of NaN scores in one scoring stops the run
    margins_from: str | None = None  # where another model's margins are
    uses_logit: ClassVar[bool] = False
    uses_margins_from: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.margins_from is not None and not self.uses_margins_from:
            raise ValueError(
                f"scorer.margins_from={self.margins_from} has no effect: this scorer asks no other model. "
                "Leave it out"
            )
        if not self.candidates_per_pair >= 1:
            raise ValueError(
                f"scorer.candidates_per_pair={self.candidates_per_pair} gives fewer candidates than pairs to "
                "train on: it must be at least 1"
            )
        if self.reuse < 1 or self.score_every < 1 or self.score_every % self.reuse:
            raise ValueError(
                f"scorer.score_every={self.score_every} must be a multiple of scorer.reuse={self.reuse}, "
                "and both must be at least 1, so that every step has the same number of pairs"
            )
        if self.margin not in MARGINS:
            raise ValueError(f"scorer.margin={self.margin}: must be one of {', '.join(MARGINS)}")
        gated = self.mastered_above is not None or self.drop_curvature
        if self.margin not in (self.ranked_by, type(self).margin) and not gated:
            raise ValueError(
                f"scorer.margin={self.margin} has no effect: this scorer does not rank by it, and no gate "
                "looks at it. Leave it out"
            )
        if self.temperature and self.ranked_by is None:
            raise ValueError(
                f"scorer.temperature={self.temperature} has no effect: this scorer ranks no pair above "
                "another. Leave it out"
            )
        check_not_negative(self, "warmup_steps", "temperature")
        for name in ("drop_curvature", "drop_uncertainty", "drop_negative", "max_nan"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"scorer.{name}={getattr(self, name)}: a share, at least 0 and below 1")

    @property
    def needs_logit(self) -> bool:
        return self.uses_logit or self.drop_uncertainty > 0

    @property
    def ranked_by(self) -> str | None:
        return self.margin

    def admitted(self, stats: PairStats) -> Tensor:
        margin, passed = stats.margin(self.margin), super().admitted(stats)
        if self.mastered_above is not None:
            passed &= margin <= self.mastered_above
        if self.drop_curvature:
            passed &= below_quantile(curvature(margin, stats.beta), 1 - self.drop_curvature)
        if self.drop_uncertainty:
            passed &= below_quantile(uncertainty(stats), 1 - self.drop_uncertainty)
        if self.drop_negative:
            passed &= below_quantile(-stats.u, 1 - self.drop_negative)
        return passed


def check_not_negative(scorer: Scorer, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(scorer, name) < math.inf:
            raise ValueError(f"scorer.{name}={getattr(scorer, name)}: must be finite and not negative")


def below_quantile(values: Tensor, q: float) -> Tensor:
    """Which values do not exceed the q-quantile of the finite ones, [n] bool. NaN never passes."""
    finite = values[values.isfinite()]
    return values <= torch.quantile(finite, q) if len(finite) else torch.zeros_like(values, dtype=torch.bool)


def deviation(values: Tensor) -> float:
    """The standard deviation of the finite values; 0 if there are fewer than two."""
    finite = values[values.isfinite()]
    return finite.std().item() if len(finite) > 1 else 0.0


@dataclass
class Sage(Ranking):
    """The damped Newton decrement at margin level: g^2 / (h + damping * beta^2).

    Without damping it is exp(-u), the squared signal-to-noise ratio of the pair's gradient. It falls strictly
    in u, so without gates and temperature it ranks as `LargestLoss` with the same `margin` does. The damping
    is in units of beta^2, so one value suits every beta.
    """

    damping: float = 0.25
    candidates_per_pair: float = 2.0
    margin: str = "policy_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "damping")

    def __call__(self, stats: PairStats) -> Tensor:
        u = stats.margin(self.margin)
        return signal(u, 1.0) ** 2 / (curvature(u, 1.0) + self.damping)


@dataclass
class SageLogit(Ranking):
    """Signal per curvature at the logits: g^2 D / (h D + g (U_w + U_l) + damping).

    g^2 D is the squared norm of the loss's gradient with respect to the logits. h D + g (U_w + U_l) bounds
    the trace of its Hessian. `per_token` divides D and U by the number of response tokens, which only the
    damping notices.
    """

    per_token: bool = True
    damping: float = 1e-3
    uses_logit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "damping")

    def __call__(self, stats: PairStats) -> Tensor:
        assert stats.logit
        u = stats.margin(self.margin)
        g, h = signal(u, stats.beta), curvature(u, stats.beta)
        d, w, l = stats.logit  # noqa: E741, the letters of the formula
        if self.per_token:
            tokens = stats.policy.chosen_tokens + stats.policy.rejected_tokens
            d, w, l = d / tokens, w / tokens, l / tokens  # noqa: E741
        return g**2 * d / (h * d + g * (w + l) + self.damping)


def select(
    scores: Tensor, k: int, seed: int, temperature: float = 0.0, admitted: Tensor | None = None
) -> Tensor:
    """Positions of k of n candidates, in candidate order: [k] int64, or fewer if fewer have a finite score.

    Those that are `admitted` [n] come before the others. Within each group the highest scores come first,
    perturbed by Gumbel noise of this temperature. A seeded shuffle breaks ties, never the order of the
    dataset. The scores are the global ones, so every rank finds the same answer.
    """
    generator = torch.Generator().manual_seed(seed)
    if temperature:
        noise = torch.empty(len(scores), dtype=torch.float64).exponential_(generator=generator).log().neg()
        scores = scores.double() / temperature + noise
    shuffle = torch.randperm(len(scores), generator=generator)
    ranked = shuffle[torch.argsort(scores[shuffle], descending=True, stable=True)]
    ranked = ranked[scores[ranked].isfinite()]
    if admitted is not None:
        ranked = torch.cat([ranked[admitted[ranked]], ranked[~admitted[ranked]]])
    return ranked[:k].sort().values
