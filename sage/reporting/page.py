"""One self-contained HTML page: tables, curves over four axes, and what selection did."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import jinja2
import numpy as np

from sage.reporting import choices, compare, pictures
from sage.reporting import rounds as of_rounds
from sage.reporting.groups import Group, group, main_metric, mean_curve
from sage.reporting.rounds import RoundsRun
from sage.reporting.runs import AXES, Evaluation, Run, rounds_of
from sage.reporting.tables import Table, latex, markdown, read_csv
from sage.training.best import is_test
from sage.training.pair_log import FOLDER as SAMPLES_FOLDER

# The curves, in the page's order, where a run has them.
CURVES = (
    "loss",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "policy_margins",
    "rewards/accuracies",
    "policy_accuracies",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
)
OURS = (*CURVES, "epoch", "learning_rate", "pairs")  # other metrics without a group of sage's are a hook's
POINTS = 240  # of a curve in a picture; many curves get fewer each, so that the page stays small
MANY_POINTS = 2000  # of all curves of a picture
DETAILED = 8  # runs whose selection is shown


def report(
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    rounds: Sequence[RoundsRun],
    metric: str | None,
    target: float | None,
) -> tuple[str, list[Table], list[str]]:
    """The page as HTML, its tables, and its notes.

    Args:
        metric: compares settings; None takes the first of benchmark accuracy, held-out accuracy and loss.
        target: a value of the metric, see `compare.comparison`.
    """
    groups = group(runs)
    alone = [e for e in evaluations if not rounds_of(e.path)]  # those of rounds are in their tables
    metric = metric or main_metric(runs)
    tables = of_rounds.tables(rounds)
    if runs:
        tables += [compare.settings(groups), compare.overview(groups, metric)]
        names = {name for run in runs for name in run.metrics}
        ends = [n for n in (*compare.FACTS, *(f"eval/{f}" for f in compare.FACTS)) if n in names]
        tables.append(compare.endings(groups, ends))
    if len(groups) > 1 and metric:
        tables += [compare.comparison(groups, metric, target), compare.wins(groups, metric)]
    tables += [t for t in (compare.benchmarks(groups), compare.evaluations(alone)) if t]
    warnings = notes(groups, metric) if runs else []
    warnings += [f"rounds {r.name}: {r.status}" for r in rounds if r.status != "finished"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sage.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colors = pictures.palette(len(groups))
    html = environment.get_template("page.html").render(
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=importlib.metadata.version("sage-align"),
        title=", ".join(dict.fromkeys(run.config["name"] for run in runs)) or "evaluations",
        tables=[(t, markdown(t), latex(t)) for t in tables],
        legend=list(zip((f"{g.key}: {g.label}" for g in groups), colors, strict=True))
        if len(groups) > 1
        else [],
        axes=AXES,
        sections=curves(groups, colors),
        rounds=of_rounds.figures(rounds),
        rounds_legend=[(r.name, c) for r, c in zip(rounds, pictures.palette(len(rounds)), strict=True)],
        details=[detail(run) for run in islice((r for r in runs if r.samples is not None), DETAILED)],
        notes=warnings,
        extras=[(run.name, read_csv(file)) for run in runs for file in run.extras],
    )
    return html, tables, warnings


def notes(groups: Sequence[Group], metric: str | None) -> list[str]:
    """What a reader should know before believing the numbers."""
    runs = [run for g in groups for run in g.runs]
    found = []
    for g in groups:
        repeated = sorted(seed for seed, times in Counter(run.seed for run in g.runs).items() if times > 1)
        if repeated:
            found.append(
                f"setting {g.key} has more than one run with seed {', '.join(map(str, repeated))}: they "
                "count as independent, so its intervals are too narrow. Leave copies out"
            )
    if metric:
        ends = {run.path: run.metrics[metric].values[-1] for run in runs if metric in run.metrics}
        if lost := [str(path) for path, value in ends.items() if not np.isfinite(value)]:
            found.append(
                f"{metric} is not finite at the end of {len(lost)} of {len(runs)} runs. Means, differences "
                f"and wins leave them out: {', '.join(lost[:5])}"
            )
    for status in ("interrupted", "running"):
        if names := [str(run.path) for run in runs if run.status == status and run.metrics]:
            found.append(
                f"{len(names)} of {len(runs)} runs: {status}, and their last values stand for their ends: "
                f"{', '.join(names[:5])}"
            )
    if names := [str(run.path) for run in runs if not run.metrics]:
        found.append(f"{len(names)} of {len(runs)} runs have no values yet: {', '.join(names[:5])}")
    if names := sorted({text for run in runs if (text := chosen_by_test(run.config))}):
        found.append(
            f"policies were selected by test problems ({', '.join(names)}): the accuracy of best/ on them is "
            "too good, and no longer a test"
        )
    early = [run for run in runs if run.status == "finished" and run.steps < (run.config.get("steps") or 0)]
    if early:
        ends = ", ".join(f"{run.name} after step {run.steps}" for run in early[:5])
        found.append(f"{len(early)} of {len(runs)} runs ended early: {ends}")
    if (scored := sum((run.path / SAMPLES_FOLDER).is_dir() for run in runs)) > DETAILED:
        found.append(f"what selection did is shown for the first {DETAILED} of {scored} runs")
    if damaged := sum(run.damaged_lines for run in runs):
        found.append(f"{damaged} lines of metrics could not be read and are left out")
    broken = sorted(
        {
            name
            for run in runs
            for name, s in run.metrics.items()
            if len(s.values) and not np.isfinite(s.values).all()
        }
    )
    if broken:
        found.append(f"not finite in places, and left out there: {', '.join(broken[:8])}")
    return found


def chosen_by_test(config: Mapping[str, Any]) -> str | None:
    """The `select` of a run if it is measured on a benchmark's test split."""
    select = config.get("select")
    kind, _, rest = (select or "").removeprefix("-").partition("/")
    split = config.get(f"benchmark.{rest.split('/')[0]}.split") if kind == "benchmark" else None
    return select if split and is_test(split) else None


