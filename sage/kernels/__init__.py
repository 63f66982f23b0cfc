"""Per-token statistics of the language-model head, without keeping its logits."""

import torch
from torch import Tensor

from sage.kernels import oracle, tiled
from sage.kernels.oracle import TokenStats

BACKENDS = {"oracle": oracle.token_stats, "tiled": tiled.token_stats}

__all__ = ["BACKENDS", "TokenStats", "token_stats"]


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    stats: tuple[str, ...] = ("logps",),
    backend: str = "tiled",
) -> TokenStats:
    """Statistics of p_t = softmax(logits_t), logits = cap(scale * (hidden @ weight.T + bias)).

    hidden  [n, h]  last hidden states of the scored positions only; n may be 0
    weight  [v, h]  of hidden's dtype; bias [v]
    labels  [n]     int64 token ids y_t. Outside [0, v): ValueError on CPU; on an accelerator, where looking
                    would wait for the device, `tiled` answers NaN and `oracle` asserts on the device.
    softcap c       cap(z) = c * tanh(z / c) (Gemma-2); None: identity
    scale           multiplies the logits (Cohere's logit_scale; Granite divides: pass 1/x)
    stats           which fields of TokenStats to compute; the others are None

    Logits and sums are float32 whatever hidden's dtype (float64 for float64), and so are the results [n].
    `logps` carries gradients to hidden, weight and bias; the other statistics are detached.
    Raises ValueError for shapes or dtypes that do not fit and for an unknown statistic or backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {sorted(BACKENDS)}")
    if unknown := set(stats) - set(TokenStats._fields):
        raise ValueError(f"stats: unknown {sorted(unknown)}, choose from {list(TokenStats._fields)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be positive, or None for no capping")
    (n, h), v = hidden.shape, weight.shape[0]
    if weight.shape != (v, h) or labels.shape != (n,) or (bias is not None and bias.shape != (v,)):
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: cast one of them")
    if labels.device.type == "cpu" and n and not (labels.min() >= 0 and labels.max() < v):
        raise ValueError(f"labels must lie in [0, {v}): got {labels.min()}..{labels.max()}")
    # Autocast would round the logits to half precision, which is what these kernels exist to avoid.
    with torch.autocast(hidden.device.type, enabled=False):
        return BACKENDS[backend](hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, stats=stats)
