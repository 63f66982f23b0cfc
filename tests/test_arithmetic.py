"""The packaged arithmetic task: its files keep their promises, and training on it raises its accuracy."""

from __future__ import annotations

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO
from hydra import compose, initialize_config_module
from many_runs import execute, freeze

from sage import config
from sage.data.source import resolve_path
from sage.reporting.runs import Run, Series

ACCURACY = "benchmark/arithmetic/accuracy"
SPLITS = ("train", "validation", "test")
FOLDER = Path(resolve_path("pkg://sage.assets/arithmetic"))


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def final_number(response: str) -> str:
    return response.rpartition("#### ")[2]


def test_problems_have_their_true_answers_and_no_split_shares_one():
    """Protects every accuracy measured on this task from wrong answers and leaked problems."""
    prompts = []
    for split in SPLITS:
        problems = read(f"problems_{split}")
        assert all(str(eval(problem["prompt"].rstrip("="))) == problem["answer"] for problem in problems)
        prompts += [problem["prompt"] for problem in problems]
        assert {pair["prompt"] for pair in read(f"pairs_{split}")} <= {p["prompt"] for p in problems}
    assert len(set(prompts)) == len(prompts)


def test_pairs_prefer_the_right_answer():
    """Protects the labels: chosen is right, rejected is wrong, and the pass rate shows that both occurred."""
    for split in SPLITS:
        for pair in read(f"pairs_{split}"):
            assert final_number(pair["chosen"]) == pair["answer"] != final_number(pair["rejected"])
            assert 0 < pair["pass_rate"] < 1


def test_it_stays_small():
    """Protects the wheel's size."""
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6


@pytest.mark.slow
def test_a_few_steps_raise_the_accuracy(tmp_path):
    """Protects the task's purpose, the whole path from pairs to a model that answers better, and that an
    evaluation inside training gives what `sage eval` gives."""
    cache = f"cache_dir={tmp_path / 'cache'}"
    overrides = ["+experiment=arithmetic", "steps=20", "optimizer.warmup_ratio=0", "data.eval_limit=32"]
    freeze(tmp_path / "run", *overrides, "+benchmark=arithmetic", "benchmark_limit=200", cache)
    words = [
        "model=hf",
        f"model.path={tmp_path / 'run' / 'final'}",
        "benchmark=arithmetic",
        "benchmark_limit=200",
        "sampling.max_new_tokens=32",
    ]
    freeze(
        tmp_path / "eval", *words, "generation.batch_size=256", "generation.chunk=4096", cache, command="eval"
    )
    execute(1, [tmp_path / "run", tmp_path / "eval"])

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = (summary[when][ACCURACY] for when in ("before", "after"))
    assert 0.55 < before < 0.8
    assert after > before + 0.03
    inside, outside = (tmp_path / "run" / "benchmarks" / "step_20", tmp_path / "eval")
    assert not (inside / "policy").exists()
    inside, outside = (
        (folder / "arithmetic" / "generations.jsonl").read_text() for folder in (inside, outside)
    )
    assert inside == outside


def load(path: str) -> ModuleType:
    spec = spec_from_file_location(Path(path).stem, REPO / path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_study() -> ModuleType:
    return load("benchmarks/study.py")


def test_the_demo_ends_with_what_the_two_runs_did(tmp_path, monkeypatch, capsys):
    """Protects the demo's last lines: shares are of the trained pairs, and no two numbers change places."""
    margins = {"sage": [-0.2, -0.1, -0.3, 0.4, -0.5], "dpo": [0.1, -0.1, 0.3, 0.4, -0.5]}
    for name, after in (("sage", 0.75), ("dpo", 0.7)):
        (tmp_path / name / "samples").mkdir(parents=True)
        log = {"selected": [True, True, True, True, False], "policy_mean": margins[name]}
        pq.write_table(pa.table(log), tmp_path / name / "samples" / "00000001.parquet")
        accuracy = {when: {ACCURACY: value} for when, value in (("before", 0.6), ("after", after))}
        (tmp_path / name / "summary.json").write_text(json.dumps(accuracy))
    monkeypatch.setattr("sys.argv", ["demo_result.py", str(tmp_path)])
    load("scripts/demo_result.py").main()
    said = re.findall(r"[0-9.]+%", capsys.readouterr().out)
    assert said == ["75%", "25%", "60.0%", "75.0%", "70.0%"]


def test_methods_are_compared_at_an_equal_cost(tmp_path):
    """Protects the study's table: accuracy is read where a run has cost as much, with scoring counted."""
    study, steps = load_study(), np.array([0, 10, 20])
    metrics = {
        "loss": Series(steps[1:], np.zeros(2)),
        "cost/forward_pairs": Series(steps[1:], np.array([20.0, 40.0])),
        "cost/backward_pairs": Series(steps[1:], np.array([10.0, 20.0])),
        ACCURACY: Series(steps, np.array([0.5, 0.6, 0.8])),
    }
    run = Run(tmp_path, {"seed": 0}, metrics, None, "finished")
    assert study.at_cost(run, ACCURACY, 75) == pytest.approx(0.7)  # 50 units in ten steps
    assert study.at_cost(run, ACCURACY, 100) == pytest.approx(0.8)
    assert np.isnan(study.at_cost(run, ACCURACY, 101))


@pytest.mark.parametrize("task", ["arithmetic", "flipped", "rare", "words", "flipped-words"])
def test_the_study_is_made_of_commands_that_compose(task, tmp_path):
    """Protects benchmarks/study.py from keys that were renamed or have no effect: no test runs it."""
    study = load_study()
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.jsonl").touch()  # flipped-words takes those of the folder above
    found = study.TASKS[task](tmp_path / "flipped")
    lines = [("build-pairs", words[1:]) for words in found.prepare.values()]
    settings = 1e-5, 0.1, "test", 0, 10
    lines += [("train", study.train(found, tmp_path, name, *settings)[1:]) for name in study.METHODS]
    lines += [("train", study.train(found, tmp_path, "sage", 1e-5, 0.1, "validation", 0, 10)[1:])]
    lines += [(words[0], words[1:]) for _, words in study.trained_on_held_out(found, tmp_path)]
    with initialize_config_module("sage.conf", version_base="1.3"):
        for command, words in lines:
            config.load(compose(command.replace("-", "_"), words), words)


def test_flipped_labels_are_a_seeded_fifth(tmp_path):
    """Protects the noise study: the wrong labels are the stated share, and the same in every folder."""
    study = load_study()
    for folder in ("a", "b"):
        study.flipped(tmp_path / folder)
    files = [tmp_path / folder / "flipped.jsonl" for folder in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    exchanged = 0
    for row, pair in zip(rows, read("pairs_train"), strict=True):
        turned = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
        assert row in (pair, turned)
        exchanged += row == turned
    assert exchanged == round(0.2 * len(rows))
