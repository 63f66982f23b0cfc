"""Preference pairs from any common source, each checked and brought into one record.

Nothing here imports torch, so a command can refuse bad data before it loads a model.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count, islice
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from sage.config import DataConfig
from sage.data.conversation import MissingPrompt, Pair, Turns, Useless, read_pair, repeats
from sage.data.formats import SAMPLED, lookup, map_columns, refuse_telling
from sage.data.messages import MEDIA, SAID
from sage.data.source import Row, first_five, read_rows
from sage.data.values import as_json, holds_text, read_answer, read_pass_rate, read_tools
from sage.util.errors import UserError

IDS = SAMPLED[:3]
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("pair_id", "prompt", "chosen", "rejected", "tools", "answer")]
    + [("pass_rate", pa.float64()), ("row", pa.int64())]
    + [(name, pa.list_(pa.int32())) for name in IDS]
    + [("tokenizer", pa.string())]
)


# Keys of messages that are checked or without meaning for a template; others are listed once.
KNOWN = ("role", "content", "tool_call_id", "id", *SAID)
# How CSV files write that a cell holds nothing.
NOTHING = ("[]", "{}", "null", "nan", "NaN", "None")


class Dropped(NamedTuple):
    """A row that gave no pair: where it stands (FILE:LINE), the reason it is counted under, and details."""

    row: int
    place: str
    pair_id: str | None
    reason: str
    detail: str


class PairSet(NamedTuple):
    """What a source holds: its pairs, its rows that gave none, and remarks for the user, one line each."""

    pairs: datasets.Dataset
    dropped: list[Dropped]
    notes: list[str]


def load_pairs(path: str, **options: Any) -> datasets.Dataset:
    """The pairs of `read_pair_set`, which takes the same arguments."""
    return read_pair_set(path, **options).pairs


def load_data(data: DataConfig, held_out: bool = False) -> PairSet:
    """The training pairs that a config names, or its held-out ones."""
    path = data.eval_path if held_out else data.path
    assert path is not None
    source = read_pair_set(
        path,
        split=data.eval_split if held_out else data.split,
        columns=data.columns.given(),
        limit=data.eval_limit if held_out else data.limit,
        max_bad=data.max_bad,
        chat=data.chat_template is not False,
    )
    if data.answers and not any(source.pairs["answer"]):
        raise UserError(
            f"data.answers={data.answers}: no row of {path} has an answer; name its column "
            "with data.columns.answer"
        )
    return source


def read_pair_set(
    path: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad: float = 0.0,
    chat: bool = True,
) -> PairSet:
    r"""Pairs from any source that `sage.data.source` reads, in any form that docs/data.md lists.

    Args:
        split: of a hub data set or a folder with several.
        columns: our column names (`formats.COLUMNS`) -> the source's; "": the source has none.
        limit: read only the first N rows.
        max_bad: the largest share of rows that may be bad. They are dropped and counted.
        chat: texts in HH's form ("\n\nHuman: ...") become messages. Otherwise they stay texts.

    The pairs have the columns of SCHEMA:
        pair_id: str, unique; the row's number where the source has none.
        prompt: JSON of a text or of messages. If the last message is the assistant's, it is a started answer.
        chosen, rejected: JSON of a text, or of a list with the assistant's message, all its keys kept.
        tools: JSON of a list, or null.
        answer: str or null.
        pass_rate: float in [0, 1] or null.
        row: int, the 1-based row of the source; in a .jsonl file, the line.
        prompt_ids, chosen_ids, rejected_ids, tokenizer: the sampled tokens and the fingerprint of their
            tokenizer, or null.

    Raises:
        UserError: the source cannot be read, a column is missing, or more rows are bad than `max_bad` allows.
            The message names the first five.
    """
    columns = columns or {}
    rows = list(islice(read_rows(path, split), limit))
    if not rows:
        raise UserError(f"{path}: no rows")
    present = dict.fromkeys(key for row in rows if isinstance(row.record, dict) for key in row.record)
    names, form = map_columns(path, present, columns) if present else ({}, None)
    unused = [key for key in present if key not in {*_outer(names), *MEDIA}]
    if "prompt" in names or "prompt" in columns:
        telling = [key for key in unused if any(_holds(row.record, key) for row in rows)]
        refuse_telling(path, telling, names, columns)
    # A text column that nothing names may be the prompt. Then what both responses begin with is not.
    unnamed = [key for key in unused if "prompt" not in columns and _may_be_prompt(rows, key)]
    repeats_prompt = _repeat_prompts(rows, names)
    pairs, dropped, bad = [], [], []
    lost_prompts, repeated, others = 0, 0, dict[str, None]()
    ids: set[str] = set()
    for row, place, record in rows:
        pair_id = None
        try:
            values = _values(record, names)
            pair_id = _pair_id(values.get("pair_id"), row)
            implicit = "prompt" not in names and not unnamed
            turns = read_pair(values, chat, implicit, repeats_prompt)
            pair = _record(values, turns)
        except UserError as error:
            reason = error.reason if isinstance(error, Useless) else "bad_row"
            dropped.append(Dropped(row, place, pair_id, reason, str(error)))
            lost_prompts += isinstance(error, MissingPrompt)
            if reason == "bad_row":
                bad.append(f"{place}: {error}")
            continue
        unique = next(name for name in _alternatives(pair_id) if name not in ids)
        repeated += unique != pair_id
        ids.add(unique)
        pairs.append({**pair, "pair_id": unique, "row": row})
        messages = (message for part in turns if not isinstance(part, str) for message in part)
        others |= dict.fromkeys(key for message in messages for key in message if key not in KNOWN)
    if len(bad) / len(rows) > max_bad:  # not max_bad * rows, which rounds: 0.29 * 100 is less than 29
        if lost_prompts and ("prompt" not in names or (lost_prompts == len(rows) and unnamed)):
            found = f"{path}: no prompt column was found; it has {', '.join(present)}"
            if not unnamed:
                raise UserError(first_five(f"{found}, and the responses do not begin with the prompt", bad))
            raise UserError(
                f"{found}. Say which one is the prompt, for example data.columns.prompt={unnamed[0]}, or set "
                "data.columns.prompt='' if both responses begin with the prompt"
            )
        head = f"{path}: {len(bad)} of {len(rows)} rows are bad; mend or remove them"
        if len(bad) < len(rows):
            head += f", or have them dropped with data.max_bad={_ceiling(len(bad), len(rows))}"
        raise UserError(first_five(head, bad))
    if not pairs:
        lines = [f"{gone.place}: {gone.detail}" for gone in dropped]
        raise UserError(first_five(f"{path}: no pair is left of {len(rows)} rows; {_count(dropped)}", lines))
    notes = []
    if form:
        notes.append(f"read in the format of {form.name}")
    if "prompt" not in names:
        notes.append("no prompt column; the prompt is what chosen and rejected both begin with")
    if repeats_prompt:
        notes.append("all responses begin with the prompt; it is asked once")
    if shown := [key for key in unused if key.strip()]:  # pandas writes its index under an empty name
        notes.append(f"columns not used: {_printable(', '.join(shown))}")
    if others:
        keys = _printable(", ".join(others))
        notes.append(f"keys of messages that only some chat templates use: {keys}")
    if repeated:
        notes.append(f"{repeated} pair_ids were taken already and got a number, such as #2")
    return PairSet(datasets.Dataset(pa.Table.from_pylist(pairs, SCHEMA)), dropped, notes)


def _record(values: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
    """A row of `read_pair_set`'s pairs but for pair_id and row, or a UserError with the reason alone."""
    for name in MEDIA:
        if _holds(values, name):
            raise UserError(f"the row has {name}; sage trains on text only")
    record: dict[str, Any] = {name: as_json(name, turns) for name, turns in pair._asdict().items()}
    tools = read_tools(values.get("tools"))
    record["tools"] = tools and as_json("tools", tools)
    record["answer"] = read_answer(values.get("answer"))
    record["pass_rate"] = read_pass_rate(values.get("pass_rate"))
    return {**record, **_sampled(values)}


