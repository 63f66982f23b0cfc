"""Columns of token ids in Arrow tables. pyarrow's own conversions take about ten times as long per number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def lengths_of(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """int64 [rows, 3]: how many ids of prompt, chosen and rejected each row has; 0 for null."""
    columns = [pc.list_value_length(table[name]).fill_null(0).to_numpy() for name in IDS]  # pyright: ignore
    return np.stack(columns, axis=1).astype(np.int64)


def to_column(rows: Sequence[list[int] | None]) -> pa.ListArray:
    """Lists of ids, some absent, as a column of list[int32]."""
    full = [row or [] for row in rows]
    offsets = np.zeros(len(full) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in full], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(full), np.int32, count=int(offsets[-1]))
    absent = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=absent)


def to_lists(column: pa.ChunkedArray) -> list[list[int]]:
    """A column of list[int32] without nulls as lists."""
    rows = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy()[offsets[0] : offsets[-1]].tolist()
        rows += [values[start:end] for start, end in pairwise((offsets - offsets[0]).tolist())]
    return rows
