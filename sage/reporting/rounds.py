"""Tables and pictures of `sage rounds`: how accuracy, pass rates and costs go from round to round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sage.answering.asking import Outcome
from sage.reporting import pictures
from sage.reporting.tables import Table

# Columns of the costs: title -> key of a round's results. Then come the seconds of each part.
COSTS = {
    "responses": "responses",
    "sampled tokens": "response_tokens",
    "scored again": "rescored_pairs",
    "scored": "forward_pairs",
    "trained": "backward_pairs",
}
PARTS = ("pairs", "older", "train", "eval")


class RoundsRun(NamedTuple):
    """A `sage rounds`, finished or not."""

    name: str
    status: str  # finished, running or interrupted
    found: list[dict[str, Any]]  # the results of round 0, 1 and so on, as in summary.json
    outcomes: list[dict[str, Outcome]]  # of the problems that round 1, 2 and so on asked

    @property
    def seen(self) -> list[dict[str, Outcome]]:
        """The outcomes after each round, of all problems as they were last asked."""
        known: list[dict[str, Outcome]] = [{}]
        for asked in self.outcomes:
            known.append({**known[-1], **asked})
        return known[1:]


def tables(runs: Sequence[RoundsRun]) -> list[Table]:
    """What rounds did, the accuracies after them, the problems whose answers changed, and what all cost."""
    found = [problems(runs), accuracies(runs), costs(runs), changes(runs)]
    if len(runs) == 1:  # no need to say which
        found = [t._replace(header=t.header[1:], rows=[row[1:] for row in t.rows]) for t in found]
    return [table for table in found if table.rows]


def problems(runs: Sequence[RoundsRun]) -> Table:
    """One row for each round. Problems count as they were last asked, in this round or before it."""
    header = ["rounds", "round", "problems", "responses", "right", "newly solved", "newly lost", "pairs"]
    header += ["older pairs", "never right", "sometimes right", "always right"]
    rows: list[list] = []
    for run in runs:
        last: Mapping[str, Outcome] = {}
        for result, asked, seen in zip(run.found[1:], run.outcomes, run.seen, strict=False):
            kinds = Counter(outcome.kind for outcome in seen.values())
            again = [(last[i], outcome) for i, outcome in asked.items() if i in last]
            rows.append(
                [
                    run.name,
                    result["round"],
                    len(asked),
                    result["responses"],
                    result["right"] / max(result["responses"], 1),
                    sum(not old.right and new.right > 0 for old, new in again),
                    sum(old.right > 0 and not new.right for old, new in again),
                    result["pairs"],
                    result["kept_pairs"],
                    *(kinds[kind] for kind in ("hopeless", "frontier", "mastered")),
                ]
            )
            last = seen
    return Table("rounds", "Rounds", header, rows)


def accuracies(runs: Sequence[RoundsRun]) -> Table:
    """One row for each round and benchmark, with 95% intervals over the benchmark's problems."""
    header = ["rounds", "round", "benchmark", "accuracy", "95% low", "95% high", "change", "change low"]
    header += ["change high", "newly solved", "newly lost"]
    rows: list[list] = []
    for run in runs:
        for result in run.found:
            for name, b in result["benchmarks"].items():
                row = [run.name, result["round"], name, b["accuracy"], *map(float, b["interval"])]
                change: list = [None] * 5
                if "difference" in b:
                    change = [b["difference"], *b["difference_interval"], len(b["gained"]), len(b["lost"])]
                rows.append([*row, *change])
    return Table("rounds_accuracy", "Accuracy after each round", header, rows)


def costs(runs: Sequence[RoundsRun]) -> Table:
    header = ["rounds", "round", *COSTS, *(f"seconds of {part}" for part in PARTS)]
    rows: list[list] = []
    for run in runs:
        for result in run.found:
            counts = [result.get(key) for key in COSTS.values()]
            seconds = [result["seconds"].get(part) for part in PARTS]
            rows.append([run.name, result["round"], *counts, *seconds])
    return Table("rounds_cost", "Cost of each round", header, rows)


def changes(runs: Sequence[RoundsRun]) -> Table:
    """The problems of benchmarks that are right after a round and were wrong before it, or the other way."""
    rows: list[list] = [
        [run.name, result["round"], name, problem, title]
        for run in runs
        for result in run.found
        for name, b in result["benchmarks"].items()
        for key, title in (("gained", "newly solved"), ("lost", "newly lost"))
        for problem in b.get(key, [])
    ]
    return Table(
        "rounds_changes",
        "Problems newly solved and newly lost",
        ["rounds", "round", "benchmark", "problem", "change"],
        rows,
    )


def figures(runs: Sequence[RoundsRun]) -> list[str]:
    """Accuracy over rounds, a curve for each run, and the pass rates of each run as rounds go on."""
    names = dict.fromkeys(name for run in runs for result in run.found for name in result["benchmarks"])
    found = []
    for name in names:
        curves = []
        for run, color in zip(runs, pictures.palette(len(runs)), strict=True):
            points = [
                (result["round"], b["accuracy"], *b["interval"])
                for result in run.found
                if (b := result["benchmarks"].get(name))
            ]
            x, y, low, high = np.array(points, float).reshape(-1, 4).T
            curves.append(pictures.Curve(color, x, y, low, high))
        found.append(pictures.lines(f"accuracy on {name}", curves, "rounds"))
    for run in runs:
        rates = {
            f"round {number}": np.array([o.right / o.samples for o in seen.values()])
            for number, seen in enumerate(run.seen, 1)
        }
        found.append(pictures.histograms(f"pass rates as last seen: {run.name}", rates, "pass rate"))
    return [figure for figure in found if figure]
