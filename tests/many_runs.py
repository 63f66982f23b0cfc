"""Many training runs in one process per rank. Importing torch and DeepSpeed takes longer than a tiny run.

Tests call `freeze` for each run and then `execute`; as a script this file is what every rank runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.utils import get_method

from sage import config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_SILENT": "true"}
ERROR_FILE = "error.txt"


def freeze(run_dir: Path, *overrides: str, command: str = "train") -> Path:
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose(command.replace("-", "_"), [*overrides]))
    config.freeze(cfg, run_dir)
    return run_dir


def execute(world_size: int, run_dirs: list[Path]) -> None:
    """Do, or go on with, every run; one that ends in a UserError leaves its message in error.txt."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [sys.executable, *(launcher if world_size > 1 else []), __file__, *map(str, run_dirs)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


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
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return target


def main(run_dirs: list[str]) -> None:
    from sage.util import ranks
    from sage.util.errors import UserError
    from sage.worker import JOBS

    for run_dir in run_dirs:
        try:
            get_method(JOBS[config.load(run_dir).command])(Path(run_dir))
        except UserError as e:
            (Path(run_dir) / ERROR_FILE).write_text(str(e))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
