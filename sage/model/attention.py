"""Attention over packed rows: a response sees its own prompt and its own past, and nothing else of the row.

A row is a prefix that all its prompts begin with, followed by spans [prompt | response | response | ...]. In
a span, `prompt` is the part behind the prefix. The attention is registered with transformers, so the model's
own code runs unchanged. On a CPU it computes each response exactly, over its own text. On CUDA it is one
FlexAttention over the row under a block mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from sage.data.packing import Span
from sage.model.kernels.recompute import bfloat16_factors
from sage.model.sequence import ALONE, SequenceGroup

IMPLEMENTATION = "sage_packed"
# Queries in one block on a CPU. Half of a short text's scores lie ahead of the query and are skipped.
# Smaller blocks make smaller products, which are slower.
BLOCK = 128
VARIANTS = 64  # of the compiled functions, for all layers of a model


class Window(NamedTuple):
    """What a layer with a sliding window gets as its mask: a token sees this many tokens, itself included."""

    size: int


class PackedRow:
    """A packed row of `length` tokens. Each rank of `group` holds a part of it.

    Masks are made when a layer first asks for them, and serve all layers.
    """

    def __init__(
        self,
        prefix: int,
        spans: Sequence[Span],
        length: int,
        device: torch.device,
        compiled: bool = True,
        group: SequenceGroup = ALONE,
    ):
        self.prefix, self.spans, self.length, self.device = prefix, spans, length, device
        self.compiled, self.group = compiled, group
        last = spans[-1]
        self.end = last.start + last.prompt + sum(last.responses)  # padding follows
        self.block_masks: dict[int | None, BlockMask] = {}

    def texts(self) -> Iterator[tuple[slice, list[slice]]]:
        """(queries, keys) of each text. The queries are the last of the keys, and each sees all that is
        before it."""
        if self.prefix:
            yield slice(0, self.prefix), [slice(0, self.prefix)]
        before = [slice(0, self.prefix)] if self.prefix else []
        for start, prompt, responses in self.spans:
            end = start + prompt + responses[0]
            yield slice(start, end), [*before, slice(start, end)]
            for response in responses[1:]:
                own = slice(end, end + response)
                yield own, [*before, slice(start, start + prompt), own]
                end += response

    def block_mask(self, window: int | None) -> BlockMask:
        """The row as a FlexAttention mask. A token behind the last span sees only itself."""
        if window not in self.block_masks:
            # Each token's span (-1 for the prefix), its part of it (0 for the prompt, then a number for each
            # response), and its place in its own text. Built on the CPU, so the device never waits.
            spans, parts = [torch.full((self.prefix,), -1)], [torch.zeros(self.prefix, dtype=torch.long)]
            places = [torch.arange(self.prefix)]
            for i, (_, prompt, responses) in enumerate(self.spans):
                sizes = [prompt, *responses]
                spans.append(torch.full((sum(sizes),), i))
                parts.append(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))
                first = self.prefix + prompt
                places += [torch.arange(self.prefix, first), *(first + torch.arange(n) for n in responses)]
            padding = self.length - sum(map(len, spans))
            spans.append(len(self.spans) + torch.arange(padding))
            parts.append(torch.zeros(padding, dtype=torch.long))
            places.append(torch.zeros(padding, dtype=torch.long))
            span, part, place = (
                torch.cat(x).to(self.device, non_blocking=True) for x in (spans, parts, places)
            )

            def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                own_text = (span[q] == span[k]) & ((part[k] == 0) | (part[q] == part[k]))
                seen = (k <= q) & ((span[k] < 0) | own_text)
                return seen if window is None else seen & (place[q] - place[k] < window)

            self.block_masks[window] = mask_maker(self.compiled)(
                visible, None, None, self.length, self.length, device=str(self.device)
            )
        return self.block_masks[window]


def local_mask(
    *,
    mask_function: Any,
    config: Any,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Window | None:
    """transformers' mask interface: the mask of the layers of one type, given to `packed_attention` as
    attention_mask.

    Raises:
        NotImplementedError: the model asks for a mask that packed rows do not have.
    """
    if use_vmap:
        raise NotImplementedError("it masks attention in a way of its own")
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise NotImplementedError(f"its attention is chunked, every {local_size} tokens")
    return None if local_size is None else Window(local_size)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    packed_row: PackedRow | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, t, d], key [1, kv_heads, t, d], value [1,
    kv_heads, t, w] -> [1, t, heads, w], for this rank's t tokens of the row.

    Gemma 2's `softcap` and sliding windows are honoured. Whatever else a model may ask for, the self-check
    finds out.

    Raises:
        NotImplementedError: the layer asks for something that packed rows do not have.
    """
    if packed_row is None:
        raise NotImplementedError("its code does not hand the row on to its attention")
    if s_aux is not None:
        raise NotImplementedError("its attention has sinks")
    if attention_mask is not None and not isinstance(attention_mask, Window):
        raise NotImplementedError("it masks attention in a way of its own")
    assert not dropout
    window = None if attention_mask is None else attention_mask.size
    query, key, value = packed_row.group.to_heads(query, key, value)
    if packed_row.device.type == "cuda" or not packed_row.compiled:
        score = None if softcap is None else _soft_cap(softcap)
        out = flex(packed_row.compiled)(
            query,
            key,
            value,
            score_mod=score,
            block_mask=packed_row.block_mask(window),
            scale=scaling,
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return packed_row.group.to_tokens(out.transpose(1, 2).contiguous()), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Texts.apply(query, key, value, packed_row, scaling, softcap, window)
    return packed_row.group.to_tokens(out), None  # pyright: ignore


class _Texts(torch.autograd.Function):
    """Softmax attention of a row's texts, block by block of queries, recomputed in the backward pass.

    Scores and softmax are float32, the other products in the model's dtype. scaled_dot_product_attention on
    each text would fill and add up gradients of the whole row for every slice of it. In bfloat16 it takes
    twice as long (torch 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: PackedRow,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.row, ctx.scaling, ctx.softcap, ctx.window = row, scaling, softcap, window
        heads, length, width = query.shape[1], query.shape[2], value.shape[3]
        out = query.new_empty(1, length, heads, width)
        out[:, row.end :] = 0
        for queries, keys in row.texts():
            k, v = _take(key, keys), _take(value, keys)
            wide = k.to(_wide(k))
            for block, seen in _blocks(queries, k.shape[1], window):
                scores = _scores(
                    _group(query[0, :, block], k), wide[:, seen], block, scaling, softcap, window
                )
                mixed = torch.bmm(scores.softmax(-1).to(v.dtype), v[:, seen])
                out[0, block] = mixed.view(heads, -1, width).transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scaling, softcap, window = ctx.scaling, ctx.softcap, ctx.window
        grad_query = torch.empty_like(query)
        grad_query[:, :, ctx.row.end :] = 0
        # Sums over texts and blocks are float32, since a prompt is a key of all its responses.
        grad_key, grad_value = (torch.zeros_like(x[0], dtype=_wide(x)) for x in (key, value))
        for queries, keys in ctx.row.texts():
            k, v = _take(key, keys), _take(value, keys)
            wide = k.to(_wide(k))
            sum_key, sum_value = (torch.zeros_like(x, dtype=_wide(x)) for x in (k, v))
            for block, seen in _blocks(queries, k.shape[1], window):
                q, g = _group(query[0, :, block], k), _group(grad[0, block].transpose(0, 1), k)
                scores = _scores(q, wide[:, seen], block, scaling, softcap, window)
                probs = scores.softmax(-1)
                grad_probs = torch.bmm(g, v[:, seen].transpose(1, 2)).to(probs.dtype)
                grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                if softcap is not None:
                    grad_scores *= 1 - (scores.clamp_min(-softcap) / softcap).square_()
                grad_scores = grad_scores.to(k.dtype)
                own = _scaled_product(grad_scores, k[:, seen], scaling)
                grad_query[0, :, block] = own.view_as(grad_query[0, :, block])
                sum_key[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q)
                sum_value[:, seen] += torch.bmm(probs.to(g.dtype).transpose(1, 2), g)
            sizes = [part.stop - part.start for part in keys]
            for part, own_key, own_value in zip(
                keys, sum_key.split(sizes, 1), sum_value.split(sizes, 1), strict=True
            ):
                grad_key[:, part] += own_key
                grad_value[:, part] += own_value
        grad_key *= scaling
        return (
            grad_query,
            grad_key[None].to(key.dtype),
            grad_value[None].to(value.dtype),
            None,
            None,
            None,
            None,
        )


def _take(x: Tensor, parts: list[slice]) -> Tensor:
    """[1, kv_heads, t, d] -> [kv_heads, those tokens, d]."""
    return torch.cat([x[0, :, part] for part in parts], 1)


def _blocks(queries: slice, keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of a text's queries, and which of its keys each block sees: up to its last query."""
    for start in range(queries.start, queries.stop, BLOCK):
        stop = min(start + BLOCK, queries.stop)
        seen = keys - (queries.stop - stop)
        yield (
            slice(start, stop),
            slice(0 if window is None else max(seen - (stop - start) - window + 1, 0), seen),
        )


def _group(x: Tensor, k: Tensor) -> Tensor:
    """[heads, t, d] -> [kv_heads, heads / kv_heads * t, d]: queries that share a key lie in one matrix."""
    return x.reshape(k.shape[0], -1, x.shape[-1])


def _scores(
    q: Tensor, k: Tensor, block: slice, scaling: float, softcap: float | None, window: int | None
) -> Tensor:
    """[kv_heads, heads / kv_heads * own, seen] of a block of `own` queries, the last of the keys, in the
    wider dtype."""
    with bfloat16_factors() if q.dtype == torch.bfloat16 else nullcontext():
        scores = _scaled_product(q.to(k.dtype), k.transpose(1, 2), scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own, seen = block.stop - block.start, scores.shape[-1]
    by_query = scores.view(-1, own, seen)
    ahead = scores.new_full((own, own), -torch.inf).triu_(1)
    by_query[:, :, -own:] += ahead
    if window is not None and seen > window:
        behind = scores.new_full((own, seen), -torch.inf).tril_(seen - own - window)
        by_query += behind
    return scores


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b for batches, rounded once."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@cache
def flex(compiled: bool) -> Any:
    """FlexAttention, compiled once for rows of any length. Uncompiled it is a slow reference for tests."""
    return compiled_often(flex_attention) if compiled else flex_attention


@cache
def mask_maker(compiled: bool) -> Any:
    """create_block_mask, which without compilation holds all pairs of tokens at once."""
    return compiled_often(create_block_mask) if compiled else create_block_mask


def compiled_often(function: Any) -> Any:
    """`function`, compiled for all shapes.

    torch compiles it anew for each dtype, window, grad mode and so on, and by default gives up after eight.
    It would then run uncompiled, which is slow and takes memory for all pairs of tokens.
    """
    import torch._dynamo  # which torch loads late

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, dynamic=True)


@cache
def _soft_cap(softcap: float) -> Any:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, local_mask)
