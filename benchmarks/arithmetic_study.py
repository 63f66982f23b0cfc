"""Which pairs deserve a gradient? Methods side by side on the arithmetic task, in sage's own training loop.

OMP_NUM_THREADS=1 python benchmarks/arithmetic_study.py run RESULTS.jsonl    tune, then five seeds; resumable
python benchmarks/arithmetic_study.py table RESULTS.jsonl    print the tables of docs/arithmetic.md

Every method gets the same grid of learning rates and betas with one seed, and keeps the settings that are
best on the validation problems. Then it runs five other seeds and answers the test problems. A run that
RESULTS.jsonl already holds is not repeated.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from transformers.utils import logging

from sage import config
from sage.data.source import resolve_path
from sage.train import train
from sage.training.hooks import Hook
from sage.training.run import Run
from sage.util import ranks
from sage.util.progress import console

STEPS, EVERY = 50, 10
GRID = [  # learning rates of 1e-4 and more destroyed the model in trials
    {"optimizer.lr": lr, "loss.beta": beta} for lr, beta in ((1e-5, 0.1), (3e-5, 0.1), (3e-5, 0.5))
]
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
T_975 = (12.71, 4.303, 3.182, 2.776)  # of Student's t with 1 to 4 degrees of freedom
NLL = "loss.nll_weight=1"
SAGE = [NLL, "scorer=sage", "scorer.margin=policy_mean", "scorer.temperature=0", "scorer.warmup_steps=0"]
REFRESH = ["scorer.score_every=10", "scorer.reuse=2"]
METHODS: dict[str, list[str]] = {
    "dpo": ["loss.nll_weight=0"],
    "dpo+nll": [NLL],
    "sage": [*SAGE, *REFRESH],
    "sage without NLL": [*SAGE[1:], "loss.nll_weight=0", *REFRESH],
    "loss": [NLL, "scorer=loss"],
    "sage, scored every step": SAGE,
    "sage, sampled": [*SAGE, *REFRESH, "scorer.temperature=0.1"],
    "sage, curriculum too": [*SAGE, *REFRESH, "curriculum=sage"],
    "easy to hard": [NLL, "curriculum=static_easy_to_hard"],
    "hardest third": [NLL, "curriculum=static_filter"],
}


class Accuracy(Hook):
    """Greedy accuracy on `problems`, and the CPU seconds spent in training, without those of evaluations."""

    def __init__(self, problems: list[dict[str, str]]):
        self.problems, self.ended, self.seconds = problems, math.nan, 0.0

    def evaluate(self, run: Run) -> dict[str, float]:
        now = time.process_time()  # not wall-clock: other work on the machine must not count
        self.seconds += now - self.ended if run.state.step else 0.0
        policy = run.engine.policy
        policy.causal.config._attn_implementation = policy.unpacked_attention  # training may have packed
        texts = answers(policy.causal, run.base.tokenizer, [p["prompt"] for p in self.problems])
        right = sum(
            t.rpartition("#### ")[2] == p["answer"] for t, p in zip(texts, self.problems, strict=True)
        )
        self.ended = time.process_time()
        return {
            "eval/accuracy": right / len(self.problems),
            "eval/cpu_seconds": self.seconds,
            **run.forward.cost_metrics(),
        }


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy. All prompts of this task have the same number of tokens, so nothing is padded."""
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, use_cache=True
    )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def one_run(method: str, settings: dict[str, float], split: str, seed: int) -> dict[str, Any]:
    """Train once; the curve has a point every EVERY steps, from 0."""
    path = resolve_path(f"pkg://sage.assets/arithmetic/problems_{split}.jsonl")
    problems = [json.loads(line) for line in Path(path).read_text().splitlines()]
    folder = Path(tempfile.mkdtemp(prefix="arithmetic-"))
    overrides = [
        "+experiment=arithmetic",
        "data.eval_limit=32",
        f"steps={STEPS}",
        f"eval_every={EVERY}",
        f"seed={seed}",
        "model.dtype=float32",
        *METHODS[method],
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    with initialize_config_module("sage.conf", version_base="1.3"):
        config.freeze(config.load(compose("train", overrides)), folder / "run")
    train(folder / "run", hooks=[Accuracy(problems)])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {
            "step": line["step"],
            "accuracy": line["eval/accuracy"],
            "cpu_seconds": line["eval/cpu_seconds"],
            "backward_pairs": line["cost/backward_pairs"],
            "logps/chosen": line["eval/logps/chosen"],
            "cost": line["cost/forward_pairs"] + 3 * line["cost/backward_pairs"],
        }
        for line in lines
        if "eval/accuracy" in line
    ]
    shutil.rmtree(folder)
    return {"method": method, "split": split, "seed": seed, "settings": settings, "curve": curve}


