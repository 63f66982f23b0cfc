"""Log-probabilities and logit statistics of preference pairs, as plain tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairLogps(NamedTuple):
    """Summed response log-probabilities and response lengths of n pairs, each [n] float32."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


class LogitStats(NamedTuple):
    """Statistics of the next-token distributions p_t of n pairs, each [n] float32, without gradients.

    They are sums over a response's tokens. y_t is the token that was written, and s_t = sum_v p_t[v]^2.
    """

    squared_norm: Tensor  # D = sum over both responses of (1 - 2 p_t[y_t] + s_t): |d margin / d logits|^2
    chosen_uncertainty: Tensor  # U_w = sum over the chosen of (1 - s_t): trace of the log-partition's Hessian
    rejected_uncertainty: Tensor  # U_l
