"""Preference pairs from any common source: read once, kept in the cache, and mapped from there.

Nothing here imports torch, so a command can refuse bad data before it loads a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sage.config import DataConfig, SourceConfig
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

    def table(self, *columns: str) -> pa.Table:
        """These columns of the pairs; all columns if none is named."""
        chosen = self.pairs.select_columns(list(columns)) if columns else self.pairs
        return chosen.with_format("arrow")[:]  # pyright: ignore

    def select(self, indices: Sequence[int]) -> PairSet:
        """The pairs at these places, in this order."""
        content = hashlib.sha256(json.dumps([self.content, *indices]).encode()).hexdigest()
        return replace(self, open=lambda: self.pairs.select(indices), count=len(indices), content=content)

    def without(self, pair_ids: Collection[str]) -> PairSet:
        """The other pairs."""
        gone = {*pair_ids}
        ids = self.table("pair_id")["pair_id"].to_pylist()
        return self.select([i for i, pair_id in enumerate(ids) if pair_id not in gone])


def load_data(data: DataConfig, cache_dir: str | None, held_out: bool = False) -> PairSet:
    """The training pairs that a config names, or its held-out ones. See `load_pair_set`.

    Raises:
        UserError: a source cannot be read or has bad rows; or no pair is left, or none has an answer.
    """
    title = data.title(held_out)
    options = {"max_bad": data.max_bad, "chat": data.chat_template is not False}
    columns = data.columns.given()
    if held_out and data.eval_path is not None:
        options |= {"split": data.eval_split, "columns": columns, "limit": data.eval_limit}
        source = load_pair_set(data.eval_path, cache_dir, **options)
    else:
        if data.sources:
            source = mixed(data.sources, cache_dir, **options)
        else:
            assert data.path is not None
            options |= {"split": data.split, "columns": columns, "limit": data.limit}
            source = load_pair_set(data.path, cache_dir, **options)
        if data.eval_share is not None and data.eval_path is None:
            source = split_off(source, data.eval_share, held_out)
            if held_out and data.eval_limit is not None:
                source = source.select(range(min(data.eval_limit, source.count)))
    if data.answers and not source.answers:
        node = "data.sources.NAME" if data.sources else "data"
        raise UserError(
            f"data.answers={data.answers}: no row of {title} has an answer; name its column with "
            f"{node}.columns.answer"
        )
    return source


def split_off(source: PairSet, share: float, held_out: bool) -> PairSet:
    """The pairs of about this share of the prompts, if `held_out`, or all others.

    A hash of the prompt decides, so no prompt is on both sides, whatever else the source holds.
    """
    prompts = (prompt for chunk in source.table("prompt")["prompt"].chunks for prompt in chunk.to_pylist())
    is_held_out = [fraction_of(problem_of(prompt)) < share for prompt in prompts]
    if len({*is_held_out}) < 2:
        raise UserError(
            f"data.eval_share={share:g} of the prompts of {source.count} pairs holds out "
            f"{'all' if is_held_out[0] else 'none'} of them: choose another share, or give held-out pairs "
            "with data.eval_path=FILE"
        )
    part = source.select([i for i, held in enumerate(is_held_out) if held == held_out])
    if held_out:
        return replace(part, dropped=[], notes=[])  # those of the training pairs
    away = f"{source.count - part.count} pairs are held out, by data.eval_share={share:g}"
    return replace(part, notes=[*source.notes, away])


def problem_of(prompt: str) -> bytes:
    """What makes two prompts ask the same: the last message of the user, without case and white space.

    Forms of Unicode that look alike (NFKC) and invisible characters make no difference. `prompt` is a value
    of the column. Neither a system text nor a started answer counts.
    """
    turns = turns_of(prompt)
    if not isinstance(turns, str):
        said = [turn.get("content") or "" for turn in turns if turn["role"] == "user"]
        turns = said[-1] if said else prompt
    if not turns.isascii():
        normal = unicodedata.normalize("NFKC", turns)
        turns = "".join(char for char in normal if unicodedata.category(char) != "Cf")
    return " ".join(turns.casefold().split()).encode("utf-8", "surrogatepass")


def fraction_of(name: bytes) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def mixed(sources: Mapping[str, SourceConfig], cache_dir: str | None, **options: Any) -> PairSet:
    """The pairs of several sources, one source after the other. Their ids become NAME/ID.

    With weights, the set is the largest one that has the sources in these proportions and no pair twice. The
    draw depends only on the sources, so it is the same in every run.
    """
    found = {name: load_source(name, source, cache_dir, options) for name, source in sources.items()}
    parts = dict(found)
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    if weights:
        unit = min(found[name].count / weight for name, weight in weights.items())
        for name, weight in weights.items():
            wanted = math.floor(unit * weight + 1e-9)
            if not wanted:
                raise UserError(
                    f"data.sources.{name}.weight={weight:g}: with the other weights and sizes, none of its "
                    f"{found[name].count} pairs is drawn: give it more weight, or leave the source out"
                )
            order = np.random.default_rng(list(name.encode())).permutation(found[name].count)
            parts[name] = found[name].select(sorted(order[:wanted].tolist()))

    def union() -> datasets.Dataset:
        return datasets.Dataset(pa.concat_tables([named(name, part) for name, part in parts.items()]))

    ids = [[name, part.content] for name, part in parts.items()]
    notes = [f"{name}: {note}" for name, part in found.items() for note in part.notes]
    for name, part in parts.items():
        if part.count < found[name].count:
            notes.append(f"{name}: {part.count} of {found[name].count} pairs are drawn, by the weights")
    return PairSet(
        union,
        sum(part.count for part in parts.values()),
        sum(part.answers for part in parts.values()),
        hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        [
            row._replace(pair_id=f"{name}/{row.pair_id or row.row}")
            for name, part in found.items()
            for row in part.dropped
        ],
        notes,
    )


def load_source(name: str, source: SourceConfig, cache_dir: str | None, options: dict[str, Any]) -> PairSet:
    """The pairs of one of several sources; an error names the source's own keys."""
    own = {"split": source.split, "columns": source.columns.given(), "limit": source.limit}
    try:
        return load_pair_set(source.path, cache_dir, **options, **own)
    except UserError as e:
        key = f"data.sources.{name}"
        text = re.sub(r"\bdata\.(columns|split|path)\b", rf"{key}.\1", str(e))
        raise UserError(f"{key}: {text}") from e


def named(name: str, part: PairSet) -> pa.Table:
    """The pairs of a source; their ids begin with its name."""
    table = part.table()
    ids = [f"{name}/{pair_id}" for pair_id in table["pair_id"].to_pylist()]
    return table.set_column(table.column_names.index("pair_id"), "pair_id", pa.array(ids, pa.string()))


def source_of(pair_id: str) -> str:
    """The name of the source of a pair of `mixed`."""
    return pair_id.partition("/")[0]


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
