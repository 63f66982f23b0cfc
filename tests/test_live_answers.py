"""Benchmarks in a run are answered by the policy as it is, and leave no trace in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from many_runs import column, execute, freeze, interrupted, weights

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def runs(tiny_model, pair_file, problem_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("live")
    sampling = ["sampling.max_new_tokens=12", "generation.batch_size=2", "generation.chunk=2"]
    problems = [f"benchmark.gsm8k.path={problem_file}", "benchmark_limit=6", *sampling]
    common = [
        *("model=hf", f"model.path={tiny_model}", f"data.path={pair_file}", "data.max_length=130"),
        *("micro_batch_tokens=260", f"steps={STEPS}", "batch_size=6", "optimizer.lr=5e-2"),
        *("optimizer.warmup_ratio=0", f"cache_dir={root / 'cache'}"),
    ]
    kinds = {
        "plain": [],
        "checkpointed": ["model.gradient_checkpointing=true"],
        "bf16": ["model.dtype=bfloat16", "engine=zero2"],  # its weights are views of DeepSpeed's own memory
    }
    folders = []
    for name, kind in kinds.items():
        kind = ["model.dtype=float32", *common, *kind]
        folders.append(freeze(root / name, *kind))
        folders.append(freeze(root / f"{name}_asked", *kind, "+benchmark=gsm8k", *problems, "eval_every=1"))
    evaluation = ["model=hf", f"model.path={root / 'plain_asked' / 'final'}", "model.dtype=float32"]
    evaluation += problems
    execute(1, folders)
    execute(1, [freeze(root / "eval", *evaluation, f"cache_dir={root / 'cache'}", command="eval")])
    assert not [*root.glob("*/error.txt")]
    return root


def answers(folder: Path) -> list[tuple]:
    (file,) = folder.rglob("generations.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    return [(row["problem_id"], row["prompt_ids"], row["response_ids"], row["response"]) for row in rows]


def test_answers_are_those_of_sage_eval_on_the_export(runs):
    """Token by token, greedy, in float32. The weights have moved, so the initial model answers otherwise."""
    asked = runs / "plain_asked" / "benchmarks"
    assert len(answers(runs / "eval")) == 6
    assert answers(asked / f"step_{STEPS}") == answers(runs / "eval") != answers(asked / "step_0")


@pytest.mark.parametrize("name", ["plain", "checkpointed", "bf16"])
def test_answering_does_not_disturb_training(runs, name):
    """The same losses and the same weights in the end, bit for bit."""
    assert column(runs / f"{name}_asked", "loss") == column(runs / name, "loss")
    assert column(runs / f"{name}_asked", "grad_norm") == column(runs / name, "grad_norm")
    ours, theirs = weights(runs / f"{name}_asked" / "final"), weights(runs / name / "final")
    assert all((ours[key] == theirs[key]).all() for key in theirs) and ours.keys() == theirs.keys()


def test_answers_after_the_last_checkpoint_are_asked_again(runs, tmp_path):
    """Protects accuracies: a run without a checkpoint starts again, perhaps with other weights, so the
    answers that it left are not those of this policy.
    """
    whole, again, changed = runs / "plain_asked", tmp_path / "again", tmp_path / "changed"
    for copy in (again, changed):
        interrupted(whole, 0, copy)
    for folder in (again / "benchmarks" / f"step_{STEPS}", changed / "benchmarks" / "step_0"):
        shutil.rmtree(folder)
        other = 0 if folder.name != "step_0" else STEPS
        shutil.copytree(whole / "benchmarks" / f"step_{other}", folder)
    (begun,) = changed.glob("benchmarks/step_0/**/.begun.json")
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"model": "another"}))
    execute(1, [again, changed])
    assert answers(again / "benchmarks" / f"step_{STEPS}") == answers(whole / "benchmarks" / f"step_{STEPS}")
    assert "another model: another" in (changed / "error.txt").read_text()


def test_nothing_is_exported_for_it(runs):
    for step in range(STEPS + 1):
        files = [*(runs / "plain_asked" / "benchmarks" / f"step_{step}").rglob("*")]
        assert not [file for file in files if file.suffix == ".safetensors" or file.name == "policy"]
        assert "generations.jsonl" in [file.name for file in files]
