"""Per-token statistics in torch, over tiles of tokens x vocabulary. It runs on any device in any dtype.

On a CPU the four matrix products take nine tenths of the time, at the speed of one large product. The
exponential takes most of the rest. So the size of the tile is all that is left to tune.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from sage.model.kernels import recompute
from sage.model.kernels.oracle import TokenStats, accumulator
from sage.model.kernels.recompute import Partials, add_product, cuts

# Tokens x vocabulary of one tile. On a CPU it is 8 MB of float32, the fastest of six sizes (one thread,
# h = 896, v = 16,384, 1,024 tokens, on a busy machine). On CUDA it is an untuned guess.
TILES = {"cpu": (2048, 1024), "cuda": (4096, 8192)}


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    stats: tuple[str, ...] = ("logps",),
    tile: tuple[int, int] | None = None,
) -> TokenStats:
    """`sage.model.kernels.token_stats`, with logits in tiles of `tile` = (tokens, vocabulary)."""
    tile = tile or TILES.get(hidden.device.type, TILES["cuda"])

    def partials(hidden, weight, bias, labels, softcap, scale, stats) -> Partials:
        (rows, cols), n, v = tile, hidden.shape[0], weight.shape[0]
        dtype = accumulator(hidden.dtype)
        buffer = hidden.new_empty(min(rows, n) * min(cols, v), dtype=dtype)
        # NaN until the label's tile comes by, so a label outside the vocabulary gives NaN.
        label_logit = hidden.new_full((n,), torch.nan, dtype=dtype)
        peaks, totals = hidden.new_empty(2, -(-v // cols), n, dtype=dtype)
        squares = torch.empty_like(peaks) if "sum_sq_probs" in stats else None
        in_bfloat16 = hidden.dtype == torch.bfloat16 and not hidden.is_cuda
        if not hidden.is_cuda:  # a CPU cannot multiply half precision into a float32 result
            hidden = hidden.to(dtype)
        wide = None if hidden.dtype == weight.dtype else hidden.new_empty(min(cols, v), hidden.shape[1])
        for k, cut_v in enumerate(cuts(v, cols)):
            tile_of_bias = None if bias is None else bias[cut_v]
            tile_of_weight = weight[cut_v]
            if wide is not None:
                tile_of_weight = wide[: len(tile_of_weight)].copy_(tile_of_weight)
            for cut_n in cuts(n, rows):
                with recompute.bfloat16_factors() if in_bfloat16 else nullcontext():
                    logits = _logits(hidden[cut_n], tile_of_weight, tile_of_bias, softcap, scale, buffer)
                index, inside = _within(labels[cut_n] - cut_v.start, logits.shape[1])
                found = logits.gather(1, index[:, None]).squeeze(1)
                label_logit[cut_n] = torch.where(inside, found, label_logit[cut_n])

                peak = torch.amax(logits, 1, out=peaks[k, cut_n])
                peak.clamp_(min=torch.finfo(dtype).min)  # a tile of -inf alone would give -inf - -inf
                probs = logits.sub_(peak[:, None]).exp_()
                torch.sum(probs, 1, out=totals[k, cut_n])
                if squares is not None:
                    torch.sum(probs.square_(), 1, out=squares[k, cut_n])
        return Partials(label_logit, peaks, totals, squares)

    in_bfloat16 = hidden.dtype == torch.bfloat16 and not hidden.is_cuda and recompute.bfloat16_in_hardware()
    if in_bfloat16 and bias is None and softcap is None and scale == 1:
        backend = recompute.TileMath(partials, _residual_bfloat16, tile, torch.bfloat16)
    else:
        backend = recompute.TileMath(partials, _residual, tile, accumulator(hidden.dtype))
    return recompute.token_stats(
        hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, stats=stats, backend=backend
    )


def _residual(hidden, weight, bias, columns, peak, total, softcap, scale, out) -> Tensor:
    if not hidden.is_cuda:
        hidden, weight = hidden.to(out.dtype), weight.to(out.dtype)
    logits = _logits(hidden, weight, bias, softcap, scale, out)
    slope = None if softcap is None else 1 - (logits / softcap).square_()
    index, inside = _within(columns, logits.shape[1])
    residual = logits.sub_(peak[:, None]).exp_()
    residual.scatter_add_(1, index[:, None], -(total * inside)[:, None])
    return residual if slope is None else residual.mul_(slope)


def _residual_bfloat16(hidden, weight, _bias, columns, peak, total, _softcap, _scale, out) -> Tensor:
    """`_residual` on a CPU with bfloat16 units, in half the time.

    The peak is subtracted before the product is rounded. So an exponent z - peak is off by at most 0.2% of
    itself. The error is smallest for the likeliest tokens, and smaller than the one from rounding the hidden
    states.
    """
    if peak.numel() and peak.abs().max() > recompute.ROUNDABLE:
        wide = torch.empty_like(out, dtype=total.dtype)
        exact = _residual(hidden, weight, None, columns, peak, total, None, 1.0, wide)
        return _tile(hidden, weight, out).copy_(exact)
    residual = _tile(hidden, weight, out).copy_(-peak[:, None])
    torch.addmm(residual, hidden, weight.T, out=residual).exp_()
    # The label's own entry is computed in float32. For a likely label it is a difference of two nearly equal
    # numbers, which rounding would destroy.
    at = ((columns >= 0) & (columns < weight.shape[0])).nonzero().squeeze(1)
    logits = (hidden[at].to(total.dtype) * weight[columns[at]].to(total.dtype)).sum(1)
    residual[at, columns[at]] = ((logits - peak[at]).exp() - total[at]).to(out.dtype)
    return residual


def _within(columns: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Columns clamped into a tile, and whether each lies in it. Both are [rows]."""
    return columns.clamp(0, cols - 1), (columns >= 0) & (columns < cols)


def _tile(hidden: Tensor, weight: Tensor, storage: Tensor) -> Tensor:
    return storage[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])


def _logits(hidden, weight, bias, softcap, scale, out) -> Tensor:
    """One tile of logits [rows, cols], in `out`'s storage. New pages cost a CPU more than the arithmetic."""
    logits = _tile(hidden, weight, out)
    add_product(logits, hidden, weight.T, beta=0)
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits
