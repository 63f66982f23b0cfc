"""Sequence parallelism: groups of ranks that compute rows together give one rank's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import make_pairs, refused, write_jsonl
from forks import on_ranks
from many_runs import ERROR_FILE, column, do_all, execute, freeze, interrupted, weights
from test_policy import pairs, tiny

from sage.config import ModelConfig
from sage.data.packing import collate
from sage.model import loading
from sage.model.policy import Policy
from sage.model.sequence import SequenceGroup, sequence_group
from sage.util.errors import UserError

SIZES = (2, 4)  # of a group; the second one has more ranks than there are key and value heads
# Soft caps, windows, learned positions and experts are among them.
MODELS = ("llama_tied", "qwen3", "gemma2", "gpt2", "mixtral")
BATCHES = (("shared", 11), ("shared", 0), ("unshared", 0))  # layout, common prefix
RUNS = {
    "zero0": ["engine=zero0", "engine.sequence_parallel=4"],
    "zero1": ["engine=zero1", "engine.sequence_parallel=2", "save_every=1"],
    "zero2": ["engine=zero2", "engine.sequence_parallel=4", "model.gradient_checkpointing=true"],
    "zero3": ["engine=zero3", "engine.sequence_parallel=2", "reference=online"],
    "lora": [
        *["engine=zero3", "engine.sequence_parallel=4", "+model/lora=default"],
        "model.gradient_checkpointing=true",
    ],
}
MUTANTS = {  # what is broken -> the engine
    "forward": "zero1",
    "backward": "zero2",
    "backward_sharded": "zero3",
}


def measure(folder: Path) -> dict[str, dict]:
    """Errors of models against one rank's, and what a rank holds. Does all runs. Every rank calls this."""
    from sage.model import sequence
    from sage.model.engine import init_distributed
    from sage.util import ranks

    init_distributed()
    found = {}
    for name in MODELS:
        for size in SIZES:
            group = sequence_group(size)
            for i, (layout, prefix) in enumerate(BATCHES):
                found[f"{name}-{size}-{i}"] = errors(name, group, layout, prefix, checkpoint=i == 1)

    runs = folder / "runs"
    do_all([str(runs / name) for name in (*RUNS, "scores")])
    if ranks.rank() == 0:
        interrupted(runs / "zero1", 1, runs / "resumed")
    ranks.barrier()
    do_all([str(runs / "resumed")])

    class Broken(torch.autograd.Function):
        """Ranks that keep what is asked for by others, in one direction."""

        @staticmethod
        def forward(ctx, x, group):
            return x.clone() if broken == "forward" else group.exchange(x)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    sequence._Exchange = Broken
    for broken in MUTANTS:
        do_all([str(runs / broken)])
    return found


def errors(name: str, group: SequenceGroup, layout: str, prefix: int, checkpoint: bool) -> dict[str, float]:
    model: Any = tiny(name)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(pairs(prefix), layout, prefix)
    held: list[int] = []
    found = []
    for policy in (Policy(model), Policy(model, group=group)):
        hook = policy.causal.get_input_embeddings().register_forward_hook(
            lambda _module, args, _out: held.append(args[0].shape[1])
        )
        logps, stats = policy(batch, logit=True)
        hook.remove()
        model.zero_grad()
        (logps.chosen - 2 * logps.rejected).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        found.append(([*logps[:2], *stats], gradients))
    (right, known), (numbers, gradients) = found
    for gradient in gradients:
        group.add(gradient)
    return {
        "held": held[-1] - -(-held[0] // group.size),
        "numbers": max(
            float(((a - b) / b).detach().abs().max()) for a, b in zip(numbers, right, strict=True)
        ),
        "gradients": max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, known, strict=True)
        ),
    }


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """Runs of one rank, and of four."""
    root = tmp_path_factory.mktemp("sequence")
    common = [
        *["model=hf", f"model.path={tiny_model}", "model.dtype=float32", "data.num_proc=1"],
        f"data.path={write_jsonl(root / 'pairs.jsonl', make_pairs(12))}",
        *["data.max_length=130", "micro_batch_tokens=260"],
    ]
    training = [
        *common,
        f"data.eval_path={write_jsonl(root / 'held_out.jsonl', make_pairs(5))}",
        # Adam forgets the size of a gradient unless epsilon is about as large.
        *[
            "steps=2",
            "batch_size=4",
            "optimizer.lr=1e-3",
            "optimizer.eps=1e-3",
            "scorer.candidates_per_pair=2",
        ],
    ]
    scoring = [*common, "scorer=sage_logit"]

    def run(name: str, *overrides: str, command: str = "train") -> Path:
        return freeze(root / name, *overrides, f"cache_dir={root / 'cache' / name}", command=command)

    one = [
        run("plain", *training),
        run("plain_lora", *training, "+model/lora=default"),
        run("plain_scores", *scoring, command="score-dataset"),
    ]
    four = "world_size=4"
    for name, overrides in RUNS.items():
        run(f"runs/{name}", *training, four, *overrides)
    for name, engine in MUTANTS.items():
        run(f"runs/{name}", *training, four, f"engine={engine}", "engine.sequence_parallel=2")
    together = [four, "engine=zero3", "engine.sequence_parallel=2"]
    run("runs/scores", *scoring, *together, command="score-dataset")
    execute(1, one)
    return root


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    return on_ranks(4, measure, folder)[0]


