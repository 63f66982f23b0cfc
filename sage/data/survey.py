"""What must be known of all rows before one of them can be read: which column means what.

The first rows answer that nearly always. A source is therefore read once, by a plan made from its first rows,
and surveyed on the way. If the survey of all rows makes another plan, the source is read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sage.data.conversation import repeats
from sage.data.formats import Format, lookup, map_columns, refuse_telling
from sage.data.messages import MEDIA
from sage.data.source import Row
from sage.data.values import holds_text

HEAD = 256  # rows of which the first plan is made
# How CSV files write that a cell holds nothing.
NOTHING = ("[]", "{}", "null", "nan", "NaN", "None")


class Plan(NamedTuple):
    """How the rows of a source are read.

    names: our column name -> the source's, and `form`, the format that was recognised, if any.
    unused: columns of the source that nothing names.
    unnamed: those of them that could be the prompt. Then what both responses begin with is not.
    repeats_prompt: all responses begin with the prompt, so it is taken away from them.
    """

    names: dict[str, str]
    form: Format | None
    unused: list[str]
    unnamed: list[str]
    repeats_prompt: bool


class Survey:
    """Facts about the rows seen so far. `names` are those of the plan that they are read by."""

    def __init__(self, names: Mapping[str, str]):
        self.names = dict(names)
        self.triple = [names.get(name) for name in ("prompt", "chosen", "rejected")]
        self.rows = 0
        self.present: dict[str, None] = {}  # all columns, in the order in which they first appear
        self.empty: dict[str, None] = {}  # those that have held nothing yet
        self.textless: dict[str, None] = {}  # those that have held no text yet but numbers
        self.repeats = set[bool]()  # whether both responses begin with the prompt, of all rows that say it

    def see(self, record: Any) -> None:
        self.rows += 1
        if not isinstance(record, dict):
            return
        if not record.keys() <= self.present.keys():
            new = [column for column in record if column not in self.present]
            for columns in (self.present, self.empty, self.textless):
                columns.update(dict.fromkeys(new))
        for column in [column for column in self.empty if holds(record, column)]:
            del self.empty[column]
        for column in [column for column in self.textless if holds_text(record.get(column))]:
            del self.textless[column]
        if False not in self.repeats and None not in self.triple:
            self.repeats |= _repeats(*(lookup(record, str(column)) for column in self.triple))

    def plan(self, path: str, columns: Mapping[str, str]) -> Plan:
        """What the rows seen so far say; `repeats_prompt` is right only if the names have not changed.

        Raises:
            UserError: a column is missing, or one would be left out that likely belongs to the conversation.
        """
        names, form = map_columns(path, self.present, columns) if self.present else ({}, None)
        read = {*names.values(), *(theirs.partition(".")[0] for theirs in names.values()), *MEDIA}
        unused = [column for column in self.present if column not in read]
        if "prompt" in names or "prompt" in columns:
            refuse_telling(path, [column for column in unused if column not in self.empty], names, columns)
        unnamed = [column for column in unused if "prompt" not in columns and column not in self.textless]
        return Plan(names, form, unused, unnamed, self.repeats == {True})


def survey(rows: Iterable[Row], names: Mapping[str, str]) -> Survey:
    found = Survey(names)
    for row in rows:
        found.see(row.record)
    return found


def plan_of(path: str, rows: Iterable[Row], columns: Mapping[str, str]) -> Plan:
    """The plan that these rows make, which are all rows or the first ones.

    Raises:
        UserError: see `Survey.plan`.
    """
    rows = list(rows)
    names = survey(rows, {}).plan(path, columns).names
    return survey(rows, names).plan(path, columns)


def _repeats(prompt: Any, chosen: Any, rejected: Any) -> set[bool]:
    """Whether both responses begin with the prompt; nothing where a row of such values gives no pair."""
    values = prompt, chosen, rejected
    if chosen == rejected or not all(isinstance(value, str | dict | list) for value in values):
        return set()
    if not all(isinstance(value, str) for value in values):
        return {False}
    if not all(map(str.strip, values)):
        return set()
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        return {False}
    return {True} if repeats(*values) else set()


def holds(record: Any, column: str) -> bool:
    """Whether a row has something in a column."""
    value = record.get(column) if isinstance(record, dict) else None
    return bool(value) and value == value and value not in NOTHING
