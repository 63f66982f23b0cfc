# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false
# pyright: reportOptionalSubscript=false, reportArgumentType=false
# Statistics and gradients that were not asked for are None, which pyright cannot follow.
"""The autograd function behind `tiled` and `triton`: an online softmax, computed again in the backward pass.

Neither pass holds an [n, v] tensor (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135; for
the language-model head, Wijmans et al., arXiv 2411.09009). The forward pass could compute the gradient and
keep it. It does not, so a pair that is scored and then dropped costs no gradient.

A backend provides two functions: `partials` for the forward pass and `residual` for the backward pass.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sage.model.kernels.oracle import TokenStats, accumulator

ROUNDABLE = 128.0  # a smaller logit is at most a quarter away from the nearest bfloat16


class Partials(NamedTuple):
    """Sums over each of k vocabulary blocks, with e = exp(z - peak of the block)."""

    label_logit: Tensor  # [n] z[y]; NaN for a label outside the vocabulary
    peaks: Tensor  # [k, n] max z
    totals: Tensor  # [k, n] sum e
    squares: Tensor | None  # [k, n] sum e^2, if asked for


class TileMath(NamedTuple):
    """The parts of `recompute` that each backend computes in its own way.

    partials(hidden, weight, bias, labels, softcap, scale, stats) -> Partials
    residual(hidden, weight, bias, columns, peak, total, softcap, scale, out) -> Tensor
        [rows, cols] of one tile, in `out`'s storage: (exp(z - peak) - total * [v = column]) * d cap.
        This is d logp / d logits without the row's factor -scale / total.
        `columns` are the labels, counted from the tile's first column. A label may lie outside of the tile.
    tile    (tokens, vocabulary) of one tile of the backward pass
    dtype   of that tile
    """

    partials: Callable[..., Partials]
    residual: Callable[..., Tensor]
    tile: tuple[int, int]
    dtype: torch.dtype


def token_stats(hidden, weight, labels, *, bias, softcap, scale, stats, backend: TileMath) -> TokenStats:
    return TokenStats(*_Stats.apply(hidden, weight, bias, labels, softcap, scale, frozenset(stats), backend))


def merge(parts: Partials, stats: frozenset[str]) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics over the whole vocabulary, and its `peak` and `total`, each [n]."""
    label_logit, peaks, totals, squares = parts
    peak = peaks.amax(0)
    shrink = (peaks - peak).exp()
    total = (totals * shrink).sum(0)
    return (
        TokenStats(
            logps=label_logit - peak - total.log() if "logps" in stats else None,
            sum_sq_probs=(squares * shrink.square()).sum(0) / total.square() if squares is not None else None,
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
            # The backward pass can subtract any number near the peak. A product in bfloat16 can start from a
            # rounded one. But rounding moves a large peak so far that the exponential overflows.
            exact, rounded = peak, peak.to(hidden.dtype).to(total.dtype)
            peak = torch.where(peak.abs() <= ROUNDABLE, rounded, peak)
            total = total * (exact - peak).exp()
        ctx.save_for_backward(hidden, labels, peak, total)
        # Keep the Parameter itself and do not use save_for_backward. ZeRO-3 empties `.data` after this
        # forward, and fills it before the backward in other storage. Saved-tensor hooks (offload,
        # checkpointing) would keep the old one, and autograd's version check would compare two buffers.
        ctx.weight, ctx.bias = weight, bias
        ctx.softcap, ctx.scale, ctx.backend = softcap, scale, backend
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        """d logp / d logit_v = [v = y] - p_v, times 1 - (z/c)^2 for the soft-cap and times the scale.

        A row's factor (its upstream gradient and 1 / total) commutes with both products. So it multiplies
        [n, h] tensors and never a tile.
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
        # All tiles share one buffer. New pages cost a CPU as much as a third of a product.
        buffer = hidden.new_empty(min(rows, n) * min(cols, v), dtype=ctx.backend.dtype)
        weights = None if dtype == weight.dtype else hidden.new_empty(min(cols, v), h, dtype=dtype)
        in_place = weight.dtype == wide or n <= rows
        sums = None if in_place else hidden.new_empty(min(cols, v), h, dtype=wide)

        for cut_v in cuts(v, cols):
            # Each pass of this loop finishes a sum over all tokens: in place, or in a float32 buffer if half
            # precision needs several parts.
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
    """Whether this CPU has units for bfloat16.

    They multiply twice as fast as float32. Emulation is ten times slower.
    """
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN says yes to any AVX-512 and then emulates
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def bfloat16_factors() -> Iterator[None]:
    """float32 products of factors that hold bfloat16 numbers, on a CPU. They stay exact, and a CPU with
    bfloat16 units makes them twice as fast."""
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a gradient's factors: x's own if the hardware can multiply it, else float32."""
    return x.dtype if x.is_cuda or bfloat16_in_hardware() else accumulator(x.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total <- beta * total + a @ b, for beta 0 or 1.

    CUDA sums products of half-precision factors in float32. A CPU rounds each product once before it is
    added.
    """
    if b.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif b.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif beta:
        total += a @ b
    else:
        total.copy_(a @ b)
