"""Preference pairs from any common source: read once, kept in the cache, and mapped from there.

Nothing here imports torch, so a command can refuse bad data before it loads a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from sage.config import DataConfig
from sage.data import store
from sage.data.conversation import Turns
from sage.data.reader import SCHEMA, Dropped, Reader
from sage.data.source import identity
from sage.util.errors import UserError
from sage.util.files import source_digest
from sage.util.progress import Activity, activity


@dataclass(frozen=True)
class PairSet:
    """What a source holds.

    open: gives the pairs, with the columns of SCHEMA.
    count: how many there are, and `answers`: how many of them have an answer.
    content: names the content of all pairs.
    dropped: rows that gave no pair.
    notes: remarks for the user, one line each.
    """

    open: Callable[[], datasets.Dataset]
    count: int
    answers: int
    content: str
    dropped: list[Dropped]
    notes: list[str]

    @cached_property
    def pairs(self) -> datasets.Dataset:
        return self.open()

    def without(self, pair_ids: Collection[str]) -> PairSet:
        """The other pairs."""
        gone = {*pair_ids}
        left = [
            i
            for i, pair_id in enumerate(self.pairs.data.column("pair_id").to_pylist())
            if pair_id not in gone
        ]
        content = hashlib.sha256(json.dumps([self.content, sorted(gone)]).encode()).hexdigest()
        return replace(self, open=lambda: self.pairs.select(left), count=len(left), content=content)


def load_pairs(path: str, **options: Any) -> datasets.Dataset:
    """The pairs of `read_pair_set`, which takes the same arguments."""
    return read_pair_set(path, **options).pairs


def load_data(data: DataConfig, cache_dir: str | None, held_out: bool = False) -> PairSet:
    """The training pairs that a config names, or its held-out ones. See `load_pair_set`."""
    path = data.eval_path if held_out else data.path
    assert path is not None
    source = load_pair_set(
        path,
        cache_dir,
        split=data.eval_split if held_out else data.split,
        columns=data.columns.given(),
        limit=data.eval_limit if held_out else data.limit,
        max_bad=data.max_bad,
        chat=data.chat_template is not False,
    )
    if data.answers and not source.answers:
        raise UserError(
            f"data.answers={data.answers}: no row of {path} has an answer; name its column "
            "with data.columns.answer"
        )
    return source


def load_pair_set(path: str, cache_dir: str | None, **options: Any) -> PairSet:
    """`read_pair_set`, which takes the same options, kept in the cache for as long as the files are the same.

    The pairs are then read once, by one process, and mapped into memory by all. Without a cache, and where
    no files are known, they are held in memory.
    """
    split = options.get("split", "train")
    files = identity(path, split) if cache_dir else None
    if cache_dir is None or files is None:
        return read_pair_set(path, **options)
    key = [path, files, options, source_digest("data"), datasets.__version__]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = Path(cache_dir, f"texts-{name}.arrow").expanduser()
    reader = Reader(path, **options)

    def found() -> dict[str, Any]:
        if identity(path, split) != files:
            raise UserError(f"{path} was changed while it was read: start again when it is complete")
        return reader.found()

    def make() -> None:
        with activity(f"reading {path}") as shown:
            reader.read(lambda batches: store.write_table(file, SCHEMA, counted(batches, shown), found))

    what = f"{path} is read again"
    notes = store.made_once(file, make, what)
    dropped = [Dropped(*row) for row in notes["dropped"]]
    return PairSet(lambda: store.open_intact(file, make, what), **{**notes, "dropped": dropped})


def counted(batches: Iterator[pa.RecordBatch], shown: Activity) -> Iterator[pa.RecordBatch]:
    """The batches; `shown` says how many pairs they hold so far."""
    pairs = 0
    for batch in batches:
        pairs += len(batch)
        shown.facts = [f"{pairs} pairs"]
        shown.advance()
        yield batch


def read_pair_set(path: str, **options: Any) -> PairSet:
    """The pairs of any source, held in memory: see `Reader`, which takes the same arguments."""
    reader = Reader(path, **options)
    table = reader.read(lambda batches: pa.Table.from_batches(batches, SCHEMA))
    return PairSet(lambda: datasets.Dataset(table), **reader.found())


def turns_of(text: str) -> Turns:
    """The value of a `prompt`, `chosen` or `rejected` column: a text, or messages."""
    return json.loads(text)
