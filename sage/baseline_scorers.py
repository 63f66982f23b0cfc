"""Scorers that others proposed, to compare with: the usual baselines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sage.losses import Loss
from sage.scorers import (
    PairStats,
    Ranking,
    below_quantile,
    check_not_negative,
    deviation,
    mean_margin,
    signal,
)


@dataclass
class LargestLoss(Ranking):
    """-log sigmoid(u)."""

    def __call__(self, stats: PairStats) -> Tensor:
        return -F.logsigmoid(stats.margin(self.margin))


@dataclass
class LargestGradient(Ranking):
    """EL2N (arXiv 2107.07075), the norm of the error at the logits: sigmoid(-u) sqrt(D)."""

    uses_logit: ClassVar[bool] = True

    def __call__(self, stats: PairStats) -> Tensor:
        assert stats.logit
        return signal(stats.margin(self.margin), 1.0) * stats.logit.squared_norm.sqrt()


@dataclass
class Easiest(Ranking):
    """The largest margin: pairs that the policy already has right."""

    def __call__(self, stats: PairStats) -> Tensor:
        return stats.margin(self.margin)


@dataclass
class SmallestGap(Ranking):
    """The smallest gap between the implicit rewards, -|u|, whatever its sign: after arXiv 2508.04149.

    The authors choose once, by a model that was trained before. Here the policy in training decides.
    """

    def __call__(self, stats: PairStats) -> Tensor:
        return -stats.margin(self.margin).abs()


@dataclass
class MarginGap(Ranking):
    """The most negative margin of a fixed model: the reference (`mean_margin`), or that of `margins_from`."""

    uses_margins_from: ClassVar[bool] = True

    @property
    def ranked_by(self) -> str:
        return "margins_from" if self.margins_from else "reference_mean"

    def __call__(self, stats: PairStats) -> Tensor:
        return -(mean_margin(stats.reference) if stats.other_margin is None else stats.other_margin)


@dataclass
class Rho(Ranking):
    """Reducible loss (arXiv 2206.07137): the loss minus that of another model (`margins_from`).

    The other model was trained on held-out pairs.
    """

    uses_margins_from: ClassVar[bool] = True
    compares_losses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margins_from is None:
            raise ValueError(
                "scorer.margins_from is not set: this scorer needs the margins of a model that was trained "
                "on held-out pairs; give a Parquet file with pair_id and margin"
            )
        if self.margin != "implicit_reward":
            raise ValueError(
                f"scorer.margin={self.margin}: this scorer compares losses, so it needs implicit_reward"
            )

    def __call__(self, stats: PairStats) -> Tensor:
        assert stats.other_margin is not None
        return F.logsigmoid(stats.other_margin) - F.logsigmoid(stats.margin(self.margin))


@dataclass
class MediumInfluence(Rho):
    """LossDiff-IRM (arXiv 2510.13212): a random choice among pairs of medium influence on held-out pairs.

    LossDiff is the loss minus that of a model trained on held-out pairs (`margins_from`), as in `Rho`. IRM is
    the margin u of the implicit rewards. A candidate passes if both lie in the `middle` share of all
    candidates. The authors choose once, by a policy that was trained on all pairs for a pass. Here the policy
    in training chooses, after `warmup_steps`.
    """

    candidates_per_pair: float = 1.6
    middle: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.middle <= 1:
            raise ValueError(f"scorer.middle={self.middle}: a share, above 0 and at most 1")

    @property
    def ranked_by(self) -> None:
        return None

    def admitted(self, stats: PairStats) -> Tensor:
        medium = in_the_middle(super().__call__(stats), self.middle) & in_the_middle(stats.u, self.middle)
        return super().admitted(stats) & medium

    def __call__(self, stats: PairStats) -> Tensor:
        return 0.0 * (super().__call__(stats) + stats.u)  # NaN where one of them is not finite


def in_the_middle(values: Tensor, share: float) -> Tensor:
    """Which values lie in this share of the finite ones, around their median, [n] bool."""
    outside = (1 - share) / 2
    return below_quantile(values, 1 - outside) & below_quantile(-values, 1 - outside)


@dataclass
class RandomFromPool(Ranking):
    """All candidates score alike: a random draw among those that pass the gates."""

    @property
    def ranked_by(self) -> None:
        return None

    warmup_steps: int = 5
    margin: str = "policy_mean"

    def __call__(self, stats: PairStats) -> Tensor:
        return torch.zeros_like(stats.u)


@dataclass
class BetaDPO(Ranking):
    """beta-DPO (arXiv 2407.08639), as in its authors' code: a Gaussian filter, and a beta for each batch.

    With m_i the candidates' margins in nats, M and s are running means of the batch's mean and standard
    deviation. Pairs are drawn with weights exp(-(m_i - M)^2 / 2 s^2). The loss takes beta * (1 + scale *
    (mean m of the drawn pairs - M)).
    """

    candidates_per_pair: float = 1.25
    scale: float = 0.6
    momentum: float = 0.9
    MIN_BETA: ClassVar[float] = 1e-3
    MIN_STD: ClassVar[float] = 1e-6  # before the first step all margins are equal

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_every != 1 or self.temperature:
            raise ValueError(
                "beta_dpo adapts beta in every step and draws by its own weights: keep "
                "scorer.score_every=1 and scorer.temperature=0"
            )
        check_not_negative(self, "scale", "momentum")
        if not self.momentum < 1:
            raise ValueError(f"scorer.momentum={self.momentum}: must be below 1")
        self.mean, self.std = 0.0, 0.0

    @property
    def ranked_by(self) -> str:
        return "implicit_reward"

    def __call__(self, stats: PairStats) -> Tensor:
        m = stats.u / stats.beta
        finite = m[m.isfinite()]
        if len(finite):
            self.mean = self.momentum * self.mean + (1 - self.momentum) * finite.mean().item()
            self.std = self.momentum * self.std + (1 - self.momentum) * deviation(m)
        return -0.5 * ((m - self.mean) / max(self.std, self.MIN_STD)) ** 2

    def noise(self, scores: Tensor) -> float:
        return 1.0  # the scores are logarithms of the weights to draw by

    def objective(self, loss: Loss, stats: PairStats, chosen: Tensor) -> Loss:
        gap = (stats.u[chosen] / stats.beta).mean().item() - self.mean
        return replace(loss, beta=max(loss.beta * (1 + self.scale * gap), self.MIN_BETA))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]
