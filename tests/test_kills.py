"""After signals, ten kills, or a full disk, a run ends with the files of an undisturbed one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from forks import ENVIRONMENT, kill_often
from hydra import compose, initialize_config_module
from hydra.utils import get_method
from many_runs import column, execute, freeze
from whole_runs import SAGE, files, left_over

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


@pytest.mark.slow
@pytest.mark.parametrize("command", WORDS)
def test_ten_kills(command, tiny_model, problem_file, tmp_path):
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

    def new_run(name: str) -> Path:
        config.freeze(cfg, tmp_path / name)
        return tmp_path / name

    whole, killed = kill_often(get_method(JOBS[command]), new_run, 10, (0.1, 0.8))
    for run_dir in killed:
        assert files(run_dir) == files(whole)


class Training:
    """`sage train` or `sage resume` in processes of its own, which a variable marks."""

    def __init__(self, run_dir: Path, *words: str):
        self.run_dir, self.mark = run_dir, str(run_dir)
        self.process = subprocess.Popen(
            [SAGE, *words],
            env={**ENVIRONMENT, "SAGE_TEST": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

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
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)
        self.process.send_signal(signum)
        status, output = self.end()
        assert status == 128 + signum and "Traceback" not in output, output
        return [line for line in output.splitlines() if "sage resume" in line]

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=300)
        deadline = time.monotonic() + 60.0
        while left_over(f"SAGE_TEST={self.mark}"):  # the kernel takes a moment
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.process.returncode, output


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
    run = Training(stopped, "train", *words, f"hydra.run.dir={stopped}")
    said = run.signal_when(signal.SIGINT, run.has_ranks)
    assert said == [f"SIGINT ended the run: go on with `sage resume {stopped}`"]
    assert not (stopped / "checkpoints").exists()
    run = Training(stopped, "resume", str(stopped))
    check_stopped(run, "SIGINT", run.signal_when(signal.SIGINT, lambda: run.steps() > 1))
    execute(1, [whole, stopped])  # as `sage resume` does, in one process
    check_equal(stopped, whole)


@pytest.mark.slow
def test_a_short_torture(tmp_path):
    """Ten trials of `make torture`, over the commands and what disturbs them."""
    command = [sys.executable, str(Path(__file__).with_name("torture.py")), str(tmp_path), "--short"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    lost = [trial for trial in trials if trial["lost"]]
    assert not lost, "\n".join(str(part) for trial in lost for part in (trial, *trial["said"]))
    assert done.returncode == 0 and len(trials) == 10, done.stdout + done.stderr
    assert sum(trial["times"] for trial in trials) >= 5  # a run that was quick may have ended before


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
