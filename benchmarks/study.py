"""Compare methods of choosing pairs, by the commands that a user runs. It resumes wherever it was stopped.

    python benchmarks/study.py run arithmetic FOLDER [METHOD ...] [--seeds 20] [--steps 50]
    python benchmarks/study.py run flipped FOLDER [METHOD ...]     arithmetic with a fifth of the labels wrong
    python benchmarks/study.py run rare FOLDER [METHOD ...]        arithmetic on problems mostly solved
    python benchmarks/study.py run words FOLDER [METHOD ...]       after scripts/make_words.py DATA FOLDER
    python benchmarks/study.py run flipped-words FOLDER/flipped [METHOD ...]    its pairs, a fifth wrong
    python benchmarks/study.py list arithmetic FOLDER              the commands that are left
    python benchmarks/study.py table arithmetic FOLDER             the tables of docs/evidence.md

Each method is a group of overrides, and METHOD+nll adds the NLL term. It runs on a small grid with one seed,
and keeps the settings that are best on the validation problems. Then it runs other seeds and answers the test
problems. A run is one `sage train` in a folder of its own: a finished one is not repeated, and a broken one
goes on from its last checkpoint. `sage report FOLDER/test/STEPS` shows the same runs in more detail.
OMP_NUM_THREADS says how many threads a run takes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sage.data.source import resolve_path
from sage.reporting.groups import Group, Interval, best, final, interval, mean_curve, paired
from sage.reporting.runs import Run, find

PLAIN, NLL = "+baseline=dpo", "+nll"
MARGINS_FROM = "scorer.margins_from={folder}/held_out_scores/scores"  # of `trained_on_held_out`
METHODS: dict[str, list[str]] = {
    "dpo": [PLAIN],
    "dpo_norm": [PLAIN, "loss=dpo_norm"],
    "omni-dpo": [PLAIN, "loss=omni_dpo"],
    "score": ["curriculum=none"],
    "curriculum": ["scorer=uniform"],
    "sage": [],
    "sage, mixed margin": ["scorer.margin=mixed"],
    "sage, implicit reward": ["scorer.margin=implicit_reward"],
    "sage, 3 candidates": ["scorer.candidates_per_pair=3"],
    "score, 3 candidates": ["curriculum=none", "scorer.candidates_per_pair=3"],
    "score, 6 candidates": ["curriculum=none", "scorer.candidates_per_pair=6"],
    "score, drop_negative": ["curriculum=none", "scorer.drop_negative=0.25", "scorer.warmup_steps=5"],
    "loss": [PLAIN, "scorer=loss"],
    "smallest reward gap": [PLAIN, "scorer=small_gap"],
    "medium influence": [PLAIN, "scorer=medium_influence", "scorer.warmup_steps=16", MARGINS_FROM],
    "easiest fifth": [PLAIN, "curriculum=static_filter", "curriculum.low=0", "curriculum.high=0.2"],
    "hardest third": [PLAIN, "curriculum=static_filter"],
    "without the hardest third": [
        PLAIN,
        "curriculum=static_filter",
        "curriculum.low=0",
        "curriculum.high=0.67",
    ],
}
DEFAULT = ["dpo", "dpo+nll", "sage", "sage+nll", *(m for m in METHODS if m not in ("dpo", "sage"))]
PER_TOKEN = 25  # times DPO's beta, about the length of a response: beta of the losses per token
PER_TOKEN_METHODS = ("dpo_norm", "omni-dpo")
TUNING_SEED = 100
FLIPPED = 0.2  # the share of wrong labels in the tasks of that name
ARITHMETIC_PAIRS = "pkg://sage.assets/arithmetic/pairs_train.jsonl"
RARE = 0.625  # the lowest pass rate in the task of that name


class Task(NamedTuple):
    common: list[str]  # overrides of every command that reads the pairs
    training: list[str]  # further ones of `sage train`
    benchmark: str  # its name in the metrics
    problems: dict[str, list[str]]  # split -> overrides
    grid: list[tuple[float, float]]  # learning rate and beta
    steps: int
    every: int  # steps between evaluations
    prepare: dict[str, list[str]]  # folder -> the command that fills it, before all runs
    policy: str
    held_out: list[str]  # pairs that no method trains on
    # For `sage eval` after each run. Its accuracy then chooses the settings.
    sampling: list[str] | None = None

    def metric(self) -> str:
        return f"benchmark/{self.benchmark}/accuracy"


def arithmetic(folder: Path) -> Task:
    validation = "benchmark.arithmetic.path=pkg://sage.assets/arithmetic/problems_validation.jsonl"
    return Task(
        common=["+experiment=arithmetic", "model.dtype=float32"],
        training=["loss.nll_weight=0"],
        benchmark="arithmetic",
        problems={
            split: ["+benchmark=arithmetic", "data.eval_limit=32", *extra]
            for split, extra in (("validation", [validation]), ("test", []))
        },
        grid=[(1e-5, 0.1), (3e-5, 0.1), (3e-5, 0.5)],
        steps=50,
        every=10,
        prepare={},
        policy="pkg://sage.assets/arithmetic",
        held_out=["data.path=pkg://sage.assets/arithmetic/pairs_validation.jsonl", "data.eval_path=null"],
    )


def on_other_pairs(task: Task, pairs: str, file: Path, change: Callable[[list[dict]], list[dict]]) -> Task:
    """The task on its training pairs as `change` returns them, written once to `file`."""
    if not file.exists():
        rows = change([json.loads(line) for line in Path(resolve_path(pairs)).read_text().splitlines()])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [word for word in task.common if not word.startswith("data.path=")]
    return task._replace(common=[*kept, f"data.path={file}"])


def flip(rows: list[dict]) -> list[dict]:
    """Exchange chosen and rejected in a seeded draw of the pairs."""
    for i in random.Random(0).sample(range(len(rows)), round(FLIPPED * len(rows))):
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    return rows


def flipped(folder: Path) -> Task:
    return on_other_pairs(arithmetic(folder), ARITHMETIC_PAIRS, folder / "flipped.jsonl", flip)


def flipped_words(folder: Path) -> Task:
    """Word problems with the policy, problems and pairs of the folder above."""
    task = words(folder.parent)._replace(prepare={})
    return on_other_pairs(task, str(folder.parent / "pairs" / "pairs.jsonl"), folder / "flipped.jsonl", flip)


def rare(folder: Path) -> Task:
    """Arithmetic on pairs of problems that the model mostly gets right: a tenth of them are errors."""
    mostly_right = lambda rows: [row for row in rows if row["pass_rate"] >= RARE]  # noqa: E731
    return on_other_pairs(arithmetic(folder), ARITHMETIC_PAIRS, folder / "rare.jsonl", mostly_right)


def words(folder: Path) -> Task:
    policy = ["model=hf", f"model.path={folder / 'policy'}"]
    sampling = ["sampling.max_new_tokens=32", "generation.batch_size=64", "generation.chunk=512"]
    asked = ["data.problems.prompt='{problem}'", "data.problems.answer_from=plain"]
    pairing = ["pairing.samples=8", "pairing.per_problem=2"]
    option = folder / "conf" / "benchmark" / "words.yaml"  # a benchmark of our own is an option of its group
    option.parent.mkdir(parents=True, exist_ok=True)
    option.write_text("words: {path: FILE, prompt: '{problem}', answer_from: plain}\n")
    own = [f"hydra.searchpath=[file://{folder / 'conf'}]", *sampling]
    return Task(
        common=[
            *policy,
            *[f"data.path={folder / 'pairs' / 'pairs.jsonl'}"],
            *["micro_batch_tokens=2048", "data.max_length=256"],
        ],
        training=["batch_size=16"],
        benchmark="words",
        problems={
            split: [*own, "+benchmark=words", f"benchmark.words.path={folder / f'problems_{split}.jsonl'}"]
            for split in ("validation", "test")
        },
        grid=[(3e-6, 0.1), (1e-5, 0.1), (3e-5, 0.1)],
        steps=50,  # 800 pairs of 1,089. SAGE scores twice as many.
        every=50,
        prepare={
            "pairs": [
                *["build-pairs", *policy, *sampling, f"data.problems.path={folder / 'problems_train.jsonl'}"],
                *[*asked, *pairing],
            ]
        },
        policy=str(folder / "policy"),
        held_out=[
            *[*sampling, "data.path=null", f"data.problems.path={folder / 'problems_validation.jsonl'}"],
            *[*asked, *pairing],
        ],
        sampling=["model=hf", "sampling.temperature=1", "samples=4"],
    )


TASKS = {
    "arithmetic": arithmetic,
    "flipped": flipped,
    "rare": rare,
    "words": words,
    "flipped-words": flipped_words,
}


def train(
    task: Task, folder: Path, method: str, lr: float, beta: float, split: str, seed: int, steps: int
) -> list[str]:
    name = method.removesuffix(NLL)
    scale = PER_TOKEN if name in PER_TOKEN_METHODS else 1
    overrides = [word.format(folder=folder) for word in METHODS[name]]
    overrides += ["loss.nll_weight=1"] if name != method else []
    every = max(task.every, steps // 10)
    return [
        *[
            "train",
            *task.common,
            *task.training,
            *task.problems[split],
            "benchmark_limit=null",
            f"steps={steps}",
        ],
        *[f"eval_every={every}", f"seed={seed}", *overrides],
        *[f"optimizer.lr={lr:g}", "optimizer.schedule=constant", f"loss.beta={beta * scale:g}"],
    ]


def commands(task: Task, folder: Path, args: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """Each run's folder and command, in order. Settings are chosen once all runs of the grid are there."""
    for name, words in task.prepare.items():
        yield folder / name, words
    if any(MARGINS_FROM in METHODS[method.removesuffix(NLL)] for method in args.methods):
        yield from trained_on_held_out(task, folder)
    for method, (lr, beta) in product(args.methods if len(task.grid) > 1 else (), task.grid):
        words = train(task, folder, method, lr, beta, "validation", TUNING_SEED, task.steps)
        yield from measured(task, folder, grid_folder(folder, method, lr, beta), words, "validation")
    # All methods of a seed before the next, so that a half-done study compares fairly.
    for seed, method in ((seed, method) for seed in range(args.seeds) for method in args.methods):
        chosen = tuned(task, folder, method)
        if chosen is not None:
            where = folder / "test" / str(args.steps) / slug(method) / str(seed)
            words = train(task, folder, method, *chosen, "test", seed, args.steps)
            yield from measured(task, folder, where, words, "test")


