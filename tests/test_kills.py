"""After twenty kills, or a full disk, a run ends with the files of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_method
from many_runs import ENVIRONMENT, freeze
from whole_runs import SAGE, files

from sage import config
from sage.worker import JOBS

WORDS = {
    "build-pairs": [
        "data=gsm8k",
        "data.problems.path={problems}",
        "pairing.samples=2",
        "pairing.chosen=own_then_gold",
    ],
    "eval": ["benchmark.gsm8k.path={problems}", "samples=2", "sampling.temperature=1"],
}


def start(command: str, run_dir: Path) -> int:
    """The rank's job in a process of its own, forked because importing torch takes most of the time."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            get_method(JOBS[command])(run_dir)
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.mark.slow
@pytest.mark.parametrize("command", WORDS)
def test_twenty_kills(command, tiny_model, problem_file, tmp_path):
    overrides = [
        "model=hf",
        f"model.path={tiny_model}",
        "model.dtype=float32",
        "generation.batch_size=2",
        "generation.chunk=2",
        "sampling.max_new_tokens=40",
        f"cache_dir={tmp_path}",
        *(w.format(problems=problem_file) for w in WORDS[command]),
    ]
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose(command.replace("-", "_"), overrides))
    get_method(JOBS[command])  # imports before the fork

    def new_run(name: str) -> Path:
        config.freeze(cfg, tmp_path / name)
        return tmp_path / name

    began = time.monotonic()
    assert os.waitpid(start(command, new_run("whole")), 0)[1] == 0
    whole, seconds = files(tmp_path / "whole"), time.monotonic() - began
    rng, kills, run = random.Random(0), 0, 0
    while kills < 20:
        run_dir, status = new_run(f"killed_{run}"), None
        while status != 0:
            pid = start(command, run_dir)
            if kills < 20:
                time.sleep(rng.uniform(0.1, 0.6) * seconds)
                os.killpg(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            assert status in (0, signal.SIGKILL)
            kills += status == signal.SIGKILL
        assert files(run_dir) == whole
        run += 1


FULL = """
mount -t tmpfs -o size={size} tmpfs {disk} || exit 77
{sage} {command} hydra.run.dir={disk}/run
echo status $?
mount -o remount,size=64m {disk}
{sage} resume {disk}/run && cp -r {disk}/run {out}
"""


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
    (tmp_path / "disk").mkdir()
    script = FULL.format(
        size=size,
        disk=tmp_path / "disk",
        out=tmp_path / "run",
        sage=SAGE,
        command=" ".join([command, *words]),
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode in (1, 77) and "status" not in done.stdout:
        pytest.skip(f"no file system of our own can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0 and "status 2" in done.stdout, done.stdout + done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "is full" in message and "sage resume" in message and "Traceback" not in done.stderr
    get_method(JOBS[command])(freeze(tmp_path / "whole", *words, command=command))
    whole, resumed = (files(tmp_path / name) for name in ("whole", "run"))
    if command == "train":
        assert resumed["final/model.safetensors"] == whole["final/model.safetensors"]
    else:
        assert resumed == whole
