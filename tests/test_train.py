"""The loop end to end, on real ranks: every invariant that a run must keep whatever engine it runs on."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_pairs, write_jsonl
from forks import command
from many_runs import ERROR_FILE, column, execute, freeze, largest_difference, metrics, weights

from sage.config import OptimizerConfig
from sage.curriculum import Shuffled
from sage.data.chat import ChatFormat
from sage.data.packing import plan
from sage.data.pairs import read_pair_set
from sage.data.tokens import tokenize_pairs
from sage.train import learning_rate
from sage.training.hooks import Hook
from sage.training.run import Run
from sage.training.selection import Choice

STEPS, BATCH = 10, 7
ZERO = (0, 1, 2, 3)
each_stage = pytest.mark.parametrize("stage", ZERO)
slow = pytest.mark.slow


class Counting(Hook):
    """A hook as a user writes it: metrics of each step and each evaluation, and a file of its own."""

    def before_step(self, run: Run, choice: Choice) -> dict[str, float]:
        return {"count/pairs": len(choice.indices), "count/beta": choice.objective.beta}

    def evaluate(self, run: Run) -> dict[str, float]:
        (run.run_dir / f"count_{run.state.step}.txt").write_text("here")
        return {"count/parameters": float(sum(p.numel() for p in run.engine.policy.parameters()))}


def several_pairs_a_problem() -> list[dict]:
    """Two problems with two right and two wrong responses each: eight pairs."""
    return [
        {
            "prompt": f"Ann has {a} apples and buys 4. How many apples?",
            "chosen": f"{right} {a + 4}.",
            "rejected": f"The answer is {wrong}.",
        }
        for a in (3, 5)
        for right in ("There are", "So she has")
        for wrong in (a * 4, a - 4)
    ]


@pytest.fixture(scope="session")
def common(tiny_model, tmp_path_factory) -> list[str]:
    """Overrides of every run here: 30 pairs of unequal length, batches of 7, 2 or 3 pairs per micro-batch."""
    rows = make_pairs(30)
    for i, row in enumerate(rows):
        row["prompt"] += " Think." * (i % 6)
    folder = tmp_path_factory.mktemp("train")
    return [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', rows)}",
        "data.max_length=130",
        "micro_batch_tokens=260",
        f"steps={STEPS}",
        f"batch_size={BATCH}",
        "optimizer.lr=1e-3",
        f"cache_dir={folder / 'cache'}",
        "model.dtype=float32",
        "optimizer.max_grad_norm=1.2",
        "+baseline=dpo",
    ]


@pytest.fixture(scope="session")
def tokenized(common):
    from transformers import AutoTokenizer

    path, model, cache = (common[i].split("=", 1)[1] for i in (2, 1, 8))
    return tokenize_pairs(
        read_pair_set(path),
        AutoTokenizer.from_pretrained(model),
        chat=ChatFormat(),
        max_length=130,
        num_proc=1,
        cache_dir=cache,
    )


@pytest.fixture(scope="session")
def benchmark(problem_file) -> list[str]:
    """Overrides that answer six problems at every evaluation."""
    return [
        "+benchmark=gsm8k",
        f"benchmark.gsm8k.path={problem_file}",
        "benchmark_limit=6",
        "sampling.max_new_tokens=8",
        "generation.batch_size=2",
        "generation.chunk=2",
    ]


@pytest.fixture(scope="session")
def one_rank(common, benchmark, tmp_path_factory) -> Path:
    """Every run of one rank that the tests below look at, by name."""
    root = tmp_path_factory.mktemp("one")
    problems = [
        f"data.path={write_jsonl(root / 'problems.jsonl', several_pairs_a_problem())}",
        "micro_batch_tokens=4000",
        "steps=1",
        "batch_size=8",
    ]
    runs = {
        "problems": problems,
        "problems_unshared": [*problems, "data.packing=unshared"],
        **{f"zero{z}": [f"engine=zero{z}", f"save_every={STEPS}"] for z in ZERO},
        **{f"unclipped{z}": [f"engine=zero{z}", "optimizer.max_grad_norm=0", "steps=4"] for z in ZERO},
        **{f"bf16_{z}": [f"engine=zero{z}", "model.dtype=bfloat16", "save_every=4", "steps=4"] for z in ZERO},
        **{
            f"nan{z}": [
                f"engine=zero{z}",
                "optimizer.lr=1e30",
                "save_every=1",
                "optimizer.warmup_ratio=0",
                "optimizer.schedule=constant",
            ]
            for z in ZERO
        },
        **{
            f"nan_bf16_{z}": [
                f"engine=zero{z}",
                "optimizer.lr=1e30",
                "optimizer.warmup_ratio=0",
                "save_every=1",
                "model.dtype=bfloat16",
                "optimizer.max_grad_norm=0",
            ]
            for z in ZERO
        },
        **{
            f"offload{z}": [
                f"engine=zero{z}_offload",
                "steps=4",
                "optimizer.implementation=torch",
                "optimizer.max_grad_norm=0",
            ]
            for z in ZERO[1:]
        },
        **{
            f"offload_bf16_{z}": [
                f"engine=zero{z}_offload",
                "model.dtype=bfloat16",
                "steps=4",
                "optimizer.implementation=torch",
            ]
            for z in ZERO[1:]
        },
        "large": ["micro_batch_tokens=16384"],
        **{
            f"decayed{z}": [
                f"engine=zero{z}",
                "optimizer.lr=1e-12",
                "optimizer.weight_decay=1e10",
                "steps=1",
                "optimizer.warmup_ratio=0",
            ]
            for z in ZERO
        },
        "unshared": ["data.packing=unshared"],
        "padded": ["data.packing=padded"],
        "online": ["reference=online"],
        "online3": ["reference=online", "engine=zero3"],
        "checkpointed": ["model.gradient_checkpointing=true"],
        "evaluated": [f"data.eval_path={common[2].split('=')[1]}", "eval_every=5", *benchmark],
        "dropout": ["+model/lora=default", "model.lora.dropout=0.2"],
        "dropout_evaluated": ["+model/lora=default", "model.lora.dropout=0.2", "eval_every=2", *benchmark],
        "hooked": ["eval_every=5", "+hooks.count._target_=test_train.Counting"],
        "wandb": ["tracking=wandb", "tracking.mode=offline", "steps=2"],
        "simpo": ["loss=simpo"],
        "cdpo": ["loss=cdpo"],
        "robust": ["loss=robust"],
        **{f"lora{z}": ["+model/lora=default", f"engine=zero{z}", f"save_every={STEPS}"] for z in (0, 2, 3)},
        "lora_online": ["+model/lora=default", "reference=online"],
        "lora_head": ["+model/lora=default", "model.lora.targets=[lm_head]"],
    }
    execute(1, [freeze(root / name, *common, *overrides) for name, overrides in runs.items()])
    adapter = f"model.adapter_path={root / 'lora0' / 'final' / 'adapter'}"
    again = [
        freeze(
            root / f"adapter_{reference}", *common, "+model/lora=default", adapter, f"reference={reference}"
        )
        for reference in ("cached", "online")
    ]
    execute(1, again)
    failed = {p.parent.name: p.read_text() for p in root.glob(f"*/{ERROR_FILE}")}
    assert {name for name in failed if not name.startswith("nan")} == {"lora_head"}, failed
    return root


@pytest.fixture(scope="session")
def two_ranks(common, benchmark, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two")
    runs = {
        f"{packing}{z}": [f"data.packing={packing}", f"engine=zero{z}"]
        for z in ZERO
        for packing in ("shared", "padded")
    }
    runs["evaluated3"] = ["engine=zero3", *benchmark]
    execute(2, [freeze(root / name, *common, "world_size=2", *overrides) for name, overrides in runs.items()])
    assert not list(root.glob(f"*/{ERROR_FILE}"))
    return root


class Naive:
    """DPO with full logits, one unpadded row at a time, plain AdamW: what the runs must reproduce."""

    def __init__(self, folder: Path, pairs, max_norm: float):
        from transformers import AutoModelForCausalLM

        self.pairs, self.max_norm = pairs, max_norm
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            self.reference = [self.logps(i) for i in range(len(pairs))]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def logp(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()

    def logps(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.pairs[i]
        return self.logp(p.prompt_ids, p.chosen_ids), self.logp(p.prompt_ids, p.rejected_ids)

    def train(self, steps: int, of: int) -> tuple[list[float], list[float]]:
        order = Shuffled(len(self.pairs), seed=0)
        losses, norms = [], []
        for step in range(steps):
            loss = torch.tensor(0.0)
            for i in order.draw(BATCH).tolist():
                chosen, rejected = self.logps(i)
                margin = (chosen - self.reference[i][0]) - (rejected - self.reference[i][1])
                loss = loss - F.logsigmoid(0.1 * margin) / BATCH
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)))
            self.optimizer.param_groups[0]["lr"] = learning_rate(step, of, OptimizerConfig(lr=1e-3))
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses, norms


@pytest.fixture(scope="session")
def naive(tiny_model, tokenized):
    return Naive(tiny_model, tokenized, max_norm=1.2).train(STEPS, STEPS)


def test_learning_rate():
    """Protects the schedules' shape: the first update has a positive rate, and the last ends the schedule."""
    rates = [learning_rate(s, 20, OptimizerConfig(lr=1.0)) for s in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[11] == pytest.approx(0.5) and 0 < rates[19] < 0.01
    assert rates[2:] == sorted(rates[2:], reverse=True)
    linear = [
        learning_rate(s, 20, OptimizerConfig(lr=1.0, schedule="linear", min_lr_ratio=0.1)) for s in range(20)
    ]
    assert linear[11] == pytest.approx(0.55)
    constant = OptimizerConfig(lr=1.0, schedule="constant", warmup_ratio=0.0)
    assert {learning_rate(s, 20, constant) for s in range(20)} == {1.0}


def test_the_micro_batches_are_several_and_uneven(tokenized):
    """The comparisons below assume this: with padding, one of two ranks runs a micro-batch of filler only."""
    order, counts = Shuffled(len(tokenized), seed=0), []
    for _ in range(STEPS):
        counts.append(
            [len([m for m in p if m]) for p in plan(tokenized.lengths()[order.draw(BATCH)], 260, 2, "padded")]
        )
    assert len(tokenized) == 30
    assert all(min(c) >= 2 for c in counts) and any(c[0] != c[1] for c in counts)


@slow
@each_stage
def test_step_0_is_ln2(one_rank, two_ranks, stage):
    """Protects that the reference is the initial policy, through the same code path.

    The reference was computed in micro-batches of other pairs, so matrix products round otherwise: hence the
    1e-6.
    """
    for run in (one_rank / f"zero{stage}", two_ranks / f"shared{stage}", two_ranks / f"padded{stage}"):
        first = metrics(run)[0]
        assert abs(first["loss"] - math.log(2)) < 1e-6
        assert all(abs(first[f"rewards/{name}"]) < 1e-6 for name in ("chosen", "rejected", "margins"))


@slow
@each_stage
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_the_naive_loop(one_rank, two_ranks, naive, stage, world_size):
    """Protects loss, accumulation, reduction, clipping, AdamW and schedule together, on 1 and 2 ranks."""
    run = one_rank / f"zero{stage}" if world_size == 1 else two_ranks / f"shared{stage}"
    losses, norms = naive
    assert any(n > 1.2 for n in norms) and any(n < 1.2 for n in norms)  # clipping acts, and not always
    differences = (
        largest_difference(column(run, "loss"), losses),
        largest_difference(column(run, "grad_norm"), norms),
    )
    print(
        f"naive, {world_size} ranks, stage {stage}: loss {differences[0]:.1e}, grad_norm {differences[1]:.1e}"
    )
    assert differences[0] < 1e-5 and differences[1] < 1e-4


@slow
@each_stage
@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_two_ranks_equal_one(one_rank, two_ranks, stage, packing):
    a, b = one_rank / f"zero{stage}", two_ranks / f"{packing}{stage}"
    names = ["loss", "grad_norm", "cost/backward_pairs"]
    differences = {name: largest_difference(column(a, name), column(b, name)) for name in names}
    print(f"1 and 2 ranks, {packing}, stage {stage}: {differences}")
    assert max(differences.values()) < 1e-5
    ours, theirs = weights(a / "final"), weights(b / "final")
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours) < 1e-4


