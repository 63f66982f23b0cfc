"""A model in float32 for a while: checks that compare two ways of computing must not depend on rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sage.util import processes


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """A model's weights in float32 for a while; afterwards it has the very tensors that it had before."""
    before = [(x, x.data) for x in (*model.parameters(), *model.buffers()) if x.dtype == torch.bfloat16]
    try:
        for holder, data in before:
            holder.data = data.float()
        yield
    finally:
        for holder, data in before:
            holder.data = data


def free_memory(device: torch.device) -> int:
    """Bytes that the device has left, those that torch only keeps for later included."""
    if device.type != "cuda":
        return processes.free_memory()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
