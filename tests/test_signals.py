"""A run ends as it is asked to, whatever it is doing, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from whole_runs import left_over

from sage.util import processes, stopping

# A rank without torch. It says what it got, and ends as `mode` asks.
RANK = """
import os, signal, subprocess, sys, time
from pathlib import Path
from sage.util import stopping

mode, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
if mode == "works":
    stopping.TOGETHER = 60.0  # on a busy machine the launcher may be slow to pass a signal on
time.sleep(0.2)  # as for imports: a signal that comes now must wait, and not get lost
stopping.install(folder, rank)
subprocess.Popen(["sleep", "1000"])  # a helper that nobody ends
if mode not in ("loads", "meets"):
    stopping.defer()
(folder / f"rank{rank}").write_text(str(os.getpid()))  # from here on signals come
if mode == "meets":  # as in gloo, which waits for another rank: no Python code runs meanwhile
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
    time.sleep(1000)
if mode in ("fails", "killed") and rank == 1:
    while not (folder / "rank0").exists():
        time.sleep(0.01)
if mode == "fails" and rank == 1:
    print("rank 1 has said why", file=sys.stderr)
    os._exit(3)
if mode == "killed" and rank == 1:
    os.kill(os.getpid(), 9)
if mode == "late" and rank == 0:
    os._exit(0)
for _ in range(1000):
    if stopping.asked() and mode != "stuck":
        (folder / f"saved{rank}").touch()
        time.sleep(0.2)
        stopping.leave("after its step 7")
    time.sleep(0.1)
"""


class Launcher:
    """`run_ranks` in a process of its own; with `job`, in a child of that process, as joblib runs jobs."""

    def __init__(self, mode: str, folder: Path, world_size: int = 2, wait: bool = True, job: bool = False):
        self.folder, self.output = folder, folder / "output"
        self.mark = f"SAGE_TEST={folder}"
        script = folder / "rank.py"
        script.write_text(RANK)
        if (pid := os.fork()) == 0:
            status = 99
            try:
                os.setsid()
                if job:
                    if os.fork():
                        time.sleep(1000)
                    stopping.stay_with_parent()
                os.dup2(os.open(self.output, os.O_CREAT | os.O_WRONLY, 0o600), 2)
                environment = {**os.environ, "SAGE_TEST": str(folder)}
                stopping.TOGETHER = 60.0 if mode == "works" else stopping.TOGETHER
                processes.GRACE = 1.0 if mode == "late" else 10.0
                command = [str(script), mode, str(folder)]
                status = processes.run_ranks(world_size, command, environment, "go on with `sage resume X`")
            finally:
                os._exit(status)
        self.pid = pid
        for rank in range(world_size if wait else 0):
            wait_until((folder / f"rank{rank}").exists)

    def signal(self, *signums: int, apart: float = 0.0) -> None:
        for signum in signums:
            os.kill(self.pid, signum)
            time.sleep(apart)

    def end(self) -> tuple[int, list[str]]:
        """The exit status and what was said, once nothing is left."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        wait_until(lambda: not left_over(self.mark))  # the kernel takes a moment
        return status, self.output.read_text().splitlines()


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_ends_the_ranks_in_good_order(signum, tmp_path):
    launcher = Launcher("works", tmp_path)
    launcher.signal(signum)
    status, said = launcher.end()
    name = signal.Signals(signum).name
    assert status == 128 + signum
    assert [(tmp_path / f"saved{rank}").exists() for rank in (0, 1)] == [True, True]
    assert said == [
        f"{name}: the run ends after this step; another signal ends it at once",
        f"{name} ended the run after its step 7: go on with `sage resume {tmp_path}`",
    ]


def test_signals_that_come_together_are_one(tmp_path):
    """Ctrl-C and Slurm signal every process, and the launcher passes on what it gets."""
    launcher = Launcher("works", tmp_path)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"rank{rank}").read_text()), signal.SIGTERM)
    launcher.signal(signal.SIGTERM, signal.SIGTERM)
    status, said = launcher.end()
    assert status == 143 and (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert len(said) == 2 and "after its step 7" in said[-1]


@pytest.mark.parametrize("own, status", [(0, 143), (signal.SIGINT, 130)])
def test_a_rank_that_got_no_signal_ends_with_the_one_that_did(own, status, monkeypatch):
    """A cluster may signal one machine and not, or not yet, the other."""
    from sage.training.run import Run  # here, because the other tests need no torch

    monkeypatch.setattr(stopping, "_arrivals", stopping.Arrivals())
    monkeypatch.setattr("sage.util.ranks.gather", lambda mine: [mine, signal.SIGTERM])
    if own:
        stopping.heard(own)
    run: Any = SimpleNamespace(save=lambda: None, tracker=SimpleNamespace(close=lambda: None))
    run.state = SimpleNamespace(step=7)
    with pytest.raises(stopping.Stopped, match="after its step 7"):
        Run.stop(run, "after its step")
    assert stopping.status() == status and stopping._arrivals.name == signal.Signals(status - 128).name


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path):
    launcher = Launcher("stuck", tmp_path)
    launcher.signal(signal.SIGINT, signal.SIGINT, apart=1.3)
    status, said = launcher.end()
    assert status == 130 and said[-1] == "ended at once: go on with `sage resume X`"


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path):
    """With one line, from one rank. There is nothing to save yet."""
    launcher = Launcher("loads", tmp_path)
    launcher.signal(signal.SIGTERM)
    assert launcher.end() == (143, [f"SIGTERM ended the run: go on with `sage resume {tmp_path}`"])