@pytest.mark.slow
def test_models_and_layouts(found):
    """Protects who sees whom across the cuts, key and value heads that ranks share, positions, padding, and
    that each rank holds its part of the tokens only."""
    assert len(found) == len(MODELS) * len(SIZES) * len(BATCHES)
    for name, values in found.items():
        assert values["held"] == 0, name
        assert values["numbers"] < 1e-5 and values["gradients"] < 1e-5, (name, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_is_that_of_one_rank(found, folder, name):
    """Protects the sum of gradients over all ranks, the pairs that groups take, metrics that count each pair
    once, evaluation, checkpointing and export."""
    ours, theirs = folder / "runs" / name, folder / ("plain_lora" if name == "lora" else "plain")
    assert not (ours / ERROR_FILE).exists(), (ours / ERROR_FILE).read_text()
    for metric in ("loss", "grad_norm", "logps/chosen", "rewards/margins", "cost/backward_pairs"):
        assert column(ours, metric) == pytest.approx(column(theirs, metric), rel=1e-5, abs=1e-5), metric
    summaries = [json.loads((run / "summary.json").read_text()) for run in (ours, theirs)]
    for when in ("before", "after"):
        assert summaries[0][when] == pytest.approx(summaries[1][when], rel=1e-5, abs=1e-5)
    for key, weight in weights(theirs / "final").items():
        other = torch.cat([x for k, x in shards(ours / "final") if k == key])
        assert (weight - other).abs().max() < 1e-5, key


def shards(folder: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return [item for file in folder.glob("*.safetensors") for item in load_file(file).items()]


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_the_undisturbed_one(found, folder):
    """Protects the checkpoint of ranks that share rows: the rest of the run is the same bit for bit."""
    whole, resumed = folder / "runs" / "zero1", folder / "runs" / "resumed"
    for metric in ("loss", "grad_norm", "rewards/margins"):
        assert column(resumed, metric)[-1] == column(whole, metric)[-1]
    ours, theirs = weights(resumed / "final"), weights(whole / "final")
    assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.slow
def test_scoring_is_that_of_one_rank(found, folder):
    one, four = (
        pq.read_table(run / "scores") for run in (folder / "plain_scores", folder / "runs" / "scores")
    )
    assert one["pair_id"] == four["pair_id"]
    for name in ("policy_chosen_logps", "policy_rejected_logps", "logit_squared_norm", "score"):
        assert np.allclose(one[name].to_numpy(), four[name].to_numpy(), rtol=1e-5, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("broken", MUTANTS)
def test_the_self_check_sees_a_broken_exchange(found, folder, broken):
    """Protects against training something else: ranks that miss each other's tokens are refused before the
    first step."""
    message = (folder / "runs" / broken / ERROR_FILE).read_text()
    assert "engine.sequence_parallel=2 needs packed attention" in message
    what = "changes a token's log-probability" if broken == "forward" else "its gradients are off by"
    assert what in message, message
    assert not (folder / "runs" / broken / "checkpoints").exists()


def test_routers_with_a_loss_of_their_own_are_refused():
    with pytest.raises(UserError, match=r"model\.router_aux_coef=0"):
        Policy(tiny("mixtral"), router_coefficient=0.1, group=SequenceGroup(2))


def test_heads_that_ranks_cannot_share_are_refused_before_weights_are_read(tmp_path):
    config = transformers.LlamaConfig(num_attention_heads=6, num_key_value_heads=6, hidden_size=48)
    config.save_pretrained(tmp_path)  # no weights
    loading.check_heads(str(tmp_path), ModelConfig(path="x"), 3)
    with pytest.raises(
        UserError, match=r"engine.sequence_parallel=4.* the 6 attention heads of model.path=x"
    ):
        loading.check_heads(str(tmp_path), ModelConfig(path="x"), 4)
    query = torch.zeros(1, 6, 4, 8)
    with pytest.raises(NotImplementedError, match="6 heads"):
        SequenceGroup(4).to_heads(query, query, query)


def test_attention_gives_contiguous_memory_with_one_head_for_each_rank(monkeypatch):
    """Protects models that look at the output with `view`, as transformers' own attention lets them."""
    monkeypatch.setattr(SequenceGroup, "exchange", lambda _self, x: x)
    out = SequenceGroup(4).to_tokens(torch.arange(64.0).view(1, 8, 1, 8))
    assert out.shape == (1, 2, 4, 8) and out.is_contiguous()


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["world_size=3"], ["engine.sequence_parallel=2", "world_size=3", "world_size=2"]),
        (["world_size=2", "data.packing=padded"], ["engine.sequence_parallel=2", "data.packing=auto"]),
        (["world_size=2", "tracking.snr_every=1"], ["tracking.snr_every=1", "engine.sequence_parallel"]),
        (["world_size=4", "batch_size=1"], ["batch_size=1", "compute a pair together", "batch_size=2"]),
        (["world_size=2", "micro_batch_tokens=255"], ["micro_batch_tokens=256", "engine.sequence_parallel"]),
    ],
)
def test_what_cannot_run_together_is_refused_before_the_ranks_start(train, overrides, parts):
    refused(train("engine.sequence_parallel=2", *overrides), *parts)
