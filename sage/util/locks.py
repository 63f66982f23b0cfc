"""Locks of files and folders, also on file systems that have no locks."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sage.util.errors import UserError
from sage.util.progress import console

# What file systems without locks answer: NFS without its lock service, some FUSE and cluster file systems.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
RANK_LOCK = ".rank{}.lock"  # in a run directory: each rank holds its own for as long as it lives


def lock(file: Path, timeout: float = -1) -> FileLock:
    """Hold `file` as a lock until it is released or this process ends, however it ends.

    Where its file system has no locks, a file in this machine's temporary folder takes its place, with one
    line: processes on other machines are then not seen.

    Args:
        timeout: seconds to wait for another process; -1 = for ever.

    Raises:
        Timeout: another process still holds it.
    """
    try:
        return _acquire(file, timeout)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
    console.print(
        f"{file.parent}: its file system has no locks, so processes on other machines are not seen",
        markup=False,
    )
    return _acquire(_substitute(file), timeout)


def held(file: Path) -> bool:
    """Whether a process holds this lock now. A lock that this user cannot open counts as held."""
    try:
        lock(file, timeout=0).release()
    except (Timeout, OSError):
        return True
    return False


def alive(run_dir: Path) -> bool:
    """Whether a rank of this run still lives."""
    return any(held(file) for file in run_dir.glob(RANK_LOCK.format("*")))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """`lock` for a block."""
    held = lock(file)
    try:
        yield
    finally:
        held.release()


def _acquire(file: Path, timeout: float) -> FileLock:
    held = FileLock(file)
    held.acquire(timeout=timeout)
    return held


def _substitute(file: Path) -> Path:
    folder = Path(tempfile.gettempdir(), f"sage-locks-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder / hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
