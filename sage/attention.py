"""Attention over packed rows: a response sees its own prompt and its own past, and nothing else of the row.

A row is a prefix that all its prompts begin with, and a run of spans [prompt | chosen | rejected], where `rejected` may
be absent and `prompt` is what follows the prefix. Registered with transformers as an attention implementation, so the
model's own code runs unchanged: on CPU one exact attention per response, over its own text alone; on CUDA one
FlexAttention over the row under a block mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

IMPLEMENTATION = "sage_packed"


class Span(NamedTuple):
    """Where a pair lies in its row: `start`, then this many tokens of prompt (after the prefix), chosen, rejected (maybe 0)."""

    start: int
    prompt: int
    chosen: int
    rejected: int


class SpanMask(NamedTuple):
    """A row for the CPU: its prefix, and each span with the masks of its two responses (None: plainly causal, or absent)."""

    prefix: int
    spans: list[tuple[Span, Tensor | None, Tensor | None]]


def packed_mask(
    prefix: int, spans: Sequence[Span], length: int, device: torch.device
) -> SpanMask | BlockMask:
    """What `packed_attention` needs to know of a row of `length` tokens, made once for all layers."""
    if device.type == "cuda":
        return block_mask(prefix, spans, length, device, compiled=True)

    def mask(before: int, own: int) -> Tensor | None:
        """[own, before + own], bottom-right aligned: the first token sees all that is before it, and itself."""
        if not before or not own:
            return None
        return torch.ones(own, before + own, dtype=torch.bool, device=device).tril(before)

    return SpanMask(
        prefix,
        [(s, mask(prefix, s.prompt + s.chosen), mask(prefix + s.prompt, s.rejected)) for s in spans],
    )


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

    Gemma 2's `softcap` is honoured. What a model asks beyond this (windows, sinks) is not: `policy.can_pack` finds out.
    """
    assert packed_mask is not None and attention_mask is None and not dropout
    if isinstance(packed_mask, BlockMask):
        score = None if softcap is None else _soft_cap(softcap)
        out = flex(query.is_cuda)(
            query, key, value, score_mod=score, block_mask=packed_mask, scale=scaling, enable_gqa=True
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous(), None
    prefix, spans = packed_mask
    outputs = []
    if prefix:
        q, k, v = (x[:, :, :prefix] for x in (query, key, value))
        outputs.append(_attend(q, k, v, None, scaling, softcap))
    for (start, prompt, chosen, rejected), first_mask, second_mask in spans:
        fork, second, end = start + prompt, start + prompt + chosen, start + prompt + chosen + rejected
        k, v = (
            torch.cat([x[:, :, :prefix], x[:, :, start:second]], 2) if prefix else x[:, :, start:second]
            for x in (key, value)
        )
        outputs.append(_attend(query[:, :, start:second], k, v, first_mask, scaling, softcap))
        if rejected:
            k, v = (
                torch.cat([x[:, :, :prefix], x[:, :, start:fork], x[:, :, second:end]], 2)
                for x in (key, value)
            )
            outputs.append(_attend(query[:, :, second:end], k, v, second_mask, scaling, softcap))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None) -> Tensor:  # fmt: skip
    """Softmax attention, causal where no mask is given."""
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


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
