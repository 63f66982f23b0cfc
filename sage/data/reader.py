"""Reads a source row by row: each row is checked and brought into one record.

Nothing here imports torch, so a command can refuse bad data before it loads a model.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from sage.data.columns import IDS, to_column
from sage.data.conversation import MissingPrompt, PairTurns, Useless, read_pair
from sage.data.formats import SAMPLED, lookup
from sage.data.messages import MEDIA, SAID
from sage.data.source import Row, first_five, read_rows
from sage.data.survey import HEAD, Survey, holds, plan_of, survey
from sage.data.values import as_json, read_answer, read_pass_rate, read_tools
from sage.util.errors import UserError

T = TypeVar("T")
BATCH = 1000  # pairs of one batch
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("pair_id", "prompt", "chosen", "rejected", "tools", "answer")]
    + [("pass_rate", pa.float64()), ("row", pa.int64())]
    + [(name, pa.list_(pa.int32())) for name in IDS]
    + [("tokenizer", pa.string())]
)


# Keys of messages that are checked or without meaning for a template; others are listed once.
KNOWN = ("role", "content", "tool_call_id", "id", *SAID)


class Dropped(NamedTuple):
    """A row that gave no pair: where it stands (FILE:LINE), the reason it is counted under, and details."""

    row: int
    place: str
    pair_id: str | None
    reason: str
    detail: str


class Replan(Exception):
    """All rows make another plan than the first ones."""


class Reader:
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
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
        max_bad: float = 0.0,
        chat: bool = True,
    ):
        self.path, self.split, self.limit, self.max_bad, self.chat = path, split, limit, max_bad, chat
        self.columns = columns or {}

    def rows(self) -> Iterator[Row]:
        return islice(read_rows(self.path, self.split), self.limit)

    def read(self, keep: Callable[[Iterator[pa.RecordBatch]], T]) -> T:
        """What `keep` makes of the pairs, in batches. It may be called again, if the first rows mislead.

        Raises:
            UserError: the source cannot be read, a column is missing, or more rows are bad than `max_bad`
                allows. The message names the first five.
        """
        rows = self.rows()
        head = list(islice(rows, HEAD))
        if not head:
            raise UserError(f"{self.path}: no rows")
        try:
            self.plan = plan_of(self.path, head, self.columns)
            rows = chain(head, rows)
        except UserError:
            self.plan = survey(self.rows(), {}).plan(self.path, self.columns)
            rows = self.rows()
        while True:
            try:
                return keep(self.batches(rows))
            except Replan:
                rows = self.rows()

    def found(self) -> dict[str, Any]:
        """The fields of a PairSet but `open`, once all batches are read."""
        return {
            "count": self.count,
            "answers": self.answers,
            "content": self.content.hexdigest(),
            "dropped": self.dropped,
            "notes": self.notes(),
        }

    def batches(self, rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
        """The pairs, by `self.plan`.

        Raises:
            Replan: `self.plan` was wrong, and is right now.
        """
        seen = Survey(self.plan.names)
        self.count, self.answers, self.content = 0, 0, hashlib.sha256()
        self.dropped: list[Dropped] = []
        self.bad: list[str] = []
        self.lost_prompts, self.repeated, self.others = 0, 0, dict[str, None]()
        self.ids: dict[str, int] = {}  # every id so far -> the last number that was put behind it
        pairs: list[dict[str, Any]] = []
        for row in rows:
            seen.see(row.record)
            if (pair := self.pair(row)) is not None:
                pairs.append(pair)
            if len(pairs) == BATCH:
                yield self.batch(pairs)
                pairs = []
        plan = seen.plan(self.path, self.columns)
        if plan != self.plan:
            self.plan = plan
            raise Replan
        self.refuse(seen)
        if pairs:
            yield self.batch(pairs)

    def pair(self, row: Row) -> dict[str, Any] | None:
        """The row's pair; None where it gives none, which is noted."""
        names, pair_id = self.plan.names, None
        try:
            values = _values(row.record, names)
            pair_id = _pair_id(values.get("pair_id"), row.number)
            implicit = "prompt" not in names and not self.plan.unnamed
            turns = read_pair(values, self.chat, implicit, self.plan.repeats_prompt)
            pair = _record(values, turns)
        except UserError as error:
            reason = error.reason if isinstance(error, Useless) else "bad_row"
            self.dropped.append(Dropped(row.number, row.place, pair_id, reason, str(error)))
            self.lost_prompts += isinstance(error, MissingPrompt)
            if reason == "bad_row":
                self.bad.append(f"{row.place}: {error}")
            return None
        unique = pair_id
        if "pair_id" in names:  # else they are the rows' numbers
            while unique in self.ids:
                self.ids[pair_id] += 1
                unique = f"{pair_id}#{self.ids[pair_id]}"
            self.repeated += unique != pair_id
            self.ids[unique] = 1
        messages = (message for part in turns if not isinstance(part, str) for message in part)
        self.others |= dict.fromkeys(key for message in messages for key in message if key not in KNOWN)
        self.count += 1
        self.answers += bool(pair["answer"])
        return {**pair, "pair_id": unique, "row": row.number}

    def batch(self, pairs: list[dict[str, Any]]) -> pa.RecordBatch:
        columns = {name: [pair[name] for pair in pairs] for name in SCHEMA.names}
        arrays = [
            to_column(columns[name]) if name in IDS else pa.array(columns[name], SCHEMA.field(name).type)
            for name in SCHEMA.names
        ]
        batch = pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
        self.content.update(batch.serialize())
        return batch

    def refuse(self, seen: Survey) -> None:
        """Refuse a source with too many bad rows, or without a pair."""
        path, bad, total = self.path, self.bad, seen.rows
        names, unnamed = self.plan.names, self.plan.unnamed
        if len(bad) / total > self.max_bad:  # not max_bad * total, which rounds: 0.29 * 100 is less than 29
            if self.lost_prompts and ("prompt" not in names or (self.lost_prompts == total and unnamed)):
                found = f"{path}: no prompt column was found; it has {', '.join(seen.present)}"
                if not unnamed:
                    raise UserError(
                        first_five(f"{found}, and the responses do not begin with the prompt", bad)
                    )
                raise UserError(
                    f"{found}. Say which one is the prompt, for example data.columns.prompt={unnamed[0]}, or "
                    "set data.columns.prompt='' if both responses begin with the prompt"
                )
            head = f"{path}: {len(bad)} of {total} rows are bad; fix or remove them"
            if len(bad) < total:
                head += f", or have them dropped with data.max_bad={_ceiling(len(bad), total)}"
            raise UserError(first_five(head, bad))
        if not self.count:
            lines = [f"{gone.place}: {gone.detail}" for gone in self.dropped]
            raise UserError(
                first_five(f"{path}: no pair is left of {total} rows; {_count(self.dropped)}", lines)
            )

    def notes(self) -> list[str]:
        plan, notes = self.plan, []
        if plan.form:
            notes.append(f"read in the format of {plan.form.name}")
        if "prompt" not in plan.names:
            notes.append("no prompt column; the prompt is what chosen and rejected both begin with")
        if plan.repeats_prompt:
            notes.append("all responses begin with the prompt, which is removed from them")
        if shown := [
            key for key in plan.unused if key.strip()
        ]:  # pandas writes its index under an empty name
            notes.append(f"columns not used: {_printable(', '.join(shown))}")
        if self.others:
            keys = _printable(", ".join(self.others))
            notes.append(f"keys of messages that only some chat templates use: {keys}")
        if self.repeated:
            notes.append(f"{self.repeated} pair_ids were taken already and got a number, such as #2")
        return notes


def _record(values: Mapping[str, Any], pair: PairTurns) -> dict[str, Any]:
    """A row of `read_pair_set`'s pairs but for pair_id and row, or a UserError with the reason alone."""
    for name in MEDIA:
        if holds(values, name):
            raise UserError(f"the row has {name}; sage trains on text only")
    record: dict[str, Any] = {name: as_json(name, turns) for name, turns in pair._asdict().items()}
    tools = read_tools(values.get("tools"))
    record["tools"] = tools and as_json("tools", tools)
    record["answer"] = read_answer(values.get("answer"))
    record["pass_rate"] = read_pass_rate(values.get("pass_rate"))
    return {**record, **_sampled(values)}


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
