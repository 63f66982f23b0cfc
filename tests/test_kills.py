"""SIGKILL twenty times at random moments: build-pairs and eval end with the files of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_method
from whole_runs import files

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
    """The rank's job in a process of its own. Forked, since importing torch twenty times is most of the work."""
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
        "model=hf", f"model.path={tiny_model}", "model.dtype=float32", "generation.batch_size=2", "generation.chunk=2",
        "sampling.max_new_tokens=40", f"cache_dir={tmp_path}", *(w.format(problems=problem_file) for w in WORDS[command]),
    ]  # fmt: skip
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
