"""Align a policy: the training loop, in the order in which things happen. setup.py builds its parts."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from sage.config import OptimizerConfig
from sage.training.finite import not_finite
from sage.training.metrics import LOSS, PER_PAIR, means, per_pair
from sage.training.setup import build_run
from sage.util import stopping
from sage.util.progress import steps


def train(run_dir: Path) -> None:
    """Start or resume the run whose frozen config is in `run_dir`. Every rank calls this."""
    run = build_run(run_dir)
    cfg, engine, forward, state = run.cfg, run.engine, run.forward, run.state
    if state.step == 0:
        state.baseline = run.evaluate()
    elif run.evaluation_due():  # a signal may have ended the run in the middle of it
        run.evaluate()

    stopping.defer()
    with steps(state.step, run.steps) as progress:
        while state.step < run.steps and not run.out_of_patience():
            started = time.perf_counter()
            choice = run.selection.choose(state.step)
            run.tracker.log(state.step + 1, run.before_step(choice))
            seen = torch.zeros(len(PER_PAIR), len(choice.indices), device=engine.device)
            for work in forward.micro_batches(run.pairs, choice.indices, backward=True):
                logps, router_loss = engine(work.batch, router=True)
                reference = run.reference(work.indices, work.batch)
                losses = choice.objective(logps, reference)
                engine.backward((losses + router_loss).sum() * (work.weight / cfg.batch_size), work.last)
                if work.reports:
                    seen[:, work.positions] = per_pair(run.loss, losses, logps, reference)
            seen = run.sum_over_ranks(seen)
            lr = learning_rate(state.step, run.steps, cfg.optimizer)
            # A step that is not finite changes nothing. The engine refuses such gradients by itself.
            grad_norm = engine.step(lr) if seen[LOSS].isfinite().all() else math.nan
            if not math.isfinite(grad_norm):
                names = run.pairs.pair_ids(choice.indices).tolist()
                raise not_finite(state.step + 1, names, seen[LOSS], grad_norm)
            run.selection.observe(choice.indices, seen)
            state.step += 1
            elapsed = time.perf_counter() - started
            state.seconds += elapsed

            metrics = None
            if state.step % cfg.log_every == 0 or state.step == run.steps:
                metrics = {
                    **means(seen.sum(1), cfg.batch_size),
                    "grad_norm": grad_norm,
                    "learning_rate": lr,
                    "epoch": state.step * cfg.batch_size / len(run.pairs),
                    "time/seconds": state.seconds,
                    "time/step_seconds": elapsed,
                    "time/pairs_per_second": cfg.batch_size / elapsed,
                    **forward.cost_metrics(),
                    **run.selection.metrics(),
                }
                run.tracker.log(state.step, metrics)
            progress.step(metrics)
            if run.evaluation_due():
                run.evaluate()
            run.save_if_due()

    run.finish()


def learning_rate(step: int, steps: int, cfg: OptimizerConfig) -> float:
    """The learning rate of update `step` (from 0) of `steps`: a linear warm-up, then the schedule."""
    warmup = math.ceil(cfg.warmup_ratio * steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[cfg.schedule]
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)
