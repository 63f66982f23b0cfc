"""Measure accuracy on math benchmarks: sample responses, verify them, and count.

RUN_DIR/BENCHMARK/generations.jsonl   every response with its extracted answer and verdict
RUN_DIR/summary.json                  accuracies with intervals; written last
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from sage.answering.accuracy import by_problem, run_benchmarks, table
from sage.answering.attempts import BEGUN_FILE, GENERATIONS_FILE, PROBLEMS, Sampler, read_attempts
from sage.answering.statistics import difference_interval, majority, mcnemar
from sage.answering.verify import rules_of_verdicts
from sage.config import SUMMARY_FILE, EvalConfig, build, differences, load
from sage.data.chat import ChatFormat
from sage.model import loading
from sage.util import ranks
from sage.util.errors import UserError, named
from sage.util.files import write_json
from sage.util.progress import console

SHOWN = 10  # flipped problems of each kind that are printed
SETTINGS = ("sampling.", "samples", "data.")  # keys that change what a model answers


def evaluate(run_dir: Path) -> None:
    """Run the evaluation of the frozen config in `run_dir`, or resume it. Every rank calls this."""
    cfg = load(run_dir)
    assert isinstance(cfg, EvalConfig)
    sampler = Sampler(
        cfg.model,
        build("generation", cfg.generation),
        cfg.sampling,
        seed=cfg.seed,
        chat=ChatFormat.of(cfg.data),
        cache_dir=cfg.cache_dir,
    )
    weights = loading.weights_of(sampler.source.folder, cfg.model)
    with sampler:
        results = run_benchmarks(sampler, cfg.benchmark, cfg.benchmark_limit, cfg.samples, run_dir, weights)
    if ranks.rank() != 0:
        return
    summary = {
        "model": cfg.model.path,
        "weights": weights,
        "samples": cfg.samples,
        "sampling": asdict(cfg.sampling),
        "seed": cfg.seed,
        "verdicts": rules_of_verdicts(),
        "mean_accuracy": fmean(result["accuracy"] for result in results.values()),
        "benchmarks": results,
    }
    write_json(run_dir / SUMMARY_FILE, summary)
    console.print(table(results))
    console.print(f"generations and verdicts: {run_dir}")


# --- comparing two finished evaluations


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compare B with A on the same problems, for every benchmark that both have.

    Raises:
        UserError: a directory is no finished evaluation, or their problems differ.
    """
    names = []
    for run_dir in (a, b):
        if not (run_dir / SUMMARY_FILE).is_file() or not isinstance(load(run_dir), EvalConfig):
            raise UserError(
                f"{run_dir} is not a finished evaluation: `sage eval` writes one, `sage resume` finishes it"
            )
        names.append(set(json.loads((run_dir / SUMMARY_FILE).read_text())["benchmarks"]))
    if not (common := sorted(names[0] & names[1])):
        raise UserError(f"{a} and {b} have no benchmark in common: {sorted(names[0])} and {sorted(names[1])}")
    return {name: compare_attempts(a / name, b / name) for name in common}


def compare_attempts(a: Path, b: Path) -> dict[str, Any]:
    """Compare two runs of one benchmark. With several samples, the majority answer of a problem counts."""
    first, second = (
        {row[0].problem_id: row for row in by_problem(read_attempts(folder / GENERATIONS_FILE))}
        for folder in (a, b)
    )
    same = [(i, r[0].answer) for i, r in first.items()] == [(i, r[0].answer) for i, r in second.items()]
    if not same or problems_of(a) != problems_of(b):
        raise UserError(
            f"{a} and {b} answer different problems: compare runs with the same benchmark and limit"
        )
    differences = [fmean(x.correct for x in second[i]) - fmean(x.correct for x in first[i]) for i in first]
    right = [
        {i: majority([x.extracted for x in row], [x.correct for x in row]) for i, row in side.items()}
        for side in (first, second)
    ]
    gained = [i for i in first if right[1][i] and not right[0][i]]
    lost = [i for i in first if right[0][i] and not right[1][i]]
    return {
        "problems": len(first),
        "difference": fmean(differences),
        "interval": list(difference_interval(differences)),
        "mcnemar_p": mcnemar(len(lost), len(gained)),
        "gained": gained,
        "lost": lost,
    }


def problems_of(folder: Path) -> str:
    """The fingerprint of the problems, without the prompt around them."""
    return json.loads((folder / BEGUN_FILE).read_text())[PROBLEMS]


def print_comparison(a: Path, b: Path) -> None:
    result = compare(a, b)
    shown = Table(title=f"{b} against {a}", title_justify="left")
    for name in ("benchmark", "problems", "difference", "95% interval", "gained", "lost", "McNemar p"):
        shown.add_column(name, justify="left" if name == "benchmark" else "right")
    for name, r in result.items():
        low, high = r["interval"]
        shown.add_row(
            name,
            str(r["problems"]),
            f"{r['difference']:+.1%}",
            f"{low:+.1%} to {high:+.1%}",
            str(len(r["gained"])),
            str(len(r["lost"])),
            f"{r['mcnemar_p']:.3g}",
        )
    console.print(shown)
    prompts = tuple(f"benchmark.{name}.prompt" for name in result)
    if keys := [key for key in differences(load(a), load(b)) if key.startswith(SETTINGS + prompts)]:
        console.print(f"warning: their {named(keys)} differ too", markup=False)
    rules = [json.loads((folder / SUMMARY_FILE).read_text()).get("verdicts") for folder in (a, b)]
    if rules[0] != rules[1]:
        console.print(
            "warning: their verdicts come from different versions of sage or of its packages: `sage verify "
            "RUN_DIR` judges the responses again",
            markup=False,
        )
    for name, r in result.items():
        for kind in ("gained", "lost"):
            if r[kind]:
                console.print(f"{name}, {kind}: {named(r[kind], SHOWN)}")
    file = b / f"compared_to_{a.resolve().name}.json"
    write_json(file, result)
    console.print(f"the whole comparison: {file}")
