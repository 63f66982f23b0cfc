"""Bytes that a micro-batch takes, found out by running the model's own code on the meta device.

Meta tensors have shapes and no content. So this needs neither the weights nor the memory, and it holds for
every model whose code transformers has. Only two parts are stood in for, because their code looks at values
or runs on CUDA alone: the head and CUDA's FlexAttention.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sage.config import ModelConfig
from sage.data.packing import MicroBatch
from sage.model import attention, loading
from sage.model.folder import reason
from sage.model.kernels import TokenStats, recompute, tiled
from sage.model.policy import Policy
from sage.model.sequence import ALONE, SequenceGroup
from sage.util.errors import UserError, first_line

META, WIDE = torch.device("meta"), torch.float32


class Shapes(SequenceGroup):
    """One of several ranks that compute rows together. The others are not there: it has shapes only."""

    def inside(self, positions: Tensor, start: int, length: int) -> Tensor:
        # This stands for the rank with the most scored tokens.
        return torch.arange(min(len(positions), length), device=positions.device)

    def exchange(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x.contiguous())

    def add(self, values: Tensor) -> None:
        pass


def shell(folder: str, cfg: ModelConfig, dtype: torch.dtype, sequence_parallel: int = 1) -> Policy:
    """The policy of a model's folder or hub name, without weights. Needs its config only.

    Raises:
        UserError: the config cannot be read, the hub does not give it, or no model can be built from it.
    """
    config = loading.read_config(folder, cfg)
    with META:
        try:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=cfg.trust_remote_code
            )
        except Exception as e:  # each model has its own checks
            raise UserError(
                f"model.path={cfg.path}: no model can be built from its config: {reason(e)}"
            ) from e
        model = loading.prepared(model, replace(cfg, adapter_path=None), seed=0, offload=True)
    group = Shapes(sequence_parallel) if sequence_parallel > 1 else ALONE
    coefficient = loading.router_coefficient(cfg, model)
    return Policy(model.to(META), cfg.head, coefficient, group, cfg.tiled_mlp)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the meta tensors that were made since, and are still held. `known` do not count."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.shapes = {tensor.shape for tensor in known if tensor.requires_grad and tensor.dim() > 1}
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # code that asks for a value, such as whether positions were packed by somebody else
        if self.backward and func is torch.ops.aten.add.Tensor and args[0].shape in self.shapes:
            return args[0]  # the second gradient of a tied weight, which autograd adds in place without us
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class MicroBytes(NamedTuple):
    """Bytes of one micro-batch: `kept` wait for the backward pass, `head` are its part for the head, and
    `peak` is the most at any time of both passes. None of them holds weights. `moved` wait in CPU memory
    instead."""

    kept: int
    head: int
    peak: int
    moved: int


def micro_bytes(policy: Policy, batch: MicroBatch, cuda: bool, backward: bool = True) -> MicroBytes:
    """The bytes of a forward and backward pass of a `shell` over a micro-batch, or of the forward pass alone.

    The peak holds the gradients of a few weights at a time. What becomes of them is the engine's.

    Raises:
        UserError: the model's code looks at values, so it does not run without them.
    """
    batch = batch.to(META)
    inputs = [x for x in batch if isinstance(x, Tensor)]
    known = [*inputs, *policy.parameters(), *policy.buffers()]
    hooks = [p.register_post_accumulate_grad_hook(forget) for p in policy.parameters() if p.requires_grad]
    try:
        with torch.set_grad_enabled(backward), stand_ins(policy, cuda) as others, LiveTensors(known) as live:
            logps = policy(batch)
            kept = live.now
            if backward:
                live.backward = True
                (logps.chosen.sum() - logps.rejected.sum()).backward()
    except Exception as e:  # a model's code fails in many ways
        raise UserError(
            f"this model cannot be planned: its code does not run without values ({first_line(e)})"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    return MicroBytes(kept, others.head, live.peak, others.moved)


def forget(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass
class Others:
    """Bytes that the stand-ins count."""

    head: int = 0  # of its backward pass
    moved: int = 0  # to CPU memory


@contextmanager
def stand_ins(policy: Policy, cuda: bool) -> Iterator[Others]:
    """For a while, the head takes its memory without looking at values, and so does CUDA's attention. What
    is offloaded is no longer there."""
    device, found = "cuda" if cuda else "cpu", Others()
    head = policy.head
    if head is not None and policy.backend != "oracle":

        def forward(hidden: Tensor, labels: Tensor, stats: tuple[str, ...], backend: str) -> TokenStats:
            return TokenStats(logps=HeadShape.apply(hidden, head.weight, device, found))  # pyright: ignore

        head.forward = forward  # pyright: ignore
    if cuda:
        attention.AttentionInterface.register(attention.IMPLEMENTATION, flex_shape)

    def move(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        found.moved += tensor.nbytes
        return tensor.shape, tensor.dtype

    def save_on_cpu(**_: Any) -> AbstractContextManager[Any]:
        if not cuda:
            return nullcontext()
        return saved_tensors_hooks(move, lambda x: torch.empty(x[0], dtype=x[1], device=META))

    try:
        with patch("transformers.modeling_utils.save_on_cpu", save_on_cpu, create=True):
            yield found
    finally:
        if head is not None:
            head.__dict__.pop("forward", None)
        attention.AttentionInterface.register(attention.IMPLEMENTATION, attention.packed_attention)


class HeadShape(torch.autograd.Function):
    """What `recompute` allocates, at the sizes of its tiles."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, device: str, found: Others) -> Tensor:
        (n, h), v = hidden.shape, weight.shape[0]
        rows, cols = tiled.TILES[device]
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.device, ctx.found = weight, device, found
        used = [hidden.new_empty(min(rows, n) * min(cols, v), dtype=WIDE)]
        used.append(hidden.new_empty(3, -(-v // cols), n, dtype=WIDE))
        if device == "cpu":
            used += [hidden.new_empty(n, h, dtype=WIDE), hidden.new_empty(min(cols, v), h, dtype=WIDE)]
        del used
        return hidden.new_zeros(n, dtype=WIDE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), weight = ctx.saved_tensors, ctx.weight
        (n, h), v = hidden.shape, weight.shape[0]
        rows, cols = tiled.TILES[ctx.device]
        half = ctx.device == "cuda" or recompute.bfloat16_in_hardware()
        grad_hidden = hidden.new_empty(n, h, dtype=WIDE)
        used = [grad_hidden, hidden.new_empty(2, min(cols, v), h, dtype=WIDE)]
        used.append(hidden.new_empty(min(rows, n) * min(cols, v), dtype=hidden.dtype if half else WIDE))
        grad_weight = None
        if weight.requires_grad:
            grad_weight = torch.empty_like(weight)
            used += [grad_weight, torch.empty_like(hidden)]
        ctx.found.head = sum(x.nbytes for x in used)
        del used
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


class FlexShape(torch.autograd.Function):
    """What FlexAttention keeps: queries, keys, values, its output, and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def flex_shape(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    packed_row: attention.PackedRow,
    **__: Any,
) -> tuple[Tensor, None]:
    out: Any = FlexShape.apply(*packed_row.group.to_heads(query, key, value))
    return packed_row.group.to_tokens(out.transpose(1, 2).contiguous()), None
