"""The parts of one training run, and what concerns them all: evaluating, saving, finishing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sage.config import SUMMARY_FILE, TrainConfig
from sage.data.tokens import TokenizedPairs
from sage.losses import Loss
from sage.model.engine import Engine
from sage.model.export import ADAPTER, export_sharded, splits_into_layers
from sage.model.export import export as export_policy
from sage.model.forward import PairForward
from sage.model.masters import write_masters
from sage.model.reference import Reference
from sage.model.sharding import is_sharded
from sage.training import checkpoint
from sage.training.base import BaseModel
from sage.training.best import Criterion
from sage.training.checkpoint import BEST_FOLDER, TrainState
from sage.training.hooks import Hook
from sage.training.metrics import peak_memory_gb
from sage.training.optimizer_state import write_optimizer
from sage.training.selection import Choice, Selection
from sage.training.sources import count_by_source
from sage.training.tracking import METRICS_FILE, Tracker
from sage.util import ranks, stopping
from sage.util.files import write_json
from sage.util.progress import activity, console, print_summary
from sage.util.stopping import Stopped


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
    criterion: Criterion | None  # of the best policy
    tracker: Tracker
    saved: float = field(default_factory=time.monotonic)  # when, on rank 0
    stop_asked: bool = False  # by a signal
    save_due: bool = False

    def before_step(self, choice: Choice) -> dict[str, float]:
        """Metrics of all hooks, of the pairs that the step is about to train on."""
        return {name: value for hook in self.hooks for name, value in hook.before_step(self, choice).items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the policy with all hooks, log that, and keep the policy if it is the best so far.

        Returns the metrics. A step is evaluated once, also if the run is resumed at this step.

        Raises:
            Stopped: a signal came; there is a checkpoint of this step, which counts as not evaluated.
        """
        state = self.state
        if state.evaluated != state.step:
            try:
                metrics = {name: value for hook in self.hooks for name, value in hook.evaluate(self).items()}
            except Stopped as e:
                self.stop(str(e))
            self.tracker.log(state.step, metrics)
            state.evaluated, state.latest = state.step, metrics
            if self.criterion:
                self.keep_best(self.criterion, metrics)
        return state.latest

    def keep_best(self, criterion: Criterion, metrics: dict[str, float]) -> None:
        """Export the policy to best/ if it is better than all before; else count it against `patience`."""
        state = self.state
        value = ranks.main_only(lambda: criterion.value(metrics))  # only rank 0 knows all metrics
        if criterion.improves(value, state.best):
            state.best, state.best_step, state.stale = value, state.step, 0
            self.export(self.run_dir / BEST_FOLDER, to_go_on=True)
            console.print(
                f"step {state.step}: {criterion.metric} is {value:.4g}, the best so far: {BEST_FOLDER}/"
            )
        else:
            state.stale += 1

    def out_of_patience(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best; says so."""
        state, patience = self.state, self.cfg.patience
        if patience is None or state.stale < patience:
            return False
        console.print(
            f"stopped early, after step {state.step}: {state.stale} evaluations in a row without a better "
            f"{self.cfg.select} than before"
        )
        return True

    def export(self, folder: Path, to_go_on: bool = False) -> None:
        """Write the policy as a Hugging Face folder, from all ranks' shards. All ranks wait for it.

        `to_go_on`: also what the config asks for so that another run can go on from this policy.
        """
        cuda = [self.engine.device] if self.engine.device.type == "cuda" else []
        policy: Any = self.engine.policy
        with activity(f"writing the policy to {folder.name}/"), torch.random.fork_rng(cuda):
            if is_sharded(policy) and splits_into_layers(policy):
                export_sharded(folder, policy, self.cfg, self.base.tokenizer)
            elif (weights := self.engine.full_state_dict()) is not None:  # on rank 0
                # This loads an adapter, which draws random numbers.
                export_policy(folder, weights, self.base.folder, self.cfg, self.base.tokenizer)
            ranks.barrier()
            trained = folder / ADAPTER if self.cfg.model.lora else folder
            if to_go_on and self.cfg.export_float32:
                write_masters(self.engine, trained)
            if to_go_on and self.cfg.export_optimizer:
                write_optimizer(self.engine, self.cfg.optimizer, trained)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks. Along with it, they agree whether to stop or to save after this step."""
        overdue = ranks.rank() == 0 and time.monotonic() - self.saved > 60 * self.cfg.save_minutes
        asked = values.new_tensor([stopping.asked(), overdue])
        total = ranks.total(torch.cat([values.flatten(), asked]))
        self.stop_asked, self.save_due = (total[-2:] > 0).tolist()
        return total[:-2].view_as(values)

    def save_if_due(self) -> None:
        """Write a checkpoint if it is time for one, or if a signal came.

        Raises:
            Stopped: a signal came.
        """
        if self.stop_asked:
            self.stop("after its step")
        every = self.cfg.save_every
        if self.save_due or (every and self.state.step % every == 0):
            self.save()

    def stop(self, where: str) -> NoReturn:
        self.save()
        self.tracker.close()
        stopping.heard(max(ranks.gather(stopping.first())))  # a cluster may signal one machine before another
        raise Stopped(f"{where} {self.state.step}")

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation. The last one does, before its checkpoint is written."""
        every, step = self.cfg.eval_every, self.state.step
        return step == self.steps or (bool(every) and step % every == 0)

    def save(self) -> None:
        """Write a checkpoint."""
        self.selection.log.flush()
        self.state.selection = self.selection.state_dict()
        self.state.costs = dict(self.forward.costs)
        with activity(f"writing checkpoint step_{self.state.step}"):
            checkpoint.save(self.engine, self.state, self.run_dir, self.cfg.keep_checkpoints)
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Evaluate, export final/, write summary.json, and print the table."""
        after = self.evaluate()
        self.selection.log.flush()
        final = self.run_dir / "final"
        self.export(final, to_go_on=self.criterion is None)
        if ranks.rank() != 0:
            return
        memory, kind = peak_memory_gb(self.engine.device)
        summary: dict[str, Any] = {
            "name": self.cfg.name,
            "steps": self.state.step,
            "world_size": ranks.world_size(),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "train_pairs": len(self.pairs),
            **({"sources": count_by_source(self.pairs)} if self.cfg.data.sources else {}),
            "before": self.state.baseline,
            "after": after,
            "seconds": self.state.seconds,
            "pairs_per_second": self.state.step * self.cfg.batch_size / self.state.seconds,
            **self.forward.cost_metrics(),
            "peak_memory_gb": memory,
            "memory_kind": kind,
            "best": self.criterion
            and {
                "metric": self.criterion.metric,
                "value": self.state.best,
                "step": self.state.best_step,
                "folder": str(self.run_dir / BEST_FOLDER),
            },
            "final": str(final),
            "metrics": str(self.run_dir / METRICS_FILE),
        }
        write_json(self.run_dir / SUMMARY_FILE, summary)
        print_summary(summary)
        self.tracker.close()  # last: it may wait for a server