def test_a_signal_while_ranks_start_is_not_lost(tmp_path):
    launcher = Launcher("loads", tmp_path, world_size=1, wait=False)
    wait_until(lambda: bool(psutil.Process(launcher.pid).children()))
    launcher.signal(signal.SIGINT)
    assert launcher.end() == (130, [f"SIGINT ended the run: go on with `sage resume {tmp_path}`"])


def test_ctrl_c_while_python_imports_gives_no_traceback(tmp_path):
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "sage", "train"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "mode, expected, words",
    [
        ("fails", 3, "rank 1 has said why"),
        ("killed", 137, "error: rank 1 was killed by signal 9 (peak "),
        ("late", 0, "rank 1 did not end with the others, and is ended now"),
    ],
)
def test_ranks_end_with_each_other(mode, expected, words, tmp_path):
    """A rank that fails, is killed, or does not end: the others are ended, and one line says why."""
    status, said = Launcher(mode, tmp_path).end()
    assert status == expected and len(said) == 1 and said[0].startswith(words)


def test_a_killed_rank_that_was_large_was_probably_out_of_memory(capfd):
    process = type("Process", (), {"returncode": -9})()
    total = psutil.virtual_memory().total / 1e9
    assert processes.explain(processes.Rank(1, process, 0.9 * total), 1, "go on") == 137
    error = capfd.readouterr().err
    assert "probably out of memory" in error and "lower micro_batch_tokens" in error and "then go on" in error


def test_ranks_do_not_outlive_a_launcher_that_was_killed(tmp_path):
    """They save, too. Without a launcher nobody could stop them."""
    launcher = Launcher("works", tmp_path)
    launcher.signal(signal.SIGKILL)
    os.waitpid(launcher.pid, 0)
    wait_until(lambda: not left_over(launcher.mark))
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert "launcher of this run is gone" in launcher.output.read_text()


def test_ranks_that_wait_in_a_library_do_not_outlive_a_launcher_that_was_killed(tmp_path):
    launcher = Launcher("meets", tmp_path)
    launcher.signal(signal.SIGKILL)
    os.waitpid(launcher.pid, 0)
    wait_until(lambda: not left_over(launcher.mark))
    assert "launcher of this run is gone" in launcher.output.read_text()


def test_jobs_do_not_outlive_a_sweep_that_was_killed(tmp_path):
    """A job that a launcher such as joblib runs in another process would train on, unseen."""
    launcher = Launcher("works", tmp_path, job=True)
    launcher.signal(signal.SIGKILL)
    os.waitpid(launcher.pid, 0)
    wait_until(lambda: not left_over(launcher.mark))
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    wait_until(lambda: "SIGTERM ended the run after its step 7" in launcher.output.read_text())


def test_a_rank_of_torchrun_does_not_outlive_it(tmp_path):
    """torchrun does not handle SIGUSR1, so it dies of it, and leaves its ranks."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    mark = f"SAGE_TEST={tmp_path}"
    environment = {**os.environ, "SAGE_TEST": str(tmp_path), "RANK": "0", stopping.TORCHRUN: "1"}
    rank = [sys.executable, str(script), "works", str(tmp_path)]
    starter = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"
    with (tmp_path / "output").open("w") as output:
        torchrun = subprocess.Popen([sys.executable, "-c", starter, *rank], env=environment, stderr=output)
    wait_until((tmp_path / "rank0").exists)
    torchrun.send_signal(signal.SIGUSR1)
    assert torchrun.wait() == -signal.SIGUSR1
    wait_until(lambda: not left_over(mark))
    assert (tmp_path / "saved0").exists()
    assert "launcher of this run is gone" in (tmp_path / "output").read_text()
