"""Read one file: JSONL, JSON, CSV, Parquet or Arrow, compressed or not."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sage.data.values import DEEPEST, is_deep
from sage.util.errors import UserError

# Suffix -> how such a file is read. A compression's suffix may follow it.
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
# Names of lists that hold a file's rows.
WRAPPERS = ("data", "rows", "examples", "instances", "pairs", "records", "samples", "items", "train", "test")
# First bytes of files that are not the text that their names promise, and what to do.
DISGUISES = {
    b"\xff\xfe": "it is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16 text: save it as UTF-8",
    b"\x1f\x8b": "it is compressed by gzip: add .gz to its name",
    b"BZh": "it is compressed by bzip2: add .bz2 to its name",
    b"\xfd7zXZ": "it is compressed by xz: add .xz to its name",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: add .zst to its name",
    b"PAR1\x15": "it is Parquet: let its name end in .parquet",
    b"ARROW1\0\0": "it is Arrow: let its name end in .arrow",
    b"PK\x03\x04": "it is a zip archive, perhaps a spreadsheet: save it as JSONL, CSV or Parquet",
}
BATCH = 1000  # rows of an Arrow table that become Python objects at a time


def kind_of(file: Path) -> str | None:
    """How a file is read, by its suffixes; None for one that is not."""
    name = file.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return KINDS.get(Path(name).suffix)


def read_file(name: str, file: Path, split: str) -> Iterator[tuple[int, Any]]:
    """(1-based number, record) of each row; a UserError in place of one that cannot be read."""
    kind = kind_of(file)
    if kind == "arrow":
        yield from enumerate(read_records(_arrow(name, file)), 1)
        return
    try:
        if kind in ("csv", "json"):
            refuse_disguised(name, file)
        if kind == "csv":
            yield from _read_csv(name, file)
        elif kind == "parquet":
            yield from enumerate(_stored(_parquet_batches(name, file)), 1)
        elif (document := read_document(name, file, split)) is not None:
            yield from enumerate(document, 1)
        else:
            with _open(file) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, _parse(line)
    except UserError:
        raise
    except Exception as error:  # a broken archive: each compression has its own family of errors
        raise UserError(f"{name}: cannot be read: {error}") from error


def refuse_disguised(name: str, file: Path) -> None:
    with _open(file) as content:
        head = content.read(8)
    for start, what in DISGUISES.items():
        if head.startswith(start):
            raise UserError(f"{name}: {what}")


def _open(file: Path, **options: Any) -> Any:
    """A file opened for reading bytes, or text with `mode="rt"`; decompressed by its suffix."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression == "zstd":  # fsspec needs a package for it, and notices neither a second frame nor a cut
        content: Any = io.BufferedReader(pa.input_stream(str(file), compression=compression))  # pyright: ignore
        mode = options.pop("mode", "rb")
        return io.TextIOWrapper(content, **options) if mode == "rt" else content
    if compression and compression not in fsspec.available_compressions():
        raise UserError(f"{file}: this Python has no {compression}; decompress the file")
    return fsspec.filesystem("file").open(str(file), **{"mode": "rb", "compression": compression, **options})


