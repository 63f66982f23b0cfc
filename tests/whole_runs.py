"""Commands as a user runs them, but in forks; some are killed in the middle."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import psutil
from forks import Forked, command, on_ranks
from hydra.utils import get_method
from many_runs import freeze

from sage import config
from sage.commands.rounds import rounds
from sage.worker import JOBS

SAGE = str(Path(sys.executable).with_name("sage"))


def sage(*words: str, ranks: int = 2) -> str:
    status, said = command(*words, ranks=ranks).end()
    assert status == 0, said
    return said


def kill_often(
    command: str, overrides: list[str], folder: Path, kills: int, share: tuple[float, float]
) -> tuple[Path, list[Path]]:
    """Do a frozen run once undisturbed, and then in runs that are killed and started again.

    Args:
        kills: how many, in all.
        share: a kill comes after between these shares of the undisturbed run's time.

    Returns:
        The folder of the undisturbed run, and those of the others.
    """
    return on_ranks(1, be_killer, command, overrides, folder, kills, share, seconds=600.0 + 120.0 * kills)[0]


def be_killer(
    command: str, overrides: list[str], folder: Path, kills: int, share: tuple[float, float]
) -> tuple[Path, list[Path]]:
    job = partial(rounds, start=in_this_process) if command == "rounds" else get_method(JOBS[command])
    whole = freeze(folder / "whole", *overrides, command=command)
    began = time.monotonic()
    assert Forked(partial(job, whole)).wait() == 0
    seconds, rng, done, runs = time.monotonic() - began, random.Random(0), 0, []
    while done < kills:
        runs.append(freeze(folder / f"killed_{len(runs)}", *overrides, command=command))
        status = None
        while status != 0:
            process = Forked(partial(job, runs[-1]))
            if done < kills:
                time.sleep(rng.uniform(*share) * seconds)
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            assert status in (0, -signal.SIGKILL)
            done += status == -signal.SIGKILL
    return whole, runs


def in_this_process(world_size: int, folder: Path) -> None:
    """Do a part of rounds, which `sage` does in ranks."""
    get_method(JOBS[config.load(folder).command])(folder)


def files(run_dir: Path) -> dict[str, bytes]:
    """Every file of a finished run but its config, which names its own folder's cache, and its locks."""
    return {
        p.relative_to(run_dir).as_posix(): p.read_bytes()
        for p in run_dir.rglob("*")
        if p.is_file() and p.name != "config.yaml" and not p.name.startswith(".")
    }


def kill_after(folder: Path, words: list[str], chunks: int, signum: int = signal.SIGKILL) -> str:
    """Start, signal the process group once this many chunks are in `folder`, and return what it said."""
    started = command(*words)
    while len(list(folder.glob("**/progress/chunk_*.jsonl"))) < chunks and started.poll() is None:
        time.sleep(0.01)
    os.killpg(started.pid, signum)
    return started.end()[1]


def left_over(mark: str) -> list[int]:
    """Live processes with NAME=VALUE in their environment, whatever their parent, group or session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            name, value = mark.split("=", 1)
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == value:
                found.append(process.pid)
    return found


def present(place: Path) -> list[int]:
    """Live processes that work in a folder, whatever their parent, group or session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(place):
                found.append(process.pid)
    return found
