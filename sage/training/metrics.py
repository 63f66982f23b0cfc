"""Named numbers from per-pair log-probabilities. Ranks add up sums; means are taken once, at the end."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from sage.losses import Loss
from sage.model.logps import PairLogps
from sage.scorers import mean_margin

PER_PAIR = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "policy_margins",
    "policy_accuracies",
)
LOSS = PER_PAIR.index("loss")


@torch.no_grad()
def per_pair(loss: Loss, losses: Tensor, policy: PairLogps, reference: PairLogps) -> Tensor:
    """The metrics of PER_PAIR for n pairs, [len(PER_PAIR), n].

    policy_margins are the policy's `mean_margin`.
    """
    chosen, rejected = loss.rewards(policy, reference)
    policy_margin = mean_margin(policy)
    return torch.stack(
        [
            losses,
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).float(),
            policy.chosen,
            policy.rejected,
            policy_margin,
            (policy_margin > 0).float(),
        ]
    )


def means(sums: Tensor, count: float, prefix: str = "") -> dict[str, float]:
    """The global means by name, from sums [len(PER_PAIR)] over `count` pairs."""
    return {prefix + name: value / count for name, value in zip(PER_PAIR, sums.tolist(), strict=True)}


def peak_memory_gb(device: torch.device) -> tuple[float, str]:
    """Peak memory of this process so far, and its kind: what the CUDA allocator took, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9, "CUDA allocator"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, "resident set"
