"""Which candidates deserve a gradient: a score per pair, from the forward pass alone.

Every scorer is a dataclass whose fields are its options; calling it maps PairStats to scores, and the highest are
trained on. What all share (how many candidates, gates, sampling) is in `Scorer`, and `select` makes the choice. To
add one, subclass `Scorer` here or anywhere importable and name it by `_target_` in one YAML under conf/scorer/.

Mathematics and constants are ours; docs/sage.md gives the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sage.losses import Loss
from sage.model.logps import LogitStats, PairLogps

MARGINS = ("implicit_reward", "policy_mean", "mixed")


@dataclass
class PairStats:
    """What a scorer may look at, for n candidate pairs; tensors are [n] float32, the same on every rank."""

    policy: PairLogps
    reference: PairLogps
    beta: float  # of the loss
    margin: Tensor  # u = beta * m, the difference of implicit rewards
    logit: LogitStats | None = None  # where the scorer's needs_logit asks for it
    other_margin: Tensor | None = None  # u under another model, where the scorer's margins_from names a file

    @classmethod
    def of(
        cls, loss: Loss, policy: PairLogps, reference: PairLogps, logit: LogitStats | None = None
    ) -> PairStats:
        return cls(policy, reference, loss.beta, loss.u(policy, reference), logit)

    def margin_by(self, kind: str) -> Tensor:
        """The margin that decides which pairs are errors, and how confident, [n].

        implicit_reward: u, which is 0 for every pair before the first step. policy_mean: reference-free, in nats per
        token, log pi(chosen)/|chosen| - log pi(rejected)/|rejected|. mixed: their sum, which the policy's own
        preference decides at first and its movement later.
        """
        if kind == "implicit_reward":
            return self.margin
        mean = mean_margin(self.policy)
        return mean if kind == "policy_mean" else mean + self.margin


def mean_margin(logps: PairLogps) -> Tensor:
    """The length-normalised margin, nats per token: [n]."""
    return logps.chosen / logps.chosen_tokens - logps.rejected / logps.rejected_tokens


def signal(u: Tensor, beta: float) -> Tensor:
    """g = beta * sigmoid(-u): minus the derivative of the DPO loss by the margin m = u / beta."""
    return beta * torch.sigmoid(-u)


def curvature(u: Tensor, beta: float) -> Tensor:
    """h = beta^2 * sigmoid(u) * sigmoid(-u): its second derivative by m."""
    return beta**2 * torch.sigmoid(u) * torch.sigmoid(-u)


def uncertainty(stats: PairStats) -> Tensor:
    """U per token, in [0, 1): how far from certain of its next token the policy is, over both responses, [n]."""
    assert stats.logit
    tokens = stats.policy.chosen_tokens + stats.policy.rejected_tokens
    return (stats.logit.chosen_uncertainty + stats.logit.rejected_uncertainty) / tokens


@dataclass
class Uniform:
    """Every candidate deserves the same: ordinary DPO, with no scoring pass."""

    candidates_per_pair: ClassVar[float] = 1
    score_every: ClassVar[int] = 1
    reuse: ClassVar[int] = 1


@dataclass
class Scorer:
    """What scorers share: how many candidates are scored and when, and how the best of them are chosen.

    For every pair that will be trained on, `candidates_per_pair` are scored. That happens every `score_every` steps,
    so no score is older than that, and each of the best is trained on `reuse` times before the next scoring: a step
    costs candidates_per_pair / reuse forward passes per trained pair. The first `warmup_steps` are uniform.

    Candidates that a gate shuts out are taken only where the others do not suffice. The gates, each off by default:
    `mastered_above` shuts out margins above this; `drop_curvature` the share with the highest curvature, which are
    those nearest to the decision boundary; `drop_uncertainty` the share whose tokens the policy is least sure of (U
    per token); `drop_negative` the share with the most negative implicit rewards, which training on the others has turned the
    policy against: the suspected mislabels. With a
    `temperature`, pairs are drawn without replacement with probabilities proportional to exp(score / temperature), in
    units of the scores' standard deviation (Gumbel top-k, arXiv 1903.06059); with 0 the best are taken.
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
    max_nan: float = 0.1  # share of one scoring's candidates whose score may be NaN before the run is stopped
    margins_from: str | None = None  # Parquet with pair_id and margin, as another model sees the pairs
    uses_logit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.candidates_per_pair >= 1:
            raise ValueError(
                f"scorer.candidates_per_pair={self.candidates_per_pair}: fewer candidates than pairs to train on; "
                "it must be at least 1"
            )
        if self.reuse < 1 or self.score_every < 1 or self.score_every % self.reuse:
            raise ValueError(
                f"scorer.score_every={self.score_every} must be a multiple of scorer.reuse={self.reuse}, both at "
                "least 1, so that every step has as many pairs as the next"
            )
        if self.margin not in MARGINS:
            raise ValueError(f"scorer.margin={self.margin}: must be one of {', '.join(MARGINS)}")
        for name in ("warmup_steps", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"scorer.{name}={getattr(self, name)}: must not be negative")
        for name in ("drop_curvature", "drop_uncertainty", "drop_negative", "max_nan"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"scorer.{name}={getattr(self, name)}: a share, from 0 up to but not including 1"
                )

    @property
    def needs_logit(self) -> bool:
        return self.uses_logit or self.drop_uncertainty > 0

    def __call__(self, stats: PairStats) -> Tensor:
        """Score per candidate, [n] float32: the highest are trained on. It looks at each pair alone."""
        raise TypeError(f"{type(self).__name__} gives no score")

    def admitted(self, stats: PairStats) -> Tensor:
        """Which candidates pass the gates, [n] bool."""
        u = stats.margin_by(self.margin)
        passed = torch.ones_like(u, dtype=torch.bool)
        if self.mastered_above is not None:
            passed &= u <= self.mastered_above
        if self.drop_curvature:
            passed &= below_quantile(curvature(u, stats.beta), 1 - self.drop_curvature)
        if self.drop_uncertainty:
            passed &= below_quantile(uncertainty(stats), 1 - self.drop_uncertainty)
        if self.drop_negative:
            passed &= below_quantile(-stats.margin, 1 - self.drop_negative)
        return passed

    def noise(self, scores: Tensor) -> float:
        """The temperature in units of the scores."""
        return self.temperature * scores[scores.isfinite()].std().item()

    def objective(self, loss: Loss, stats: PairStats, chosen: Tensor) -> Loss:
        """The loss for the candidates at the positions `chosen`; a scorer may adapt it."""
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the scorer remembers from step to step: nothing, for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def below_quantile(values: Tensor, q: float) -> Tensor:
    """Which values do not exceed the q-quantile of the finite ones; NaN never does."""
    return values <= torch.quantile(values[values.isfinite()], q)


