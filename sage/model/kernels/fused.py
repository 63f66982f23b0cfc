# pyright: reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright does not understand functions that `triton.jit` has wrapped.
"""Per-token statistics on CUDA through Triton. One kernel computes the head's product and reduces its logits.

Forward: one program computes one tile of logits, like a matrix product. It keeps a few numbers per row and
drops the tile. torch merges the numbers of all tiles.

Backward: the same program computes its tile again and writes the logits' gradient to a buffer, in the model's
dtype. cuBLAS multiplies the buffer into the gradients of hidden and weight. Triton could accumulate these
gradients too, but their [tokens, h] sums do not fit a program's registers, so it would need atomics or locks.
With cuBLAS two thirds of the backward pass run at full speed. Every sum has a fixed order, so a run repeats
bit for bit.

Set `TRITON_INTERPRET=1` before importing this module to run the kernels on a CPU, in tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sage.model.kernels import recompute
from sage.model.kernels.oracle import TokenStats
from sage.model.kernels.recompute import Partials

# Neither table was tuned on a GPU. Compiled for Ampere and Hopper, no program spills registers.
# Tokens x vocabulary of one tile of the backward pass: 64 MB of bfloat16, 60 GFLOP per product at h = 896.
# The products then take long enough to hide the launches.
TILE = (4096, 8192)
# (tokens, vocabulary, hidden, warps, stages) of one program, by CUDA capability and bytes per element.
BLOCKS = {
    (9, 2): (128, 128, 64, 8, 3),  # 96 KB of shared memory. RTX 50 has 99, data-centre cards have 227.
    (8, 2): (128, 128, 32, 8, 3),  # 32 KB
    (8, 4): (64, 64, 32, 4, 3),
}
GROUP = 16  # token blocks that use one block of the weight while it is in L2


def blocks(hidden: Tensor) -> tuple[int, int, int, int, int]:
    """The row of BLOCKS for the newest capability that this device supports."""
    major = torch.cuda.get_device_capability(hidden.device)[0] if hidden.is_cuda else 8
    return BLOCKS[max(key for key in BLOCKS if key[0] <= major and key[1] == hidden.element_size())]


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    stats: tuple[str, ...] = ("logps",),
    tile: tuple[int, int] = TILE,
) -> TokenStats:
    """`sage.model.kernels.token_stats` for bfloat16 and float32. `tile` belongs to the backward pass."""
    if hidden.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"backend='triton' takes bfloat16 and float32, not {hidden.dtype}: choose tiled")
    backend = recompute.TileMath(_partials, _residual, tile, hidden.dtype)
    return recompute.token_stats(
        hidden.contiguous(),
        weight,
        labels,
        bias=bias,
        softcap=softcap,
        scale=scale,
        stats=stats,
        backend=backend,
    )


def _partials(hidden, weight, bias, labels, softcap, scale, stats) -> Partials:
    (n, h), v = hidden.shape, weight.shape[0]
    rows, cols, inner, warps, stages = blocks(hidden)
    k = triton.cdiv(v, cols)

    label_logit = hidden.new_full((n,), torch.nan, dtype=torch.float32)
    peaks, totals = hidden.new_empty(2, k, n, dtype=torch.float32)
    squares = hidden.new_empty(k, n, dtype=torch.float32) if "sum_sq_probs" in stats else None
    if n:
        _partials_kernel[triton.cdiv(n, rows) * k,](
            hidden, weight.contiguous(), bias, labels, label_logit, peaks, totals, squares,
            n, v, h, softcap or 0.0, scale, softcap is not None, rows, cols, inner, GROUP,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return Partials(label_logit, peaks, totals, squares)


def _residual(hidden, weight, bias, columns, peak, total, softcap, scale, out) -> Tensor:
    (n, h), v = hidden.shape, weight.shape[0]
    rows, cols, inner, warps, stages = blocks(hidden)
    residual = out[: n * v].view(n, v)
    _residual_kernel[triton.cdiv(n, rows) * triton.cdiv(v, cols),](
        hidden, weight.contiguous(), bias, columns, peak, total, residual,
        n, v, h, softcap or 0.0, scale, softcap is not None, rows, cols, inner, GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return residual


@triton.jit
def _logits(
    hidden, weight, bias, n, v, h, softcap, scale,
    CAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """This program's tile of logits [ROWS, COLS] in float32, its rows and its columns."""
    # Programs that run at the same time share a group of token blocks and the same blocks of the weight.
    pid, row_blocks, col_blocks = tl.program_id(0), tl.cdiv(n, ROWS), tl.cdiv(v, COLS)
    first = pid // (GROUP * col_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = pid % (GROUP * col_blocks)
    rows = (first + within % height) * ROWS + tl.arange(0, ROWS)
    cols = within // height * COLS + tl.arange(0, COLS)

    inner = tl.arange(0, INNER)
    # Offsets are int64, since a weight of 256k rows of 8,192 has more than 2^31 elements. Rows and columns
    # past the end read the last one.
    hidden += tl.minimum(rows, n - 1).to(tl.int64)[:, None] * h + inner[None, :]
    weight += tl.minimum(cols, v - 1).to(tl.int64)[None, :] * h + inner[:, None]
    logits = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, h, INNER):
        a = tl.load(hidden + k, mask=(k + inner < h)[None, :], other=0.0)
        b = tl.load(weight + k, mask=(k + inner < h)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision="ieee")  # float32 factors are not rounded to TF32

    if bias is not None:
        logits += tl.load(bias + cols, mask=cols < v, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if CAP:
        shrunk = tl.exp(-2 * tl.abs(logits) / softcap)
        capped = softcap * (1 - shrunk) / (1 + shrunk)
        logits = tl.where(logits < 0, -capped, capped)
    return logits, rows, cols


@triton.jit(do_not_specialize=["n"])
def _partials_kernel(
    hidden, weight, bias, labels, label_logit, peaks, totals, squares, n, v, h, softcap, scale,
    CAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    logits, rows, cols = _logits(hidden, weight, bias, n, v, h, softcap, scale, CAP, ROWS, COLS, INNER, GROUP)
    label = tl.load(labels + rows, mask=rows < n, other=-1)
    found = tl.sum(tl.where(cols[None, :] == label[:, None], logits, 0.0), 1)
    start = tl.min(cols, 0)
    here = (label >= start) & (label < tl.minimum(start + COLS, v))
    tl.store(label_logit + rows, found, mask=(rows < n) & here)

    inside = (cols < v)[None, :]
    peak = tl.max(tl.where(inside, logits, -float("inf")), 1)
    peak = tl.maximum(peak, -3.4028234663852886e38)  # a tile of -inf alone would give -inf - -inf
    probs = tl.where(inside, tl.exp(logits - peak[:, None]), 0.0)
    at = (start // COLS).to(tl.int64) * n + rows
    tl.store(peaks + at, peak, mask=rows < n)
    tl.store(totals + at, tl.sum(probs, 1), mask=rows < n)
    if squares is not None:
        tl.store(squares + at, tl.sum(probs * probs, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _residual_kernel(
    hidden, weight, bias, columns, peak, total, out, n, v, h, softcap, scale,
    CAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    logits, rows, cols = _logits(hidden, weight, bias, n, v, h, softcap, scale, CAP, ROWS, COLS, INNER, GROUP)
    column = tl.load(columns + rows, mask=rows < n, other=-1)
    residual = tl.exp(logits - tl.load(peak + rows, mask=rows < n, other=0.0)[:, None])
    label = tl.load(total + rows, mask=rows < n, other=0.0)[:, None]
    residual -= tl.where(cols[None, :] == column[:, None], label, 0.0)
    if CAP:
        residual *= 1 - (logits / softcap) * (logits / softcap)
    at = rows.to(tl.int64)[:, None] * v + cols[None, :]
    tl.store(out + at, residual.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (cols < v)[None, :])
