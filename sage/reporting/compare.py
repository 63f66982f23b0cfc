"""The tables of a report: what each run came to, and how groups of runs compare."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from sage.reporting.groups import Group, Interval, best, final, interval, paired, reach
from sage.reporting.runs import AXES, Evaluation, Run
from sage.reporting.tables import Table

FACTS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def value_at_end(run: Run, metric: str) -> float:
    """The last value; NaN where there is none, or only that of before the steps that the run has done."""
    series = run.metrics.get(metric)
    if series is None or (run.steps and not series.steps[-1]):
        return math.nan
    return final(series)


def settings(groups: Sequence[Group]) -> Table:
    """What the letters of the settings stand for."""
    rows: list[list] = [
        [g.key, g.label, len(g.runs), ", ".join(str(seed) for seed in sorted(r.seed for r in g.runs))]
        for g in groups
    ]
    return Table("settings", "Settings", ["setting", "what is different", "runs", "seeds"], rows)


def overview(groups: Sequence[Group], metric: str | None) -> Table:
    """One row for each run."""
    header = ["run", "setting", "seed", "status", "steps", "trained pairs", "cost", "seconds"]
    header += [metric, f"best {metric}", "at step"] if metric else []
    rows: list[list] = []
    for group in groups:
        for run in group.runs:
            ends = {name: float(clock.values[-1]) for name, clock in run.clocks.items()}
            row = [
                run.name if run.name.strip() else str(run.path),
                group.key,
                run.seed,
                run.status,
                run.steps,
                *(ends.get(name) for name in ("pairs", "cost", "seconds")),
            ]
            if metric:
                value, step = best(run, metric)
                row += [value_at_end(run, metric), value, step]
            rows.append(row)
    return Table("runs", "Runs", header, rows)


def endings(groups: Sequence[Group], metrics: Sequence[str]) -> Table:
    """The last value of each metric, by setting: mean and 95% interval over seeds."""
    rows: list[list] = [
        [
            group.key,
            len(group.runs),
            *(interval([value_at_end(run, metric) for run in group.runs]) for metric in metrics),
        ]
        for group in groups
    ]
    return Table("final", "At the end of the runs", ["setting", "runs", *metrics], rows)


def comparison(groups: Sequence[Group], metric: str, target: float | None) -> Table:
    """How settings compare by one metric. The first setting is the baseline of differences and of the target.

    The target is the baseline's best value, averaged over its seeds, unless it is given.
    """
    baseline = groups[0]
    if target is None:
        target = interval([best(run, metric)[0] for run in baseline.runs]).mean
    goal = f"{'<=' if baseline.runs[0].less_is_better(metric) else '>='} {target:.4g}"
    header = ["setting", "seeds", "best", "final", "final - first setting's"]
    header += [f"{name} to {goal}" for name in ("pairs", "cost", "seconds")] + ["reached"]
    rows: list[list] = []
    for group in groups:
        difference: Interval | str = "baseline"
        if group is not baseline:
            difference = paired(baseline, group, lambda run: value_at_end(run, metric))
        reached = {
            axis: [reach(run, metric, target, axis) for run in group.runs]
            for axis in ("pairs", "cost", "seconds")
        }
        count = sum(math.isfinite(value) for value in reached["pairs"])
        rows.append(
            [
                group.key,
                len(group.runs),
                interval([best(run, metric)[0] for run in group.runs]),
                interval([value_at_end(run, metric) for run in group.runs]),
                difference,
                *(interval(reached[axis]) for axis in reached),
                f"{count} of {len(group.runs)}",
            ]
        )
    return Table("comparison", f"Comparison by {metric}", header, rows)


def wins(groups: Sequence[Group], metric: str) -> Table:
    """On how many common seeds the setting of a row ends better than that of a column."""
    sign = -1 if groups[0].runs[0].less_is_better(metric) else 1
    values = [{run.seed: value_at_end(run, metric) for run in group.runs} for group in groups]
    rows: list[list] = []
    for i, group in enumerate(groups):
        row: list = [group.key]
        for j in range(len(groups)):
            seeds = [
                s
                for s in values[i].keys() & values[j].keys()
                if math.isfinite(values[i][s]) and math.isfinite(values[j][s])
            ]
            better = sum(sign * (values[i][s] - values[j][s]) > 0 for s in seeds)
            row.append("" if i == j else f"{better} of {len(seeds)}")
        rows.append(row)
    return Table("wins", f"Wins by final {metric}", ["setting", *(g.key for g in groups)], rows)


def benchmarks(groups: Sequence[Group]) -> Table | None:
    """Every measurement of accuracy on problems during training, with the interval that the run wrote."""
    rows: list[list] = []
    for group in groups:
        for run in group.runs:
            for name in run.metrics:
                if not (name.startswith("benchmark/") and name.endswith("/accuracy")):
                    continue
                stem = name.removesuffix("accuracy")
                low, high = (by_step(run, f"{stem}{end}") for end in ("low", "high"))
                for step, value in by_step(run, name).items():
                    bounds = [low.get(step, math.nan), high.get(step, math.nan)]
                    rows.append([group.key, run.seed, stem.split("/")[1], step, value, *bounds])
    header = ["setting", "seed", "benchmark", "step", "accuracy", "95% low", "95% high"]
    return Table("benchmarks", "Accuracy on problems", header, rows) if rows else None


def by_step(run: Run, metric: str) -> dict[int, float]:
    if metric not in run.metrics:
        return {}
    steps, values = run.metrics[metric]
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def evaluations(found: Sequence[Evaluation]) -> Table | None:
    """The accuracies of finished evaluations."""
    rows: list[list] = [
        [
            str(e.path),
            str(e.summary["model"]),
            name,
            result["problems"],
            result["accuracy"],
            *map(float, result["interval"]),
        ]
        for e in found
        for name, result in e.summary["benchmarks"].items()
    ]
    header = ["evaluation", "model", "benchmark", "problems", "accuracy", "95% low", "95% high"]
    return Table("evaluations", "Evaluations", header, rows) if rows else None


def every_point(groups: Sequence[Group]) -> pa.Table:
    """Every logged value, with its place on every axis, for other programs."""
    parts = []
    for group in groups:
        for run in group.runs:
            for name, (steps, values) in run.metrics.items():
                texts = {"run": str(run.path), "setting": group.key, "seed": run.seed, "metric": name}
                columns = {
                    **{key: pa.repeat(text, len(steps)) for key, text in texts.items()},
                    **{axis: pa.array(run.at(axis, steps)) for axis in AXES},
                    "value": pa.array(values),
                }
                parts.append(pa.table(columns))
    return pa.concat_tables(parts) if parts else pa.table({})
