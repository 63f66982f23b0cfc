# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false
# The accumulators of statistics nobody asked for are None; one flag guards each, which pyright cannot follow.
"""Per-token statistics the obvious way: every logit at once, plain autograd. The meaning of the other backends."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of n next-token distributions p_t, each [n]; a statistic that was not asked for is None.

    float32 (float64 when hidden is float64). Only `logps` carries gradients; the rest are detached.
    """

    logps: Tensor | None = None  # log p_t[y_t]
    sum_sq_probs: Tensor | None = None  # s_t = sum_v p_t[v]^2
    entropy: Tensor | None = None  # -sum_v p_t[v] log p_t[v], in nats
    is_top1: Tensor | None = None  # bool: no token is likelier than y_t


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results: at least float32, whatever the model's."""
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
    """`sage.model.kernels.token_stats` with [n, v] logits in memory."""
    dtype = accumulator(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(1, labels[:, None]).squeeze(1)

    fixed = log_probs.detach()
    probs = fixed.exp() if {"sum_sq_probs", "entropy"} & set(stats) else None
    return TokenStats(
        logps=logps if "logps" in stats else None,
        sum_sq_probs=probs.square().sum(-1) if "sum_sq_probs" in stats else None,
        entropy=-(probs * fixed).sum(-1) if "entropy" in stats else None,
        is_top1=logps.detach() >= fixed.amax(-1) if "is_top1" in stats else None,
    )
