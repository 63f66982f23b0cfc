"""Compare three rounds with one round of equal training and of equal cost, by the commands that a user runs.

    python benchmarks/rounds.py run arithmetic FOLDER [--seeds 5]     resumes wherever it was stopped
    python benchmarks/rounds.py run words FOLDER [--seeds 3]          after scripts/make_words.py DATA FOLDER
    python benchmarks/rounds.py list arithmetic FOLDER                the commands that are left
    python benchmarks/rounds.py table arithmetic FOLDER               the tables of docs/evidence.md

Each run is done once with SAGE and once with plain DPO:

- "three rounds" sample a budget of responses in each round, and train for some steps on their pairs;
- "one round" samples one budget, and trains for as many steps as the three rounds together;
- "one round, three budgets" also samples as many responses as the three rounds together.

So the last has the cost of the three rounds in every part, sampled responses and trained pairs, and no price
of one in units of the other is needed. `run TASK FOLDER --options` instead repeats SAGE's three rounds with
each option of the `round` group. OMP_NUM_THREADS says how many threads a run takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import study
from study import cell, run, sampled, sampled_accuracy

from sage.config import SUMMARY_FILE
from sage.reporting.groups import interval

ROUNDS = 3
METHODS = {"SAGE": [], "uniform": ["+baseline=dpo"]}
ARMS = {  # name -> rounds, budgets in each, steps in each
    "three rounds": (ROUNDS, 1, 1),
    "one round": (1, 1, ROUNDS),
    "one round, three budgets": (1, ROUNDS, ROUNDS),
}
OPTIONS = {  # name -> overrides of SAGE's three rounds
    "three rounds": [],
    "reference=initial": ["round.reference=initial"],
    "optimizer=continued": ["round.optimizer=continued"],
    "keep=0.5": ["round.keep=0.5"],
    "rising temperature": ["round.temperatures=[1,1.2,1.4]"],
    "rejected=earlier": ["round.rejected=earlier"],
}


class Task(NamedTuple):
    common: list[str]
    budget: int  # responses of one round, 8 to a problem
    steps: int  # of one round
    sampling: list[str] | None = None  # for `sage eval` of each run's policy


def arithmetic(folder: Path) -> Task:
    """A round asks an eighth of the problems. A run takes about a minute of one core."""
    common = ["+experiment=arithmetic", "+benchmark=arithmetic", "data.eval_path=null", "model.dtype=float32"]
    return Task(common, budget=2500, steps=20)


def words(folder: Path) -> Task:
    """A round asks a quarter of the problems. The settings are the best of the study's grid."""
    task = study.words(folder)
    common = [word for word in task.common if not word.startswith("data.path=")]
    building = [word for word in task.prepare["pairs"][1:] if word not in common]
    settings = ["optimizer.lr=3e-5", "optimizer.schedule=constant", "loss.beta=0.1", "loss.nll_weight=1"]
    assert task.sampling is not None
    sampling = [*task.sampling, *study.given(task.problems["test"])]
    return Task([*common, *building, *task.problems["test"], *settings], 1600, 8, sampling)


TASKS = {"arithmetic": arithmetic, "words": words}


def where(folder: Path, method: str, arm: str, seed: int) -> Path:
    return folder / method / arm.replace(",", "").replace(" ", "_").replace("=", "_") / str(seed)


def commands(task: Task, folder: Path, seeds: int, options: bool) -> Iterator[tuple[Path, list[str]]]:
    """Each run's folder and command; all arms of a seed before the next, so that a part compares fairly."""
    arms = [(m, arm, over, *length) for m, over in METHODS.items() for arm, length in ARMS.items()]
    if options:
        arms = [("SAGE", name, over, *ARMS["three rounds"]) for name, over in OPTIONS.items()]
    for seed, (method, arm, overrides, rounds, budgets, steps) in product(range(seeds), arms):
        length = [f"rounds={rounds}", f"round.budget={budgets * task.budget}"]
        length += [f"steps={steps * task.steps}", "eval_every=0", f"seed={seed}"]
        run_dir = where(folder, method, arm, seed)
        yield run_dir, ["rounds", *task.common, *overrides, *length]
        if task.sampling is not None:
            yield sampled(folder, run_dir), ["eval", f"model.path={run_dir / 'final'}", *task.sampling]


# --- the tables


def finished(folder: Path, method: str, arm: str, seeds: int) -> dict[int, dict[str, Any]]:
    """Seed -> summary of the runs that are there."""
    files = {seed: where(folder, method, arm, seed) / SUMMARY_FILE for seed in range(seeds)}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def accuracy(summary: dict[str, Any], number: int = -1) -> float:
    """The accuracy after a round, in percent, on the one benchmark."""
    (measured,) = summary["rounds"][number]["benchmarks"].values()
    return 100 * measured["accuracy"]


def total(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda summary: sum(found.get(name, 0) for found in summary["rounds"])


def table(folder: Path, seeds: int) -> None:
    print("Accuracy in percent, differences in points: means and 95% intervals over seeds (Student's t).\n")
    columns = ["seeds", "accuracy", "three rounds' lead", "responses", "sampled tokens", "pairs built"]
    columns += ["trained", "scored", "sampled accuracy", "three rounds' lead in it"]
    print(f"| method | run | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for method in METHODS:
        first = finished(folder, method, "three rounds", seeds)
        for arm in ARMS:
            found = finished(folder, method, arm, seeds)
            lead = [accuracy(first[seed]) - accuracy(found[seed]) for seed in first.keys() & found.keys()]
            costs = ("responses", "response_tokens", "pairs", "backward_pairs", "forward_pairs")
            row = [
                *(method, arm, str(len(found)), cell(interval([accuracy(s) for s in found.values()]), ".1f")),
                "" if arm == "three rounds" else cell(interval(lead), "+.1f"),
                *(f"{interval([total(name)(s) for s in found.values()]).mean:,.0f}" for name in costs),
            ]
            answers, others = (
                {s: 100 * sampled_accuracy(folder, where(folder, method, name, s)) for s in range(seeds)}
                for name in (arm, "three rounds")
            )
            row.append(cell(interval([*answers.values()]), ".1f"))
            lead = [others[seed] - answers[seed] for seed in answers]
            row.append("" if arm == "three rounds" else cell(interval(lead), "+.1f"))
            print(f"| {' | '.join(row)} |")
    after = [*range(ROUNDS + 1)]
    print(f"\n| accuracy after round | seeds | {' | '.join(map(str, after))} | end - SAGE's |")
    print(f"|{'---|' * (len(after) + 3)}")
    plain = finished(folder, "SAGE", "three rounds", seeds)
    for method, arm in [("uniform", "three rounds"), *(("SAGE", name) for name in OPTIONS)]:
        if found := finished(folder, method, arm, seeds):
            rows = [cell(interval([accuracy(s, number) for s in found.values()]), ".1f") for number in after]
            lead = [accuracy(found[seed]) - accuracy(plain[seed]) for seed in found.keys() & plain.keys()]
            against = "" if found == plain else cell(interval(lead), "+.1f")
            print(f"| {method}, {arm} | {len(found)} | {' | '.join(rows)} | {against} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "list", "table"))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--options", action="store_true", help="SAGE's three rounds with each option")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.what == "table":
        table(folder, args.seeds)
    else:
        task = TASKS[args.task](folder)
        run(commands(task, folder, args.seeds, args.options), show=args.what == "list")


if __name__ == "__main__":
    main()
