"""Runs that go on: after a requeue, from another folder, to more steps, or where nothing has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from many_runs import column, execute, freeze, weights

from sage import config, launch
from sage.util.errors import UserError

CONSTANT = ["optimizer.schedule=constant", "optimizer.warmup_ratio=0"]


@pytest.fixture
def common(tiny_model, pair_file, tmp_path) -> list[str]:
    return [
        *["model=hf", f"model.path={tiny_model}", f"data.path={pair_file}", "data.max_length=130"],
        *["micro_batch_tokens=260", "batch_size=4", "model.dtype=float32", f"cache_dir={tmp_path / 'cache'}"],
    ]


@pytest.fixture
def started(monkeypatch) -> list[Path]:
    """Folders of the runs whose ranks would have been started."""
    folders: list[Path] = []
    monkeypatch.setattr(launch, "start", lambda _, folder: folders.append(folder))
    return folders


def loaded(run: Path) -> Any:
    return config.load(run)


def test_a_frozen_config_can_be_read_from_any_folder(tiny_model, pair_file, tmp_path, monkeypatch):
    monkeypatch.chdir(pair_file.parent)
    shards = tmp_path / "run"
    freeze(shards, "model=hf", "model.path=gpt2", "data.path='pa*.jsonl'", "steps=1", "cache_dir=cache")
    cfg = config.load(shards)
    assert isinstance(cfg, config.TrainConfig)
    assert cfg.data.path == str(pair_file.parent / "pa*.jsonl")
    assert cfg.cache_dir == str(pair_file.parent / "cache")
    assert cfg.model.path == "gpt2"  # a hub's name
    monkeypatch.chdir(tiny_model.parent)
    cfg = config.load(freeze(tmp_path / "b", "model=hf", "model.path=tiny", "steps=1", "data.path=x"))
    assert isinstance(cfg, config.TrainConfig)
    assert cfg.model.path == str(tiny_model) and cfg.data.path == "x"


def test_a_run_that_failed_before_its_first_step_does_not_block_its_folder(common, tmp_path):
    run = freeze(tmp_path / "run", *common, "steps=1")
    (run / "metrics.jsonl").touch()
    (run / ".rank0.lock").touch()
    freeze(run, *common, "steps=2")
    assert loaded(run).steps == 2
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="already holds a run"):
        freeze(run, *common, "steps=3")


def test_resume_auto_starts_a_run_or_goes_on_with_it(common, tmp_path, started):
    """The same command line again, as Slurm runs it after a requeue. Other settings are refused."""
    run = tmp_path / "run"

    def auto(*overrides: str, resume: str = "resume=auto") -> None:
        cfg = config.load(freeze(tmp_path / "typed", *common, resume, "steps=4", *overrides))
        (tmp_path / "typed" / "config.yaml").unlink()
        launch.run(cfg, run)

    auto(resume="resume=never")
    (run / "metrics.jsonl").write_text("{}\n")
    auto()
    assert started == [run, run]
    with pytest.raises(UserError, match=r"begun with another loss\.beta"):
        auto("loss.beta=0.3")
    (run / "summary.json").write_text("{}")
    auto()
    assert started == [run, run]


@pytest.mark.parametrize(
    "overrides, steps, reason",
    [
        (["optimizer.schedule=linear"], 8, "learning rates depend"),
        (["optimizer.schedule=constant", "optimizer.warmup_ratio=0.5"], 8, "learning rates depend"),
        (CONSTANT, 2, "has done 3 already"),
        ([*CONSTANT, "curriculum=static_easy_to_hard"], 8, "grows with the number of steps"),
    ],
)
def test_more_steps_are_refused_where_they_would_change_what_is_done(
    overrides, steps, reason, common, tmp_path, started
):
    run = freeze(tmp_path / "run", *common, "steps=4", *overrides)
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    with pytest.raises(UserError, match=reason):
        launch.resume(run, steps)
    assert not started and loaded(run).steps == 4


@pytest.mark.parametrize(
    "saved, steps, reason",
    [
        (None, 2, "has done 4 already"),
        (None, 8, r"no checkpoint of its last step, 4, .*\(there is none\)"),
        (3, 4, "has done 4 already"),
        (3, 8, r"\(its newest is of step 3\)"),
        (4, 8, None),
    ],
)
def test_a_finished_run_goes_on_from_its_last_step_only(saved, steps, reason, common, tmp_path, started):
    """From an earlier one it would train what is in final/ and best/ once more, and overwrite them."""
    run = freeze(tmp_path / "run", *common, "steps=4", *CONSTANT)
    (run / "summary.json").write_text('{"steps": 4}')
    if saved:
        (run / "checkpoints" / f"step_{saved}").mkdir(parents=True)
    if reason is None:
        launch.resume(run, steps)
        assert started == [run]
        return
    with pytest.raises(UserError, match=reason):
        launch.resume(run, steps)
    assert not started and (run / "summary.json").exists()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_run_of_epochs_can_be_given_steps(schedule, common, tmp_path, started):
    """If nothing depends on how many steps its epochs are, which only the tokenised pairs decide."""
    words = ["optimizer.warmup_ratio=0", f"optimizer.schedule={schedule}"]
    run = freeze(tmp_path / "run", *common, "epochs=2", *words)
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    if schedule == "linear":
        with pytest.raises(UserError, match="learning rates depend"):
            launch.resume(run, 8)
        return
    launch.resume(run, 8)
    cfg = config.load(run)
    assert isinstance(cfg, config.TrainConfig) and (cfg.steps, cfg.epochs) == (8, None) and started == [run]


def test_another_number_of_ranks(common, tmp_path, started, capsys):
    """The frozen config says it, unless a rank still runs. A requeued job may have another number, too."""
    run = freeze(tmp_path / "run", *common, "steps=4")
    (run / "metrics.jsonl").write_text("{}\n")
    with FileLock(run / ".rank0.lock"), pytest.raises(UserError, match="still running"):
        launch.resume(run, world_size=2)
    with pytest.raises(UserError, match=r"batch_size=4 pairs cannot feed world_size=8 ranks"):
        launch.resume(run, world_size=8)
    assert loaded(run).world_size == 1 and not started
    launch.resume(run, world_size=2)
    assert loaded(run).world_size == 2 and started == [run]
    launch.resume(run, world_size=3, here=False)
    assert loaded(run).world_size == 3 and started == [run]
    assert "--nproc-per-node=3" in capsys.readouterr().out
    launch.resume(run)
    assert loaded(run).world_size == 3 and started == [run, run]
    cfg = config.load(freeze(tmp_path / "typed", *common, "resume=auto", "steps=4", "world_size=4"))
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("resume: never", "resume: auto")
    )
    launch.run(cfg, run)
    assert loaded(run).world_size == 4 and started == [run, run, run]


@pytest.mark.slow
def test_a_finished_run_with_more_steps_is_the_longer_run(common, tmp_path, started):
    common = [*common, *CONSTANT, "save_every=2", "optimizer.lr=1e-3"]
    short, long = (freeze(tmp_path / name, *common, f"steps={n}") for name, n in (("short", 4), ("long", 6)))
    execute(1, [short, long])
    with pytest.raises(UserError, match=r"finished.*steps=N gives it more"):
        launch.resume(short)
    launch.resume(short, 6)
    assert started == [short]
    execute(1, [short])
    assert column(short, "loss") == column(long, "loss")
    ours, theirs = weights(short / "final"), weights(long / "final")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
