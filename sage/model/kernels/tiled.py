"""Per-token statistics in torch, over tiles of tokens x vocabulary: any device, any dtype.

On CPU nine tenths of the time is the four matrix products, at the speed that one large product reaches; the exponential
is most of the rest. So what is left to tune is the tile.
"""

import torch
from torch import Tensor

from sage.model.kernels import recompute
from sage.model.kernels.oracle import TokenStats, accumulator
from sage.model.kernels.recompute import Partials, add_product, cuts

# Tokens x vocabulary of one tile. CPU: 8 MB of float32, the fastest of six sizes tried (one thread, h = 896,
# v = 16,384, 1,024 tokens, beside other work). CUDA, a guess: enough work for each launch.
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
    """`sage.model.kernels.token_stats` in tiles of `tile` = (tokens, vocabulary) logits."""
    tile = tile or TILES.get(hidden.device.type, TILES["cuda"])

    def partials(hidden, weight, bias, labels, softcap, scale, stats) -> Partials:
        (rows, cols), n, v = tile, hidden.shape[0], weight.shape[0]
        dtype = accumulator(hidden.dtype)
        buffer = hidden.new_empty(min(rows, n) * min(cols, v), dtype=dtype)

        def sums(name: str) -> Tensor | None:
            return hidden.new_empty(-(-v // cols), n, dtype=dtype) if name in stats else None

        # NaN until the label's tile comes by: a label outside the vocabulary shows itself.
        label_logit = hidden.new_full((n,), torch.nan, dtype=dtype)
        peaks, totals = hidden.new_empty(2, -(-v // cols), n, dtype=dtype)
        squares, weighted = sums("sum_sq_probs"), sums("entropy")
        if not hidden.is_cuda:  # a CPU has no product of half precision that comes out as float32
            hidden = hidden.to(dtype)
        wide = None if hidden.dtype == weight.dtype else hidden.new_empty(min(cols, v), hidden.shape[1])
        for k, cut_v in enumerate(cuts(v, cols)):
            tile_of_bias = None if bias is None else bias[cut_v]
            tile_of_weight = weight[cut_v]
            if wide is not None:
                tile_of_weight = wide[: len(tile_of_weight)].copy_(tile_of_weight)
            for cut_n in cuts(n, rows):
                logits = _logits(hidden[cut_n], tile_of_weight, tile_of_bias, softcap, scale, buffer)
                index, inside = _within(labels[cut_n] - cut_v.start, logits.shape[1])
                found = logits.gather(1, index[:, None]).squeeze(1)
                label_logit[cut_n] = torch.where(inside, found, label_logit[cut_n])

                peak = torch.amax(logits, 1, out=peaks[k, cut_n])
                peak.clamp_(min=torch.finfo(dtype).min)  # else a tile of -inf alone would give -inf - -inf
                logits.sub_(peak[:, None])
                probs = logits.exp_() if weighted is None else logits.exp()
                torch.sum(probs, 1, out=totals[k, cut_n])
                if weighted is not None:
                    torch.sum(logits.mul_(probs), 1, out=weighted[k, cut_n])
                if squares is not None:
                    torch.sum(probs.square_(), 1, out=squares[k, cut_n])
        return Partials(label_logit, peaks, totals, squares, weighted)

    in_bfloat16 = hidden.dtype == torch.bfloat16 and not hidden.is_cuda and recompute.bfloat16_in_hardware()
    if in_bfloat16 and bias is None and softcap is None and scale == 1:
        backend = recompute.Backend(partials, _residual_bfloat16, tile, torch.bfloat16)
    else:
        backend = recompute.Backend(partials, _residual, tile, accumulator(hidden.dtype))
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

    The product is rounded with the peak already subtracted, so an exponent z - peak is off by 0.2% of itself at the most:
    least where the probability is, and less than the rounding of the hidden states makes of it anyway.
    """
    if peak.numel() and peak.abs().max() > recompute.ROUNDABLE:
        wide = torch.empty_like(out, dtype=total.dtype)
        exact = _residual(hidden, weight, None, columns, peak, total, None, 1.0, wide)
        return _tile(hidden, weight, out).copy_(exact)
    residual = _tile(hidden, weight, out).copy_(-peak[:, None])
    torch.addmm(residual, hidden, weight.T, out=residual).exp_()
    # The label's own in float32: where it is likely, the difference is less than what rounding would leave of it.
    at = ((columns >= 0) & (columns < weight.shape[0])).nonzero().squeeze(1)
    logits = (hidden[at].to(total.dtype) * weight[columns[at]].to(total.dtype)).sum(1)
    residual[at, columns[at]] = ((logits - peak[at]).exp() - total[at]).to(out.dtype)
    return residual


def _within(columns: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Columns clamped into a tile, and which of them lie in it; both [rows]."""
    return columns.clamp(0, cols - 1), (columns >= 0) & (columns < cols)


def _tile(hidden: Tensor, weight: Tensor, storage: Tensor) -> Tensor:
    return storage[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])


def _logits(hidden, weight, bias, softcap, scale, out) -> Tensor:
    """One tile of logits [rows, cols], in `out`'s storage: fresh pages cost more than the arithmetic on CPU."""
    logits = _tile(hidden, weight, out)
    add_product(logits, hidden, weight.T, beta=0)
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits
