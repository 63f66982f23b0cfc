"""Compare three rounds with one round of equal training and of equal cost, by the commands that a user runs.

    python benchmarks/rounds.py run FOLDER [--seeds 5]     resumes wherever it was stopped
    python benchmarks/rounds.py list FOLDER                the commands that are left
    python benchmarks/rounds.py table FOLDER               the tables of docs/evidence.md

All runs are on arithmetic, once with SAGE and once with plain DPO:

- "three rounds" sample BUDGET responses in each round, and train for STEPS steps on their pairs;
- "one round" samples BUDGET responses once, and trains for as many steps as the three rounds together;
- "one round, three budgets" also samples as many responses as the three rounds together.

So the last has the cost of the three rounds in every part, sampled responses and trained pairs, and no price
of one in units of the other is needed. OMP_NUM_THREADS says how many threads a run takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from study import cell, run

from sage.config import SUMMARY_FILE
from sage.reporting.groups import interval

ROUNDS, BUDGET, STEPS = 3, 2500, 20  # BUDGET asks an eighth of the problems, 8 responses each
METHODS = {"SAGE": [], "uniform": ["+baseline=dpo"]}
ARMS = {
    "three rounds": (ROUNDS, BUDGET, STEPS),
    "one round": (1, BUDGET, ROUNDS * STEPS),
    "one round, three budgets": (1, ROUNDS * BUDGET, ROUNDS * STEPS),
}
COMMON = ["+experiment=arithmetic", "+benchmark=arithmetic", "data.eval_path=null", "model.dtype=float32"]


def where(folder: Path, method: str, arm: str, seed: int) -> Path:
    return folder / method / arm.replace(",", "").replace(" ", "_") / str(seed)


def commands(folder: Path, seeds: int) -> Iterator[tuple[Path, list[str]]]:
    """Each run's folder and command; all arms of a seed before the next, so that a part compares fairly."""
    for seed in range(seeds):
        for method, words in METHODS.items():
            for arm, (rounds, budget, steps) in ARMS.items():
                length = [f"rounds={rounds}", f"round.budget={budget}", f"steps={steps}", "eval_every=0"]
                yield where(folder, method, arm, seed), ["rounds", *COMMON, *words, *length, f"seed={seed}"]


# --- the tables


def finished(folder: Path, method: str, arm: str, seeds: int) -> dict[int, dict[str, Any]]:
    """Seed -> summary of the runs that are there."""
    files = {seed: where(folder, method, arm, seed) / SUMMARY_FILE for seed in range(seeds)}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def accuracy(summary: dict[str, Any], number: int = -1) -> float:
    """The accuracy after a round, in percent."""
    return 100 * summary["rounds"][number]["benchmarks"]["arithmetic"]["accuracy"]


def total(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda summary: sum(found.get(name, 0) for found in summary["rounds"])


def table(folder: Path, seeds: int) -> None:
    print("Accuracy in percent, differences in points: means and 95% intervals over seeds (Student's t).\n")
    columns = ["seeds", "accuracy", "three rounds' lead", "responses", "sampled tokens", "pairs built"]
    columns += ["trained", "scored"]
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
            print(f"| {' | '.join(row)} |")
    after = range(ROUNDS + 1)
    print(f"\n| after round | {' | '.join(map(str, after))} |\n|{'---|' * (len(after) + 1)}")
    for method in METHODS:
        found = finished(folder, method, "three rounds", seeds).values()
        row = [cell(interval([accuracy(s, number) for s in found]), ".1f") for number in after]
        print(f"| {method} | {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "list", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.what == "table":
        table(folder, args.seeds)
    else:
        run(commands(folder, args.seeds), show=args.what == "list")


if __name__ == "__main__":
    main()