def load(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(file: Path, methods: list[str]) -> None:
    """Run what the results lack: the grid on validation problems, then the seeds on test problems."""
    console.quiet = True
    logging.disable_progress_bar()
    for method, settings in product(methods, GRID):
        once(file, method, settings, "validation", TUNING_SEED)
    # All methods of a seed before the next, so that a half-done study compares fairly.
    for seed, method in product(SEEDS, methods):
        once(file, method, tuned(load(file), method), "test", seed)
    ranks.leave()


def once(file: Path, method: str, settings: dict[str, float], split: str, seed: int) -> None:
    wanted = {"method": method, "settings": settings, "split": split, "seed": seed}
    if any(all(line[key] == value for key, value in wanted.items()) for line in load(file)):
        return
    result = one_run(method, settings, split, seed)
    with file.open("a") as f:
        f.write(json.dumps(result) + "\n")
    print(
        time.strftime("%H:%M:%S"),
        method,
        settings,
        split,
        seed,
        [p["accuracy"] for p in result["curve"]],
        flush=True,
    )


def best(curve: list[dict[str, float]]) -> float:
    return max(point["accuracy"] for point in curve)


def tuned(lines: list[dict[str, Any]], method: str) -> dict[str, float]:
    """The settings whose best point on the validation problems is highest."""
    tried = [line for line in lines if line["method"] == method and line["split"] == "validation"]
    return max(tried, key=lambda line: best(line["curve"]))["settings"]


# --- the table


def curves(lines: list[dict[str, Any]], method: str, name: str) -> np.ndarray:
    """[seeds, points] of the test runs, for the seeds that every tested method has finished."""
    tested: dict[str, dict[int, Any]] = {}
    for line in lines:
        if line["split"] == "test":
            tested.setdefault(line["method"], {})[line["seed"]] = line["curve"]
    seeds = sorted(set.intersection(*map(set, tested.values())))
    runs = [tested[method][seed] for seed in seeds] if method in tested else []
    return np.array([[point[name] for point in curve] for curve in runs])


def reach(accuracy: np.ndarray, target: float, at: np.ndarray) -> float:
    """Where a curve first reaches the target, linear between its points; NaN where it never does."""
    above = np.flatnonzero(accuracy >= target)
    if not len(above):
        return np.nan
    i = max(above[0], 1)
    return at[i - 1] + (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1]) * (at[i] - at[i - 1])


def cell(values: np.ndarray, form: str) -> str:
    """Mean over the seeds that have a value and its 95% interval by Student's t."""
    found = values[np.isfinite(values)]
    count = "" if len(found) == len(values) else f", {len(found)} of {len(values)} seeds"
    if len(found) < 2:
        return "never" if not len(found) else f"{found[0]:{form}}{count}"
    half = T_975[len(found) - 2] * found.std(ddof=1) / len(found) ** 0.5
    return f"{found.mean():{form}} ± {half:{form}}{count}"


def heading(settings: dict[str, float]) -> str:
    return ", ".join(f"{value:g}" for value in settings.values())


def grid_table(lines: list[dict[str, Any]]) -> None:
    """Tuning: the best validation accuracy of each method under each setting, and the step it came at."""
    headings = [heading(settings) for settings in GRID]
    print(f"| lr, beta | {' | '.join(headings)} |\n|{'---|' * (len(GRID) + 1)}")
    for method in METHODS:
        cells = dict.fromkeys(headings, "")
        for line in lines:
            if (line["method"], line["split"]) == (method, "validation"):
                top = max(line["curve"], key=lambda point: point["accuracy"])
                cells[heading(line["settings"])] = f"{top['accuracy']:.3f} at {top['step']}"
        if any(cells.values()):
            print(f"| {method} | {' | '.join(cells.values())} |")
    print()


def table(file: Path) -> None:
    """Print the results. The last four columns: what the mean curve and the seeds needed to reach it."""
    lines = load(file)
    grid_table(lines)
    target = curves(lines, "dpo", "accuracy").mean(0).max()
    print(f"Target: the best of DPO's mean curve, {target:.3f}\n")
    print("| method | seeds | best | at the end | steps | backward pairs | cost | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        accuracy = curves(lines, method, "accuracy")
        if not len(accuracy):
            continue
        row = [method, str(len(accuracy)), cell(accuracy.max(1), ".3f"), cell(accuracy[:, -1], ".3f")]
        for name in ("step", "backward_pairs", "cost", "cpu_seconds"):
            at = curves(lines, method, name)
            seeds = np.array([reach(a, target, x) for a, x in zip(accuracy, at, strict=True)])
            on_mean = reach(accuracy.mean(0), target, at.mean(0))
            row.append(("" if np.isnan(on_mean) else f"{on_mean:.0f}; ") + cell(seeds, ".0f"))
        print(f"| {' | '.join(row)} |")


def main() -> None:
    match sys.argv[1:]:
        case ["run", file, *methods]:
            run(Path(file), methods or list(METHODS))
        case ["table", file]:
            table(Path(file))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
