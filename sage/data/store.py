"""Tables in the cache: an Arrow file that is written batch by batch, and notes about it in a file beside it.

The notes are written last and hold a checksum of the table. So a table counts only once it is whole, and
whoever opens it may map it into memory without reading it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash

from sage.util.files import checksum, sweep, write_text, write_whole
from sage.util.locks import locked
from sage.util.progress import console

BATCH_BYTES = 32 << 20  # of a batch of the file: large, so that offsets lie together and few pages hold them


def made_once(file: Path, make: Callable[[], None], what: str) -> dict[str, Any]:
    """The notes of a table. `make` writes it if it is not there yet, while other processes wait.

    Where the table is damaged, a line says that, and `what` follows. This does not read the table.
    """
    notes = _notes(file, what)
    if notes is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):
            if _content(file) is None:
                make()
        notes = _notes(file, what)
        assert notes is not None
    return notes


def write_table(
    file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], notes: Callable[[], dict[str, Any]]
) -> None:
    """Write a table and its notes. `notes` is called when all batches are written."""
    sweep(file)
    content: dict[str, Any] = {}

    def fill(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
            for batch in _merged(batches):
                writer.write_batch(batch)
        found = notes()
        content.update(size=path.stat().st_size, checksum=checksum(path), own=_checksum(found), notes=found)

    write_whole(file, fill)
    write_text(_notes_file(file), json.dumps(content))  # ASCII: a bad row may hold what is no text


def open_intact(file: Path, make: Callable[[], None], what: str) -> datasets.Dataset:
    """The table, mapped into memory after a look at all of it. `make` writes it again if it is damaged."""
    content = _content(file)
    if content is None or checksum(file) != content["checksum"]:
        say_damaged(file, what)
        make()
    return open_table(file)


def open_table(file: Path) -> datasets.Dataset:
    """The table, mapped into memory. Nothing is read yet."""
    return datasets.Dataset.from_file(str(file))


def say_damaged(file: Path, what: str) -> None:
    console.print(f"{file} is damaged, so {what}", markup=False)


def _notes(file: Path, what: str) -> dict[str, Any] | None:
    content = _content(file)
    if content is None and _notes_file(file).exists():
        say_damaged(file, what)
    return content and content["notes"]


def _content(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(_notes_file(file).read_text(encoding="utf-8"))
        size, _ = content["size"], content["checksum"]
        whole = content["own"] == _checksum(content["notes"]) and file.stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if whole else None


def _notes_file(file: Path) -> Path:
    return file.with_suffix(".json")


def _checksum(notes: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(notes, sort_keys=True).encode())


def _merged(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
    """The same rows in batches of about BATCH_BYTES."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(part.nbytes for part in held) >= BATCH_BYTES:
            yield from pa.Table.from_batches(held).combine_chunks().to_batches()
            held = []
    if held:
        yield from pa.Table.from_batches(held).combine_chunks().to_batches()
