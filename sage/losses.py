"""Preference losses: pure functions of summed log-probabilities, one small class each.

A loss is a dataclass whose fields are its options. Calling it maps the log-probabilities of n pairs to n
losses. Below, u is beta * m, where m = (chosen logratio) - (rejected logratio). To add a loss, subclass
`Loss` here or in any importable module, and name the class by `_target_` in one YAML under conf/loss/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sage.model.logps import PairLogps


@dataclass
class Loss:
    """What all losses share: the implicit reward, and an NLL term on the chosen response.

    nll_weight scales -log pi(chosen) / |chosen| (RPO, arXiv 2404.19733). It keeps the log-probabilities of
    chosen responses from falling.
    """

    beta: float = 0.1
    nll_weight: float = 0.0
    reference_free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"loss.beta={self.beta}: must be positive and finite")
        for f in fields(self):
            if not 0 <= getattr(self, f.name) < math.inf:
                raise ValueError(f"loss.{f.name}={getattr(self, f.name)}: must be finite and not negative")

    def rewards(self, policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected, [n] each.

        beta * (log pi - log pi_ref): arXiv 2305.18290, equation 5.
        """
        return self.beta * (policy.chosen - reference.chosen), self.beta * (
            policy.rejected - reference.rejected
        )

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no preference loss")

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss per pair, [n]."""
        loss = self.preference(policy, reference)
        if self.nll_weight:
            loss = loss - self.nll_weight * policy.chosen / policy.chosen_tokens
        return loss

    def u(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(policy, reference)
        return chosen - rejected


@dataclass
class DPO(Loss):
    """-log sigmoid(u): arXiv 2305.18290, equation 7."""

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return -F.logsigmoid(self.u(policy, reference))


@dataclass
class NormalizedDPO(DPO):
    """DPO on log-ratios per token: arXiv 2411.15124, equation 6.

    The reward is beta * (log pi - log pi_ref) / |y|, so beta is larger than DPO's by about a
    response's length.
    """

    beta: float = 5.0

    def rewards(self, policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().rewards(policy, reference)
        return chosen / policy.chosen_tokens, rejected / policy.rejected_tokens


@dataclass
class OmniDPO(NormalizedDPO):
    """Omni-DPO, later Uni-DPO (arXiv 2506.10054): every pair gets a weight, less if the policy has it right.

    -(1 - sigmoid(beta * policy_mean - policy_margin))^focus * log sigmoid(u), with policy_mean and u per
    token. For chosen responses that became less likely than under the reference, it adds calibrated_nll *
    -log pi(chosen) / |chosen|. The gradient passes through the weight, and the defaults are those for
    Qwen2.5-Math, both as in the authors' code. Their second weight grades how much better the chosen
    response is. It would be the same for all verified pairs, and is left out.
    """

    beta: float = 2.0
    policy_margin: float = 2.0
    focus: float = 3.0
    calibrated_nll: float = 0.2

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen = policy.chosen / policy.chosen_tokens
        margin = self.beta * (chosen - policy.rejected / policy.rejected_tokens)
        weight = torch.sigmoid(self.policy_margin - margin) ** self.focus
        fallen = policy.chosen < reference.chosen
        return weight * super().preference(policy, reference) - self.calibrated_nll * (fallen * chosen)


@dataclass
class CDPO(Loss):
    """Conservative DPO: cross-entropy against labels flipped with probability label_smoothing.

    -(1 - e) log sigmoid(u) - e log sigmoid(-u): Mitchell, https://ericmitchell.ai/cdpo.pdf, equation 3.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing}: must lie in [0, 0.5)")

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        u, e = self.u(policy, reference), self.label_smoothing
        return -(1 - e) * F.logsigmoid(u) - e * F.logsigmoid(-u)


@dataclass
class RobustDPO(CDPO):
    """cDPO without its bias: its expectation under flipped labels is the clean DPO loss.

    (-(1 - e) log sigmoid(u) + e log sigmoid(-u)) / (1 - 2e): arXiv 2403.00409, equation 9.
    """

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        u, e = self.u(policy, reference), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(u) + e * F.logsigmoid(-u)) / (1 - 2 * e)


@dataclass
class IPO(Loss):
    """(h - 1/(2 beta))^2 with h the difference of logratios: arXiv 2310.12036, equation 17.

    Logratios are averaged over response tokens, which is the authors' correction in TRL. With sums, the
    target 1/(2 beta) would depend on the response's length.
    """

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        chosen = (policy.chosen - reference.chosen) / policy.chosen_tokens
        rejected = (policy.rejected - reference.rejected) / policy.rejected_tokens
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass
class Hinge(Loss):
    """max(0, 1 - u): SLiC's calibration with normalised likelihood ratios, arXiv 2309.06657, equation 8."""

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return torch.relu(1 - self.u(policy, reference))


@dataclass
class DPOP(Loss):
    """DPO-Positive (arXiv 2402.13228, equation 3): lowers u by how far the chosen response fell.

    The fall is measured against the reference, and scaled by `penalty`.
    """

    penalty: float = 50.0

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        fall = torch.relu(reference.chosen - policy.chosen)
        return -F.logsigmoid(self.u(policy, reference) - self.beta * self.penalty * fall)


@dataclass
class SimPO(Loss):
    """-log sigmoid(u - gamma) without a reference: arXiv 2405.14734, equation 6.

    The reward is beta * log pi(y|x) / |y|. target_margin is gamma, in units of reward.
    """

    beta: float = 2.0
    target_margin: float = 1.0
    reference_free: ClassVar[bool] = True

    def rewards(self, policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        return (
            self.beta * policy.chosen / policy.chosen_tokens,
            self.beta * policy.rejected / policy.rejected_tokens,
        )

    def preference(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return -F.logsigmoid(self.u(policy, reference) - self.target_margin)