@dataclass
class Sage(Scorer):
    """The damped Newton decrement at margin level: g^2 / (h + damping * beta^2).

    Undamped it is exp(-u), the squared signal-to-noise ratio of the pair's gradient. It falls strictly in u, so
    without gates and temperature it ranks as `LargestLoss` does. In units of beta^2 the damping is the same for every
    beta.
    """

    damping: float = 0.25

    def __call__(self, stats: PairStats) -> Tensor:
        u = stats.margin_by(self.margin)
        return signal(u, 1.0) ** 2 / (curvature(u, 1.0) + self.damping)


@dataclass
class SageLogit(Scorer):
    """Signal per curvature at the logits: g^2 D / (h D + g (U_w + U_l) + damping).

    g^2 D is the squared norm of the loss's gradient by the logits, and h D + g (U_w + U_l) bounds the trace of its
    Hessian. `per_token` divides D and U by the number of response tokens, which matters to the damping alone.
    """

    per_token: bool = True
    damping: float = 1e-3
    uses_logit: ClassVar[bool] = True

    def __call__(self, stats: PairStats) -> Tensor:
        assert stats.logit
        u = stats.margin_by(self.margin)
        g, h = signal(u, stats.beta), curvature(u, stats.beta)
        d, w, l = stats.logit  # noqa: E741, the letters of the formula
        if self.per_token:
            tokens = stats.policy.chosen_tokens + stats.policy.rejected_tokens
            d, w, l = d / tokens, w / tokens, l / tokens  # noqa: E741
        return g**2 * d / (h * d + g * (w + l) + self.damping)


