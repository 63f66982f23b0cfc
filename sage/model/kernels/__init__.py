"""Per-token statistics of the language-model head. Its logits are not kept."""

import importlib.util

import torch
from torch import Tensor

from sage.model.kernels import oracle, tiled
from sage.model.kernels.oracle import TokenStats

__all__ = ["BACKENDS", "TokenStats", "choose_backend", "has_triton", "token_stats"]


def _triton(*args, **options) -> TokenStats:
    from sage.model.kernels import fused  # Triton is optional, and slow to import

    return fused.token_stats(*args, **options)


BACKENDS = {"oracle": oracle.token_stats, "tiled": tiled.token_stats, "triton": _triton}


def has_triton() -> bool:
    """Whether Triton is installed. torch's CUDA wheels for Linux bring it."""
    return importlib.util.find_spec("triton") is not None


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend: `triton` for bfloat16 on CUDA, else `tiled`.

    In float32 `tiled` is faster, because cuBLAS computes all its products. `triton` is compiled on the user's
    machine. Compare it with `tiled` before use, as `sage.model.selfcheck` does.
    """
    return "triton" if device.type == "cuda" and dtype == torch.bfloat16 and has_triton() else "tiled"


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
    labels  [n]     int64 token ids y_t. An id outside [0, v) is a ValueError on CPU. An accelerator would
                    have to wait for that check. There `oracle` asserts on the device, and the other
                    backends return NaN.
    softcap c       cap(z) = c * tanh(z / c) (Gemma 2). None is the identity.
    scale           multiplies the logits (Cohere's logit_scale). Granite divides its logits: pass 1/x.
    stats           the fields of TokenStats to compute. The others are None.
    backend         a name in BACKENDS

    Logits, sums and results [n] are float32 for every dtype of `hidden` except float64, which stays float64.
    `logps` carries gradients to hidden, weight and bias. The other statistics are detached.

    Raises:
        ValueError: shapes or dtypes do not fit, or a statistic or backend is unknown.
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
    if hidden.dtype == torch.float16:
        raise ValueError("hidden is float16, which cannot hold sums over a large vocabulary: use bfloat16")
    if labels.device.type == "cpu" and n and not (labels.min() >= 0 and labels.max() < v):
        raise ValueError(f"labels must lie in [0, {v}): got {labels.min()}..{labels.max()}")
    # Autocast would round the logits to half precision, which is what these kernels exist to avoid.
    with torch.autocast(hidden.device.type, enabled=False):
        return BACKENDS[backend](hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, stats=stats)
