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
COMMAND_LOCK = ".command.lock"  # in the folder of a run or a sweep: the command that writes its config has it


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
def reserved(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder, so that of two `sage` commands that start at once only one writes there.

    The default folders of two commands are the same if they start in the same second. `key` is the config's
    key that chooses the folder.

    Raises:
        UserError: another command holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder / COMMAND_LOCK, timeout=0)
    except Timeout as e:
        raise UserError(
            f"{folder} is in use by another `sage` command: wait for it, or choose another folder with "
            f"{key}=FOLDER"
        ) from e
    try:
        yield
    finally:
        Path(held.lock_file).unlink(missing_ok=True)  # a folder that was refused stays as it was
        held.release()


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
