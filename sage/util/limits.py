"""Limits on the CPU time and the memory of code that came with a model, such as its chat template."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    if signal.getsignal(signal.SIGVTALRM) is not _stop:  # it stays: setting it takes longer than a rendering
        signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_PROF, LAST * seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except TooLong:
        raise TooLong(f"it has computed for {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*_: Any) -> None:
    raise TooLong


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Raise MemoryError in the block once this process has taken `size` more bytes in it.

    It works where /proc says how much the process has; elsewhere, as on macOS, there is no limit.
    """
    try:
        taken = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    given = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([taken + size, *given]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
