"""Many training runs in one process per rank. Importing torch and DeepSpeed takes longer than a tiny run.

Tests call `freeze` for each run and then `execute`. As a script this file does the runs of one rank, which
torchrun has started.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from forks import ENVIRONMENT as ENVIRONMENT
from forks import on_ranks
from hydra import compose, initialize_config_module
from hydra.utils import get_method

from sage import config

ERROR_FILE = "error.txt"


def freeze(run_dir: Path, *overrides: str, command: str = "train") -> Path:
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose(command.replace("-", "_"), [*overrides]))
    config.freeze(cfg, run_dir)
    return run_dir


def execute(world_size: int, run_dirs: list[Path]) -> None:
    """Do, or go on with, every run; one that ends in a UserError leaves its message in error.txt."""
    on_ranks(world_size, do_all, [str(run_dir) for run_dir in run_dirs])


def metrics(run_dir: Path) -> list[dict]:
    """Training log events, in order; the step-0 and final evaluations have no loss and are left out."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def column(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(run_dir)]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def interrupted(run_dir: Path, step: int, target: Path) -> Path:
    """A copy of a finished run as a kill after `step`'s checkpoint would have left it."""
    shutil.copytree(run_dir, target)
    for outcome in ("final", "summary.json"):
        path = target / outcome
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for checkpoint in (target / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return target


def do_all(run_dirs: list[str]) -> None:
    from sage.util.errors import UserError
    from sage.worker import JOBS

    for run_dir in run_dirs:
        try:
            get_method(JOBS[config.load(run_dir).command])(Path(run_dir))
        except UserError as e:
            (Path(run_dir) / ERROR_FILE).write_text(str(e))


if __name__ == "__main__":
    from sage.util import ranks

    do_all(sys.argv[1:])
    ranks.leave()
