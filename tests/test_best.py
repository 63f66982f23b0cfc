"""`select` and `patience`: best/ holds the best policy that was measured, whatever happens to the run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import make_pairs, write_jsonl
from many_runs import ERROR_FILE, column, execute, freeze, interrupted, weights
from whole_runs import files, kill_often

from sage.config import load
from sage.training.best import Criterion
from sage.training.checkpoint import SIDECAR
from sage.training.evaluation import check_select
from sage.training.hooks import Hook
from sage.util import ranks
from sage.util.errors import UserError

STEPS = 6


@dataclass
class Scripted(Hook):
    """An evaluation whose values are given, by step. A negative one stands for NaN, which no config holds.

    As with benchmarks, only rank 0 has the metrics.
    """

    values: list[float] = field(default_factory=list)

    def evaluate(self, run) -> dict[str, float]:
        if ranks.rank():
            return {}
        value = self.values[run.state.step]
        return {"extra/score": value if value >= 0 else math.nan, "eval/pairs": run.state.step}


def scripted(*values: float) -> list[str]:
    listed = ",".join(str(value) for value in values)
    return ["+hooks.script._target_=test_best.Scripted", f"+hooks.script.values=[{listed}]"]


RISES = scripted(0.1, 0.3, 0.2, -1, 0.6, 0.5, 0.6)  # the best is step 4


@pytest.fixture(scope="module")
def common(tiny_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("best")
    return [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', make_pairs(16))}",
        "data.max_length=130",
        "micro_batch_tokens=2000",
        f"steps={STEPS}",
        "batch_size=4",
        "optimizer.lr=1e-3",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
        f"cache_dir={folder / 'cache'}",
        "model.dtype=float32",
        "eval_every=1",
    ]


@pytest.fixture(scope="module")
def runs(common, problem_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    by_score = [*RISES, "select=extra/score"]
    pairs = common[2].split("=", 1)[1]
    lora = ["+model/lora=default", "model.lora.dropout=0.2"]
    benchmark = [
        "+benchmark=gsm8k",
        f"benchmark.gsm8k.path={problem_file}",
        "benchmark_limit=2",
        "sampling.max_new_tokens=4",
    ]
    given = {
        "best": [*by_score, "save_every=1", "keep_checkpoints=9"],
        "patient": [*by_score, "patience=2", "save_every=1", "keep_checkpoints=9"],
        "hopeless": [*scripted(*[-1] * 7), "select=extra/score", "patience=3"],
        "lora": [*lora, "steps=3"],
        "lora_best": [*lora, "steps=3", *by_score],
        "measured": [*benchmark, f"data.eval_path={pairs}", "select=eval/loss", "steps=3"],
        "last": [*by_score, "steps=4", "eval_every=3", "save_every=4"],
        "misspelt": [*RISES, "select=extra/scores"],
    }
    execute(1, [freeze(root / name, *common, *more) for name, more in given.items()])
    assert {p.parent.name for p in root.glob(f"*/{ERROR_FILE}")} == {"misspelt"}
    execute(2, [freeze(root / "two_ranks", *common, *by_score, "engine=zero3", "world_size=2")])
    return root


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_what_is_better():
    """Protects the direction: losses and metrics with a minus sign fall. NaN and a tie win nothing."""
    assert Criterion.of("eval/loss") == ("eval/loss", True) == Criterion.of("-eval/loss")
    assert Criterion.of("-extra/kl") == ("extra/kl", True)
    more, less = Criterion.of("benchmark/a/accuracy"), Criterion.of("eval/loss")
    assert more.improves(0.5, None) and more.improves(0.6, 0.5) and less.improves(0.4, 0.5)
    for value, best in ((math.nan, None), (math.nan, 0.5), (math.inf, None), (0.5, 0.5)):
        assert not more.improves(value, best) and not less.improves(value, best)
    assert not more.improves(0.4, 0.5) and not less.improves(0.6, 0.5)


def at_step(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The policy's weights in a checkpoint."""
    import sage.model.engine  # noqa: F401, lets torch.load read DeepSpeed's plain classes

    (file,) = (run / "checkpoints" / f"step_{step}").rglob("mp_rank_00_model_states.pt")
    state = torch.load(file, weights_only=True)["module"]
    return {name.removeprefix("model."): value for name, value in state.items()}


def same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(expected[name], value) for name, value in weights(folder).items())


@pytest.mark.slow
def test_best_is_the_policy_of_the_best_evaluation(runs):
    """best/ equals the policy of that step, bit for bit; final/ stays the last policy."""
    run = runs / "best"
    found = summary(run)["best"]
    assert (found["metric"], found["value"], found["step"]) == ("extra/score", 0.6, 4)
    assert found["folder"] == str(run / "best")
    assert same(run / "best", at_step(run, 4)) and same(run / "final", at_step(run, STEPS))
    assert not same(run / "best", at_step(run, STEPS))
    ours, theirs = (sorted(p.name for p in (run / f).iterdir()) for f in ("best", "final"))
    assert ours == theirs
    assert summary(runs / "lora")["best"] is None and not (runs / "lora" / "best").exists()


