"""What ranks do in turn; a process that no group was made for is a world of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and only then on the others, who find its results in a cache."""
    if dist.is_initialized() and dist.get_rank() != 0:
        dist.barrier()
        return work()
    result = work()
    barrier()
    return result


def leave() -> None:
    """Leave the process group, where there is one, and end the process with status 0.

    Not through the interpreter's own end: DeepSpeed keeps groups alive, and a gloo thread that lets go of its last
    tensor while Python shuts down aborts the process, with all its work done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
