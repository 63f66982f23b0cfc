# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false
# A statistic that was not asked for has no accumulator. One flag guards each, which pyright cannot follow.
"""Per-token statistics the obvious way: all logits at once and plain autograd.

This backend defines what the others compute.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of n next-token distributions p_t, each [n]. A statistic that was not asked for is None.

    They are float32, or float64 if the hidden states are. Only `logps` carries gradients.
    """

    logps: Tensor | None = None  # log p_t[y_t]
    sum_sq_probs: Tensor | None = None  # s_t = sum_v p_t[v]^2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results for a model's `dtype`: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    stats: tuple[str, ...] = ("logps",),
) -> TokenStats:
    """`sage.model.kernels.token_stats` with all [n, v] logits in memory."""
    dtype = accumulator(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(1, labels[:, None]).squeeze(1)

    return TokenStats(
        logps=logps if "logps" in stats else None,
        sum_sq_probs=log_probs.detach().exp().square().sum(-1) if "sum_sq_probs" in stats else None,
    )
