"""More steps, or more rounds, for a run that has begun: `sage resume RUN_DIR steps=N` and `rounds=N`."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.utils import get_class

from sage.config import SUMMARY_FILE, RoundsConfig, RunConfig, TrainConfig
from sage.util.errors import UserError


def give_steps(cfg: RunConfig, run_dir: Path, steps: int) -> None:
    """Set the steps of a training run that has begun. What it has done must be what it would do anyway.

    A finished run goes on from its last step only. From an earlier checkpoint it would train anew what is in
    final/ and best/, and overwrite them.
    """
    from sage.train import learning_rate  # here, because it loads torch
    from sage.training.checkpoint import list_checkpoints

    if type(cfg) is not TrainConfig:
        instead = "; rounds=N gives it more rounds" if isinstance(cfg, RoundsConfig) else ""
        raise UserError(f"steps={steps} is for `sage train`, and {run_dir} is `sage {cfg.command}`{instead}")
    checkpoints, summary = list_checkpoints(run_dir), run_dir / SUMMARY_FILE
    saved = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
    done = max(saved, json.loads(summary.read_text()).get("steps", 0) if summary.is_file() else 0)
    if steps <= done:
        raise UserError(f"steps={steps}: {run_dir} has done {done} already")
    if saved < done:
        newest = f"its newest is of step {saved}" if saved else "there is none"
        raise UserError(
            f"steps={steps}: {run_dir} is finished and has no checkpoint of its last step, {done}, to go on "
            f"from ({newest}): save_every must divide the steps for that. Start a new run with steps={steps}"
        )
    # How many steps some epochs are is only known once the pairs are tokenised.
    same = cfg.optimizer.schedule == "constant" and cfg.optimizer.warmup_ratio == 0
    if cfg.steps is not None:
        same = all(
            learning_rate(step, cfg.steps, cfg.optimizer) == learning_rate(step, steps, cfg.optimizer)
            for step in range(done)
        )
    if done and not same:
        raise UserError(
            f"steps={steps}: {run_dir} has done {done} steps, and their learning rates depend on the number "
            "of steps, by optimizer.schedule and optimizer.warmup_ratio. Only a constant schedule without "
            "warm-up can be given more: start a new run from final/"
        )
    if done and get_class(cfg.curriculum["_target_"]).uses_steps:
        raise UserError(f"steps={steps}: the curriculum of {run_dir} grows with the number of steps")
    cfg.steps, cfg.epochs = steps, None


def give_rounds(cfg: RunConfig, run_dir: Path, rounds: int) -> None:
    """Set the number of rounds. What was done in each does not depend on how many follow."""
    if not isinstance(cfg, RoundsConfig):
        raise UserError(f"rounds={rounds} is for `sage rounds`, and {run_dir} is `sage {cfg.command}`")
    done = len(list(run_dir.glob(f"round_*/train/{SUMMARY_FILE}")))
    if rounds <= done:
        raise UserError(f"rounds={rounds}: {run_dir} has done {done} already")
    cfg.rounds = rounds
