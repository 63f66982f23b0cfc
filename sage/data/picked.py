"""All pairs of a set, encoded by several processes, and which of them are kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from sage.data import placement
from sage.data.columns import lengths_of, to_column
from sage.data.encoding import IDS, Encoder
from sage.util import stopping
from sage.util.progress import track

PARALLEL_FROM = 2000  # rows; below this, starting worker processes costs more than it saves
BATCH = 1000  # rows encoded at a time
PREFIX_ROWS = 4096  # prompts compared at a time: all of a large set at once would take gigabytes
RULES = placement.RULES | {
    "other_tokenizer": "the sampled token ids belong to another tokenizer, so the texts are encoded instead",
    "other_text": "the sampled token ids are not those of the texts and of the chat template, so the texts "
    "are encoded instead",
    "unknown": "the tokenizer reads some characters of the texts as its unknown token",
}
KEPT = pa.schema(
    [("pair_id", pa.string()), ("pass_rate", pa.float64())]
    + [(name, pa.list_(pa.int32())) for name in IDS]
    + [("text_hash", pa.uint64())]
)
TEXTS = ("prompt", "chosen", "rejected", "tools")  # what text_hash names, whatever the tokenizer
ENCODED = pa.schema(
    [*KEPT, ("row", pa.int64()), ("rules", pa.list_(pa.string()))]
    + [("reason", pa.string()), ("detail", pa.string())]
)


class ModelLimits(NamedTuple):
    """What a model can take: ids below `vocabulary`, texts of up to `positions` tokens; None = no limit."""

    vocabulary: int | None = None
    positions: int | None = None


class Picked:
    """Picks the pairs to keep, batch by batch, and notes what the user should know about all of them."""

    def __init__(self, max_length: int, limits: ModelLimits):
        self.max_length, self.limits = max_length, limits
        self.dropped: dict[str, list[str]] = {"too_long": [], "same_tokens": []}
        self.details: dict[str, str] = {}
        self.rows: dict[str, int] = {}  # of pairs with details
        self.rules = Counter[str]()
        self.shortest: int | None = None  # tokens, of all pairs that could be encoded
        self.largest: dict[str, tuple[int, int, str]] = dict.fromkeys(
            IDS, (-1, 0, "")
        )  # the largest id in each column, its row and its pair
        self.prefix = Prefix()
        self.digests = {name: hashlib.sha256() for name in ("lengths", *KEPT.names)}

    def pick(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Those of a batch of ENCODED that are kept, as KEPT."""
        lengths = lengths_of(batch)
        totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
        reasons = np.array(batch["reason"].to_pylist(), dtype=object)
        able = ~batch["reason"].is_valid().to_numpy(zero_copy_only=False)
        for index in np.flatnonzero((lengths[:, 1] == lengths[:, 2]) & able).tolist():
            if batch["chosen_ids"][index].equals(batch["rejected_ids"][index]):
                reasons[index] = "same_tokens"
        if self.limits.positions:
            reasons[able & (totals > self.limits.positions)] = "beyond_positions"
        reasons[able & (totals > self.max_length)] = "too_long"
        kept = np.array([reason is None for reason in reasons], dtype=bool)
        self.note(batch, reasons, kept)
        if able.any():
            shortest = int(totals[able].min())
            self.shortest = shortest if self.shortest is None else min(self.shortest, shortest)
        return self.seal(batch.filter(pa.array(kept)))

    def note(self, batch: pa.RecordBatch, reasons: np.ndarray, kept: np.ndarray) -> None:
        """Note why pairs are dropped, and by which rules the others were encoded."""
        for index in np.flatnonzero(~kept).tolist():
            pair_id = batch["pair_id"][index].as_py()
            self.dropped.setdefault(str(reasons[index]), []).append(pair_id)
            if detail := batch["detail"][index].as_py():
                self.details[pair_id] = detail
                self.rows[pair_id] = batch["row"][index].as_py()
        self.rules.update(pc.list_flatten(batch["rules"].filter(pa.array(kept))).to_pylist())  # pyright: ignore

    def seal(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The kept pairs as KEPT. All that it holds goes into the fingerprint."""
        self.digests["lengths"].update(lengths_of(batch).tobytes())
        for name in KEPT.names:
            self.digests[name].update(content_of(batch[name]))
        for name in IDS:
            ids = pc.list_flatten(batch[name]).to_numpy()  # pyright: ignore
            if len(ids) and ids.max() > self.largest[name][0]:
                row = int(pc.list_parent_indices(batch[name])[int(ids.argmax())].as_py())  # pyright: ignore
                self.largest[name] = int(ids.max()), batch["row"][row].as_py(), batch["pair_id"][row].as_py()
        self.prefix.see(batch["prompt_ids"])
        return batch.select(KEPT.names)

    def notes(self) -> dict[str, Any]:
        """What is known once all batches were picked."""
        digests = b"".join(digest.digest() for digest in self.digests.values())
        return {
            "dropped": self.dropped,
            "details": self.details,
            "rows": self.rows,
            "notes": [
                f"{self.rules[rule]} pairs: {sentence}"
                for rule, sentence in RULES.items()
                if self.rules[rule]
            ],
            "shortest": self.shortest,
            "largest": self.largest,
            "shared": self.prefix.length or 0,
            "fingerprint": hashlib.sha256(digests).hexdigest()[:32],
        }


def content_of(column: pa.Array) -> bytes:
    """The values of a column of KEPT, such that those of two batches follow one another."""
    if pa.types.is_string(column.type):
        return "".join(f"{len(text)} {text}" for text in column.to_pylist()).encode()
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column  # pyright: ignore
    return values.to_numpy(zero_copy_only=False).tobytes()


class Prefix:
    """The tokens that all prompts seen so far share at their start, at least one short of each."""

    def __init__(self):
        self.first = np.empty(0, np.int32)  # the first prompt
        self.length: int | None = None  # None before there is a prompt

    def see(self, prompts: pa.ListArray) -> None:
        """Prompts, of which none is null."""
        if not len(prompts):
            return
        starts = prompts.offsets.to_numpy()
        ids, shortest = prompts.values.to_numpy(), int(np.diff(starts).min())
        if self.length is None:
            self.first, self.length = ids[starts[0] : starts[1]].copy(), shortest
        self.length = min(self.length, shortest - 1)
        for row in range(0, len(prompts), PREFIX_ROWS):
            heads = ids[starts[:-1][row : row + PREFIX_ROWS, None] + np.arange(self.length)]
            differs = np.flatnonzero((heads != self.first[: self.length]).any(0))
            self.length = int(differs[0]) if len(differs) else self.length


def encoded(pairs: datasets.Dataset, encode: Encoder, num_proc: int | None) -> Iterator[pa.RecordBatch]:
    """All pairs in order, in batches of ENCODED. `num_proc` processes encode; None = one per CPU core."""
    many = len(pairs) > PARALLEL_FROM
    title = "tokenising pairs" if many else None
    workers = num_proc or os.cpu_count() or 1
    starts = range(0, len(pairs), BATCH)
    if workers == 1 or not many:
        _share(pairs, encode, None)
        yield from track(map(_encode, starts), title, len(pairs), len)
        return
    # Forked, so that they have the tokenizer, and map the same file.
    context = multiprocessing.get_context("fork")
    with context.Pool(min(workers, len(starts)), _share, (pairs, encode, os.getpid())) as pool:
        yield from track(pool.imap(_encode, starts), title, len(pairs), len)


_shared: list[Any] = []  # the pairs and the encoder of this process


def _share(pairs: datasets.Dataset, encode: Encoder, parent: int | None) -> None:
    _shared[:] = pairs, encode
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """End this worker when the process that started it was killed: it would hold that process's locks."""
    stopping.wait_for_end_of(parent)
    os._exit(1)


def _encode(start: int) -> pa.RecordBatch:
    pairs, encode = _shared
    batch = pairs[start : start + BATCH]
    texts = zip(*(batch[name] for name in TEXTS), strict=True)
    hashes = [xxhash.xxh3_64_intdigest(json.dumps(parts).encode()) for parts in texts]
    columns = {**encode(batch), "row": batch["row"], "text_hash": hashes}
    arrays = [
        to_column(columns[name]) if name in IDS else pa.array(columns[name], ENCODED.field(name).type)
        for name in ENCODED.names
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=ENCODED)