@slow
@pytest.mark.parametrize("packing", ["unshared", "padded"])
def test_any_packing_gives_the_same_gradient(one_rank, packing):
    """Protects the shared prompt in the whole loop: sharing saves tokens and changes nothing else."""
    shared, other = one_rank / "zero0", one_rank / packing
    assert largest_difference(column(shared, "loss"), column(other, "loss")) < 1e-5
    assert largest_difference(column(shared, "grad_norm"), column(other, "grad_norm")) < 1e-4
    assert column(shared, "cost/backward_tokens")[-1] < 0.8 * column(other, "cost/backward_tokens")[-1]


@slow
def test_any_budget_gives_the_same_gradient(one_rank):
    small, large = one_rank / "zero0", one_rank / "large"
    differences = [largest_difference(column(small, n), column(large, n)) for n in ("loss", "grad_norm")]
    print(f"budgets 260 and 16384: loss {differences[0]:.1e}, grad_norm {differences[1]:.1e}")
    assert differences[0] < 1e-6 * STEPS and differences[1] < 1e-5


@slow
@each_stage
def test_max_grad_norm_0_never_clips(one_rank, tiny_model, tokenized, stage):
    """Without clipping too, the norm is reported and NaN is found. DeepSpeed clips at 1.0 by default."""
    losses, norms = Naive(tiny_model, tokenized, max_norm=math.inf).train(4, 4)
    run = one_rank / f"unclipped{stage}"
    assert max(norms) > 1.2
    assert largest_difference(column(run, "loss"), losses) < 1e-5
    assert largest_difference(column(run, "grad_norm"), norms) < 1e-4


