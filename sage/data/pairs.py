"""Preference pairs: read in any common format, and checked.

Nothing here imports torch, so a command can refuse bad data before it loads a model.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import datasets

from sage.data.source import read_rows, refuse_bad_rows
from sage.util.errors import UserError

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


COLUMNS = ("pair_id", "prompt", "chosen", "rejected", "pass_rate")


FEATURES = datasets.Features(
    {name: datasets.Value("float64" if name == "pass_rate" else "string") for name in COLUMNS}
    | {"row": datasets.Value("int64")}
)


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


def read_prompt(text: str) -> str | list[dict[str, str]]:
    """A `prompt` column's value: a plain text, or messages."""
    return json.loads(text)


def _names(path: str, columns: dict[str, str], present: Mapping[str, None]) -> dict[str, str]:
    """Our name -> theirs, for the columns this source has; without one for prompt, it is implicit."""
    names = {name: columns.get(name, name) for name in COLUMNS}
    for name, theirs in names.items():
        if theirs not in present and (name in columns or name in ("chosen", "rejected")):
            raise UserError(
                f"{path}: no column {theirs!r} for {name}; it has {', '.join(present)}. Say which is {name} with "
                f"data.columns, for example data.columns.{name}={next(iter(present))}"
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
