"""Sequence parallelism: N ranks compute each row together, and each holds a part of its tokens.

This is Ulysses (Jacobs et al., arXiv 2309.14509). Only attention looks at other tokens. Before it, every rank
gives its tokens of the other ranks' heads away, and gets all tokens of its own heads. So attention sees the
whole row, whatever its mask. After it, the outputs go back.

After the head, all ranks of a group get the log-probabilities of all scored tokens, so they compute the same
loss. Its gradient flows back into a rank's own tokens only. The gradients of all ranks add up to the whole,
as they do where ranks have different pairs. So ZeRO splits its state over all ranks as ever, and adds up
gradients over all ranks. DeepSpeed's own sequence parallelism does the same (its
`seq_data_parallel_group`), so it needs to know nothing of our groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sage.data.packing import MicroBatch
from sage.util import ranks


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that compute each row together; by default, this rank alone."""

    size: int = 1
    rank: int = 0
    handle: Any = None  # torch's

    def cut(self, batch: MicroBatch) -> tuple[MicroBatch, Tensor | None]:
        """This rank's tokens of a packed row, and which of the scored tokens are among them, [own] int64.

        Spans and slots stay those of the whole row. The row is padded first, so that ranks get equal parts.
        """
        if self.size == 1:
            return batch, None
        assert batch.spans is not None
        length = -(-batch.input_ids.shape[1] // self.size)
        start = self.rank * length
        own = self.inside(batch.positions, start, length)

        def part(row: Tensor) -> Tensor:
            return F.pad(row, (0, length * self.size - row.shape[1]))[:, start : start + length]

        return batch._replace(
            input_ids=part(batch.input_ids),
            position_ids=part(batch.position_ids),
            positions=batch.positions[own] - start,
            labels=batch.labels[own],
        ), own

    def inside(self, positions: Tensor, start: int, length: int) -> Tensor:
        """Which of the positions lie among these `length` tokens, [own] int64."""
        return ((positions >= start) & (positions < start + length)).nonzero().squeeze(1)

    def gather(self, values: Tensor, own: Tensor | None, count: int) -> Tensor:
        """The values of all `count` scored tokens, from those of each rank's `own`: [own] -> [count]."""
        return values if own is None else _Gather.apply(values, own, count, self)  # pyright: ignore

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, heads, t, d] of all heads and the own tokens -> [1, heads / N, N t, d] of the own heads.

        Key and value heads are repeated where the ranks do not divide them.

        Raises:
            NotImplementedError: the ranks do not divide the query heads.
        """
        if self.size == 1:
            return query, key, value
        if query.shape[1] % self.size:
            raise NotImplementedError(
                f"{self.size} ranks cannot share the {query.shape[1]} heads of its attention equally"
            )
        repeats = math.lcm(key.shape[1], self.size) // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
        query, key, value = (self._to_heads(x) for x in (query, key, value))
        return query, key, value

    def _to_heads(self, x: Tensor) -> Tensor:
        _, heads, length, width = x.shape
        found = _Exchange.apply(x.reshape(self.size, heads // self.size, length, width), self)
        return found.transpose(0, 1).reshape(1, heads // self.size, self.size * length, width)  # pyright: ignore

    def to_tokens(self, out: Tensor) -> Tensor:
        """[1, N t, heads / N, d] of the own heads and all tokens -> [1, t, heads, d] of the own tokens."""
        if self.size == 1:
            return out
        _, length, heads, width = out.shape
        found = _Exchange.apply(out.reshape(self.size, length // self.size, heads, width), self)
        whole = found.transpose(0, 1).reshape(1, length // self.size, self.size * heads, width)  # pyright: ignore
        # With one head for each rank the reshape copies nothing, but some models take a view (AFMoE, JetMoE).
        return whole.contiguous()

    def exchange(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, ...]: part i goes to rank i, and the part at j comes from rank j."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=self.handle)
        return out

    def add(self, values: Tensor) -> None:
        """Replace the values by their sum over the group."""
        dist.all_reduce(values, group=self.handle)


ALONE = SequenceGroup()


@cache
def sequence_group(size: int) -> SequenceGroup:
    """This rank's group of `size` ranks, which follow each other. Every rank calls this."""
    if size == 1:
        return ALONE
    handle, _ = dist.new_subgroups(size, timeout=ranks.WAIT)
    return SequenceGroup(size, dist.get_rank() % size, handle)


class _Exchange(torch.autograd.Function):
    """`exchange`. The gradient of a part returns to the rank that the part came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.exchange(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.exchange(grad), None


class _Gather(torch.autograd.Function):
    """`gather`. All ranks compute the same loss, so each takes the gradient of its own values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, own: Tensor, count: int, group: SequenceGroup) -> Tensor:
        ctx.save_for_backward(own)
        out = values.new_zeros(count).scatter(0, own, values)
        group.add(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return grad[own], None, None, None
