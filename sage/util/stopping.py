"""SIGINT, SIGTERM and SIGUSR1: the first one ends a run in good order, and a second one ends it at once.

A signal may reach a process twice: Ctrl-C and Slurm signal every process of a job, and the launcher passes on
what it gets. So signals that come together count as one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TOGETHER = 1.0  # seconds
WATCH = "SAGE_LAUNCHER_PIPE"  # environment variable: a pipe that ends when the launcher does
GO_ON = "SAGE_GO_ON"  # environment variable of a rank: how to continue, as its launcher says it
TORCHRUN = "TORCHELASTIC_RUN_ID"  # environment variable that torchrun sets
PATIENCE = 600.0  # seconds after the launcher's death, at most, for the step and its checkpoint
SHOW_CURSOR = b"\r\x1b[?25h"  # a progress bar may have hidden it


class Stopped(Exception):
    """All ranks have agreed to end the run here, because of a signal. What they did is on disk."""


class Arrivals:
    """The signals that this process has got."""

    def __init__(self):
        self.first = 0  # the number of the first one; 0 if none has come
        self.at = 0.0
        self.again = False  # whether another one came more than TOGETHER after the first

    def add(self, signum: int) -> None:
        now = time.monotonic()
        if not self.first:
            self.first, self.at = signum, now
        self.again = self.again or now - self.at > TOGETHER

    @property
    def status(self) -> int:
        """The exit status of a process that ends because of the first signal; 0 if none has come."""
        return self.first and 128 + self.first

    @property
    def name(self) -> str:
        return signal.Signals(self.first).name


_arrivals = Arrivals()
_deferred = False
_orphaned = False
_farewell = ""
_parent = 0  # the process that this one must not outlive; 0 if there is none


def go_on(run_dir: Path) -> str:
    """How to continue a run that was interrupted."""
    return os.environ.get(GO_ON, f"go on with `sage resume {run_dir}`")


def install(run_dir: Path, rank: int) -> None:
    """Let signals end this rank of a run: at once, until `defer` is called. Rank 0 says how to continue.

    The rank also ends when its launcher is gone, however that one died. The rank sees that a pipe closes,
    which works on every system and without a race. A rank of torchrun, which has no such pipe, sees that it
    has another parent. Ranks of srun or deepspeed see nothing.
    """
    global _farewell
    _farewell = go_on(run_dir) if rank == 0 else ""
    for signum in SIGNALS:
        signal.signal(signum, _on_signal)
    # Helper processes, such as those that tokenise, must end as usual.
    os.register_at_fork(after_in_child=_reset)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the launcher blocks them until a rank is here
    pipe = os.environ.pop(WATCH, None)
    if pipe or TORCHRUN in os.environ:
        threading.Thread(target=_watch, args=(pipe and int(pipe), os.getppid()), daemon=True).start()


def defer() -> None:
    """From here on a signal is only noted: the training loop asks for it at every step's end."""
    global _deferred
    _deferred = True


def asked() -> bool:
    """Whether a signal has asked this rank to end."""
    return bool(_arrivals.first)


def first() -> int:
    """The number of the first signal that this rank has got; 0 if none has come."""
    return _arrivals.first


def heard(signum: int) -> None:
    """Another rank has got a signal, for which this one ends too. Its own may come late, or never."""
    if not asked():
        _arrivals.add(signum)


def status() -> int:
    """The exit status that the signal asks for; 0 if none has come."""
    return _arrivals.status


def stay_with_parent() -> None:
    """Let the ranks that this process starts end when the process that started this one is gone."""
    global _parent
    _parent = os.getppid()


def abandoned() -> bool:
    """Whether the process that `stay_with_parent` saw is gone."""
    return bool(_parent) and os.getppid() != _parent


def wait_for_end_of(parent: int) -> None:
    """Return once the process `parent`, which started this one, is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)


def tell(line: str) -> None:
    """Write a line to standard error; also in a signal handler, where `print` may fail."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def end(status: int) -> None:
    """End the process without Python's own shutdown, which may wait for threads and other ranks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if sys.stdout and sys.stdout.isatty():
        with suppress(OSError):
            os.write(1, SHOW_CURSOR)
    if _orphaned and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with the helpers, which the launcher would have ended
    os._exit(status)


def leave(where: str = "") -> None:
    """End this rank because of a signal, `where` it stands, such as "after its step 7"."""
    if _farewell:
        tell(f"{_arrivals.name} ended the run{where and ' '}{where}: {_farewell}")
    end(_arrivals.status)


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` handle the signals for a while. Only a process's main thread can; others do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started here keep signals waiting until `install`, so that none is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_signal(signum: int, _: Any) -> None:
    new = not asked()
    _arrivals.add(signum)
    if _arrivals.again or not _deferred:
        leave()
    elif new and _farewell:
        tell(f"{_arrivals.name}: the run ends after this step; another signal ends it at once")


def _reset() -> None:
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


def _watch(pipe: int | None, parent: int) -> None:
    global _orphaned
    if pipe is None:
        wait_for_end_of(parent)
    else:
        os.read(pipe, 1)  # nobody writes: it returns at the end
    _orphaned = True
    if _farewell:
        tell("the launcher of this run is gone: its ranks end as after SIGTERM")
    if _deferred:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
    # This thread ends the rank itself. The main thread handles no signal while it waits in a library, such as
    # gloo, which waits long for a rank that has ended before the two have met.
    end(128 + signal.SIGTERM)
