"""After signals, ten kills, or a full disk, a run ends with the files of an undisturbed one."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from forks import Forked, Started, be_command
from many_runs import column, execute, freeze
from whole_runs import SAGE, files, kill_often, present

NEW_USER, NEW_MOUNTS = 0x10000000, 0x20000  # CLONE_NEWUSER and CLONE_NEWNS of Linux
WORDS = {
    "build-pairs": [
        "data=gsm8k",
        "data.problems.path={problems}",
        "pairing.samples=2",
        "pairing.chosen=own_then_gold",
    ],
    "eval": ["benchmark.gsm8k.path={problems}", "samples=2", "sampling.temperature=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", WORDS)
def test_ten_kills(command, tiny_model, problem_file, tmp_path):
    overrides = [
        "model=hf",
        f"model.path={tiny_model}",
        "model.dtype=float32",
        "generation.batch_size=2",
        "generation.chunk=2",
        "sampling.max_new_tokens=12",
        f"cache_dir={tmp_path}",
        *(w.format(problems=problem_file) for w in WORDS[command]),
    ]
    whole, killed = kill_often(command, overrides, tmp_path, 10, (0.1, 0.8))
    for run_dir in killed:
        assert files(run_dir) == files(whole)


class Training:
    """`sage train` or `sage resume`, whose processes work in a folder of their own. If not `real`, they are
    forks.
    """

    def __init__(self, run_dir: Path, *words: str, real: bool = False):
        self.run_dir, self.place = run_dir, run_dir.with_name("place")
        self.place.mkdir(exist_ok=True)
        self.process = Started(be_real if real else be_forked, self.place, words)

    def steps(self) -> int:
        log = self.run_dir / "metrics.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def has_ranks(self) -> bool:
        with suppress(psutil.NoSuchProcess):  # the checks have children, too, which end soon
            children = psutil.Process(self.process.pid).children()
            return any("sage.worker" in child.cmdline() for child in children)
        return False

    def signal_when(self, signum: int, true: Callable[[], bool]) -> list[str]:
        """Send the signal once it is time, and return the lines that name `sage resume`."""
        while not true():
            assert self.process.poll() is None, self.process.end()
            time.sleep(0.01)
        os.kill(self.process.pid, signum)
        status, output = self.end()
        assert status == 128 + signum and "Traceback" not in output, output
        return [line for line in output.splitlines() if "sage resume" in line]

    def end(self) -> tuple[int, str]:
        status, output = self.process.end()
        deadline = time.monotonic() + 60.0
        while present(self.place):  # the kernel takes a moment
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return status, output


def be_real(place: Path, words: Sequence[str]) -> None:
    os.chdir(place)
    os.execv(SAGE, [SAGE, *words])


def be_forked(place: Path, words: Sequence[str]) -> None:
    os.chdir(place)
    be_command(words, ranks=2)


def training(ranks: int, model: Path, pairs: Path, cache: Path) -> list[str]:
    """Forty steps, without a checkpoint until a signal comes."""
    return [
        *("model=hf", f"model.path={model}", "model.dtype=float32", f"cache_dir={cache}"),
        *(f"data.path={pairs}", "data.max_length=130", "steps=40", "batch_size=4", "save_every=0"),
        *("+baseline=dpo", "optimizer.lr=1e-3", f"world_size={ranks}", f"engine=zero{2 * (ranks - 1)}"),
    ]


def check_stopped(run: Training, name: str, said: list[str]) -> None:
    """The one line names the step, and the checkpoint is of that step."""
    step, run_dir = run.steps(), run.run_dir
    assert step < 40
    assert said == [f"{name} ended the run after its step {step}: go on with `sage resume {run_dir}`"]
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == [f"step_{step}"]


def check_equal(run_dir: Path, whole: Path) -> None:
    assert len(column(whole, "loss")) == 40 and column(run_dir, "loss") == column(whole, "loss")
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run_dir, whole)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_sigterm_with_two_ranks_loses_no_step(tiny_model, pair_file, tmp_path):
    words = training(2, tiny_model, pair_file, tmp_path)
    whole, stopped = freeze(tmp_path / "whole", *words), tmp_path / "stopped"
    run = Training(stopped, "train", *words, f"hydra.run.dir={stopped}")
    check_stopped(run, "SIGTERM", run.signal_when(signal.SIGTERM, lambda: run.steps() > 1))
    status, output = Training(stopped, "resume", str(stopped)).end()
    assert status == 0, output
    execute(2, [whole])
    check_equal(stopped, whole)


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_and_in_the_middle_loses_no_step(tiny_model, pair_file, tmp_path):
    words = training(1, tiny_model, pair_file, tmp_path)
    whole, stopped = freeze(tmp_path / "whole", *words), tmp_path / "stopped"
    run = Training(stopped, "train", *words, f"hydra.run.dir={stopped}", real=True)
    said = run.signal_when(signal.SIGINT, run.has_ranks)
    assert said == [f"SIGINT ended the run: go on with `sage resume {stopped}`"]
    assert not (stopped / "checkpoints").exists()
    run = Training(stopped, "resume", str(stopped))
    check_stopped(run, "SIGINT", run.signal_when(signal.SIGINT, lambda: run.steps() > 1))
    execute(1, [whole, stopped])  # as `sage resume` does, in one process
    check_equal(stopped, whole)


def be_torture(folder: Path) -> None:
    import torture

    sys.argv = ["torture.py", str(folder), "--short"]
    torture.main()


@pytest.mark.slow
def test_a_short_torture(tmp_path):
    """Ten trials of `make torture`, over the commands and what disturbs them."""
    status, said = Started(be_torture, tmp_path).end(seconds=900.0)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    lost = [trial for trial in trials if trial["lost"]]
    assert not lost, "\n".join(str(part) for trial in lost for part in (trial, *trial["said"]))
    assert status == 0 and len(trials) == 10, said
    assert sum(trial["times"] for trial in trials) >= 5  # a run that was quick may have ended before


NO_DISK = 77  # exit status


def fill_a_disk(folder: Path, size: str, words: list[str]) -> None:
    """Run a command on a file system that is too small, and resume it on a larger one, which no other process
    sees. A copy of the run stays.
    """
    disk, user, group = folder / "disk", os.getuid(), os.getgid()
    disk.mkdir()
    if ctypes.CDLL(None).unshare(NEW_USER | NEW_MOUNTS):
        sys.exit(NO_DISK)
    for name, value in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(value)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
        sys.exit(NO_DISK)
    run_dir = disk / "run"
    print("status", Forked(partial(be_command, [*words, f"hydra.run.dir={run_dir}"], 1)).wait(), flush=True)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert Forked(partial(be_command, ["resume", str(run_dir)], 1)).wait() == 0
    shutil.copytree(run_dir, folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("command, size", [("build-pairs", "40k"), ("train", "300k")])
def test_a_full_disk_loses_nothing(command, size, tiny_model, problem_file, pair_file, tmp_path):
    """A real file system that is too small: one message, exit status 2; with more room the run goes on,
    exactly.
    """
    words = ["model=hf", f"model.path={tiny_model}", "model.dtype=float32", f"cache_dir={tmp_path}"]
    if command == "train":
        words += [f"data.path={pair_file}", "data.max_length=130", "steps=4", "batch_size=4", "save_every=2"]
        words += ["+baseline=dpo"]
    else:
        words += ["generation.batch_size=2", "generation.chunk=2", "sampling.max_new_tokens=40"]
        words += [word.format(problems=problem_file) for word in WORDS[command]]
    status, said = Started(fill_a_disk, tmp_path, size, [command, *words]).end()
    if status == NO_DISK:
        pytest.skip(f"no file system of our own can be mounted here: {said.strip()}")
    assert status == 0 and "status 2" in said, said
    (message,) = [line for line in said.splitlines() if "error" in line]
    assert "is full" in message and "sage resume" in message and "Traceback" not in said
    execute(1, [freeze(tmp_path / "whole", *words, command=command)])
    whole, resumed = (files(tmp_path / name) for name in ("whole", "run"))
    if command == "train":
        assert resumed["final/model.safetensors"] == whole["final/model.safetensors"]
    else:
        assert resumed == whole