def curves(groups: Sequence[Group], colors: Sequence[str]) -> list[tuple[str, list[dict[str, str]]]]:
    """(heading, pictures) where a picture is one SVG for each axis."""
    names = {name for g in groups for run in g.runs for name in run.metrics}
    benchmark = sorted(n for n in names if n.startswith("benchmark/") and n.endswith("/accuracy"))
    snr = [n for n in ("snr/selected", "snr/uniform", "snr/ratio") if n in names]
    shown = {
        "Accuracy on problems": benchmark,
        "Held-out pairs": [f"eval/{n}" for n in CURVES if f"eval/{n}" in names],
        "Training pairs": [n for n in CURVES if n in names],
        "Sources of the training pairs": sorted(n for n in names if n.startswith("sources/")),
        "Selection": sorted(n for n in names if n.startswith("selection/")),
        "Signal-to-noise ratio of updates": snr,
        "Metrics of hooks": sorted(
            n for n in names if n.removeprefix("eval/") not in OURS and not of_sage(n)
        ),
    }
    points = max(40, min(POINTS, MANY_POINTS // max(len(groups), 1)))
    sections = []
    for heading, metrics in shown.items():
        figures = [figure for n in metrics if (figure := over_axes(groups, colors, n, points))]
        if figures:
            sections.append((heading, figures))
    return sections


def of_sage(metric: str) -> bool:
    groups = ("benchmark/", "selection/", "curriculum/", "cost/", "time/", "snr/", "sources/")
    return metric.startswith(groups)


def over_axes(groups: Sequence[Group], colors: Sequence[str], metric: str, points: int) -> dict[str, str]:
    figures = {}
    for axis, text in AXES.items():
        found = []
        for g, color in zip(groups, colors, strict=True):
            if curve := mean_curve(g.runs, metric, axis, points):
                if len(g.runs) == 1:
                    curve = own_interval(g.runs[0], metric, axis) or curve
                found.append(pictures.Curve(color, *curve))
        if picture := pictures.lines(metric, found, text):
            figures[axis] = picture
    return figures


def own_interval(run: Run, metric: str, axis: str) -> tuple[np.ndarray, ...] | None:
    """The curve of a benchmark's accuracy with the interval over problems that the run itself wrote."""
    stem = metric.removesuffix("accuracy")
    if not metric.startswith("benchmark/") or f"{stem}low" not in run.metrics:
        return None
    series = [run.metrics[f"{stem}{end}"] for end in ("accuracy", "low", "high")]
    if len({len(s.steps) for s in series}) > 1:
        return None
    return run.at(axis, series[0].steps), *(s.values for s in series)


def detail(run: Run) -> dict[str, Any]:
    """What selection did in one run."""
    figures: list[str | None] = [strata(run, "competence"), strata(run, "quota")]
    table = choices.scored(run)
    if table is not None:
        shares = choices.shares(table)
        for name, parts in (("candidates", shares.candidates), ("selected pairs", shares.selected)):
            figures.append(
                pictures.areas(f"kinds of {name}", shares.steps, parts, choices.KINDS, AXES["step"])
            )
        selected = table["selected"].to_numpy(zero_copy_only=False)
        for name, values in (
            ("score", table["score"].to_numpy().astype(float)),
            ("margin", choices.ranking_margin(table)),
        ):
            split = {"candidates": values, "selected": values[selected]}
            figures.append(pictures.histograms(f"{name}: all steps", split, name))
    most, least, counts = choices.often(run)
    return {
        "path": str(run.path),
        "figures": [figure for figure in figures if figure],
        "most": most,
        "least": least,
        "counts": counts,
    }


def strata(run: Run, what: str) -> str | None:
    """Competence or quota of every stratum over steps."""
    stem = f"curriculum/{what}_"
    numbers = sorted(int(end) for n in run.metrics if (end := n.removeprefix(stem)) != n and end.isdigit())
    names = [f"{stem}{number}" for number in numbers]
    found = []
    for name, color in zip(names, pictures.palette(len(names)), strict=True):
        x, y = run.metrics[name].finite
        found.append(pictures.Curve(color, x, y, y, y))
    return pictures.lines(f"{what} by stratum, easiest first in blue", found, AXES["step"]) if found else None
