"""Named numbers from per-pair log-probabilities. Sums travel over ranks; means are taken once, at the end."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from sage.losses import Loss
from sage.model.logps import PairLogps

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

    policy_margins are reference-free and length-normalised: log pi(chosen)/|chosen| - log pi(rejected)/|rejected|.
    """
    chosen, rejected = loss.rewards(policy, reference)
    policy_margin = policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens
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
    """Name the global means: sums [len(PER_PAIR)] over all ranks and micro-batches, divided by `count` pairs."""
    return {prefix + name: value / count for name, value in zip(PER_PAIR, sums.tolist(), strict=True)}


def peak_memory_gb(device: torch.device) -> tuple[float, str]:
    """Peak memory of this process so far, and what was measured: the CUDA allocator's, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9, "CUDA allocator"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, "resident set"
