# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false, reportArgumentType=false, reportOperatorIssue=false
# The accumulators of statistics and gradients nobody asked for are None, which pyright cannot follow.
"""Per-token statistics over tiles of tokens x vocabulary: no [n, v] tensor, forward or backward.

Online softmax (Milakov & Gimelshein, arXiv 1805.02867) with the softmax recomputed in the backward pass
(Dao et al., arXiv 2205.14135; for the language-model head, Wijmans et al., arXiv 2411.09009).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sage.kernels.oracle import TokenStats, accumulator

# Tokens x vocabulary of one tile: 4 MB of float32 on CPU, where (512, 2048) was within 3% of the best of the five
# sizes tried (one thread, 2048 x 576 x 49152); 128 MB on CUDA, a guess: enough work for each launch.
TILES = {"cpu": (512, 2048), "cuda": (4096, 8192)}


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
    """`sage.kernels.token_stats` in tiles of `tile` = (tokens, vocabulary) logits."""
    tile = tile or TILES.get(hidden.device.type, TILES["cuda"])
    return TokenStats(
        *_TiledStats.apply(hidden, weight, bias, labels, softcap, scale, frozenset(stats), tile)
    )


class _TiledStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, softcap, scale, stats, tile):
        n, v = hidden.shape[0], weight.shape[0]
        rows, cols = tile
        want_sq, want_entropy = "sum_sq_probs" in stats, "entropy" in stats
        dtype = accumulator(hidden.dtype)
        # Partial sums of each vocabulary tile, relative to the tile's own maximum; merged below.
        parts = [hidden.new_zeros(-(-v // cols), n, dtype=dtype) for _ in range(4)]
        # NaN until the label's tile comes by: a label outside the vocabulary shows itself.
        label_logit = hidden.new_full((n,), torch.nan, dtype=dtype)
        buffer = hidden.new_empty(min(rows, n) * min(cols, v), dtype=dtype)

        for k, cut_v in enumerate(_cuts(v, cols)):
            for cut_n in _cuts(n, rows):
                logits = _logits(hidden[cut_n], weight[cut_v], _at(bias, cut_v), softcap, scale, buffer)
                index, inside = _within(labels[cut_n], cut_v)
                found = logits.gather(1, index[:, None]).squeeze(1)
                label_logit[cut_n] = torch.where(inside, found, label_logit[cut_n])

                peak, total, squares, weighted = (part[k, cut_n] for part in parts)
                torch.amax(logits, 1, out=peak)
                logits.sub_(peak[:, None])
                probs = logits.exp() if want_entropy else logits.exp_()
                torch.sum(probs, 1, out=total)
                if want_entropy:
                    torch.sum(logits.mul_(probs), 1, out=weighted)
                if want_sq:
                    torch.sum(probs.square_(), 1, out=squares)

        peaks, totals, squares, weighted = parts
        peak = peaks.amax(0)
        shift = peaks - peak
        shrink = shift.exp()
        total = (totals * shrink).sum(0)
        logps = label_logit - peak - total.log()
        sum_sq = (squares * shrink.square()).sum(0) / total.square() if want_sq else None
        # sum_v (z - peak) e^(z - peak), each tile moved from its own peak to the common one.
        entropy = (
            total.log() - ((weighted + shift * totals) * shrink).sum(0) / total if want_entropy else None
        )
        is_top1 = label_logit >= peak if "is_top1" in stats else None

        ctx.save_for_backward(hidden, labels, peak, total)
        # The Parameter itself, not save_for_backward: ZeRO-3 empties `.data` after this forward and gathers it
        # anew, into other storage, before the backward; saved-tensor hooks (offload, checkpointing) would have
        # kept today's storage, and the version check would compare counters of two different buffers.
        ctx.weight, ctx.bias = weight, bias
        ctx.softcap, ctx.scale, ctx.tile = softcap, scale, tile
        ctx.mark_non_differentiable(*(x for x in (sum_sq, entropy, is_top1) if x is not None))
        return logps if "logps" in stats else None, sum_sq, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        """d logp / d logit_v = [v = y] - p_v, then through the soft-cap (1 - (z/c)^2) and the scale."""
        hidden, labels, peak, total = ctx.saved_tensors
        weight, bias = ctx.weight.data, None if ctx.bias is None else ctx.bias.data
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        n, v = hidden.shape[0], weight.shape[0]
        rows, cols = ctx.tile
        dtype = accumulator(hidden.dtype)
        grad = grad.to(dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        buffer = hidden.new_empty(min(rows, n) * min(cols, v), dtype=dtype)

        for cut_v in _cuts(v, cols):
            # The sum over tokens ends inside this loop, so one tile of float32 weight gradient is enough.
            tile_weight = torch.zeros_like(weight[cut_v], dtype=dtype) if need_weight else None
            tile_bias = torch.zeros_like(bias[cut_v], dtype=dtype) if need_bias else None
            for cut_n in _cuts(n, rows):
                logits = _logits(
                    hidden[cut_n], weight[cut_v], _at(bias, cut_v), ctx.softcap, ctx.scale, buffer
                )
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
                index, inside = _within(labels[cut_n], cut_v)
                g = grad[cut_n] * ctx.scale
                # exp(z - peak) / total and not exp(z - lse): at large |z| the difference loses no bits.
                d = logits.sub_(peak[cut_n, None]).exp_().mul_((-g / total[cut_n])[:, None])
                d.scatter_add_(1, index[:, None], (g * inside)[:, None])
                if slope is not None:
                    d.mul_(slope)
                if need_hidden:
                    _add_product(grad_hidden[cut_n], d, weight[cut_v])
                if need_weight:
                    _add_product(tile_weight, d.T, hidden[cut_n])
                if need_bias:
                    tile_bias += d.sum(0)
            if need_weight:
                grad_weight[cut_v] = tile_weight
            if need_bias:
                grad_bias[cut_v] = tile_bias

        grad_hidden = grad_hidden.to(hidden.dtype) if need_hidden else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _cuts(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _at(bias: Tensor | None, cut: slice) -> Tensor | None:
    return None if bias is None else bias[cut]


def _within(labels: Tensor, cut: slice) -> tuple[Tensor, Tensor]:
    """Labels as columns of a vocabulary tile (clamped), and which of them lie in it; both [rows]."""
    columns = labels - cut.start
    return columns.clamp(0, cut.stop - cut.start - 1), (labels >= cut.start) & (labels < cut.stop)


def _logits(hidden, weight, bias, softcap, scale, buffer) -> Tensor:
    """One tile of logits [rows, cols], written into `buffer`: fresh pages cost more than the arithmetic on CPU."""
    logits = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
    _add_product(logits, hidden, weight.T, beta=0)
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total <- beta * total + a @ b, summed in total's dtype even when b is half precision."""
    if b.dtype == total.dtype or not total.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
    else:  # tensor cores take half-precision factors and sum in float32
        product = torch.mm(a.to(b.dtype), b, out_dtype=total.dtype)
        total.copy_(product) if beta == 0 else total.add_(product)
