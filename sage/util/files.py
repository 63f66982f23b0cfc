"""Files that appear whole or not at all, even if the process or the machine dies."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import xxhash

CHUNK = 1 << 20  # bytes read at a time: what the processor keeps near


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, flush it to disk, and rename it.

    Several processes, also of several machines, may write the same file at once: each has its own temporary
    file, and the last one wins.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(file)
    try:
        write(temporary)
        fsync(temporary)
        os.replace(temporary, file)
    except BaseException as error:  # a full disk gets its room back
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file)  # a write that fails does not name it
        raise
    fsync(file.parent)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, of this machine or another one."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def sweep(file: Path) -> None:
    """Delete temporary files of `file` that processes of this machine left behind when they were killed."""
    for left in file.parent.glob(f".{file.name}.{platform.node()}.*.tmp"):
        if not psutil.pid_exists(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a folder that is complete. What was at `final` is deleted once the new folder is there."""
    old = final.with_name(f".{final.name}.old")
    if old.exists():  # left by a kill
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def link_folder(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """Make `target` a copy of `source`, of hard links, which take no room on the disk. Names that match
    `without` are left out.

    Where the file system has no hard links, the files are copied.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    if temporary.exists():  # left by a kill
        shutil.rmtree(temporary)
    shutil.copytree(source, temporary, copy_function=_link, ignore=shutil.ignore_patterns(*without))
    replace_folder(temporary, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def without_wildcards(path: Path) -> Iterator[Path]:
    """The path, or a link to it for a library that would take a part of it, such as [1], for a wildcard."""
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link


def delete_folder(folder: Path) -> None:
    """Delete a folder, or a link to one, as far as that is allowed."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum(file: Path) -> str:
    """A checksum (XXH3) that notices damage, about as fast as the file can be read, but not intent."""
    digest = xxhash.xxh3_64()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def source_digest(*parts: str) -> str:
    """Hash of sage's own source in these files and folders of the package, for caches that depend on it."""
    package = Path(__file__).resolve().parent.parent
    found = [package / part for part in parts]
    files = sorted(file for path in found for file in ([path] if path.is_file() else path.rglob("*.py")))
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
