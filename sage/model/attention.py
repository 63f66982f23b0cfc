"""Attention over packed rows: a response sees its own prompt and its own past, and nothing else of the row.

A row is a prefix that all its prompts begin with, and a run of spans [prompt | chosen | rejected], where `rejected` may
be absent and `prompt` is what follows the prefix. Registered with transformers as an attention implementation, so the
model's own code runs unchanged: on CPU one exact attention per response, over its own text alone; on CUDA one
FlexAttention over the row under a block mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from sage.data.packing import Span

IMPLEMENTATION = "sage_packed"
# Queries of one block on a CPU: half of a short text's scores are ahead of it, and skipped; smaller products are slower.
BLOCK = 128


class SpanMask(NamedTuple):
    """A row for the CPU."""

    prefix: int
    spans: Sequence[Span]

    def texts(self) -> Iterator[tuple[slice, list[slice]]]:
        """(queries, keys) of each text; a text's last tokens are its queries, and each sees all that is before it."""
        if self.prefix:
            yield slice(0, self.prefix), [slice(0, self.prefix)]
        before = [slice(0, self.prefix)] if self.prefix else []
        for start, prompt, chosen, rejected in self.spans:
            second = start + prompt + chosen
            yield slice(start, second), [*before, slice(start, second)]
            if rejected:
                own = slice(second, second + rejected)
                yield own, [*before, slice(start, start + prompt), own]


def packed_mask(
    prefix: int, spans: Sequence[Span], length: int, device: torch.device
) -> SpanMask | BlockMask:
    """What `packed_attention` needs to know of a row of `length` tokens, made once for all layers."""
    if device.type == "cuda":
        return block_mask(prefix, spans, length, device, compiled=True)
    return SpanMask(prefix, spans)


def block_mask(
    prefix: int, spans: Sequence[Span], length: int, device: torch.device, compiled: bool
) -> BlockMask:
    """The same as a FlexAttention mask. Of its spans, a token behind the last one sees itself alone."""
    sizes = torch.tensor([part for s in spans for part in s[1:]])
    # Token -> its part: -1 prefix, then 3 * span + (0 prompt, 1 chosen, 2 rejected). Built on the CPU: the device never waits.
    part = torch.cat([torch.full((prefix,), -1), torch.repeat_interleave(torch.arange(len(sizes)), sizes)])
    padding = torch.arange(length - len(part)) * 3 + len(sizes)
    part = torch.cat([part, padding]).to(device, non_blocking=True)

    def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_pair = part[q] // 3 == part[k] // 3
        own_text = same_pair & ((part[q] % 3 != 2) | (part[k] % 3 != 1))
        return (k <= q) & ((part[k] < 0) | own_text)

    return create_block_mask(visible, None, None, length, length, device=str(device), _compile=compiled)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    packed_mask: SpanMask | BlockMask | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, t, d], key and value [1, kv_heads, t, d] -> [1, t, heads, d].

    Gemma 2's `softcap` is honoured. What a model asks beyond this (windows, sinks) is not: `probe.can_pack` finds out.
    """
    assert packed_mask is not None and attention_mask is None and not dropout
    if isinstance(packed_mask, BlockMask):
        score = None if softcap is None else _soft_cap(softcap)
        out = flex(query.is_cuda)(
            query, key, value, score_mod=score, block_mask=packed_mask, scale=scaling, enable_gqa=True
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous(), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Texts.apply(query, key, value, packed_mask, scaling, softcap), None  # pyright: ignore


class _Texts(torch.autograd.Function):
    """Softmax attention of a row's texts, block by block of queries, recomputed in the backward pass.

    Scores and softmax are float32, the other products in the model's dtype. scaled_dot_product_attention on each text would
    fill and add up gradients of the whole row for every slice of it, and takes twice as long in bfloat16 (torch 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: SpanMask,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.scaling, ctx.softcap = mask, scaling, softcap
        _, heads, length, width = query.shape
        out = query.new_empty(1, length, heads, width)
        for queries, keys in mask.texts():
            k, v = _take(key, keys), _take(value, keys)
            wide = k.to(_wide(k))
            for block, seen in _blocks(queries, k.shape[1]):
                scores = _scores(_group(query[0, :, block], k), wide[:, :seen], block, scaling, softcap)
                mixed = torch.bmm(scores.softmax(-1).to(v.dtype), v[:, :seen])
                out[0, block] = mixed.view(heads, -1, width).transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scaling, softcap = ctx.scaling, ctx.softcap
        grad_query = torch.empty_like(query)
        # Sums over texts and blocks, in float32: a prompt is a key of both responses.
        grad_key, grad_value = (torch.zeros_like(x[0], dtype=_wide(x)) for x in (key, value))
        for queries, keys in ctx.mask.texts():
            k, v = _take(key, keys), _take(value, keys)
            wide = k.to(_wide(k))
            sum_key, sum_value = (torch.zeros_like(x, dtype=_wide(x)) for x in (k, v))
            for block, seen in _blocks(queries, k.shape[1]):
                q, g = _group(query[0, :, block], k), _group(grad[0, block].transpose(0, 1), k)
                scores = _scores(q, wide[:, :seen], block, scaling, softcap)
                probs = scores.softmax(-1)
                grad_probs = torch.bmm(g, v[:, :seen].transpose(1, 2)).to(probs.dtype)
                grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                if softcap is not None:
                    grad_scores *= 1 - (scores.clamp_min(-softcap) / softcap).square_()
                grad_scores = grad_scores.to(k.dtype)
                own = _scaled_product(grad_scores, k[:, :seen], scaling)
                grad_query[0, :, block] = own.view_as(grad_query[0, :, block])
                sum_key[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), q)
                sum_value[:, :seen] += torch.bmm(probs.to(g.dtype).transpose(1, 2), g)
            sizes = [part.stop - part.start for part in keys]
            for part, own_key, own_value in zip(
                keys, sum_key.split(sizes, 1), sum_value.split(sizes, 1), strict=True
            ):
                grad_key[:, part] += own_key
                grad_value[:, part] += own_value
        grad_key *= scaling
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None, None, None


