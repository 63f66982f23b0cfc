"""Accuracy on benchmarks, for `sage eval` and for the evaluations of `sage train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from sage.answering.attempts import Attempt, Sampler
from sage.answering.problems import read_problems
from sage.answering.statistics import bootstrap, by_group, majority, pass_at, wilson
from sage.config import ProblemsConfig
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.progress import console


def run_benchmarks(
    sampler: Sampler,
    benchmarks: Mapping[str, ProblemsConfig],
    limit: int | None,
    samples: int,
    folder: Path,
    weights: str | None = None,
) -> dict[str, Any]:
    """Answer the first `limit` problems of each benchmark, and measure. Only rank 0 gets results.

    The attempts are kept in `folder`/BENCHMARK. What an interrupted run left there is used, if
    its problems and `weights`, the fingerprint of its model, were the same.
    """
    results = {}
    for name, benchmark in benchmarks.items():
        problems = ranks.main_only(lambda benchmark=benchmark: read_problems(benchmark)[:limit])
        attempts = sampler.attempts(problems, samples, benchmark.prompt, folder / name, name, weights)
        if ranks.rank() == 0:
            check_decided(name, attempts, folder / name)
            results[name] = measure(attempts)
    return results


def check_decided(name: str, attempts: Sequence[Attempt], folder: Path) -> None:
    """Say how many answers could not be compared within the verifier's limits. They count as wrong.

    Raises:
        UserError: no attempt could be compared.
    """
    lost = sum(a.undecided for a in attempts)
    if lost == len(attempts):
        raise UserError(
            f"{name}: the verifier timed out or crashed on all {lost} answers, so none counts as right. The "
            f"machine may be overloaded, or the true answers may not be formulas. See {folder}. To answer "
            "and verify again, delete it and run the same command"
        )
    if lost:
        console.print(
            f"warning: {name}: the verifier timed out or crashed on {lost} of {len(attempts)} answers, which "
            "count as wrong",
            markup=False,
        )


def by_problem(attempts: Sequence[Attempt]) -> list[list[Attempt]]:
    """The attempts at each problem, in order."""
    rows: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        rows.setdefault(attempt.problem_id, []).append(attempt)
    return list(rows.values())


def measure(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The results of one benchmark, from the same number of samples of each problem."""
    rows = by_problem(attempts)
    samples = len(rows[0])
    means = [fmean(a.correct for a in row) for row in rows]

    def by_wilson(values: Sequence[float]) -> bool:
        return samples == 1 or len({*values}) == 1  # resampling equal means shows no doubt at all

    def accuracy(values: Sequence[float]) -> dict[str, Any]:
        interval = wilson(sum(values), len(values)) if by_wilson(values) else bootstrap(values)
        return {"accuracy": fmean(values), "interval": list(interval), "problems": len(values)}

    lengths = [a.tokens for a in attempts]
    result = {
        **accuracy(means),
        "interval_by": "wilson" if by_wilson(means) else "bootstrap over problems",
        "samples": samples,
        "groups": by_group([row[0].group for row in rows], means, accuracy),
        "tokens": {
            "mean": fmean(lengths),
            "median": median(lengths),
            "longest": max(lengths),
            "mean_right": mean_or_none([a.tokens for a in attempts if a.correct]),
            "mean_wrong": mean_or_none([a.tokens for a in attempts if not a.correct]),
        },
        "truncated": fmean(a.finish == "length" for a in attempts),
        "no_room": fmean(a.finish == "no_room" for a in attempts),
        "unparsable": fmean(a.extracted is None for a in attempts),
        "undecided": fmean(a.undecided for a in attempts),
    }
    if samples > 1:
        votes = [majority([a.extracted for a in row], [a.correct for a in row]) for row in rows]
        result[f"maj@{samples}"] = {
            "accuracy": fmean(votes),
            "interval": list(wilson(sum(votes), len(votes))),
        }
        ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
        result["pass@k"] = {
            str(k): fmean(pass_at(k, samples, sum(a.correct for a in row)) for row in rows) for k in ks
        }
    return result


def mean_or_none(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def table(results: dict[str, Any]) -> Table:
    shown = Table(title="accuracy", title_justify="left")
    for name in ("benchmark", "problems", "accuracy", "95% interval", "tokens", "cut off", "no answer"):
        shown.add_column(name, justify="left" if name == "benchmark" else "right")
    for name, r in results.items():
        low, high = r["interval"]
        shown.add_row(
            name,
            str(r["problems"]),
            f"{r['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{r['tokens']['mean']:.0f}",
            f"{r['truncated']:.1%}",
            f"{r['unparsable']:.1%}",
        )
        for group, g in r["groups"].items():
            low, high = g["interval"]
            shown.add_row(
                f"  {group}", str(g["problems"]), f"{g['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"
            )
    return shown
