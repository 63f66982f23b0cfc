"""Commands as a user runs them, in processes of their own; some are killed in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from forks import ENVIRONMENT

SAGE = str(Path(sys.executable).with_name("sage"))


def sage(*words: str) -> str:
    done = subprocess.run(
        [SAGE, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(run_dir: Path) -> dict[str, bytes]:
    """Every file of a finished run but its config, which names its own folder's cache, and its locks."""
    return {
        p.relative_to(run_dir).as_posix(): p.read_bytes()
        for p in run_dir.rglob("*")
        if p.is_file() and p.name != "config.yaml" and not p.name.startswith(".")
    }


def kill_after(folder: Path, command: list[str], chunks: int, signum: int = signal.SIGKILL) -> str:
    """Start, signal the whole process group once this many chunks are in `folder`, and return the errors."""
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(folder.glob("**/progress/chunk_*.jsonl"))) < chunks and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    return process.communicate()[1]


def left_over(mark: str) -> list[int]:
    """Live processes with NAME=VALUE in their environment, whatever their parent, group or session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            name, value = mark.split("=", 1)
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == value:
                found.append(process.pid)
    return found
