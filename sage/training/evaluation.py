"""What a run is judged by: its loss on held-out pairs, and its accuracy on benchmarks. Both are hooks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from sage.answering.accuracy import run_benchmarks
from sage.answering.attempts import Sampler
from sage.answering.generation import HF, Backend, HFGenerator, Source
from sage.config import SamplingConfig, TrainConfig, build, nearest
from sage.data.chat import ChatFormat
from sage.data.tokens import TokenizedPairs
from sage.model.loading import load_tokenizer
from sage.model.policy import Policy
from sage.model.reference import Reference, known_policy, reference_logps
from sage.model.sharding import is_sharded
from sage.training.best import Criterion, is_test
from sage.training.hooks import Hook
from sage.training.metrics import PER_PAIR, means, per_pair
from sage.training.run import Run
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.progress import console


class HeldOut(Hook):
    """The metrics of PER_PAIR on held-out pairs, as eval/*."""

    def __init__(self, pairs: TokenizedPairs, reference: Reference):
        self.pairs, self.reference = pairs, reference

    def evaluate(self, run: Run) -> dict[str, float]:
        forward, everything = run.forward, np.arange(len(self.pairs))
        costs = dict(forward.costs)
        reference = reference_logps(self.reference, forward, self.pairs, everything)
        if known_policy(self.reference, run.state.step):
            logps = reference  # the policy has not moved yet
        else:
            logps = forward.all_logps(self.pairs, everything, "held-out pairs")
        forward.costs.update(costs)  # evaluation is no cost of training
        numbers = per_pair(run.loss, run.loss(logps, reference), logps, reference)
        metrics = means(numbers.sum(1), len(everything), "eval/")
        console.print(
            f"step {run.state.step}: {len(everything)} held-out pairs: loss {metrics['eval/loss']:.4f}, "
            f"accuracy {metrics['eval/policy_accuracies']:.3f}, by reward "
            f"{metrics['eval/rewards/accuracies']:.3f}"
        )
        return {**metrics, "eval/pairs": len(everything)}


class LivePolicy(Backend):
    """`generation=hf` with the run's own policy, which is not loaded again."""

    def __init__(self, policy: Policy, options: HF):
        self.policy, self.options, self.chunk = policy, options, options.chunk

    @contextmanager
    def open(self, source: Source, sampling: SamplingConfig) -> Iterator[HFGenerator]:
        tokenizer = load_tokenizer(source.folder, source.model)
        with self.policy.answering() as model:
            yield HFGenerator(model, tokenizer, source.ends, sampling, self.options)


class Benchmarks(Hook):
    """Greedy accuracy on the config's benchmarks and its interval, as benchmark/*.

    Rank 0 has these metrics, the others none. The policy answers as it is, if every rank holds it whole.
    Shards, an adapter and vLLM need a folder: the policy is exported and loaded from there, as `sage eval`
    does. The answers are the same.
    """

    def evaluate(self, run: Run) -> dict[str, float]:
        cfg, engine = run.cfg, run.engine
        folder = run.run_dir / "benchmarks" / f"step_{run.state.step}"
        policy, backend, model = engine.policy, build("generation", cfg.generation), cfg.model
        assert isinstance(policy, Policy)
        exported = None
        if type(backend) is HF and policy.can_answer and not is_sharded(policy):
            backend = LivePolicy(policy, backend)
        else:
            exported = folder / "policy"
            run.export(exported)
            if engine.device.type == "cuda":
                torch.cuda.empty_cache()  # vLLM answers in a process of its own
            model = replace(cfg.model, path=str(exported), lora=None, adapter_path=None)
        greedy = replace(cfg.sampling, temperature=0.0)
        cuda = [engine.device] if engine.device.type == "cuda" else []
        with (
            torch.random.fork_rng(cuda),
            Sampler(
                model,
                backend,
                greedy,
                seed=cfg.seed,
                chat=ChatFormat.of(cfg.data),
                cache_dir=cfg.cache_dir,
            ) as sampler,
        ):
            results = run_benchmarks(sampler, cfg.benchmark, cfg.benchmark_limit, 1, folder, run.state.model)
        ranks.barrier()
        if exported and ranks.rank() == 0:
            shutil.rmtree(exported)
        metrics: dict[str, float] = {}
        for name, result in results.items():
            low, high = result["interval"]
            console.print(
                f"step {run.state.step}: {name} accuracy {result['accuracy']:.1%} ({low:.1%} to {high:.1%}) "
                f"of {result['problems']} problems"
            )
            for key, value in (("accuracy", result["accuracy"]), ("low", low), ("high", high)):
                metrics[f"benchmark/{name}/{key}"] = value
        return metrics


def check_select(cfg: TrainConfig, hooks: Iterable[type[Hook]]) -> str | None:
    """Check the metric that `select` names, before a model is loaded. Returns a warning, if there is one.

    A hook's metrics are known only once it has measured: its names are checked at the first evaluation.

    Raises:
        UserError: no evaluation of this run would log the metric.
    """
    if cfg.select is None:
        return None
    metric = Criterion.of(cfg.select).metric
    names = [f"eval/{name}" for name in (*PER_PAIR, "pairs")] if cfg.data.has_held_out else []
    names += [f"benchmark/{name}/{end}" for name in cfg.benchmark for end in ("accuracy", "low", "high")]
    if metric not in names and all(hook.evaluate is Hook.evaluate for hook in hooks):
        remedy = (
            "give held-out pairs with data.eval_path=FILE or data.eval_share=0.05, or problems with "
            "+benchmark=NAME"
        )
        logged = f"they log {', '.join(names)}" if names else f"there are none: {remedy}"
        near = nearest(metric, names)
        raise UserError(f"select={cfg.select}: the evaluations of this run do not log it{near}; {logged}")
    name = metric.split("/")[1] if metric in names else ""
    if name in cfg.benchmark and is_test(cfg.benchmark[name].split):
        return (
            f"warning: select={cfg.select} chooses the policy by test problems "
            f"(benchmark.{name}.split={cfg.benchmark[name].split}), so its accuracy on them is no longer a "
            f"test. Use validation problems: benchmark.{name}.path=FILE benchmark.{name}.split=validation"
        )
    return None
