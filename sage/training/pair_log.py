"""The per-pair log: RUN_DIR/samples/*.parquet, with one row for each pair that a step scored or trained on.

A file ends where a checkpoint does, and gets its name when it is whole. So a resumed run drops exactly the
files of the steps that it runs again. The size is bounded: if a run would log more rows than the limit, only
every n-th event (a scoring, or a step without one) is kept.
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
        ("margin", pa.float32()),  # u, of the implicit reward
        ("policy_mean", pa.float32()),
        ("signal", pa.float32()),  # of u
        ("curvature", pa.float32()),  # of u
        ("score", pa.float32()),  # null in a step that scored nothing
        ("ranked_by", pa.string()),  # the margin that the score depends on; null if none
        ("selected", pa.bool_()),
    ]
)
FLUSH_ROWS = 50_000
CONTENT_KEY = b"sage.content"  # of a file's metadata: the content of the source that the pairs are from


class PairLog:
    """Written by rank 0.

    `expected` is the number of rows of the whole run. At most `limit` rows are kept; 0 keeps none. `content`
    names what the pairs' source held, so that a reader knows whether the ids still belong to its texts.
    """

    def __init__(self, run_dir: Path, expected: int, limit: int, main: bool, content: str = ""):
        self.folder, self.rows = run_dir / FOLDER, []
        self.stride = math.ceil(expected / limit) if limit and main else 0
        self.main, self.schema = main, SCHEMA.with_metadata({CONTENT_KEY: content})

    def rewind(self, step: int) -> None:
        """Delete the files of the steps after `step`, which are about to run again."""
        if self.main:
            for file in self.folder.glob("*.parquet"):
                if file.stem.isdigit() and int(file.stem) > step:  # others are not ours
                    file.unlink()

    def wants(self, event: int) -> bool:
        """Whether the event of this number is one of those that are kept."""
        return bool(self.stride) and event % self.stride == 0

    def add(self, step: int, **columns: object) -> None:
        """Add the n rows of one step. Columns are arrays of n values by name; a missing column is null."""
        n = len(columns["pair_id"])  # pyright: ignore
        columns["step"] = [step] * n
        arrays = [
            pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in SCHEMA
        ]
        self.rows.append(pa.table(arrays, schema=self.schema))
        if sum(map(len, self.rows)) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows held in memory, under the number of their first step."""
        if not self.rows:
            return
        table = pa.concat_tables(self.rows)
        file = self.folder / f"{table['step'][0].as_py():08d}.parquet"
        write_whole(file, partial(pq.write_table, table))
        self.rows = []
