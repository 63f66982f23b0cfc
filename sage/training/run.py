"""The parts of one training run, and what happens to all of them at once: building, evaluating, saving, finishing."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from sage.answering.accuracy import run_benchmarks
from sage.answering.attempts import Sampler
from sage.config import SUMMARY_FILE, TrainConfig, load
from sage.curriculum import Curriculum, Setting
from sage.data.chat import ChatFormat
from sage.data.pairs import PairSet, load_data
from sage.data.tokens import TokenizedPairs, tokenize_pairs
from sage.losses import Loss
from sage.model import loading
from sage.model.engine import Engine, Frozen, init_distributed
from sage.model.export import export as export_policy
from sage.model.forward import PairForward
from sage.model.policy import Policy
from sage.model.reference import Absent, Cached, Online, Reference, Scored, ask, identity
from sage.model.selfcheck import settle
from sage.scorers import Scorer, Uniform
from sage.training import checkpoint
from sage.training.checkpoint import TrainState
from sage.training.metrics import means, peak_memory_gb, per_pair
from sage.training.samples import SampleLog
from sage.training.selection import Selection, draws
from sage.training.tracking import METRICS_FILE
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.files import write_json
from sage.util.progress import console, print_summary


class Run:
    """Built once per rank: data first, so that bad input fails before a model is loaded; then the model, the reference
    (while the policy is still the initial one), and last the place where an interrupted run stopped.
    """

    def __init__(self, run_dir: Path):
        cfg = load(run_dir)
        assert isinstance(cfg, TrainConfig)
        self.cfg = cfg
        self.run_dir = run_dir
        self.loss: Loss = build("loss", cfg.loss)
        if cfg.data.scores and self.loss.reference_free:
            raise UserError(
                f"data.scores={cfg.data.scores} is a reference cache, and this loss needs no reference"
            )
        self.scorer: Scorer | Uniform = build("scorer", cfg.scorer)
        device = init_distributed()
        torch.manual_seed(cfg.seed)
        self.dtype = loading.compute_dtype(cfg.model, device)
        loading.check_head(cfg.model, device)

        self.folder = ranks.main_first(lambda: loading.resolve_model(cfg.model, cfg.cache_dir))
        self.tokenizer = loading.load_tokenizer(self.folder, cfg.model)
        self.pairs = read_pairs(cfg, self.tokenizer, run_dir)
        self.eval_pairs = (
            read_pairs(cfg, self.tokenizer, run_dir, held_out=True) if cfg.data.eval_path else None
        )
        self.steps = cfg.steps or math.ceil((cfg.epochs or 0) * len(self.pairs) / cfg.batch_size)
        setting = Setting(
            self.pairs.pass_rates(),
            self.pairs.lengths()[:, 1:].sum(1),
            self.steps,
            *draws(self.scorer, cfg.batch_size),
            cfg.seed,
        )
        curriculum: Curriculum = build("curriculum", cfg.curriculum, setting=setting)

        self.identity = identity(self.folder, cfg.model, self.dtype)
        self.scored = Scored(cfg.data.scores, self.pairs, self.identity) if cfg.data.scores else None

        model = loading.load_model(self.folder, cfg.model, self.dtype, cfg.seed)
        self.engine = Engine(Policy(model, cfg.model.head), cfg.engine, cfg.optimizer, self.dtype, device)
        asked = [self.pairs, *([self.eval_pairs] if self.eval_pairs else [])]
        layout = settle(self.engine, asked, cfg.data.packing, cfg.model.path)
        self.forward = PairForward(self.engine, cfg.micro_batch_tokens, layout)
        self.reference = self.scored or self.build_reference(self.pairs, "training")
        self.eval_reference = self.build_reference(self.eval_pairs, "held-out") if self.eval_pairs else None

        self.forward.reset_costs()  # what a warm cache would have saved is not a cost of training
        self.selection = Selection(
            self.scorer,
            curriculum,
            self.loss,
            self.pairs,
            self.forward,
            self.reference,
            cfg.batch_size,
            cfg.seed,
        )
        self.state = TrainState(self.pairs.fingerprint, self.engine.world_size)
        saved = checkpoint.list_checkpoints(run_dir)
        if saved:
            self.state = checkpoint.restore(self.engine, self.state, saved[-1])
            self.selection.load_state_dict(self.state.selection)
            self.forward.costs.update(self.state.costs)
            console.print(f"resumed from {saved[-1]}")
        self.samples = SampleLog(
            run_dir,
            self.state.step,
            self.steps * setting.candidates // self.scorer.score_every,
            cfg.tracking.sample_rows,
            main=self.engine.rank == 0,
        )

    def build_reference(self, pairs: TokenizedPairs, name: str) -> Reference:
        cfg, policy = self.cfg, self.engine.policy
        assert isinstance(policy, Policy)
        if self.loss.reference_free:
            return Absent(pairs)
        if cfg.reference == "online":
            if cfg.model.lora and not cfg.model.adapter_path:
                return Online(self.engine, adapters_off=True)
            if not hasattr(self, "reference_engine"):  # one copy serves training and held-out pairs
                model = loading.load_model(self.folder, cfg.model, self.dtype, cfg.seed)
                model = Policy(model)
                model.follow(policy)
                sharded = cfg.engine.zero_stage == 3
                self.reference_engine = Frozen(model, sharded, self.dtype, self.engine.device)
            return Online(self.reference_engine, adapters_off=False)
        key = {**self.identity, "layout": self.forward.layout, "backend": policy.backend}
        return Cached(self.forward, pairs, key, cfg.cache_dir, name)

    def evaluate(self) -> dict[str, float]:
        """What the policy makes of held-out pairs (eval/*) and of benchmarks (benchmark/*), as far as there are any."""
        return {**self.ask_held_out(), **self.answer_benchmarks()}

    @torch.no_grad()
    def ask_held_out(self) -> dict[str, float]:
        """Metrics of PER_PAIR."""
        if self.eval_pairs is None or self.eval_reference is None:
            return {}
        everything = np.arange(len(self.eval_pairs))
        costs = dict(self.forward.costs)
        reference = ask(self.eval_reference, self.forward, self.eval_pairs, everything)
        if self.state.step == 0 and isinstance(self.eval_reference, Cached):
            logps = reference  # the policy has not moved yet, and has been asked
        else:
            logps = self.forward.all_logps(self.eval_pairs, everything, "held-out pairs")
        self.forward.costs.update(costs)  # the cost of training counts what training needs
        metrics = per_pair(self.loss, self.loss(logps, reference), logps, reference)
        return {**means(metrics.sum(1), len(everything), "eval/"), "eval/pairs": len(everything)}

    @torch.no_grad()
    def answer_benchmarks(self) -> dict[str, float]:
        """Greedy accuracy and its interval, on rank 0, by the code of `sage eval`: it loads the policy from a folder, as
        any user of it would, so that every engine and every way to shard or adapt it is served alike."""
        if not (cfg := self.cfg).benchmark:
            return {}
        folder = self.run_dir / "benchmarks" / f"step_{self.state.step}"
        exported = folder / "policy"
        cuda = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):  # loading an adapter seeds it
            self.export(exported)
            ranks.barrier()
            model = replace(cfg.model, path=str(exported), lora=None, adapter_path=None)
            greedy = replace(cfg.sampling, temperature=0.0)
            with Sampler(
                model,
                instantiate(cfg.generation),
                greedy,
                seed=cfg.seed,
                chat=ChatFormat.of(cfg.data),
                cache_dir=cfg.cache_dir,
            ) as sampler:
                results = run_benchmarks(sampler, cfg.benchmark, cfg.benchmark_limit, 1, folder)
        ranks.barrier()
        if self.engine.rank == 0:
            shutil.rmtree(exported)
        metrics: dict[str, float] = {}
        for name, result in results.items():
            low, high = result["interval"]
            console.print(
                f"step {self.state.step}: {name} accuracy {result['accuracy']:.1%} ({low:.1%} to {high:.1%}) "
                f"of {result['problems']} problems"
            )
            for key, value in (("accuracy", result["accuracy"]), ("low", low), ("high", high)):
                metrics[f"benchmark/{name}/{key}"] = value
        return metrics

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, from all ranks' shards."""
        weights = self.engine.full_state_dict()
        if weights is not None:
            export_policy(folder, weights, self.folder, self.cfg, self.tokenizer)

    def save(self) -> None:
        self.samples.flush()
        self.state.selection = self.selection.state_dict()
        self.state.costs = dict(self.forward.costs)
        checkpoint.save(self.engine, self.state, self.run_dir, self.cfg.keep_checkpoints)

    def finish(self, after: dict[str, float]) -> None:
        """Export final/, write summary.json, print the table."""
        self.samples.flush()
        final = self.run_dir / "final"
        self.export(final)
        if self.engine.rank != 0:
            return
        memory, kind = peak_memory_gb(self.engine.device)
        summary: dict[str, Any] = {
            "name": self.cfg.name,
            "steps": self.state.step,
            "world_size": self.engine.world_size,
            "dtype": str(self.dtype).removeprefix("torch."),
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


def read_pairs(cfg: TrainConfig, tokenizer: Any, run_dir: Path, held_out: bool = False) -> TokenizedPairs:
    """The config's pairs, or its held-out ones, tokenised; says how many there are, and what was dropped."""
    data = cfg.data
    path = data.eval_path if held_out else data.path

    def work() -> tuple[PairSet, TokenizedPairs]:
        source = load_data(data, held_out)
        return source, tokenize_pairs(
            source.pairs,
            tokenizer,
            chat=ChatFormat.of(data),
            max_length=data.max_length,
            num_proc=data.num_proc,
            cache_dir=cfg.cache_dir,
            max_bad=data.max_bad,
        )

    source, pairs = ranks.main_first(work)
    for note in source.notes + pairs.notes:
        console.print(f"{path}: {note}")
    dropped = Counter(row.reason for row in source.dropped)
    dropped.update({reason: len(ids) for reason, ids in pairs.dropped.items() if ids})
    console.print(f"{path}: {len(pairs)} pairs" + (f", dropped: {dict(dropped)}" if dropped else ""))
    if data.list_dropped and not console.quiet:
        rows = [row._asdict() for row in source.dropped]
        rows += [
            {"pair_id": pair_id, "reason": reason, "detail": pairs.details.get(pair_id)}
            for reason, ids in pairs.dropped.items()
            for pair_id in ids
        ]
        with (run_dir / "dropped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"path": path, **row}) + "\n" for row in rows)
    return pairs


def build(group: str, node: dict[str, Any], **arguments: Any) -> Any:
    """Instantiate the class that a `_target_` group names.

    Raises:
        UserError: the class refuses the values it was given.
    """
    try:
        return instantiate(node, _partial_=True)(**arguments)  # Hydra would take the arguments apart
    except (InstantiationException, TypeError, ValueError) as e:
        raise UserError(f"{group}: {e.__cause__ or e}") from e
