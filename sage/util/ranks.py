"""This process among the ranks of a run. A process without a process group is a world of one."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

from sage.util.errors import UserError, first_line
from sage.util.files import source_digest

T = TypeVar("T")
MEET = timedelta(minutes=10)  # for all ranks to come
WAIT = timedelta(days=7)  # for another rank in a collective: it may read, download or answer for hours


def _group() -> Any:
    """torch.distributed, if this process is in a group. A command that never loads torch is in none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_initialized() else None


def rank() -> int:
    """The group's number for this process; before there is a group, the launcher's; without a launcher, 0."""
    return dist.get_rank() if (dist := _group()) else _given("RANK", 0)


def world_size() -> int:
    return dist.get_world_size() if (dist := _group()) else _given("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its own machine, which is also the number of its GPU."""
    return _given("LOCAL_RANK", 0)


def _given(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def check_place() -> None:
    """Refuse what a launcher has set, or left out, if this process cannot be a rank with it.

    Raises:
        UserError: names the variables.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys():
        return
    numbers = ["RANK", "WORLD_SIZE", *(["LOCAL_RANK", "MASTER_PORT"] if world_size() > 1 else [])]
    wrong = [name for name in numbers if not os.environ.get(name, "").isdecimal()]
    if world_size() > 1 and not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR")
    if not wrong and rank() >= world_size():
        wrong = ["RANK", "WORLD_SIZE"]
    if wrong:
        found = ", ".join(f"{name}={os.environ.get(name, '')}" for name in wrong)
        raise UserError(
            f"this process cannot be a rank with {found}: a launcher must set RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT (docs/clusters.md). If there is no launcher, unset them"
        )


def join(backend: str, device: Any = None) -> None:
    """Join the process group of the run, if this process is not in one yet.

    From then on a rank waits for the others for as long as their work takes. The launcher ends it if one of
    them dies, and so does the connection to that rank, which the system closes. `device` is the GPU for nccl.

    Raises:
        UserError: not all ranks came, or their machines have other versions of sage or its packages.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return
    if world_size() == 1:
        # In memory, without a port: a free port that was looked up may be taken by the time we listen on it.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device)
        return
    store = None
    try:
        store, me, count = next(rendezvous("env://", timeout=MEET))
        store.set(f"here/{me}", "")
        store.wait([f"here/{other}" for other in range(count)], MEET)
    except dist.DistError as e:
        count, where = world_size(), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        absent = [str(other) for other in range(count) if store and not store.check([f"here/{other}"])]
        raise UserError(
            f"not all {count} ranks connected to {where} within {MEET} "
            f"(missing: {', '.join(absent) or 'unknown'}). A rank failed to start, or its machine cannot "
            f"reach this address ({first_line(e)})"
        ) from e
    store.set_timeout(WAIT)
    store = dist.PrefixStore("sage", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=me, world_size=count, timeout=WAIT, device_id=device)
    agreed(_software, "sage and the packages that it computes with")


def _software() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "deepspeed")
    return {name: importlib.metadata.version(name) for name in packages} | {"sage": source_digest("")}


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


def total(values: Any) -> Any:
    """The sum over the ranks of a tensor on the group's device, in place."""
    if dist := _group():
        dist.all_reduce(values)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank. The other ranks' own values are ignored."""
    if not (dist := _group()) or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What became of some work on a rank."""

    value: T | None
    error: UserError | None
    machine: str

    @classmethod
    def of(cls, work: Callable[[], T]) -> _Outcome[T]:
        try:
            return cls(work(), None, socket.gethostname())
        except UserError as e:
            return cls(None, e, socket.gethostname())


def main_only(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone, and return its result on every rank.

    Use this for whatever depends on files: another rank may see a file that has just appeared, or sit on a
    machine that does not see it at all. Ranks that decide differently wait for each other for ever.

    Raises:
        UserError: `work` raised it on rank 0; then every rank does.
    """
    outcome = broadcast(_Outcome.of(work) if rank() == 0 else None)
    assert outcome is not None
    if outcome.error:
        raise outcome.error
    return outcome.value  # pyright: ignore[reportReturnType]


def machine_first(work: Callable[[], T]) -> T:
    """Run `work` on the first rank of each machine and then on the others, which find its results there.

    Use this for what each machine needs on its own disk. `work` must not use the process group: one machine
    may find the results of an earlier run, and another one not.

    Raises:
        UserError: `work` raised it on some rank; then every rank does.
    """
    mine = None
    for first in (True, False):
        if (local_rank() == 0) == first:
            mine = _Outcome.of(work)
        _raise_first(mine and replace(mine, value=None))
    assert mine is not None
    return mine.value  # pyright: ignore[reportReturnType]


def agreed(work: Callable[[], T], what: str) -> T:
    """Run `work` on the first rank of each machine, and return rank 0's result on every rank.

    Use this for what says which files a machine has. `what` names them in an error message.

    Raises:
        UserError: `work` raised it on some rank, or two machines got different results; then every rank does.
    """
    outcomes = _raise_first(_Outcome.of(work) if local_rank() == 0 else None)
    main = outcomes[0]
    assert main is not None
    for other, outcome in enumerate(outcomes):
        if outcome and outcome.value != main.value:
            raise UserError(
                f"{what} are not the same on {outcome.machine} (rank {other}) as on {main.machine} (rank 0): "
                "make them the same on all machines"
            )
    return main.value  # pyright: ignore[reportReturnType]


def _raise_first(mine: _Outcome[T] | None) -> Sequence[_Outcome[T] | None]:
    """Every rank's outcome, in order; the first UserError among them is raised on every rank."""
    outcomes = gather(mine)
    main = outcomes[0]
    for outcome in outcomes:
        if main and outcome and outcome.error:
            elsewhere = outcome.machine != main.machine
            raise UserError(f"on {outcome.machine}: {outcome.error}") if elsewhere else outcome.error
    return outcomes


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
