"""MLPs in tiles along the tokens, so that the activations of one tile exist at a time.

An MLP computes each token by itself, and its activations are several times as wide as the hidden states. They
are not kept: the backward pass computes each tile again (Arctic Long Sequence Training, arXiv 2506.13996).
DeepSpeed has this too (`TiledMLP`). Its backward pass adds to `.grad` of the weights, so `autograd.grad` does
not see their gradients, half precision rounds each sum, and ranks must have equally many tiles.

Which modules compute each token by itself is tried out, on the code and not on the weights.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from sage.model.kernels.oracle import accumulator
from sage.model.kernels.recompute import cuts
from sage.model.sharding import shape_of

# Tokens of a tile. Each tile costs one addition to every weight's gradient, which takes a few percent of the
# tile's products at this size.
TILE = 4096
TRIED = 3  # tokens of the trial


class Tiles:
    """The `forward` of a module that computes each token by itself: [..., h] -> [..., h]."""

    def __init__(self, module: nn.Module):
        self.module, self.whole, self.tokens = module, module.forward, TILE
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if x.shape[:-1].numel() <= self.tokens:
            return self.whole(x)
        kept = [_Kept.apply(x.new_empty(0, requires_grad=True), x)]  # in a list: no gradient flows into it
        return _Tiles.apply(self, kept, x, *self.module.parameters())  # pyright: ignore

    def tiles(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Places and tokens of each tile. The tokens have as many dimensions as x."""
        tokens = x.reshape(-1, x.shape[-1])
        for cut in cuts(len(tokens), self.tokens):
            yield cut, tokens[cut].view(*[1] * (x.dim() - 2), -1, x.shape[-1])


@contextmanager
def in_tiles_of(tokens: int | None, tiles: Sequence[Tiles]) -> Iterator[None]:
    """Other tiles for a while; None = everything at once."""
    before = [each.tokens for each in tiles]
    for each in tiles:
        each.tokens = sys.maxsize if tokens is None else tokens
    try:
        yield
    finally:
        for each, size in zip(tiles, before, strict=True):
            each.tokens = size


class _Kept(torch.autograd.Function):
    """Keeps the input of the tiles for their backward pass, before the first tile is computed.

    A checkpointed layer is computed again until the last of its tensors is there. So it stops here, where the
    MLP is its last part, and the MLP is not computed once more. `torch.utils.checkpoint` keeps its inputs in
    the same way.
    """

    @staticmethod
    def forward(ctx: Any, empty: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return empty.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("nothing is computed from it")


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: Tiles, kept: list[Tensor], x: Tensor, *weights: nn.Parameter) -> Tensor:
        ctx.tiles, ctx.kept, ctx.random = tiles, kept, random_state(x.device)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for cut, tile in tiles.tiles(x):
            out.view(-1, x.shape[-1])[cut] = tiles.whole(tile).view(-1, x.shape[-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tiles, (kept,) = ctx.tiles, ctx.kept
        (x,) = kept.grad_fn.saved_tensors
        del kept
        ctx.kept.clear()  # autograd frees what a node has saved only if it runs that node
        needs_x, *needed = ctx.needs_input_grad[2:]
        weights = [w for w, need in zip(tiles.module.parameters(), needed, strict=True) if need]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        rows = grad.reshape(-1, x.shape[-1])
        sums: list[Tensor | None] = [None] * len(weights)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            set_random_state(ctx.random, x.device)
            for cut, tile in tiles.tiles(x):
                with torch.enable_grad():
                    tile = tile.detach().requires_grad_(needs_x)
                    out = tiles.whole(tile)
                asked = [*[tile] * needs_x, *weights]
                found = list(torch.autograd.grad(out, asked, rows[cut].view_as(out), allow_unused=True))
                if grad_x is not None:
                    grad_x.view(-1, x.shape[-1])[cut] = found.pop(0).view(-1, x.shape[-1])
                for i, part in enumerate(found):  # in float32: sums in bfloat16 would round each time
                    if part is not None:
                        total = sums[i]
                        sums[i] = part.to(accumulator(part.dtype)) if total is None else total.add_(part)
                del out, found
        each = iter(None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True))
        return None, None, grad_x, *(next(each) if need else None for need in needed)


def random_state(device: torch.device) -> list[Tensor]:
    """What an adapter's dropout draws from."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda, device)


def tiled(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are computed in tiles."""
    return [module for module in model.modules() if isinstance(module.forward, Tiles)]


def token_wise(model: nn.Module, hidden_size: int) -> list[nn.Module]:
    """The largest modules of a model that compute each token by itself, and have weights to do so.

    Their `forward` takes one tensor and gives one of its shape.
    """
    known: dict[str, bool] = {}

    def search(module: nn.Module) -> Iterator[nn.Module]:
        parameters = inspect.signature(module.forward).parameters.values()
        if len(parameters) == 1 and sum(len(shape_of(w)) > 1 for w in module.parameters()) > 1:
            kind = f"{type(module)} {module} {[shape_of(w) for w in module.parameters()]}"
            if kind not in known:
                known[kind] = computes_each_token_by_itself(module, hidden_size)
            if known[kind]:
                yield module
                return
        for child in module.children():
            yield from search(child)

    return list(search(model))


@torch.no_grad()
def computes_each_token_by_itself(module: nn.Module, hidden_size: int) -> bool:
    """Whether a module gives the same for a few random tokens together as for each alone.

    It computes with random weights on the CPU. So it gives the same answer for a model without weights, or
    with a part of them. They take little memory: entry [i, j] of a weight is number i + j of a row, and the
    matrices of stacked experts overlap but for their first numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def stand_in(x: Tensor) -> Tensor:
        shape = shape_of(x)
        strides = [1] * len(shape) if len(shape) < 3 else [*[4] * (len(shape) - 2), shape[-1], 1]
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        numbers = torch.randn(last + 1, generator=generator) / max(shape[-1:], default=1) ** 0.5
        return numbers.as_strided(shape, strides)

    values = {name: stand_in(w) for name, w in module.named_parameters()}
    values |= {name: stand_in(b) for name, b in module.named_buffers() if b.is_floating_point()}
    tokens = torch.randn(1, TRIED, hidden_size, generator=generator)
    try:
        together = functional_call(module, values, (tokens,))
        alone = torch.cat([functional_call(module, values, (t,)) for t in tokens.split(1, 1)], 1)
        return (
            together.shape == tokens.shape
            and together.dtype == tokens.dtype
            and torch.allclose(together, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
        )
    except Exception:  # it takes something else, or gives something else than one tensor
        return False


def described(tiles: Sequence[Tiles]) -> str:
    """How many modules of each class these are."""
    counts = Counter(type(each.module).__name__ for each in tiles)
    return ", ".join(f"{n} {name}" for name, n in counts.items())
