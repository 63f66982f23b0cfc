"""Attention over packed rows against a softmax written out with its mask."""

from __future__ import annotations

import functools
import types

import pytest
import torch

from sage.model import attention
from sage.model.attention import PackedRow, Span, Window, local_mask, packed_attention

PREFIX = 6
ROWS = {
    0: [Span(0, 5, (7, 4)), Span(16, 1, (1, 4, 2, 3)), Span(27, 12, (3,))],
    PREFIX: [Span(6, 5, (7, 4)), Span(22, 1, (1, 4, 2, 3)), Span(33, 6, (3,))],
}
LENGTH = 42


def dense_mask(before: int, window: int | None) -> torch.Tensor:
    """[LENGTH, LENGTH]: what each token may see, pair by pair and token by token."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    prefix = list(range(before))
    for start, prompt, responses in ROWS[before]:
        begin = start + prompt
        for response in responses:
            text = prefix + list(range(start, start + prompt)) + list(range(begin, begin + response))
            begin += response
            for t, position in enumerate(text):
                mask[position, text[max(0, t + 1 - (window or len(text))) : t + 1]] = True
    return mask


def naive(q, k, v, scaling, softcap, prefix, window=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~dense_mask(prefix, window), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def row(prefix: int, length: int = LENGTH, flex: bool = False) -> PackedRow:
    """The row as a CPU reads it, or with `flex` as CUDA does, by an uncompiled FlexAttention."""
    return PackedRow(prefix, ROWS[prefix], length, torch.device("cpu"), compiled=not flex)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("flex", [False, True], ids=["texts", "flex"])
@pytest.mark.parametrize("prefix", ROWS)
def test_against_the_dense_mask(flex, kv_heads, softcap, prefix, window):
    """Protects who sees whom in the CPU path and in CUDA's (FlexAttention, here uncompiled), sliding
    windows, and the CPU path's gradients. FlexAttention has none on a CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, LENGTH, 16, generator=generator, requires_grad=not flex)
        for heads in (4, kv_heads, kv_heads)
    )
    mask = None if window is None else Window(window)
    out, _ = packed_attention(
        torch.nn.Module(), q, k, v, mask, scaling=0.3, softcap=softcap, packed_row=row(prefix, flex=flex)
    )
    expected = naive(q, k, v, 0.3, softcap, prefix, window)
    assert out.shape == (1, LENGTH, 4, 16) and (out - expected).abs().max() < 1e-5
    if flex:
        return
    weight = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_masks_that_packed_rows_do_not_have_are_refused():
    """Protects models with chunked attention, sinks or masks of their own from being read
    as if they had none."""
    config = types.SimpleNamespace(attention_chunk_size=8)
    mask = {"mask_function": None, "config": config}
    assert local_mask(**mask) is None and local_mask(**mask, local_size=4) == Window(4)
    with pytest.raises(NotImplementedError, match="chunked"):
        local_mask(**mask, local_size=8)
    with pytest.raises(NotImplementedError, match="a way of its own"):
        local_mask(**mask, use_vmap=True)
    x = torch.zeros(1, 4, LENGTH, 16)
    ask = functools.partial(packed_attention, torch.nn.Module(), x, x, x)
    with pytest.raises(NotImplementedError, match="sinks"):
        ask(None, packed_row=row(0), s_aux=torch.zeros(4))
    with pytest.raises(NotImplementedError, match="a way of its own"):
        ask(torch.zeros(1, 1, LENGTH, LENGTH), packed_row=row(0))
    with pytest.raises(NotImplementedError, match="does not hand the row on"):
        ask(None)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("prefix", ROWS)
def test_blocks_of_queries(monkeypatch, prefix, block, dtype, tolerance, window):
    """Protects texts longer than a block, and gradients that a prompt's keys collect from several."""
    monkeypatch.setattr(attention, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, LENGTH, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = None if window is None else Window(window)
    options = {"scaling": 0.3, "softcap": 2.0, "packed_row": row(prefix)}
    out, _ = packed_attention(torch.nn.Module(), *inputs, mask, **options)
    expected = naive(*exact, 0.3, 2.0, prefix, window)
    weight = torch.randn(out.shape, generator=generator).to(dtype)
    ours = [out, *torch.autograd.grad((out * weight).sum(), inputs)]
    theirs = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("prefix", ROWS)
def test_a_row_may_end_in_padding(prefix):
    """Protects FlexAttention rows padded to a round length: no pair sees the padding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, LENGTH + 6, 16, generator=generator) for _ in range(3))
    padded = row(prefix, LENGTH + 6, flex=True)
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, scaling=0.3, packed_row=padded)
    expected = naive(*(x[:, :, :LENGTH] for x in (q, k, v)), 0.3, None, prefix)
    assert (out[:, :LENGTH] - expected).abs().max() < 1e-5 and out.isfinite().all()
