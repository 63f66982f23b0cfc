"""Read what a run left: its config, its metrics, the log of scored pairs, and whether it has finished."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sage.config import CONFIG_FILE, SUMMARY_FILE, flatten, read_written
from sage.training.best import Criterion, lower_is_better
from sage.training.pair_log import FOLDER as SAMPLES_FOLDER
from sage.training.tracking import METRICS_FILE
from sage.util.errors import UserError
from sage.util.locks import alive

BACKWARD = 3  # forward units that a trained pair costs: one forward, and a backward worth two
# The axes over which a metric is drawn: name -> label.
AXES = {
    "step": "optimizer steps",
    "pairs": "trained pairs",
    "cost": "cost (forward passes of a pair)",
    "seconds": "seconds in steps",
}


class Series(NamedTuple):
    """One metric of one run: [n] steps, rising, and [n] finite or NaN values."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Series:
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass
class Run:
    """A training run, finished or not."""

    path: Path
    config: dict[str, Any]  # dotted key -> value
    metrics: dict[str, Series]
    summary: dict[str, Any] | None
    status: str  # finished, running or interrupted
    damaged_lines: int = 0
    extras: list[Path] = field(default_factory=list)  # tables that a hook of the run wrote

    @property
    def name(self) -> str:
        place = self.path.absolute()
        return f"{place.parent.name}/{place.name}" if rounds_of(place) else place.name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def less_is_better(self, metric: str) -> bool:
        select = self.config.get("select")
        return lower_is_better(metric) or (select is not None and Criterion.of(select) == (metric, True))

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((int(s.steps[-1]) for s in self.metrics.values()), default=0)

    @cached_property
    def clocks(self) -> dict[str, Series]:
        """Each axis of AXES as a function of the step, from the training log; it starts at 0."""
        loss = self.metrics.get("loss")
        if loss is None:
            return {}
        steps = np.concatenate([[0], loss.steps])

        def total(name: str, factor: float = 1.0) -> np.ndarray:
            series = self.metrics.get(name)
            if series is None:
                return np.zeros(len(steps))
            return factor * np.interp(steps, [0, *series.steps], [0.0, *series.values])

        pairs = total("cost/backward_pairs")
        costs = total("cost/forward_pairs") + BACKWARD * pairs
        seconds = total("time/seconds")
        axes = {"step": steps.astype(float), "pairs": pairs, "cost": costs, "seconds": seconds}
        return {name: Series(steps, values) for name, values in axes.items()}

    def at(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """The position on an axis of AXES of each of these steps."""
        if axis == "step" or axis not in self.clocks:
            return steps.astype(float)
        clock = self.clocks[axis]
        return np.interp(steps, clock.steps, clock.values)

    @cached_property
    def samples(self) -> pa.Table | None:
        """The log of scored and trained pairs, or None where the run kept none."""
        files = sorted((self.path / SAMPLES_FOLDER).glob("*.parquet"))
        tables = []
        for file in files:
            try:
                tables.append(pq.read_table(file))
            except (OSError, pa.ArrowInvalid) as e:
                raise UserError(f"{file} cannot be read: {e}; delete it to leave its pairs out") from e
        return pa.concat_tables(tables, promote_options="default") if tables else None


class Evaluation(NamedTuple):
    """A finished `sage eval`."""

    path: Path
    summary: dict[str, Any]


class Rounds(NamedTuple):
    """A `sage rounds`. The training runs and evaluations in its folder are found, too."""

    path: Path
    config: dict[str, Any]  # dotted keys

    @property
    def name(self) -> str:
        return self.path.absolute().name


def find(paths: Sequence[str]) -> tuple[list[Run], list[Evaluation], list[Rounds], list[str]]:
    """All training runs, finished evaluations and folders of rounds at or below these paths, and the paths
    that hold run directories of other commands only.

    Raises:
        UserError: a path holds no run directory, no path holds one to report, or a run cannot be read.
    """
    found: dict[Path, Run | Evaluation | Rounds] = {}  # a folder may be at or below several paths
    others = []
    for name in paths:
        folders = list(dict.fromkeys(walk(Path(name).expanduser())))
        here = [part for folder in folders if (part := read(folder)) is not None]
        if not folders:
            raise UserError(f"{name}: no run here; a run directory holds {CONFIG_FILE} and {METRICS_FILE}")
        others += [] if here else [name]
        found |= {part.path.resolve(): part for part in here}
    if not found:
        raise UserError(f"{', '.join(others)}: no training run, no rounds and no finished evaluation here")
    parts = found.values()
    return (
        [part for part in parts if isinstance(part, Run)],
        [part for part in parts if isinstance(part, Evaluation)],
        [part for part in parts if isinstance(part, Rounds)],
        others,
    )


def walk(root: Path, depth: int = 4) -> Iterator[Path]:
    """Run directories at or below a folder; a sweep holds one per job, and rounds hold one per part."""
    if (root / CONFIG_FILE).is_file():
        yield root
        rounds = sorted(root.glob("round_*"), key=lambda folder: (len(folder.name), folder.name))
        yield from (part for folder in rounds for part in walk(folder, 1))
    elif depth and root.is_dir():
        for folder in sorted(root.iterdir(), key=natural):
            if folder.is_dir() and not folder.name.startswith("."):
                yield from walk(folder, depth - 1)


def natural(path: Path) -> tuple[int, int | str]:
    return (0, int(path.name)) if path.name.isdigit() else (1, path.name)


def read(folder: Path) -> Run | Evaluation | Rounds | None:
    """What a run directory holds, or None for a command that has nothing to report, like build-pairs."""
    written = read_written(folder)
    command = written["command"]
    summary_file = folder / SUMMARY_FILE
    summary = read_summary(summary_file) if summary_file.is_file() else None
    if command == "eval":
        return Evaluation(folder, summary) if summary else None
    config = dict(flatten(written))
    if command == "rounds":
        return Rounds(folder, config)
    if command != "train":
        return None
    metrics, damaged = read_metrics(folder / METRICS_FILE)
    if rounds := rounds_of(folder):
        config = {key: inside(value, rounds) for key, value in config.items()}
        whole = dict(flatten(read_written(rounds)))
        config |= {key: value for key, value in whole.items() if key == "seed" or key.startswith("round.")}
    status = "finished" if summary is not None else "running" if alive(folder) else "interrupted"
    return Run(folder, config, metrics, summary, status, damaged, sorted((folder / "report").glob("*.csv")))


def rounds_of(folder: Path) -> Path | None:
    """The folder of the `sage rounds` that a run directory is a part of."""
    root = folder.absolute().parent.parent
    part = folder.absolute().parent.name.startswith("round_") and (root / CONFIG_FILE).is_file()
    return root if part else None


def inside(value: Any, root: Path) -> Any:
    """A file's name below `root`, so that the same round of other rounds has the same setting."""
    return value.removeprefix(f"{root}/") if isinstance(value, str) else value


def read_summary(file: Path) -> dict[str, Any]:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file} is damaged ({e}); delete it to report the run as interrupted") from e
    if not isinstance(summary, dict):
        raise UserError(f"{file} is no summary of sage; delete it to report the run as interrupted")
    return summary


def read_metrics(file: Path) -> tuple[dict[str, Series], int]:
    """Every metric of a metrics.jsonl, and how many lines could not be read. The last line of a step wins."""
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    step = int(row.pop("step"))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    damaged += 1  # a kill cut it short, or it is being written now
                    continue
                for name, value in row.items():
                    number = value if isinstance(value, int | float) else math.nan
                    found.setdefault(name, {})[step] = float(number)
    series = {}
    for name, values in found.items():
        steps = np.array(sorted(values), np.int64)
        series[name] = Series(steps, np.array([values[step] for step in steps.tolist()]))
    return series, damaged
