# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false, reportArgumentType=false
# Statistics and gradients nobody asked for are None, which pyright cannot follow.
"""The autograd function behind `tiled` and `triton`: online softmax, recomputed in the backward pass.

No [n, v] tensor exists, forward or backward (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135;
for the language-model head, Wijmans et al., arXiv 2411.09009). Recomputing, rather than keeping the gradient that the
forward could have made, costs a dropped pair nothing.

A backend brings two functions: `partials` for the forward, `residual` for the backward.
"""

import platform
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sage.model.kernels.oracle import TokenStats, accumulator

ROUNDABLE = 128.0  # up to here a logit is at most a quarter from the nearest bfloat16


class Partials(NamedTuple):
    """Sums over each of k vocabulary blocks, with e = exp(z - peak of the block); None where not asked for."""

    label_logit: Tensor  # [n] z[y]; NaN for a label outside the vocabulary
    peaks: Tensor  # [k, n] max z
    totals: Tensor  # [k, n] sum e
    squares: Tensor | None  # [k, n] sum e^2
    weighted: Tensor | None  # [k, n] sum (z - peak) e


class Backend(NamedTuple):
    """What `recompute` leaves to a backend.

    partials(hidden, weight, bias, labels, softcap, scale, stats) -> Partials
    residual(hidden, weight, bias, columns, peak, total, softcap, scale, out) -> Tensor
        [rows, cols] of one tile, in `out`'s storage: (exp(z - peak) - total * [v = column]) * d cap, which is
        d logp / d logits up to the row's factor -scale / total; columns: labels within the tile, or outside of it
    tile    (tokens, vocabulary) of one tile of the backward pass
    dtype   of that tile
    """

    partials: Callable[..., Partials]
    residual: Callable[..., Tensor]
    tile: tuple[int, int]
    dtype: torch.dtype


def token_stats(hidden, weight, labels, *, bias, softcap, scale, stats, backend: Backend) -> TokenStats:
    return TokenStats(*_Stats.apply(hidden, weight, bias, labels, softcap, scale, frozenset(stats), backend))


def merge(parts: Partials, stats: frozenset[str]) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics of the whole vocabulary, and its `peak` and `total` [n]."""
    label_logit, peaks, totals, squares, weighted = parts
    peak = peaks.amax(0)
    shift = peaks - peak
    shrink = shift.exp()
    total = (totals * shrink).sum(0)
    return (
        TokenStats(
            logps=label_logit - peak - total.log() if "logps" in stats else None,
            sum_sq_probs=(squares * shrink.square()).sum(0) / total.square() if squares is not None else None,
            # sum_v (z - peak) e^(z - peak), each block moved from its own peak to the common one.
            entropy=total.log() - ((weighted + shift * totals) * shrink).sum(0) / total
            if weighted is not None
            else None,
            is_top1=label_logit >= peak if "is_top1" in stats else None,
        ),
        peak,
        total,
    )


class _Stats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, softcap, scale, stats, backend):
        found, peak, total = merge(
            backend.partials(hidden, weight, bias, labels, softcap, scale, stats), stats
        )
        if hidden.dtype == torch.bfloat16:
            # Any point near the peak serves the backward pass, and a product in bfloat16 can start from a rounded
            # one. A large peak would be rounded so far that the exponential overflows.
            exact, rounded = peak, peak.to(hidden.dtype).to(total.dtype)
            peak = torch.where(peak.abs() <= ROUNDABLE, rounded, peak)
            total = total * (exact - peak).exp()
        ctx.save_for_backward(hidden, labels, peak, total)
        # The Parameter itself, not save_for_backward: ZeRO-3 empties `.data` after this forward and gathers it
        # anew, into other storage, before the backward; saved-tensor hooks (offload, checkpointing) would have
        # kept today's storage, and the version check would compare counters of two different buffers.
        ctx.weight, ctx.bias = weight, bias
        ctx.softcap, ctx.scale, ctx.backend = softcap, scale, backend
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        """d logp / d logit_v = [v = y] - p_v, then through the soft-cap (1 - (z/c)^2) and the scale.

        A row's factor (its upstream gradient and 1 / total) commutes with both products, so it is applied to [n, h]
        tensors and never to a tile.
        """
        hidden, labels, peak, total = ctx.saved_tensors
        weight, bias = ctx.weight.data, None if ctx.bias is None else ctx.bias.data
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        (n, h), v = hidden.shape, weight.shape[0]
        (rows, cols), wide = ctx.backend.tile, total.dtype
        factor = -ctx.scale * grad.to(wide) / total
        dtype = product_dtype(hidden)
        scaled = (hidden * factor[:, None]).to(dtype) if need_weight else None
        grad_hidden = hidden.new_zeros(n, h, dtype=wide) if need_hidden else None
        grad_weight = (torch.empty_like if n else torch.zeros_like)(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        # One buffer each for all tiles: fresh pages cost a CPU as much as a third of a product.
        buffer = hidden.new_empty(min(rows, n) * min(cols, v), dtype=ctx.backend.dtype)
        weights = None if dtype == weight.dtype else hidden.new_empty(min(cols, v), h, dtype=dtype)
        in_place = weight.dtype == wide or n <= rows
        sums = None if in_place else hidden.new_empty(min(cols, v), h, dtype=wide)

        for cut_v in cuts(v, cols):
            # The sum over tokens ends inside this loop: in place, or for half precision in several parts, in float32.
            width = cut_v.stop - cut_v.start
            own_weight = weight[cut_v] if weights is None else weights[:width].copy_(weight[cut_v])
            if need_weight:
                tile_weight = grad_weight[cut_v] if sums is None else sums[:width]
            tile_bias = hidden.new_zeros(width, dtype=wide) if need_bias else None
            tile_of_bias = None if bias is None else bias[cut_v]
            for cut_n in cuts(n, rows):
                residual = ctx.backend.residual(
                    hidden[cut_n], weight[cut_v], tile_of_bias, labels[cut_n] - cut_v.start,
                    peak[cut_n], total[cut_n], ctx.softcap, ctx.scale, buffer,
                )  # fmt: skip
                if need_bias:
                    tile_bias += residual.T.to(wide) @ factor[cut_n]
                residual = residual.to(dtype)
                if need_hidden:
                    add_product(grad_hidden[cut_n], residual, own_weight)
                if need_weight:
                    add_product(tile_weight, residual.T, scaled[cut_n], beta=int(cut_n.start > 0))
            if need_weight and sums is not None:
                grad_weight[cut_v] = tile_weight
            if need_bias:
                grad_bias[cut_v] = tile_bias

        grad_hidden = grad_hidden.mul_(factor[:, None]).to(hidden.dtype) if need_hidden else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def cuts(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


@cache
def bfloat16_in_hardware() -> bool:
    """Whether this CPU multiplies bfloat16 as it is, twice as fast as float32; others take ten times as long."""
    if platform.machine() in ("x86_64", "AMD64"):  # where oneDNN takes AVX-512 for enough, and emulates it
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a gradient's factors are multiplied: x's own where the hardware takes it, else float32."""
    return x.dtype if x.is_cuda or bfloat16_in_hardware() else accumulator(x.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total <- beta * total + a @ b, for beta 0 or 1. Half-precision factors are summed in float32 on CUDA; a CPU rounds
    their product once, before it is added, as the gradient is rounded in the end."""
    if b.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif b.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif beta:
        total += a @ b
    else:
        total.copy_(a @ b)
