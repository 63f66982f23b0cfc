"""ZeRO-3: every weight is split over the ranks as soon as it is read, so no rank holds the whole model.

transformers reads one weight after another from mapped files. A hook sees each one before it enters the
model, and DeepSpeed takes it from there. So missing weights, conversions and buffers are handled as in a
model that is not sharded, and the values are the same bit for bit.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sage.util import ranks
from sage.util.errors import UserError
from sage.util.progress import console

# transformers marks the weights that it has read. What is missing from the files is initialised later, and
# must be whole until then.
READ = "_is_hf_initialized"


def load_sharded(
    read: Callable[[], nn.Module],
    split: Callable[[nn.Module], None],
    dtype: torch.dtype,
    at_once: bool = False,
) -> nn.Module:
    """What `read` returns, a transformers model, with its weights split over the ranks as they are read.

    Each rank keeps the part that `split` (`sage.model.engine.split_weights`) gives it, in `dtype`. Weights
    that come from no file are split at the end, and with `at_once` all are. Every rank calls this.
    """

    def take(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        tied = module._parameters.get(name)  # before it becomes a second name of `weight`
        both = weight is not None and weight is not tied and is_split(weight) and is_split(tied)
        # transformers ties weights that are both in the files if they are equal. Split ones look empty.
        if both and any(ranks.gather(not torch.equal(own_part(tied), own_part(weight)))):
            raise ValueError("the files hold different values for weights that the config ties")
        if at_once or weight is None or weight.is_meta or is_split(weight) or not hasattr(weight, READ):
            return
        holder = nn.Module()
        holder._parameters["weight"] = weight  # past the hook
        # A copy, since DeepSpeed writes rank 0's values into this tensor, and it may be a mapped file.
        weight.data = weight.data.to(wanted(weight), copy=True, memory_format=torch.contiguous_format)
        split(holder)
        if size_of(weight) > 2**20:
            return_freed_memory()

    def wanted(weight: Tensor) -> torch.dtype:
        return dtype if weight.is_floating_point() else weight.dtype

    hook = register_module_parameter_registration_hook(take)
    try:
        # transformers would otherwise read ahead, in threads, without a limit.
        with patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            model = read()
    except UserError:
        if at_once:
            raise
        model = None
    finally:
        hook.remove()
    if model is None:  # some models compute a fixed weight from the shape of the one that was read (Pegasus)
        at_once, model = True, read()
    if at_once:
        console.print("each rank read the whole model before its weights were split", markup=False)
    for weight in model.parameters():
        if not is_split(weight):
            weight.data = weight.data.to(wanted(weight))
    split(model)
    return model


def return_freed_memory() -> None:
    """Ask the C library for the memory that was freed. It keeps what lies between blocks in use, and here a
    part follows every whole weight: a third of the model would stay."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)


def is_split(weight: Any) -> bool:
    """Whether DeepSpeed has split a weight over the ranks."""
    return hasattr(weight, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are split over the ranks."""
    return any(is_split(weight) for weight in model.parameters())


def size_of(weight: Any) -> int:
    """Elements of a weight, of which this rank may hold a part."""
    return weight.ds_numel if is_split(weight) else weight.numel()


def shape_of(weight: Any) -> torch.Size:
    """The shape of a weight, of which this rank may hold a part. Its own `shape` is then that of nothing."""
    return weight.ds_shape if is_split(weight) else weight.shape


def own_part(weight: Any) -> Tensor:
    """What this rank holds of a weight: all of it, or its part, flat and without padding."""
    if not is_split(weight):
        return weight
    part = weight.ds_tensor
    start = part.ds_numel * weight.ds_zero_partition_rank
    return part[: max(min(weight.ds_numel - start, part.ds_numel), 0)]


def check_weights(policy: nn.Module) -> None:
    """Refuse a model that is broken before it is trained. Every rank calls this.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    broken = (
        name
        for name, weight in policy.named_parameters()
        for some in own_part(weight).detach().flatten().split(2**20)  # isfinite makes copies
        if not torch.isfinite(some).all()
    )
    for name in ranks.gather(next(broken, None)):
        if name:
            raise UserError(
                f"the model itself is broken: its weight {name.removeprefix('model.')} holds NaN or infinite "
                "values; use another model.path, or another checkpoint of this model"
            )
