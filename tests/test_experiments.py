"""Every experiment is planned and runs for two steps, with a tiny model and few pairs in place of its own."""

from __future__ import annotations

import json

import pytest
from conftest import REPO
from many_runs import column, execute, freeze

EXPERIMENTS = sorted(file.stem for file in (REPO / "conf" / "experiment").glob("*.yaml"))


@pytest.fixture
def small(tiny_model, pair_file, problem_file, tmp_path):
    """What replaces an experiment's model, data and length. Its loss, engine, selection and adapter stay."""

    def overrides(name: str) -> list[str]:
        benchmark = ["benchmark_limit=2", f"benchmark.gsm8k.path={problem_file}"] if "gsm8k" in name else []
        if benchmark:
            benchmark.append("data.eval_share=0.2")  # of few pairs, the experiment's share is none
        return [
            *(f"+experiment={name}", f"model.path={tiny_model}", f"data.path={pair_file}", "data.limit=40"),
            *("data.eval_path=null", "data.columns={}", "data.max_length=130", "micro_batch_tokens=520"),
            *("steps=2", "epochs=null", "batch_size=4", "world_size=1", f"cache_dir={tmp_path / 'cache'}"),
            *benchmark,
        ]

    return overrides


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_is_planned(sage, small, tmp_path, name):
    file = tmp_path / "plan.json"
    status, _, err = sage("plan", *small(name), "gpu_gb=80", f"json={file}")
    assert status == 0, err
    assert json.loads(file.read_text())["fits"]


@pytest.mark.slow
def test_it_runs_for_two_steps(small, tmp_path):
    folders = [freeze(tmp_path / name, *small(name), "sampling.max_new_tokens=4") for name in EXPERIMENTS]
    execute(1, folders)
    for folder in folders:
        assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
        assert len(column(folder, "loss")) == 2 and (folder / "final").is_dir(), folder.name