@slow
@each_stage
def test_weight_decay_shrinks_matrices_alone(one_rank, tiny_model, stage):
    """A rate too small to learn, and a decay of a hundredth."""
    initial = weights(tiny_model)
    for name, value in weights(one_rank / f"decayed{stage}" / "final").items():
        torch.testing.assert_close(
            value, initial[name] * (1.0 if value.ndim == 1 else 0.99), rtol=1e-6, atol=1e-9
        )


@slow
@each_stage
def test_bf16_keeps_float32_masters(one_rank, stage):
    """Protects small updates: below bfloat16's resolution they add up in the masters. All stages agree."""
    run = one_rank / f"bf16_{stage}"
    assert largest_difference(column(run, "loss"), column(one_rank / "bf16_1", "loss")) < 1e-3
    assert weights(run / "final")["model.norm.weight"].dtype == torch.bfloat16
    count = sum(w.numel() for w in weights(run / "final").values())
    found: dict[str, list[torch.Tensor]] = {}

    def collect(node, path=""):
        if isinstance(node, dict):
            for k, v in node.items():
                collect(v, f"{path}/{k}")
        elif isinstance(node, (list, tuple)):
            for v in node:
                collect(v, path)
        elif isinstance(node, torch.Tensor):
            kind = "moment" if "exp_avg" in path else "master" if "fp32" in path else ""
            if kind and node.is_floating_point():
                found.setdefault(kind, []).append(node)

    import sage.model.engine  # noqa: F401, lets torch.load read DeepSpeed's plain classes

    for file in (run / "checkpoints" / "step_4").rglob("*_states.pt"):
        collect(torch.load(file, weights_only=True))
    for kind, copies in (("master", 1), ("moment", 2)):
        assert {t.dtype for t in found[kind]} == {torch.float32}
        assert sum(t.numel() for t in found[kind]) >= copies * count
    assert any((m != m.bfloat16().float()).any() for m in found["master"])


