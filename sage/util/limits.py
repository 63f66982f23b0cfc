"""A limit on the CPU time of code that came with a model, such as its chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TooLong(Exception):
    """The code has used up its time."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block once this process has computed for `seconds` in it.

    Only Python code can be stopped so, and only in the main thread; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _stop:  # it stays: setting it takes longer than a rendering
        signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except TooLong:
        raise TooLong(f"it has computed for {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _stop(*_: Any) -> None:
    raise TooLong
