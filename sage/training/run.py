"""The parts of one training run, and what concerns them all: evaluating, saving, finishing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sage.config import SUMMARY_FILE, TrainConfig
from sage.data.tokens import TokenizedPairs
from sage.losses import Loss
from sage.model.engine import Engine
from sage.model.export import export as export_policy
from sage.model.forward import PairForward
from sage.model.reference import Reference
from sage.training import checkpoint
from sage.training.base import BaseModel
from sage.training.checkpoint import TrainState
from sage.training.hooks import Hook
from sage.training.metrics import peak_memory_gb
from sage.training.selection import Choice, Selection
from sage.training.tracking import METRICS_FILE
from sage.util.files import write_json
from sage.util.progress import print_summary


@dataclass
class Run:
    """What `setup.build_run` builds, once per rank."""

    cfg: TrainConfig
    run_dir: Path
    base: BaseModel  # what the policy was loaded from
    loss: Loss
    pairs: TokenizedPairs  # to train on
    steps: int  # of the whole run
    engine: Engine
    forward: PairForward
    reference: Reference
    selection: Selection
    state: TrainState
    hooks: list[Hook]

    def before_step(self, choice: Choice) -> dict[str, float]:
        """Metrics of all hooks, of the pairs that the step is about to train on."""
        return {name: value for hook in self.hooks for name, value in hook.before_step(self, choice).items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of all hooks, of the policy."""
        return {name: value for hook in self.hooks for name, value in hook.evaluate(self).items()}

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, from all ranks' shards."""
        weights = self.engine.full_state_dict()
        if weights is not None:
            export_policy(folder, weights, self.base.folder, self.cfg, self.base.tokenizer)

    def save(self) -> None:
        """Write a checkpoint."""
        self.selection.log.flush()
        self.state.selection = self.selection.state_dict()
        self.state.costs = dict(self.forward.costs)
        checkpoint.save(self.engine, self.state, self.run_dir, self.cfg.keep_checkpoints)

    def finish(self, after: dict[str, float]) -> None:
        """Export final/, write summary.json, and print the table."""
        self.selection.log.flush()
        final = self.run_dir / "final"
        self.export(final)
        if self.engine.rank != 0:
            return
        memory, kind = peak_memory_gb(self.engine.device)
        summary: dict[str, Any] = {
            "name": self.cfg.name,
            "steps": self.state.step,
            "world_size": self.engine.world_size,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "train_pairs": len(self.pairs),
            "before": self.state.baseline,
            "after": after,
            "seconds": self.state.seconds,
            "pairs_per_second": self.state.step * self.cfg.batch_size / self.state.seconds,
            **self.forward.cost_metrics(),
            "peak_memory_gb": memory,
            "memory_kind": kind,
            "final": str(final),
            "metrics": str(self.run_dir / METRICS_FILE),
        }
        write_json(self.run_dir / SUMMARY_FILE, summary)
        print_summary(summary)