@slow
@pytest.mark.parametrize("stage", ZERO[1:])
def test_offload_changes_no_number(one_rank, stage):
    """With torch's AdamW: DeepSpeed's CPU one takes minutes to compile, once per machine."""
    for offloaded, like, tolerance in (("offload", "unclipped", 1e-5), ("offload_bf16_", "bf16_", 1e-3)):
        run = one_rank / f"{offloaded}{stage}"
        assert (
            largest_difference(column(run, "loss"), column(one_rank / f"{like}{stage}", "loss")) < tolerance
        )
        norms = column(run, "grad_norm"), column(one_rank / f"{like}{stage}", "grad_norm")
        assert largest_difference(*norms) < 10 * tolerance


@slow
@pytest.mark.parametrize(
    "name, like",
    [("online", "zero0"), ("online3", "zero3"), ("checkpointed", "zero0"), ("lora_online", "lora0")],
)
def test_options_that_change_no_number(one_rank, name, like):
    """Reference online or cached; activations kept or recomputed."""
    difference = largest_difference(column(one_rank / name, "loss"), column(one_rank / like, "loss"))
    print(f"{name} and {like}: {difference:.1e}")
    assert difference < 1e-6


@slow
def test_evaluation_changes_nothing_and_sums_right(one_rank):
    """Protects training from evaluation (costs, RNG, gradients), and the held-out means over 30 pairs."""
    run = one_rank / "evaluated"
    for name in ("loss", "grad_norm", "cost/backward_pairs", "cost/backward_tokens"):
        assert column(run, name) == column(one_rank / "zero0", name)
        assert column(one_rank / "dropout_evaluated", name) == column(one_rank / "dropout", name)
    assert column(one_rank / "dropout", "loss") != column(one_rank / "lora0", "loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [0, 5, STEPS]
    assert all(line["eval/pairs"] == 30 and 0 <= line["eval/rewards/accuracies"] <= 1 for line in held_out)
    assert held_out[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out[-1]["eval/loss"] < 0.6
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["eval/loss"] == held_out[-1]["eval/loss"]


@slow
def test_a_hook_measures_and_changes_nothing(one_rank):
    """Protects studies: a class named in the config logs at steps and evaluations, without other effects."""
    run = one_rank / "hooked"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "count/parameters" in line] == [0, 5, STEPS]
    assert [line["count/pairs"] for line in lines if "count/pairs" in line] == [BATCH] * STEPS
    assert (run / "count_5.txt").exists()
    assert json.loads((run / "summary.json").read_text())["after"]["count/parameters"] > 0
    assert column(run, "loss") == column(one_rank / "zero0", "loss")


@slow
def test_training_computes_the_texts_of_a_problem_once(one_rank, tiny_model, tmp_path):
    """Protects batches with several pairs of a problem: each prompt and each response is computed once, and
    the gradient is the same as with a prompt for each response."""
    from transformers import AutoTokenizer

    pairs = tokenize_pairs(
        read_pair_set(str(one_rank / "problems.jsonl")),
        AutoTokenizer.from_pretrained(tiny_model),
        chat=ChatFormat(),
        max_length=130,
        num_proc=1,
        cache_dir=str(tmp_path),
    )
    prompts = {tuple(p.prompt_ids) for p in (pairs[i] for i in range(8))}
    texts = {
        (*p.prompt_ids, -1, *r) for p in (pairs[i] for i in range(8)) for r in (p.chosen_ids, p.rejected_ids)
    }
    responses = sum(len(text) - text.index(-1) - 1 for text in texts)
    assert len(prompts) == 2 and len(texts) == 8  # where a pair at a time would compute 16
    once = pairs.common_prefix + sum(len(p) - pairs.common_prefix for p in prompts) + responses
    apart = sum(map(len, texts)) - len(texts)
    shared, unshared = metrics(one_rank / "problems")[-1], metrics(one_rank / "problems_unshared")[-1]
    assert (shared["cost/backward_tokens"], unshared["cost/backward_tokens"]) == (once, apart)
    assert shared["grad_norm"] == pytest.approx(unshared["grad_norm"], rel=1e-4)


@slow
def test_evaluation_answers_benchmarks(one_rank, two_ranks):
    """Six problems before training, every five steps and after it: one rank and the shards of two agree."""
    answers = {}
    for run, steps in ((one_rank / "evaluated", (0, 5, STEPS)), (two_ranks / "evaluated3", (0, STEPS))):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "benchmark/gsm8k/accuracy" in line]
        assert [line["step"] for line in lines] == [*steps]
        assert all(line["benchmark/gsm8k/accuracy"] < 0.01 < line["benchmark/gsm8k/high"] for line in lines)
        for step in steps:
            (file,) = (run / "benchmarks" / f"step_{step}").rglob("generations.jsonl")
            answers[run.name, step] = [json.loads(line)["response"] for line in file.read_text().splitlines()]
    assert all(len(responses) == 6 for responses in answers.values())
    for step in (0, STEPS):
        assert answers["evaluated", step] == answers["evaluated3", step]