def _take(x: Tensor, parts: list[slice]) -> Tensor:
    """[1, kv_heads, t, d] -> [kv_heads, those tokens, d]."""
    return torch.cat([x[0, :, part] for part in parts], 1)


def _blocks(queries: slice, keys: int) -> Iterator[tuple[slice, int]]:
    """Blocks of a text's queries, and how many of its keys the last query of each sees."""
    for start in range(queries.start, queries.stop, BLOCK):
        stop = min(start + BLOCK, queries.stop)
        yield slice(start, stop), keys - (queries.stop - stop)


def _group(x: Tensor, k: Tensor) -> Tensor:
    """[heads, t, d] -> [kv_heads, heads / kv_heads * t, d]: queries that share a key lie in one matrix."""
    return x.reshape(k.shape[0], -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, block: slice, scaling: float, softcap: float | None) -> Tensor:
    """[kv_heads, heads / kv_heads * own, seen] of a block of `own` queries, the last of the keys, in the keys' wider dtype."""
    with _bfloat16_factors() if q.dtype == torch.bfloat16 else nullcontext():
        scores = _scaled_product(q.to(k.dtype), k.transpose(1, 2), scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own = block.stop - block.start
    ahead = scores.new_full((own, own), -torch.inf).triu_(1)
    scores.view(-1, own, scores.shape[-1])[:, :, -own:] += ahead
    return scores


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b, of batches, rounded once."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


@contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """float32 products whose factors are bfloat16 numbers: exact all the same, and a CPU with units for these is faster."""
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@cache
def flex(compiled: bool) -> Any:
    """FlexAttention, compiled once for rows of any length; uncompiled it is a slow reference, for tests."""
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@cache
def _soft_cap(softcap: float) -> Any:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


AttentionInterface.register(IMPLEMENTATION, packed_attention)
