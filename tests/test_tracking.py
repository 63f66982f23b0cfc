"""Weights & Biases and TensorBoard: what they get after a resume, and that neither can stop a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from sage import config
from sage.config import TrackingConfig
from sage.training import tracking, wandb_log
from sage.util.errors import UserError

CFG = config.TrainConfig(tracking=TrackingConfig(wandb=True))


class FakeRun:
    """Stands for a W&B run; `step` is what the server says comes next."""

    def __init__(self, mode: str, step: int, fails: bool = False):
        self.settings, self.step, self.fails = SimpleNamespace(mode=mode), step, fails
        self.logged: list[int] = []

    def log(self, metrics: dict, step: int) -> None:
        if self.fails:
            raise ConnectionResetError("wandb's process is gone")
        self.logged.append(step)

    def finish(self) -> None:
        self.log({}, -1)


@pytest.fixture
def started(monkeypatch):
    """The options of every `wandb.init`, which returns a FakeRun or raises what `run` is."""
    calls = []

    def with_run(run, reason: str | None = None):
        def init(**options):
            calls.append(options)
            if isinstance(run, Exception) and options["mode"] == "online":
                raise run
            return FakeRun(options["mode"], 0) if isinstance(run, Exception) else run

        monkeypatch.setattr(wandb, "init", init)
        monkeypatch.setattr(wandb, "teardown", lambda: None)
        monkeypatch.setattr(wandb_log, "absent", lambda: reason)
        return calls

    return with_run


@pytest.mark.parametrize(
    "mode, server, logged, expected",
    [
        ("offline", 0, -1, [0, 1, 2, 3, 4, 5, 6]),  # a new run
        ("offline", 0, 4, [5, 6]),  # resumed at step 2, after it had logged step 4
        ("online", 3, 4, [3, 4, 5, 6]),  # the kill took step 3 and 4 with it: the server does not have them
        ("online", 5, 4, [5, 6]),
    ],
)
def test_a_resumed_run_goes_on_where_its_log_ends(started, tmp_path, mode, server, logged, expected):
    run = FakeRun(mode, server)
    started(run)
    log = wandb_log.WandbLog(CFG, tmp_path, logged)
    for step in range(7):
        log.log(step, {"loss": 1.0})
    assert run.logged == expected


def test_the_id_belongs_to_the_folder_not_to_its_path(started, tmp_path):
    calls = started(FakeRun("offline", 0))
    for _ in range(2):
        wandb_log.WandbLog(CFG, tmp_path, -1)
    (tmp_path / wandb_log.ID_FILE).unlink()  # as if the folder was deleted, and made again
    wandb_log.WandbLog(CFG, tmp_path, -1)
    first, second, third = (call["id"] for call in calls)
    assert first == second != third


def test_without_a_server_auto_is_offline_and_online_is_refused(started, tmp_path, capsys):
    calls = started(FakeRun("offline", 0), reason="you are not logged in")
    wandb_log.WandbLog(CFG, tmp_path, -1)
    assert calls[-1]["mode"] == "offline"
    assert "offline: you are not logged in" in capsys.readouterr().out
    with pytest.raises(UserError, match="not logged in"):
        tracking.check_tracking(TrackingConfig(wandb=True, mode="online"))
    tracking.check_tracking(TrackingConfig(wandb=True))


def test_a_server_that_refuses_the_run(started, tmp_path, capsys):
    calls = started(wandb.errors.CommError("permission denied"))
    wandb_log.WandbLog(CFG, tmp_path, -1)
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert "permission denied" in capsys.readouterr().out
    online = config.TrainConfig(tracking=TrackingConfig(wandb=True, mode="online"))
    with pytest.raises(UserError, match="permission denied"):
        wandb_log.WandbLog(online, tmp_path, -1)


def test_a_failure_later_does_not_stop_training(started, tmp_path, capsys):
    started(FakeRun("online", 0, fails=True))
    log = wandb_log.WandbLog(CFG, tmp_path, -1)
    for step in range(3):
        log.log(step, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("logs nothing more") == 1


def test_a_server_that_does_not_answer_is_noticed_at_once(monkeypatch, tmp_path):
    wandb.teardown()  # else it keeps the settings of an earlier test
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert "not logged in" in str(wandb_log.absent())
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    wandb.teardown()
    started = time.monotonic()
    assert "127.0.0.1:9 does not answer" in str(wandb_log.absent())
    assert time.monotonic() - started < 10
    wandb.teardown()


@pytest.mark.parametrize("project", ["a/b/c", "/", "a/", "50%", "a#b", ""])
def test_projects(project):
    with pytest.raises(UserError, match=r"tracking\.project"):
        tracking.check_tracking(TrackingConfig(wandb=True, project=project))
    tracking.check_tracking(TrackingConfig(wandb=True, project="me/mine"))


def test_entity_and_project(started, tmp_path):
    calls = started(FakeRun("offline", 0))
    cfg = config.TrainConfig(tracking=TrackingConfig(wandb=True, project="me/mine"))
    wandb_log.WandbLog(cfg, tmp_path, -1)
    assert (calls[0]["entity"], calls[0]["project"]) == ("me", "mine")


def test_tensorboard_forgets_the_steps_that_are_run_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config.TrainConfig(tracking=TrackingConfig(tensorboard=True))
    for first, value in ((0, 1.0), (3, 2.0)):  # killed after step 5, whose checkpoint was of step 3
        log = tracking.Tracker(cfg, tmp_path, first, main=True)
        for step in range(first + 1, 6):
            log.log(step, {"loss": value})
        log.close()
    events = EventAccumulator(str(tmp_path / tracking.TENSORBOARD_FOLDER)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_tensorboard_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sage-align\[tensorboard\]'"):
        tracking.check_tracking(TrackingConfig(tensorboard=True))


def test_rewind_says_how_far_the_log_went(tmp_path):
    file = Path(tmp_path, "metrics.jsonl")
    damaged = [b'{"step": 6', b'{"st\xffep": 1}', b"7", b'{"step": "x"}', b"\0" * 9, b"[" * 100_000]
    lines = [json.dumps({"step": step}).encode() for step in range(1, 6)]
    file.write_bytes(b"\n".join(lines + damaged))
    assert tracking.rewind(file, 3) == 5
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
