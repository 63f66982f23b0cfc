"""What selection did in one run, from its log of scored pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage.config import read_frozen
from sage.data.pairs import load_data
from sage.reporting.runs import Run
from sage.training.pair_log import CONTENT_KEY
from sage.util.errors import UserError

CONFIDENT, NEAR = 1.0, 0.25  # standard deviations of the candidates' margins
KINDS = ("confident errors", "mild errors", "near the boundary", "mild successes", "mastered")
SHOWN = 10
POINTS = 200  # of a picture


class Shares(NamedTuple):
    """Shares of each kind in KINDS among all candidates and among the selected, [steps, kinds] each."""

    steps: np.ndarray
    candidates: np.ndarray
    selected: np.ndarray


class Often(NamedTuple):
    """A pair and how often the run selected it."""

    pair_id: str
    scored: int
    selected: int
    stratum: int
    margin: float  # when last seen
    prompt: str
    chosen: str
    rejected: str


def scored(run: Run) -> pa.Table | None:
    """The rows of the log in which candidates competed, or None where the run never scored any."""
    table = run.samples
    if table is None:
        return None
    table = table.filter(table["score"].is_valid())
    return table if len(table) else None


def ranking_margin(table: pa.Table) -> np.ndarray:
    """The margin that the scorer ranked by; that of the implicit reward if it ranked by none."""
    margin = table["margin"].to_numpy().astype(np.float64)
    ranked_by = np.array(table["ranked_by"].to_pylist(), dtype=object)
    mean = table["policy_mean"].to_numpy().astype(np.float64)
    margin = np.where(ranked_by == "policy_mean", mean, margin)
    # `margin_gap` ranks by minus a margin that the log does not hold.
    of_other = np.isin(ranked_by.astype(str), ("reference_mean", "margins_from"))
    margin = np.where(of_other, -table["score"].to_numpy().astype(np.float64), margin)
    return np.where(ranked_by == "mixed", margin + mean, margin)


def kinds_of(margins: np.ndarray) -> np.ndarray:
    """The kind, an index into KINDS, of each candidate of one scoring, [n].

    The margin is divided by the candidates' standard deviation, so that the kinds do not depend on beta or on
    the unit of the margin.
    """
    spread = np.nanstd(margins)
    z = margins / spread if spread > 0 else np.zeros_like(margins)
    return np.digitize(z, [-CONFIDENT, -NEAR, NEAR, CONFIDENT])


def shares(table: pa.Table) -> Shares:
    """Shares of the kinds of pairs in the steps that scored candidates, or in POINTS of many such steps."""
    steps = table["step"].to_numpy()
    margins, selected = ranking_margin(table), table["selected"].to_numpy(zero_copy_only=False)
    found = []
    scorings = np.unique(steps)
    for step in scorings[:: max(len(scorings) // POINTS, 1)]:
        where = np.flatnonzero((steps == step) & np.isfinite(margins))
        if len(where):
            kinds = kinds_of(margins[where])
            counts = [np.bincount(kinds[m], minlength=len(KINDS)) for m in (slice(None), selected[where])]
            found.append((step, *(c / max(c.sum(), 1) for c in counts)))
    numbers, candidates, chosen = zip(*found, strict=True)
    return Shares(np.array(numbers), np.array(candidates), np.array(chosen))


def often(run: Run) -> tuple[list[Often], list[Often], dict[str, int]]:
    """The pairs that were selected most and least often, and counts over all scored pairs."""
    table = run.samples
    assert table is not None
    selected = pc.cast(table["selected"], pa.int32())
    table = table.set_column(table.column_names.index("selected"), "selected", selected)
    by_pair = table.group_by("pair_id", use_threads=False).aggregate(
        [("selected", "count"), ("selected", "sum"), ("stratum", "last"), ("margin", "last")]
    )
    times = by_pair["selected_sum"].to_numpy()
    order = np.argsort(-times, kind="stable")
    rows = [by_pair.take([int(i)]).to_pylist()[0] for i in (*order[:SHOWN], *order[::-1][:SHOWN])]
    texts = texts_of(run, [row["pair_id"] for row in rows])
    pairs = [
        Often(
            row["pair_id"],
            row["selected_count"],
            row["selected_sum"],
            row["stratum_last"],
            row["margin_last"],
            *texts.get(row["pair_id"], ("", "", "")),
        )
        for row in rows
    ]
    count = len(order[:SHOWN])
    counts = {
        "pairs in the log": len(by_pair),
        "never selected": int((times == 0).sum()),
        "selected once": int((times == 1).sum()),
        "selected more than once": int((times > 1).sum()),
        "most often": int(times.max(initial=0)),
    }
    return pairs[:count], pairs[count:], counts


def texts_of(run: Run, pair_ids: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Prompt, chosen and rejected of these pairs, from the run's own data; empty where it is gone or changed.

    Ids may be row numbers, so a source that has changed since may give them to other pairs.
    """
    wanted, table = set(pair_ids), run.samples
    try:
        cfg: Any = OmegaConf.to_object(read_frozen(run.path))
        data = load_data(cfg.data, cfg.cache_dir) if cfg.data.has_pairs else None
    except (UserError, OmegaConfBaseException, OSError):
        data = None
    known = table is not None and (table.schema.metadata or {}).get(CONTENT_KEY)
    if data is None or data.content.encode() != known:
        return {}
    rows = [i for i, pair_id in enumerate(data.pairs["pair_id"]) if pair_id in wanted]
    texts = {}
    for row in data.pairs.select(rows):
        parts = (json.loads(row[name]) for name in ("prompt", "chosen", "rejected"))  # pyright: ignore
        texts[row["pair_id"]] = tuple(part if isinstance(part, str) else as_text(part) for part in parts)  # pyright: ignore
    return texts


def as_text(messages: list[dict[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)