@dataclass
class LargestLoss(Scorer):
    """-log sigmoid(u)."""

    def __call__(self, stats: PairStats) -> Tensor:
        return -F.logsigmoid(stats.margin_by(self.margin))


@dataclass
class LargestGradient(Scorer):
    """EL2N (arXiv 2107.07075), the norm of the error at the logits: sigmoid(-u) sqrt(D)."""

    uses_logit: ClassVar[bool] = True

    def __call__(self, stats: PairStats) -> Tensor:
        assert stats.logit
        return signal(stats.margin_by(self.margin), 1.0) * stats.logit.squared_norm.sqrt()


@dataclass
class Easiest(Scorer):
    """The largest margin: pairs that the policy has right already."""

    def __call__(self, stats: PairStats) -> Tensor:
        return stats.margin_by(self.margin)


@dataclass
class MarginGap(Scorer):
    """The most negative margin of a fixed model: the reference's (nats per token), or that in `margins_from`."""

    def __call__(self, stats: PairStats) -> Tensor:
        return -(mean_margin(stats.reference) if stats.other_margin is None else stats.other_margin)


@dataclass
class Rho(Scorer):
    """Reducible loss (arXiv 2206.07137): the loss less that of a model trained on held-out pairs (`margins_from`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margins_from is None:
            raise ValueError(
                "scorer.margins_from is not set: rho needs the margins of a model that was trained on held-out pairs; "
                "give a Parquet file with pair_id and margin"
            )

    def __call__(self, stats: PairStats) -> Tensor:
        assert stats.other_margin is not None
        return F.logsigmoid(stats.other_margin) - F.logsigmoid(stats.margin_by(self.margin))


@dataclass
class RandomFromPool(Scorer):
    """All candidates score alike: a draw at random among those that the gates let pass."""

    def __call__(self, stats: PairStats) -> Tensor:
        return torch.zeros_like(stats.margin)


@dataclass
class BetaDPO(Scorer):
    """beta-DPO (arXiv 2407.08639), as its authors' code has it: a Gaussian filter, and a beta that fits the batch.

    With m_i the candidates' margins in nats, and M and s running means of their batch mean and deviation, pairs are
    drawn with weights exp(-(m_i - M)^2 / 2 s^2), and the loss takes beta * (1 + scale * (mean m of the drawn - M)).
    """

    scale: float = 0.6
    momentum: float = 0.9
    MIN_BETA: ClassVar[float] = 1e-3
    MIN_STD: ClassVar[float] = 1e-6  # before the first step all margins are equal

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_every != 1 or self.temperature:
            raise ValueError(
                "beta_dpo adapts beta in every step and draws by its own weights: keep scorer.score_every=1 and "
                "scorer.temperature=0"
            )
        self.mean, self.std = 0.0, 0.0

    def __call__(self, stats: PairStats) -> Tensor:
        m = stats.margin / stats.beta
        finite = m[m.isfinite()]
        self.mean = self.momentum * self.mean + (1 - self.momentum) * finite.mean().item()
        self.std = self.momentum * self.std + (1 - self.momentum) * finite.std().item()
        return -0.5 * ((m - self.mean) / max(self.std, self.MIN_STD)) ** 2

    def noise(self, scores: Tensor) -> float:
        return 1.0  # the scores are logarithms of the weights to draw by

    def objective(self, loss: Loss, stats: PairStats, chosen: Tensor) -> Loss:
        gap = (stats.margin[chosen] / stats.beta).mean().item() - self.mean
        return replace(loss, beta=max(loss.beta * (1 + self.scale * gap), self.MIN_BETA))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]


def select(
    scores: Tensor, k: int, seed: int, temperature: float = 0.0, admitted: Tensor | None = None
) -> Tensor:
    """Positions of k of n candidates, in candidate order: [k] int64, or fewer where fewer have a finite score.

    Those that are `admitted` [n] come before the others, and among each the highest scores, perturbed by Gumbel noise
    of this temperature. Ties are broken by a seeded shuffle, never by the order of the dataset. The scores are the
    global ones, so every rank finds the same answer.
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
