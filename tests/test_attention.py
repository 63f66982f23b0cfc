"""Attention over packed rows against a softmax written out with its mask."""

from __future__ import annotations

import pytest
import torch

from sage.model import attention
from sage.model.attention import Span, block_mask, packed_attention, packed_mask

PREFIX = 6
ROWS = {
    0: [Span(0, 5, 7, 4), Span(16, 1, 1, 9), Span(27, 12, 3, 0)],
    PREFIX: [Span(6, 5, 7, 4), Span(22, 1, 1, 9), Span(33, 6, 3, 0)],
}
LENGTH = 42


def dense_mask(before: int) -> torch.Tensor:
    """[LENGTH, LENGTH]: what each token may see, pair by pair and token by token."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    prefix = list(range(before))
    mask[:before, :before] = torch.ones(before, before).tril().bool()
    for start, prompt, chosen, rejected in ROWS[before]:
        first = prefix + list(range(start, start + prompt + chosen))
        second = first[: before + prompt]
        second += list(range(start + prompt + chosen, start + prompt + chosen + rejected))
        for text in (first, second):
            for t, position in enumerate(text):
                mask[position, text[: t + 1]] = True
    return mask


def naive(q, k, v, scaling, softcap, prefix):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~dense_mask(prefix), -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["spans", "block_mask"])
@pytest.mark.parametrize("prefix", ROWS)
def test_against_the_dense_mask(kind, kv_heads, softcap, prefix):
    """Protects who sees whom in the CPU path and in CUDA's (FlexAttention, here uncompiled), and the CPU path's
    gradients; FlexAttention has none on a CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, LENGTH, 16, generator=generator, requires_grad=kind == "spans")
        for heads in (4, kv_heads, kv_heads)
    )
    device = torch.device("cpu")
    mask = (
        packed_mask(prefix, ROWS[prefix], LENGTH, device)
        if kind == "spans"
        else block_mask(prefix, ROWS[prefix], LENGTH, device, compiled=False)
    )
    out, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, softcap=softcap, packed_mask=mask
    )
    expected = naive(q, k, v, 0.3, softcap, prefix)
    assert out.shape == (1, LENGTH, 4, 16) and (out - expected).abs().max() < 1e-5
    if kind == "block_mask":
        return
    weight = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("prefix", ROWS)
def test_blocks_of_queries(monkeypatch, prefix, block, dtype, tolerance):
    """Protects texts longer than a block, and gradients that a prompt's keys collect from several."""
    monkeypatch.setattr(attention, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, LENGTH, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = packed_mask(prefix, ROWS[prefix], LENGTH, torch.device("cpu"))
    out, _ = packed_attention(torch.nn.Module(), *inputs, None, scaling=0.3, softcap=2.0, packed_mask=mask)
    expected = naive(*exact, 0.3, 2.0, prefix)
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
    mask = block_mask(prefix, ROWS[prefix], LENGTH + 6, torch.device("cpu"), compiled=False)
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, scaling=0.3, packed_mask=mask)
    expected = naive(*(x[:, :, :LENGTH] for x in (q, k, v)), 0.3, None, prefix)
    assert (out[:, :LENGTH] - expected).abs().max() < 1e-5 and out.isfinite().all()
