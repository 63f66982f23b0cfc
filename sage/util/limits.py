"""Limits on the CPU time and the memory of code that came with a model, such as its chat template."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

LAST = 4  # times the limit: a single call into C that takes so long ends the process


class TooLong(Exception):
    """The code has used up its time."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block once this process has computed for `seconds` in it.

    Only Python code can be stopped so, and only in the main thread; elsewhere there is no limit. A call into
    C, such as the comparison of deeply nested lists, cannot be interrupted, so SIGPROF ends the process after
    LAST times as long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handle()
    signal.setitimer(signal.ITIMER_PROF, LAST * seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except TooLong:
        raise TooLong(f"it has computed for {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


@cache  # once in a process: asking for the handler takes as long as a rendering
def _handle() -> None:
    signal.signal(signal.SIGVTALRM, _stop)


def _stop(*_: Any) -> None:
    raise TooLong


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Raise MemoryError in the block once this process has taken `size` more bytes in it.

    It works where /proc says how much the process has; elsewhere, as on macOS, there is no limit.
    """
    statm = _statm(os.getpid())
    if statm is None:
        yield
        return
    taken = int(os.pread(statm, 64, 0).split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    given = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([taken + size, *given]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@cache  # it stays open: opening it takes as long as a rendering
def _statm(process: int) -> int | None:
    """The file in which Linux says how much memory a process has; a forked process needs its own."""
    try:
        return os.open(f"/proc/{process}/statm", os.O_RDONLY)
    except OSError:
        return None
