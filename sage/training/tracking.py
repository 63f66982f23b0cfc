"""Where metrics go: always to RUN_DIR/metrics.jsonl, and to Weights & Biases if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sage.config import TrackingConfig, TrainConfig

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Writes metrics, on rank 0 only.

    On resume, lines after the checkpoint move to metrics.superseded.jsonl: their steps are about to run
    again.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path, step: int, main: bool):
        self.file, self.wandb = None, None
        if not main:
            return
        path = run_dir / METRICS_FILE
        if path.exists():
            rewind(path, step)
        self.file = path.open("a")
        if cfg.tracking.wandb:
            self.wandb = start_wandb(cfg.tracking, cfg, run_dir)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step. Nothing is written if there are none."""
        if not metrics:
            return
        if self.file:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def rewind(path: Path, step: int) -> None:
    """Move away the lines after `step`, and a line that a kill cut short."""
    keep, superseded = [], []
    for line in path.read_text().splitlines():
        try:
            late = json.loads(line)["step"] > step
        except (ValueError, KeyError):
            late = True
        (superseded if late else keep).append(line + "\n")
    if superseded:
        with path.with_name("metrics.superseded.jsonl").open("a") as f:
            f.writelines(superseded)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(keep))
        temporary.rename(path)


def start_wandb(tracking: TrackingConfig, cfg: TrainConfig, run_dir: Path):
    """Open a run, offline unless the user is logged in or asks for online. A resume continues it."""
    import dataclasses
    import hashlib

    import wandb

    mode: Any = tracking.mode if tracking.mode != "auto" else ("online" if wandb.api.api_key else "offline")
    return wandb.init(
        project=tracking.project,
        name=f"{cfg.name}/{run_dir.name}",
        id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12],
        resume="allow",
        dir=run_dir,
        mode=mode,
        settings=wandb.Settings(quiet=True),
        config=dataclasses.asdict(cfg),
    )