@pytest.mark.slow
def test_the_last_checkpoint_knows_the_last_evaluation(runs):
    """A run that is given more steps begins with its best/, which would be lost otherwise."""
    folder = runs / "last" / "checkpoints" / "step_4"
    assert torch.load(folder / SIDECAR, weights_only=True)["best_step"] == 4
    assert same(folder / "best", weights(runs / "last" / "final"))


@pytest.mark.slow
def test_shards_and_adapters_export_their_best(runs):
    """Protects ZeRO-3's gathering in the middle of a run, and the random numbers of dropout."""
    ours, theirs = weights(runs / "two_ranks" / "best"), weights(runs / "best" / "best")
    assert max((ours[k] - theirs[k]).abs().max() for k in theirs) < 1e-5
    assert summary(runs / "two_ranks")["best"]["step"] == 4
    adapter = json.loads((runs / "lora_best" / "best" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == sorted(adapter["target_modules"])  # the same files in every process
    assert summary(runs / "lora_best")["best"]["step"] == 1
    assert column(runs / "lora_best", "loss") == column(runs / "lora", "loss")


@pytest.mark.slow
def test_patience(runs):
    """Step 3 is the second evaluation after the best one, at step 1. NaN is no gain either."""
    stopped = summary(runs / "patient")
    assert stopped["steps"] == 3 and stopped["best"]["step"] == 1
    assert same(runs / "patient" / "best", at_step(runs / "best", 1))
    assert stopped["after"]["eval/pairs"] == 3
    lines = [json.loads(line) for line in (runs / "patient" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "extra/score" in line] == [0, 1, 2, 3]  # none of them twice
    hopeless = summary(runs / "hopeless")
    assert hopeless["steps"] == 2 and hopeless["best"]["value"] is None
    assert not (runs / "hopeless" / "best").exists()


@pytest.mark.slow
def test_metrics_of_sage_itself_select(runs):
    losses = {
        line["step"]: line["eval/loss"]
        for line in map(json.loads, (runs / "measured" / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in line
    }
    found = summary(runs / "measured")["best"]
    assert found["value"] == min(losses.values()) == losses[found["step"]] and found["step"] > 0
    message = (runs / "misspelt" / ERROR_FILE).read_text()
    assert message == "select=extra/scores: no evaluation logs this; they log extra/score, eval/pairs"


@pytest.mark.slow
def test_names_are_those_that_a_run_logs(runs, common):
    """Protects the refusal before the model is loaded: its list is what a real evaluation logs."""
    cfg = load(runs / "measured")
    cfg.select = "eval/los"
    with pytest.raises(UserError, match=r"select=eval/los: .*did you mean 'eval/loss'\?\)") as refused:
        check_select(cfg, [Hook])
    first = json.loads((runs / "measured" / "metrics.jsonl").read_text().splitlines()[0])
    assert str(refused.value).split("they log ")[1].split(", ") == [n for n in first if n != "step"]
    cfg.select = "benchmark/gsm8k/accuracy"
    assert "no longer a test" in check_select(cfg, [])
    cfg.benchmark["gsm8k"].split = "validation"
    assert check_select(cfg, []) is None
    cfg.benchmark, cfg.data.eval_path = {}, None
    with pytest.raises(UserError, match=r"data\.eval_path=FILE"):
        check_select(cfg, [])
    check_select(cfg, [Scripted])


@pytest.mark.slow
def test_resume_has_the_best_of_its_checkpoint(runs, tmp_path):
    """A kill after a later evaluation leaves a best/ that the resumed run has not reached yet."""
    again = {
        (name, step): interrupted(runs / name, step, tmp_path / f"{name}{step}")
        for name, step in (("best", 3), ("best", 5), ("patient", 2), ("patient", 3))
    }
    shutil.rmtree(again["best", 5] / "best")
    execute(1, list(again.values()))
    for (name, step), run in again.items():
        assert same(run / "best", weights(runs / name / "best")), (name, step)
        ours, theirs = summary(run), summary(runs / name)
        ours["best"].pop("folder"), theirs["best"].pop("folder")
        assert ours["best"] == theirs["best"] and ours["steps"] == theirs["steps"]
        assert column(run, "loss") == column(runs / name, "loss")
    # And before the resumed run has measured anything: the checkpoint's own, which takes no room.
    checkpoint = runs / "best" / "checkpoints" / "step_3" / "best"
    assert same(checkpoint, at_step(runs / "best", 1))
    assert (checkpoint / "model.safetensors").stat().st_nlink > 1


@pytest.mark.slow
def test_kills_while_the_best_is_written(common, tmp_path):
    """Five kills of a run that improves in every step, and so is nearly always writing best/."""
    given = [*common, *scripted(*range(STEPS + 1)), "select=extra/score", "save_every=2"]
    whole, killed = kill_often("train", given, tmp_path, 5, (0.5, 1.0))
    expected = files(whole)
    for after in map(files, killed):
        for name in ("best/model.safetensors", "best/config.json", "final/model.safetensors"):
            assert after[name] == expected[name]
