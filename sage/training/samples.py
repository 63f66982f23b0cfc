"""The per-pair log: RUN_DIR/samples/*.parquet, one row for each pair that a step scored or trained on.

Files end where checkpoints do and are renamed into place when whole, so that a resumed run drops exactly the files of
the steps that it runs again. The size is bounded: where all rows of a run would pass the limit, every n-th event is kept.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sage.util.files import write_whole

FOLDER = "samples"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("pair_id", pa.string()),
        ("stratum", pa.int16()),
        ("margin", pa.float32()),
        ("signal", pa.float32()),
        ("curvature", pa.float32()),
        ("score", pa.float32()),
        ("selected", pa.bool_()),
    ]
)
FLUSH_ROWS = 50_000


class SampleLog:
    """Written by rank 0. `expected` is the rows of the whole run, `limit` how many may be kept (0: none)."""

    def __init__(self, run_dir: Path, step: int, expected: int, limit: int, main: bool):
        self.folder, self.rows, self.events = run_dir / FOLDER, [], []
        self.stride = math.ceil(expected / limit) if limit and main else 0
        if main:
            for file in self.folder.glob("*.parquet"):
                if int(file.stem) > step:
                    file.unlink()

    def wants(self, event: int) -> bool:
        """Whether the event of this number is one of those that are kept."""
        return bool(self.stride) and event % self.stride == 0

    def add(self, step: int, **columns: object) -> None:
        """The n rows of one step: its columns by name, arrays of n values; a missing column is null."""
        n = len(columns["pair_id"])  # pyright: ignore
        columns["step"] = [step] * n
        arrays = [
            pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in SCHEMA
        ]
        self.rows.append(pa.table(arrays, schema=SCHEMA))
        if sum(map(len, self.rows)) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is held, under the number of its first step."""
        if not self.rows:
            return
        table = pa.concat_tables(self.rows)
        file = self.folder / f"{table['step'][0].as_py():08d}.parquet"
        write_whole(file, partial(pq.write_table, table))
        self.rows = []