@slow
def test_costs_count_what_ran(one_rank, tokenized):
    """In each row, each different text once, each prompt once, and what all prompts begin with once."""
    lengths, order, prefix = tokenized.lengths(), Shuffled(30, seed=0), tokenized.common_prefix
    tokens, apart = 0, 0
    for _ in range(STEPS):
        batch = order.draw(BATCH)
        apart += lengths[batch].sum()
        for members in plan(lengths[batch], 260, 1, "shared", prefix, tokenized.keys(batch))[0]:
            pairs = [tokenized[int(batch[i])] for i in members]
            texts = {(*p.prompt_ids, -1, *r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)}
            prompts = {text[: text.index(-1)] for text in texts}
            tokens += prefix + sum(len(p) - prefix for p in prompts)
            tokens += sum(len(text) - text.index(-1) - 1 for text in texts)
    assert prefix > 0 and tokens < apart
    last = metrics(one_rank / "zero0")[-1]
    assert last["cost/backward_pairs"] == BATCH * STEPS
    assert last["cost/backward_tokens"] == tokens
    assert last["cost/padding_fraction"] == 0
    assert np.isclose(last["epoch"], BATCH * STEPS / 30)


@slow
def test_simpo_needs_no_reference(one_rank, tiny_model, tokenized):
    """A reference-free loss end to end: the first loss is the formula's on the initial policy."""
    initial = Naive(tiny_model, tokenized, max_norm=math.inf)
    margins = []
    for i in Shuffled(30, seed=0).draw(BATCH).tolist():
        (chosen, rejected), p = initial.reference[i], tokenized[i]
        margins.append(2.0 * (chosen / len(p.chosen_ids) - rejected / len(p.rejected_ids)) - 1.0)
    expected = -F.logsigmoid(torch.stack(margins)).mean().item()
    losses = column(one_rank / "simpo", "loss")
    assert losses[0] == pytest.approx(expected, abs=1e-6) and losses[-1] < losses[0]