def _parse(text: bytes) -> Any:
    """A JSON value, or the UserError that says why there is none."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return UserError(f"not UTF-8 text ({error}); save it as UTF-8")
    except RecursionError:
        return UserError("JSON that is nested too deeply")
    except ValueError as error:  # also a number of more digits than Python converts
        return UserError(f"not valid JSON: {error}")
    deep = text.count(b"[") + text.count(b"{") > DEEPEST and is_deep(value)
    return UserError("JSON that is nested too deeply") if deep else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python takes the last of two values with one key, and drops the first silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def read_document(name: str, file: Path, split: str) -> list[Any] | None:
    """The rows of a file that is one JSON value: an array, or an object around one. None for JSON lines."""
    with _open(file) as lines:
        first = next((line for line in lines if line.strip()), b"")
        value = _parse(first)
        if isinstance(value, dict):
            more = next((line for line in lines if line.strip()), None)
            return _unwrap(name, value, split) if more is None else None
        if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"[", b"{")):
            return None
        text = first + lines.read()
    value = _parse(text)
    if isinstance(value, dict):
        return _unwrap(name, value, split) or [value]
    if isinstance(value, UserError):
        if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") or "Extra data" in str(value):
            return None  # lines, of which the first is broken
        line = re.search(r"line (\d+)", str(value))
        raise UserError(f"{name}:{line[1] if line else 1}: {value}")
    return value


def _unwrap(name: str, value: dict[str, Any], split: str) -> list[Any] | None:
    """The rows in an object such as {"data": [...]} or of columns; None where the object is itself a row."""
    if (rows := _from_columns(value)) is not None:
        return rows
    lists = {
        key: rows
        for key, rows in value.items()
        if isinstance(rows, list)
        and rows
        and all(isinstance(row, dict) and not {"role", "from", "type"} & row.keys() for row in rows)
    }
    if split in lists:
        return [_from_viewer(row) for row in lists[split]]
    if len(lists) < len(value):
        # Beside rows there may be a version. Beside a row's tools there is its prompt.
        lists = {key: rows for key, rows in lists.items() if key in WRAPPERS}
    if len(lists) > 1:
        raise UserError(
            f"{name}: no list {split!r}; it has {', '.join(lists)}. Say which with the "
            "split that goes with this path, such as data.split"
        )
    found = next(iter(lists.values()), None)
    return found and [_from_viewer(row) for row in found]


def _from_columns(value: dict[str, Any]) -> list[Any] | None:
    """The rows of a table that is stored by columns, as pandas and `Dataset.to_dict` write it; None for other
    objects."""
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:  # orient="split"
        return [dict(zip(value["columns"], cells, strict=True)) for cells in value["data"]]
    columns = list(value.values())
    if len(columns) < 2:
        return None
    if all(isinstance(column, dict) for column in columns):  # {"prompt": {"0": ..., "1": ...}, ...}
        indices = list(columns[0])
        if not all(list(column) == indices for column in columns) or not all(map(str.isdigit, indices)):
            return None
        columns = [list(column.values()) for column in columns]
    # An object in a list is a message, or a row.
    if not all(isinstance(column, list) and not any(map(_is_object, column)) for column in columns):
        return None
    if len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)] or None


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _from_viewer(row: dict[str, Any]) -> Any:
    """A row without the cover that the hub's dataset viewer puts around it."""
    if not isinstance(row.get("row"), dict) or not row.keys() <= {"row", "row_idx", "truncated_cells"}:
        return row
    if cut := row.get("truncated_cells"):
        return UserError(
            f"the dataset viewer has cut {', '.join(map(str, cut))} short; get the data set itself"
        )
    return row["row"]


def _read_csv(name: str, file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a table with a header. All values are text, as they stand there.

    The separator is the first that divides the header: many spreadsheets write semicolons or tabs.
    """
    csv.field_size_limit(2**31 - 1)
    options: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    try:
        with _open(file, **options) as text:
            header = text.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from error
    separators = "\t,;|" if ".tsv" in file.name.lower() else ",;\t|"
    separator = next((mark for mark in separators if mark in header), ",")
    with _open(file, **options) as text:
        lines = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next(lines, [])
            if repeated := {column for column in header if header.count(column) > 1}:
                raise UserError(f"{name}: the header has {', '.join(sorted(repeated))} more than once")
            for number, cells in enumerate(filter(None, lines), 1):
                if len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True))
                else:
                    yield number, UserError(f"{len(cells)} cells under a header of {len(header)}")
        except csv.Error as error:
            raise UserError(f"{name}: line {lines.line_num}: not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from error


def read_parquet(name: str, file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset(pq.read_table(file))
    except Exception as error:  # Arrow's errors have no family of their own
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error


def _parquet_batches(name: str, file: Path) -> Iterator[pa.RecordBatch]:
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if repeated := {column for column in names if names.count(column) > 1}:
            raise UserError(f"{name}: the table has {', '.join(sorted(repeated))} more than once")
        yield from table.iter_batches(BATCH)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error


def _arrow(name: str, file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_file(str(file))
    except Exception as error:
        raise UserError(f"{name}: cannot be read as an Arrow stream: {error}") from error


def read_records(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Rows as they are stored: an image stays its bytes."""
    return _stored(data.with_format("arrow").iter(BATCH))


def _stored(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for record in batch.to_pylist():
            yield {column: _without_nulls(value) for column, value in record.items()}


def _without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow adds: it gives each object all the keys that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
