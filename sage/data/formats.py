"""Which columns of a source mean what: our names, and the column names of public preference formats."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from sage.config import PairColumns
from sage.util.errors import UserError

# Tokens that were sampled, and the fingerprint of their tokenizer. Only pairs that sage built have them.
SAMPLED = ("prompt_ids", "chosen_ids", "rejected_ids", "tokenizer")
# Our names. `data.columns` maps all but the last four to columns of the source.
MAPPABLE = tuple(field.name for field in fields(PairColumns))
COLUMNS = (*MAPPABLE, *SAMPLED)
# They mean what their name says only in a format that has them, or where data.columns names them.
MAPPED_ONLY = ("input", "history", "started", "chosen_reasoning", "rejected_reasoning")
# Columns that likely belong to the conversation -> our name for what they hold. They are never left out
# silently.
TELLING = {
    **{name: name for name in MAPPED_ONLY if name != "started"},
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    "initial_reason_steps": "started",
    **dict.fromkeys(("functions", "function_definitions"), "tools"),
    **{
        f"{side}_{word}": f"{side}_reasoning"
        for side in ("chosen", "rejected")
        for word in ("reasoning_content", "thinking")
    },
}


class Format(NamedTuple):
    """A source that has all of `marks` and none of `others` is in this format, which maps these `columns`."""

    name: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    columns: Mapping[str, str]


FORMATS = (
    Format(
        "LLaMA-Factory (ShareGPT)",
        ("conversations",),
        ("prompt",),
        {"prompt": "conversations"},
    ),
    Format(
        "Alpaca",
        ("instruction",),
        ("prompt",),
        {"prompt": "instruction", "input": "input", "history": "history"},
    ),
    Format(
        "Step-DPO",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        (),
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "started": "initial_reason_steps"},
    ),
    Format(
        "ms-swift",
        ("messages", "rejected_response"),
        ("prompt", "chosen", "rejected"),
        {"chosen": "messages", "rejected": "rejected_response"},
    ),
    Format(
        "ms-swift",
        ("messages", "rejected_messages"),
        ("prompt", "chosen", "rejected"),
        {"chosen": "messages", "rejected": "rejected_messages"},
    ),
    Format(
        "ms-swift",
        ("query", "response", "rejected_response"),
        ("prompt", "chosen", "rejected"),
        {"prompt": "query", "chosen": "response", "rejected": "rejected_response", "history": "history"},
    ),
    Format(
        "OpenAI preferences",
        ("input", "preferred_output", "non_preferred_output"),
        ("prompt", "chosen", "rejected"),
        {
            "prompt": "input.messages",
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
            "tools": "input.tools",
        },
    ),
)


def lookup(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column; "a.b" is b inside the column a, unless a column has that very name."""
    if column in record or "." not in column:
        return record.get(column)
    outer, _, inner = column.partition(".")
    value = record.get(outer)
    return lookup(value, inner) if isinstance(value, dict) else None


def recognise(present: Iterable[str], columns: Mapping[str, str]) -> Format | None:
    """The format of a source with these columns, unless `columns` (data.columns) says otherwise."""
    have = {*present}
    for form in FORMATS:
        core = (
            (name, form.columns[name]) for name in ("prompt", "chosen", "rejected") if name in form.columns
        )
        agreed = all(columns.get(name, theirs) == theirs for name, theirs in core)
        if have.issuperset(form.marks) and have.isdisjoint(form.others) and agreed:
            return form
    return None


def map_columns(
    path: str, present: Iterable[str], columns: Mapping[str, str]
) -> tuple[dict[str, str], Format | None]:
    """(our name -> the source's, for all columns that this source has; the recognised format).

    An entry of `columns` goes before what the format says. "" in it says that the source has no such column.

    Raises:
        UserError: a column of the source that `columns` names does not exist, or there are no responses.
    """
    present = [*present]
    form = recognise(present, columns)
    names = {name: name for name in COLUMNS if name not in MAPPED_ONLY}
    names |= form.columns if form else {}
    names |= columns
    sides = [names["chosen"], names["rejected"]]
    if not columns and not any(theirs.partition(".")[0] in present for theirs in sides):
        raise UserError(
            f"{path}: no columns {sides[0]!r} and {sides[1]!r}; it has {', '.join(present)}. A pair needs a "
            "better and a worse response in one row. If they are there, name their columns with "
            "data.columns.chosen=COLUMN and data.columns.rejected=COLUMN"
        )
    found = {}
    for name, theirs in names.items():
        if not theirs:
            continue
        if theirs in present or theirs.partition(".")[0] in present:
            found[name] = theirs
        elif columns.get(name) or name in ("chosen", "rejected"):
            raise UserError(
                f"{path}: no column {theirs!r} for {name}; it has {', '.join(present)}. Say which is {name} "
                f"with data.columns, for example {_example(name, present, found)}"
            )
    for one, other in (("prompt", "chosen"), ("prompt", "rejected"), ("chosen", "rejected")):
        if one in found and found[one] == found.get(other):
            raise UserError(f"data.columns: {one} and {other} are both mapped to {found[one]!r}")
    return found, form


def _example(name: str, present: list[str], found: Mapping[str, str]) -> str:
    """An override that maps `name` to a column without a meaning yet, of nearly the same name if possible."""
    free = [column for column in present if column not in found.values()] or present
    column = next((column for column in free if column.strip().lower() == name), free[0])
    plain = re.fullmatch(r"[\w.-]+", column)
    return f"data.columns.{name}={column}" if plain else f"'data.columns.{name}=\"{column}\"'"


def refuse_telling(
    path: str, unused: Iterable[str], names: Mapping[str, str], columns: Mapping[str, str]
) -> None:
    """Refuse a source of which a column is not used that likely belongs to the conversation.

    Args:
        unused: the columns that are not used and hold something.
        names, columns: as in `map_columns`.
    """
    for theirs in unused:
        ours = TELLING.get(theirs)
        if ours and ours not in columns and ours not in names:
            raise UserError(
                f"{path}: the column {theirs!r} would be left out. Set data.columns.{ours}={theirs} to use "
                f"it as {ours}, or data.columns.{ours}='' to leave it out"
            )