@slow
def test_losses_are_not_mixed_up(one_rank):
    runs = {name: column(one_rank / name, "loss") for name in ("zero0", "cdpo", "robust")}
    assert all(losses[0] == pytest.approx(math.log(2), abs=1e-6) for losses in runs.values())
    assert len({round(losses[-1], 4) for losses in runs.values()}) == 3


@slow
@each_stage
@pytest.mark.parametrize("kind", ["nan", "nan_bf16_"])
def test_nan_stops_the_run(one_rank, stage, kind):
    """Protects checkpoints from a diverged model: the run ends before it writes one, and says what to do."""
    run = one_rank / f"{kind}{stage}"
    message = (run / ERROR_FILE).read_text()
    assert "not finite" in message and "optimizer.lr" in message
    assert re.search(r"\bp\d+\b", message)  # pairs of the step are named
    step = int(message.split()[1].rstrip(":"))
    saved = sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").iterdir())
    assert saved == list(range(max(1, step - 2), step))
    assert not (run / "final").exists() and not (run / "summary.json").exists()
    assert all(math.isfinite(line["loss"]) for line in metrics(run))


@slow
def test_nan_exits_2_with_one_message(common, tmp_path):
    arguments = [
        *common,
        "optimizer.lr=1e30",
        "optimizer.warmup_ratio=0",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    status, said = command("train", *arguments).end()
    assert status == 2
    assert "Traceback" not in said
    (message,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "not finite" in message and "optimizer.lr" in message
    assert not (tmp_path / "run" / "final").exists()


@slow
@pytest.mark.parametrize("name", ["zero0", "zero3", "bf16_2", "lora0"])
def test_final_loads_in_plain_transformers_and_generates(one_rank, tiny_model, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = one_rank / name / "final"
    model: Any = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    message = [{"role": "user", "content": "How many apples?"}]
    prompt = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    initial = json.loads((tiny_model / "config.json").read_text())
    exported = json.loads((final / "config.json").read_text())
    assert exported["architectures"] == initial["architectures"]
    assert exported["tie_word_embeddings"] and exported.get("use_cache", True)
    assert not any(p.name.endswith(".tmp") for p in final.parent.iterdir())


@slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_final_weights_are_the_last_checkpoints(one_rank, stage):
    import sage.model.engine  # noqa: F401

    run = one_rank / f"zero{stage}"
    (file,) = (run / "checkpoints" / f"step_{STEPS}").rglob("mp_rank_00_model_states.pt")
    stored = torch.load(file, weights_only=True)["module"]
    for name, value in weights(run / "final").items():
        assert torch.equal(stored[f"model.{name}"], value)


@slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora(one_rank, tiny_model, stage):
    """Step 0 is ln 2 with the adapter off, base weights stay the same, and merged equals adapted."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = one_rank / f"lora{stage}"
    losses = column(run, "loss")
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[-1] < losses[0] - 1e-3
    assert largest_difference(losses, column(one_rank / "lora0", "loss")) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(run / "final")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        initial = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "final" / "adapter")(ids).logits
        assert (merged(ids).logits - adapted).abs().max() < 1e-5
    assert (adapted - initial).abs().max() > 1e-3
    assert torch.equal(merged.model.embed_tokens.weight, base.get_input_embeddings().weight)


@slow
@pytest.mark.parametrize("reference", ["cached", "online"])
def test_going_on_from_an_adapter(one_rank, reference):
    """The stored adapter is the reference too, so step 0 is ln 2, and training starts from it."""
    run = one_rank / f"adapter_{reference}"
    first = metrics(run)[0]
    assert abs(first["loss"] - math.log(2)) < 1e-6 and abs(first["rewards/margins"]) < 1e-6
    assert first["logps/chosen"] != metrics(one_rank / "lora0")[0]["logps/chosen"]


@slow
def test_an_adapter_on_the_head_is_refused(one_rank):
    message = (one_rank / "lora_head" / ERROR_FILE).read_text()
    assert "head" in message and "adapter" in message


@slow
def test_wandb_offline(one_rank):
    run = one_rank / "wandb"
    assert len(metrics(run)) == 2
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))
    assert not [
        p for p in Path(os.getcwd()).glob("wandb/offline-run-*") if p.stat().st_mtime > run.stat().st_mtime
    ]
