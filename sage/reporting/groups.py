"""Group runs that differ only in their seed, and compare the groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from sage.reporting.runs import Rounds, Run, Series

# Keys that say where a run lies or how it is watched, not what it computes.
IGNORED = (
    "seed",
    "cache_dir",
    "name",
    "command",
    "tracking",
    "world_size",
    "log_every",
    "data.num_proc",
    "save_every",
    "resume",
    "save_minutes",
    "keep_checkpoints",
    "export_float32",
    "export_optimizer",
)
# In this order, the first metric that any run has decides the comparison.
PREFERRED = ("eval/policy_accuracies", "eval/rewards/accuracies", "eval/loss", "rewards/accuracies", "loss")


@dataclass
class Group:
    """Runs of one setting, one for each seed.

    `label` says what is special about the setting, `key` is the letter that stands for it in tables.
    """

    key: str
    label: str
    runs: list[Run]


class Interval(NamedTuple):
    """A mean with its 95% interval, which is NaN where a single value gives none."""

    mean: float
    low: float
    high: float
    n: int


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs with the same settings but for the seed, in the order of their first run."""
    keys = differing(runs)
    groups: dict[tuple[str, ...], Group] = {}
    for run in runs:
        values = tuple(str(run.config.get(key)) for key in keys)
        groups.setdefault(values, Group("", label(run, keys, runs), [])).runs.append(run)
    for number, g in enumerate(groups.values()):
        g.key = letters(number)
    return list(groups.values())


def letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    more, last = divmod(number, 26)
    return (letters(more - 1) if more else "") + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[last]


def differing(runs: Sequence[Run | Rounds]) -> list[str]:
    """Config keys, but for IGNORED, in which any two runs differ."""
    everything = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in everything
        if not key.startswith(IGNORED) and len({str(run.config.get(key)) for run in runs}) > 1
    ]


def label(run: Run | Rounds, keys: Sequence[str], runs: Sequence[Run | Rounds]) -> str:
    """What makes a run's setting different.

    A class sets the defaults of its fields, so a field is named only if runs of the same class differ in it.
    """
    parts = []
    for key in keys:
        value = run.config.get(key)
        top, _, name = key.rpartition(".")
        target = f"{top}._target_"
        if name == "_target_":
            parts.append(f"{top}={str(value).rpartition('.')[2]}")
        elif value is not None:
            alike = [r for r in runs if r.config.get(target) == run.config.get(target)]
            if len({str(r.config.get(key)) for r in alike}) > 1:
                parts.append(f"{key}={value}")
    return ", ".join(parts) or str(run.config.get("name", run.name))


def main_metric(runs: Sequence[Run]) -> str | None:
    """The metric to compare by: accuracy on problems if a run measured it, else on held-out pairs."""
    names = Counter(name for run in runs for name in run.metrics)
    benchmarks = sorted(n for n in names if n.startswith("benchmark/") and n.endswith("/accuracy"))
    return next((name for name in (*benchmarks, *PREFERRED) if name in names), None)


def best(run: Run, metric: str) -> tuple[float, int]:
    """The best finite value and its step; NaN at step 0 where there is none."""
    series = run.metrics.get(metric)
    if series is None or not len(series.finite.values):
        return float("nan"), 0
    steps, values = series.finite
    place = int(values.argmin() if run.less_is_better(metric) else values.argmax())
    return float(values[place]), int(steps[place])


def final(series: Series) -> float:
    return float(series.values[-1]) if len(series.values) else float("nan")


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% Student interval of one value per seed. Values that are not finite are left out."""
    data = np.array([v for v in values if np.isfinite(v)])
    if not len(data):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(mean, float("nan"), float("nan"), 1)
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data)))
    return Interval(mean, mean - half, mean + half, len(data))


def paired(a: Group, b: Group, value_of: Any) -> Interval:
    """The difference b - a over the seeds that both groups have."""
    first = {run.seed: value_of(run) for run in a.runs}
    second = {run.seed: value_of(run) for run in b.runs}
    return interval([second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())])


def reach(run: Run, metric: str, target: float, axis: str) -> float:
    """Where on an axis a run first evaluates at least as well as the target; NaN if it never does."""
    series = run.metrics.get(metric)
    if series is None:
        return float("nan")
    steps, values = series.finite
    good = values <= target if run.less_is_better(metric) else values >= target
    return float(run.at(axis, steps[good][:1])[0]) if good.any() else float("nan")


def mean_curve(runs: Sequence[Run], metric: str, axis: str, points: int) -> tuple[np.ndarray, ...] | None:
    """(x, mean, low, high) of a metric over the runs of a group, [m] each, m <= points; None without values.

    Runs are interpolated onto common positions, over the range that all of them cover.
    """
    curves = []
    for run in runs:
        if metric in run.metrics:
            steps, values = run.metrics[metric].finite
            if len(values):
                curves.append((run.at(axis, steps), values))
    if not curves:
        return None
    if len(curves) == 1:
        x, y = thin(curves[0][0], curves[0][1], points)
        return x, y, y, y
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if end < start:
        return None
    own = np.unique(np.concatenate([x[(x >= start) & (x <= end)] for x, _ in curves]))
    grid = own if len(own) <= points else np.linspace(start, end, points)
    table = np.stack([np.interp(grid, x, y) for x, y in curves])
    mean = table.mean(0)
    half = stats.t.ppf(0.975, len(curves) - 1) * table.std(0, ddof=1) / np.sqrt(len(curves))
    return grid, mean, mean - half, mean + half


def thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` points: means over runs of neighbours, with the first and last kept as they are."""
    if len(x) <= points:
        return x, y
    cuts = np.array_split(np.arange(1, len(x) - 1), points - 2)
    inner_x = [x[c].mean() for c in cuts]
    inner_y = [y[c].mean() for c in cuts]
    return np.array([x[0], *inner_x, x[-1]]), np.array([y[0], *inner_y, y[-1]])
