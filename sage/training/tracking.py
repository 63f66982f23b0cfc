"""Where metrics go: always to RUN_DIR/metrics.jsonl, and to Weights & Biases or TensorBoard if asked."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from sage.config import TrackingConfig, TrainConfig
from sage.training.wandb_log import WandbLog, check_wandb
from sage.util.errors import UserError
from sage.util.files import write_text

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class Log(Protocol):
    """A second place for metrics."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes metrics, on rank 0 only.

    On resume, lines after the checkpoint move to metrics.superseded.jsonl: their steps are about to run
    again.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path, step: int, main: bool):
        self.file, self.logs = None, list[Log]()
        if not main:
            return
        path = run_dir / METRICS_FILE
        logged = rewind(path, step) if path.exists() else -1
        self.file = path.open("a")
        if cfg.tracking.wandb:
            self.logs.append(WandbLog(cfg, run_dir, logged))
        if cfg.tracking.tensorboard:
            self.logs.append(TensorBoard(run_dir, step))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step. Nothing is written if there are none."""
        if not metrics:
            return
        if self.file:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        for log in self.logs:
            log.log(step, metrics)

    def close(self) -> None:
        if self.file:
            self.file.close()
        for log in self.logs:
            log.close()


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets later steps of an interrupted run: they are about to run again.
        self.writer = SummaryWriter(run_dir / TENSORBOARD_FOLDER, purge_step=step + 1 if step else None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def check_tracking(tracking: TrackingConfig) -> None:
    """Refuse, before a model is loaded, logs that cannot be written.

    Raises:
        UserError: a package is missing, or Weights & Biases is to be online and cannot be.
    """
    if tracking.tensorboard and find_spec("tensorboard") is None:
        raise UserError("tracking=tensorboard needs its package: pip install 'sage-align[tensorboard]'")
    if tracking.wandb:
        check_wandb(tracking)


def rewind(path: Path, step: int) -> int:
    """Move away the lines after `step`, and those that a kill or a fault damaged. Returns the last step."""
    keep, superseded, last = [], [], -1
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            number = json.loads(line)["step"]
            late, last = number > step, max(last, number)
        except (ValueError, KeyError, TypeError, RecursionError):
            late = True
        (superseded if late else keep).append(line + "\n")
    if superseded:
        with path.with_name("metrics.superseded.jsonl").open("a") as f:
            f.writelines(superseded)
        write_text(path, "".join(keep))
    return last