def trained_on_held_out(task: Task, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Train a model for a pass over held-out pairs, and measure the training pairs by it."""
    once = ["epochs=1", "steps=null", "optimizer.lr=1e-5", "optimizer.schedule=constant"]
    yield (
        folder / "held_out",
        ["train", *task.common, *task.training, *task.held_out, PLAIN, "loss.beta=0.1", *once],
    )
    models = [f"model.path={folder / 'held_out' / 'final'}", f"reference_model={task.policy}"]
    yield folder / "held_out_scores", ["score-dataset", *task.common, *models, "loss.beta=0.1"]


def measured(
    task: Task, folder: Path, where: Path, words: list[str], split: str
) -> Iterator[tuple[Path, list[str]]]:
    """The command of a run, and that which samples answers from its policy if the task asks for them."""
    yield where, words
    if task.sampling is not None:
        words = [*task.sampling, *given(task.problems[split])]
        yield sampled(folder, where), ["eval", f"model.path={where / 'final'}", *words]


def given(problems: list[str]) -> list[str]:
    """The problems as `sage eval` takes them, which has a benchmark by default."""
    return [word.removeprefix("+") for word in problems]


def sampled(folder: Path, where: Path) -> Path:
    return folder / "sampled" / where.relative_to(folder)


def sampled_accuracy(folder: Path, where: Path) -> float:
    file = sampled(folder, where) / "summary.json"
    return json.loads(file.read_text())["mean_accuracy"] if file.exists() else math.nan


def grid_folder(folder: Path, method: str, lr: float, beta: float) -> Path:
    return folder / "grid" / slug(method) / f"{lr:g}_{beta:g}"


def slug(method: str) -> str:
    return method.replace(",", "").replace(" ", "_")


def tuned(task: Task, folder: Path, method: str) -> tuple[float, float] | None:
    """The settings that do best on the validation problems; None if a run is missing."""
    if len(task.grid) == 1:
        return task.grid[0]
    values = {}
    for lr, beta in task.grid:
        where = grid_folder(folder, method, lr, beta)
        runs = finished([where])
        if not runs:
            return None
        if task.sampling is None:
            values[lr, beta] = best(runs[0], task.metric())[0]
        else:
            values[lr, beta] = sampled_accuracy(folder, where)
    if any(map(math.isnan, values.values())):
        return None
    return max(values, key=lambda key: values[key])


def finished(folders: list[Path]) -> list[Run]:
    there = [str(f) for f in folders if (f / "summary.json").exists()]
    return find(there)[0] if there else []


def run(lines: Iterable[tuple[Path, list[str]]], show: bool) -> None:
    """Run the commands that are not finished in their folders, or only show them."""
    for where, words in lines:
        if (where / "summary.json").exists() or (where / "manifest.json").exists():
            continue
        begun = (where / "config.yaml").exists()
        words = ["resume", str(where)] if begun else [*words, f"hydra.run.dir={where}"]
        line = shlex.join(["sage", *words])
        print(line, flush=True)
        if not show:
            sage = Path(sys.executable).with_name("sage")
            done = subprocess.run([sage, *words], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{done.stderr[-2000:]}\nstatus {done.returncode}: {line}")


# --- the tables


def cell(value: Interval, form: str = ".3f") -> str:
    if not value.n:
        return ""
    half = f" ± {value.high - value.mean:{form.lstrip('+')}}" if value.n > 1 else ""
    return f"{value.mean:{form}}{half}"


def reach(group: Group, metric: str, target: float, axis: str) -> float:
    """Where the mean curve first reaches the target, between its points; NaN if it never does."""
    curve = mean_curve(group.runs, metric, axis, 10_000)
    if curve is None:
        return math.nan
    x, y = curve[:2]
    above = np.flatnonzero(y >= target)
    if not len(above):
        return math.nan
    i = max(int(above[0]), 1)
    return float(np.interp(target, y[i - 1 : i + 1], x[i - 1 : i + 1]))


def at_cost(run: Run, metric: str, cost: float) -> float:
    """The metric of a run that is stopped at this cost, between its evaluations; NaN if it is shorter."""
    steps, values = run.metrics[metric].finite
    return float(np.interp(cost, run.at("cost", steps), values, right=math.nan))


def table(task: Task, folder: Path, args: argparse.Namespace) -> None:
    metric = task.metric()
    print(f"| lr, beta | {' | '.join(f'{lr:g}, {beta:g}' for lr, beta in task.grid)} |")
    print(f"|{'---|' * (len(task.grid) + 1)}")
    for method in args.methods:
        row = []
        for lr, beta in task.grid:
            runs = finished([grid_folder(folder, method, lr, beta)])
            value, step = best(runs[0], metric) if runs else (math.nan, 0)
            answers = sampled_accuracy(folder, grid_folder(folder, method, lr, beta))
            also = "" if math.isnan(answers) else f", sampled {answers:.3f}"
            row.append(f"{value:.3f} at {step}{also}" if runs else "")
        if any(row):
            print(f"| {method} | {' | '.join(row)} |")

    groups = {}
    for method in args.methods:
        where = folder / "test" / str(args.steps) / slug(method)
        if runs := finished([where / str(seed) for seed in range(args.seeds)]):
            groups[method] = Group(method, method, runs)
    if "dpo" not in groups:
        return
    curve = mean_curve(groups["dpo"].runs, metric, "step", 10_000)
    assert curve is not None
    target = float(curve[1].max())
    # Trained pairs cost the same in all runs of equal length, and scoring comes on top: DPO's is the least.
    least = min(run.clocks["cost"].values[-1] for run in groups["dpo"].runs)
    print(f"\nTarget: the best of DPO's mean curve, {target:.3f}. Differences in points, paired by seed.\n")
    columns = "best | end | end - DPO's | end - (DPO + NLL)'s | end - the score's | pairs | cost | whole cost"
    columns += f" | at a cost of {least:.0f} | there, - DPO's | there, - the score's"
    print(f"| method | seeds | {columns} |\n|{'---|' * 13}")
    for method, group in groups.items():
        row = [method, str(len(group.runs))]
        for value_of in (
            lambda run: best(run, metric)[0],
            lambda run: final(run.metrics[metric]),
        ):
            row.append(cell(interval([value_of(run) for run in group.runs])))
        for other in ("dpo", "dpo+nll", "score"):
            known = other in groups and other != method
            points = lambda run: 100 * final(run.metrics[metric])  # noqa: E731
            row.append(cell(paired(groups[other], group, points), "+.1f") if known else "")
        for axis in ("pairs", "cost"):
            where = reach(group, metric, target, axis)
            row.append("never" if math.isnan(where) else f"{where:.0f}")
        row.append(f"{np.mean([run.clocks['cost'].values[-1] for run in group.runs]):.0f}")
        row.append(cell(interval([at_cost(run, metric, least) for run in group.runs])))
        for other in ("dpo", "score"):
            points = lambda run: 100 * at_cost(run, metric, least)  # noqa: E731
            known = other in groups and other != method
            row.append(cell(paired(groups[other], group, points), "+.1f") if known else "")
        print(f"| {' | '.join(row)} |")
    if task.sampling is not None:
        print("\n| method | seeds | sampled | - DPO's | - (DPO + NLL)'s |\n|---|---|---|---|---|")
        for method, group in groups.items():
            answers = lambda run: 100 * sampled_accuracy(folder, run.path)  # noqa: E731
            row = [method, str(len(group.runs)), cell(interval([*map(answers, group.runs)]), ".1f")]
            for other in ("dpo", "dpo+nll"):
                known = other in groups and other != method
                row.append(cell(paired(groups[other], group, answers), "+.1f") if known else "")
            print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "list", "table"))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--settings", metavar="LR,BETA", help="for all methods, instead of the grid")
    args = parser.parse_args()
    if unknown := {method.removesuffix(NLL) for method in args.methods} - set(METHODS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    folder = args.folder.resolve()
    task = TASKS[args.task](folder)
    args.methods = args.methods or DEFAULT
    args.steps = args.steps or task.steps
    if args.settings:
        lr, beta = map(float, args.settings.split(","))
        task = task._replace(grid=[(lr, beta)])
    if args.what == "table":
        table(task, folder, args)
    else:
        run(commands(task, folder, args), show=args.what == "list")


if __name__ == "__main__":
    main()