def turns_of(text: str) -> Turns:
    """The value of a `prompt`, `chosen` or `rejected` column: a text, or messages."""
    return json.loads(text)


def _values(record: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Our column name -> the row's value."""
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict) or not record:
        raise UserError(f"not an object with columns but {str(record)[:40]}")
    media = {name: record[name] for name in MEDIA if name in record}
    return media | {name: lookup(record, theirs) for name, theirs in names.items()}


def _pair_id(value: Any, row: int) -> str:
    if isinstance(value, float):
        value = None if value != value else int(value) if value.is_integer() else value
    if value is None or value == "":
        return str(row)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"pair_id is {str(value)[:40]}, not a text or a number")
    as_json("pair_id", value)
    return str(value)


def _alternatives(pair_id: str) -> Iterator[str]:
    """The id, then the id with a number."""
    return chain([pair_id], (f"{pair_id}#{number}" for number in count(2)))


def _sampled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampled ids and their tokenizer's fingerprint, as they are.

    One response may have none, because it is a problem's own solution. Without a fingerprint, all are null.
    """
    sampled = {name: values.get(name) for name in SAMPLED}
    if sampled["tokenizer"] is None:
        return dict.fromkeys(SAMPLED)
    for name in IDS:
        ids = sampled[name]
        if ids is not None and not (
            isinstance(ids, list) and ids and all(type(index) is int and 0 <= index < 2**31 for index in ids)
        ):
            raise UserError(f"{name} is not a list of token ids")
    if not isinstance(sampled["tokenizer"], str):
        raise UserError("tokenizer is not the fingerprint of a tokenizer")
    return sampled


def _outer(names: Mapping[str, str]) -> set[str]:
    """The columns that are read, also those of which only an inner part is."""
    return {*names.values(), *(theirs.partition(".")[0] for theirs in names.values())}


def _holds(record: Any, column: str) -> bool:
    """Whether a row has something in a column."""
    value = record.get(column) if isinstance(record, dict) else None
    return bool(value) and value == value and value not in NOTHING


def _may_be_prompt(rows: Iterable[Row], column: str) -> bool:
    """Whether a column could be a prompt: somewhere it holds a text that is no number."""
    return any(holds_text(row.record.get(column)) for row in rows if isinstance(row.record, dict))


def _repeat_prompts(rows: Iterable[Row], names: Mapping[str, str]) -> bool:
    """Whether all three are texts in all rows, and both responses begin with the prompt and go on."""
    columns = [names.get(name) for name in ("prompt", "chosen", "rejected")]
    if None in columns:
        return False
    texts = (
        [lookup(row.record, str(column)) for column in columns]
        for row in rows
        if isinstance(row.record, dict)
    )
    return all(all(isinstance(text, str) for text in row) and repeats(*row) for row in texts)


def _ceiling(part: int, whole: int) -> float:
    """The share with two digits, rounded up."""
    return -(-100 * part // whole) / 100


def _printable(text: str) -> str:
    """The text with halves of characters spelled out, which no terminal can write."""
    return text.encode("utf-8", "backslashreplace").decode()


def _count(dropped: Iterable[Dropped]) -> str:
    """ "dropped: 3 same_responses, 1 bad_row"."""
    counts = Counter(row.reason for row in dropped)
    return "dropped: " + ", ".join(f"{number} {reason}" for reason, number in counts.items())
