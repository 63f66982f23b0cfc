"""Sweeps: a failed job does not stop the others; table, file and exit status say what came of each."""

from __future__ import annotations

import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from conftest import refused

from sage import config, sweeps
from sage.util.errors import UserError
from sage.util.locks import reserved


@pytest.fixture
def sweep(train, monkeypatch, tmp_path):
    """`sage train -m` in which each job ends as `ends` says: with an exit status, or with an accuracy."""
    folder = tmp_path / "sweep"

    def run(ends: dict[int, int | float], *overrides: str, flags: tuple[str, ...] = ()):
        started = []

        def start(_world_size: int, run_dir: Path) -> None:
            cfg = config.load(run_dir)
            assert isinstance(cfg, config.TrainConfig)
            started.append(cfg.seed)
            end = ends[cfg.seed]
            if isinstance(end, int):
                raise SystemExit(end)
            (run_dir / "summary.json").write_text(json.dumps({"after": {"eval/policy_accuracies": end}}))

        monkeypatch.setattr("sage.launch.start", start)
        monkeypatch.setenv("COLUMNS", "160")
        result = train(*overrides, f"hydra.sweep.dir={folder}", flags=("-m", *flags))
        file = folder / "sweep.json"
        return result, started, json.loads(file.read_text())["jobs"] if file.exists() else None

    return run


def test_a_failed_job_does_not_stop_the_others(sweep, tmp_path):
    (status, out, err), started, jobs = sweep({1: 0.25, 2: 7, 3: 0.75}, "seed=1,2,3", "optimizer.lr=0.001")
    assert status == 7 and started == [1, 2, 3]
    assert [job["value"] for job in jobs] == [0.25, None, 0.75]
    assert [job["error"] for job in jobs] == [None, "exit status 7", None]
    assert [job["folder"] for job in jobs] == [str(tmp_path / "sweep" / str(number)) for number in range(3)]
    table = out[out.index("3 jobs, 1 failed") :]
    assert all(part in table for part in ("seed=1", "eval/policy_accuracies 0.2500", "failed: exit status 7"))
    assert "optimizer.lr" not in table  # all jobs have it
    assert "Traceback" not in err and not (tmp_path / "sweep" / ".jobs").exists()


def test_a_sweep_whose_jobs_all_succeed(sweep):
    (status, out, _), _, jobs = sweep({1: 0.25, 2: 0.5}, "seed=1,2")
    assert status == 0 and len(jobs) == 2 and "2 jobs, 0 failed" in out


def test_a_job_that_is_refused_is_named(sweep, tmp_path):
    """Its model is looked at only when its turn comes."""
    (status, _, err), started, jobs = sweep(
        {1: 0.5}, "seed=1", f"model.path={tmp_path / 'no'},pkg://no/model"
    )
    assert status == 2 and not started
    assert "error: job 0: model.path=" in err and "error: job 1: pkg://no" in err
    assert "no such file" in jobs[0]["error"] and "no package" in jobs[1]["error"]


def test_a_signal_ends_the_sweep(sweep):
    (status, out, _), started, jobs = sweep({1: 0.5, 2: 143, 3: 0.5}, "seed=1,2,3")
    assert status == 143 and started == [1, 2]
    assert len(jobs) == 2 and "2 jobs, 1 failed" in out


def test_a_killed_process_of_a_launcher_is_one_message():
    """joblib's launcher raises this when the system has killed one of the processes that run its jobs."""

    def killed():
        raise BrokenProcessPool("a worker was terminated")

    with pytest.raises(UserError, match=r"was killed.*`sage resume FOLDER`"):
        sweeps.run_sweep(killed)


def test_all_jobs_are_checked_before_the_first_one_starts(sweep, tmp_path):
    result, started, jobs = sweep({1: 0.5}, "seed=1", "optimizer.lr=0.1,-1")
    refused(result, "job 1 of this sweep", "optimizer.lr=-1")
    assert not started and jobs is None and not (tmp_path / "sweep").exists()


def test_a_sweeps_folder_is_not_used_again(sweep, tmp_path):
    """Its table would be lost: each job would be refused, since its folder holds a run."""
    _, _, before = sweep({1: 0.25, 2: 0.5}, "seed=1,2")
    result, started, jobs = sweep({1: 0.75}, "seed=1,1")
    refused(result, str(tmp_path / "sweep"), "already holds a sweep", "resume=auto")
    assert not started and jobs == before
    (status, _, _), started, jobs = sweep({}, "seed=1,2", "resume=auto")
    assert status == 0 and not started
    assert [{**job, "overrides": []} for job in jobs] == [{**job, "overrides": []} for job in before]


def test_two_sweeps_that_start_at_once(sweep, tmp_path):
    with reserved(tmp_path / "sweep", "hydra.sweep.dir"):
        result, started, _ = sweep({1: 0.25}, "seed=1,2")
    refused(result, str(tmp_path / "sweep"), "in use by another `sage` command")
    assert not started


def test_a_grid_in_an_experiment_is_checked_too(sweep, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "grid.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      optimizer.lr: 0.1,-1\n"
    )
    result, started, _ = sweep({1: 0.5}, "seed=1", "+experiment=grid", flags=("-cd", str(tmp_path / "mine")))
    refused(result, "job 1 of this sweep", "optimizer.lr=-1")
    assert not started


def test_the_result_of_a_run(tmp_path):
    def of(summary: dict):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return sweeps.result(tmp_path)

    after = {"eval/loss": 0.5, "eval/policy_accuracies": 0.6, "benchmark/gsm8k/accuracy": 0.3}
    assert sweeps.result(tmp_path / "none") == (None, None)
    assert of({"after": {}}) == (None, None)
    assert of({"after": after}) == ("eval/policy_accuracies", 0.6)
    assert of({"after": {"benchmark/gsm8k/accuracy": 0.3}}) == ("benchmark/gsm8k/accuracy", 0.3)
    assert of({"after": after, "best": {"metric": "eval/loss", "value": 0.4}}) == ("eval/loss", 0.4)


def test_optuna_gets_the_result(sweep):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    (status, _, err), started, jobs = sweep(
        {1: 0.25, 3: 0.75},
        *["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=6"],
        *["hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_jobs=1"],
        "seed=choice(1,3)",
    )
    assert status == 0, err
    assert set(started) == {1, 3} and len(jobs) == 6
    best = (Path(jobs[0]["folder"]).parent / "optimization_results.yaml").read_text()
    assert "best_value: 0.75" in best
