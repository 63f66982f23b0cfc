"""This process among the ranks of a run. A process without a process group is a world of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from sage.util.errors import UserError

T = TypeVar("T")


def _group() -> Any:
    """torch.distributed, if this process is in a group. A command that never loads torch is in none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_initialized() else None


def rank() -> int:
    """The group's number for this process; before there is a group, the launcher's; without a launcher, 0."""
    return dist.get_rank() if (dist := _group()) else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if (dist := _group()) else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its own machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    if dist := _group():
        dist.barrier()


def gather(value: T) -> list[T]:
    """One small Python object from every rank, in order, on every rank."""
    if not (dist := _group()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank. The other ranks' own values are ignored."""
    if not (dist := _group()) or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def main_only(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone, and return its result on every rank.

    Use this for whatever depends on files: another rank may see a file that has just appeared, or sit on a
    machine that does not see it at all. Ranks that decide differently wait for each other for ever.

    Raises:
        UserError: `work` raised it on rank 0; then every rank does.
    """
    result, error = _attempt(work) if rank() == 0 else (None, None)
    result, error = broadcast((result, error))
    if error:
        raise error
    return result  # pyright: ignore[reportReturnType]


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 first and then on the others, which find its results in a cache.

    Unlike `main_only` this suits results that each machine needs on its own disk. `work` must not use the
    process group.

    Raises:
        UserError: `work` raised it.
    """
    result, error = _attempt(work) if rank() == 0 else (None, None)
    if error := broadcast(error):
        raise error
    return result if rank() == 0 else work()  # pyright: ignore[reportReturnType]


def _attempt(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except UserError as e:
        return None, e


def leave() -> None:
    """Leave the process group, if there is one, and end the process with status 0.

    The interpreter's own shutdown will not do: DeepSpeed keeps groups alive, and a gloo thread that releases
    its last tensor while Python shuts down aborts the process after all its work is done.
    """
    if dist := _group():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
