"""Kill runs at random moments, damage their files, fill their disks, and compare what comes out.

    python tests/torture.py FOLDER [--trials N] [--seed N] [--short] [--table]

Each trial starts the same command line again until it ends: what it leaves must be what an undisturbed run
leaves, byte for byte, and no process may be left. Finished trials are kept in FOLDER/trials.jsonl, so the
suite itself can be killed and started again. --table prints the table of docs/reliability.md. --short is for
CI: ten trials, each disturbed once, whose processes are forked from this one because importing torch takes
most of the time of a tiny run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import conftest
import psutil
from hydra.utils import get_method
from many_runs import ENVIRONMENT, column
from whole_runs import SAGE, files, left_over

from sage import cli, worker
from sage.util import processes

TRAIN = ["train", "data.path={pairs}", "data.max_length=130", "micro_batch_tokens=260", "save_every=2"]
TRAIN += ["steps=12", "batch_size=6", "optimizer.lr=1e-3", "engine={engine}", "world_size={ranks}"]
SAMPLES = [
    "generation.batch_size=2",
    "generation.chunk=2",
    "sampling.max_new_tokens=40",
    "world_size={ranks}",
]
COMMANDS = {
    "build-pairs": ["build-pairs", "data=gsm8k", "data.problems.path={problems}", "pairing.samples=2"],
    "eval": ["eval", "benchmark.gsm8k.path={problems}", "samples=2", "sampling.temperature=1"],
    "score-dataset": ["score-dataset", "data.path={pairs}", "data.max_length=130", "micro_batch_tokens=260"],
}
COMMANDS["build-pairs"] += ["pairing.chosen=own_then_gold", *SAMPLES]
COMMANDS["eval"] += SAMPLES
COMMANDS["score-dataset"] += ["shard_pairs=4", "world_size={ranks}"]
# What runs: command, engine, ranks.
RUNS = [
    ("train", "zero0", 1),
    ("train", "zero2", 2),
    ("train", "zero3", 2),
    ("train", "zero2", 1),
    ("build-pairs", "zero0", 1),
    ("score-dataset", "zero0", 2),
    ("eval", "zero0", 2),
    ("build-pairs", "zero0", 2),
]
SITUATIONS = ["SIGKILL of everything", "SIGKILL of a rank", "SIGKILL of the launcher", "SIGTERM", "SIGINT"]
FLIPS = ["a byte flipped in the newest checkpoint", "a byte flipped in a cache"]  # of training runs
# What is tried: a run and a situation.
LONG = [
    (run, situations[turn % len(situations)])
    for turn in range(7)
    for run in RUNS
    for situations in [SITUATIONS + (FLIPS if run[0] == "train" else [])]
]
SHORT = [
    (("train", "zero2", 2), "SIGKILL of a rank"),
    (("train", "zero0", 1), "SIGTERM"),
    (("build-pairs", "zero0", 1), "SIGKILL of everything"),
    (("score-dataset", "zero0", 2), "SIGKILL of the launcher"),
    (("eval", "zero0", 2), "SIGTERM"),
    (("train", "zero2", 2), "SIGKILL of the launcher"),
    (("train", "zero0", 1), "a byte flipped in the newest checkpoint"),
    (("build-pairs", "zero0", 1), "SIGINT"),
    (("score-dataset", "zero0", 2), "SIGKILL of a rank"),
    (("train", "zero0", 1), "a byte flipped in a cache"),
]
MARK = "SAGE_TORTURE"  # environment variable: the folder of the trial
TIMELESS = ("seconds", "pairs_per_second", "peak_memory_gb")


class Forked:
    """A forked process that does `job`, and otherwise is as `Popen` would start it."""

    returncode: int | None = None

    def __init__(self, job: Callable[[], object], env: Mapping[str, str], keep: Sequence[int] = ()):
        self.pid = os.fork()
        if self.pid:
            return
        status: object = 1
        try:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            for number in os.listdir("/proc/self/fd"):  # as `exec` would
                if int(number) > 2 and int(number) not in keep:
                    with contextlib.suppress(OSError):
                        os.close(int(number))
            job()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status if isinstance(status, int) else 1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.02)


class ForkedCommand(Forked):
    """A command line, and its ranks, in forked processes that work in `place`."""

    def __init__(self, words: list[str], env: Mapping[str, str], place: Path):
        self.output = place / "output"
        self.words, self.place = words, place
        super().__init__(self.command, env)

    def command(self) -> None:
        os.chdir(self.place)
        output = os.open(self.output, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        processes.subprocess = type("Module", (), {"Popen": forked_rank})  # pyright: ignore
        sys.argv = ["sage", *self.words]
        cli.main()

    def communicate(self, timeout: float = 0.0) -> tuple[str, None]:
        self.wait()
        wait_until_gone(self.place)
        return self.output.read_text(), None


def forked_rank(
    command: list[str], env: Mapping[str, str], start_new_session: bool, pass_fds: Sequence[int]
) -> Forked:
    """What `sage.util.processes` starts with `Popen`."""
    module, *words = command[2:]  # after `python -m`
    assert start_new_session and module == "sage.worker"

    def job() -> None:
        sys.argv = [module, *words]
        worker.main()

    return Forked(job, env, pass_fds)


class Suite:
    def __init__(self, folder: Path, seed: int, short: bool = False):
        self.folder, self.seed, self.short = folder, seed, short
        self.plan = SHORT if short else LONG
        self.times = 1 if short else 2  # that a run is disturbed
        # When, as a share of an undisturbed run. Imports, which a forked one lacks, are a third of a run.
        self.moments = (0.2, 0.8) if short else (0.3, 1.0)
        if short:
            for job in worker.JOBS.values():  # imports before the fork
                get_method(job)
        self.model = folder / "model" / "tiny"
        self.pairs, self.problems = folder / "pairs" / "pairs.jsonl", folder / "problems" / "problems.jsonl"
        if not self.problems.exists():
            place = type("Places", (), {"mktemp": lambda _, name: make(folder / name)})()
            for fixture in (conftest.tiny_model, conftest.pair_file, conftest.problem_file):
                fixture._get_wrapped_function()(place)
        self.kept = folder / "trials.jsonl"

    def words(self, run: tuple[str, str, int], run_dir: Path, cache: Path) -> list[str]:
        command, engine, ranks = run
        words = TRAIN if command == "train" else COMMANDS[command]
        values = {"pairs": self.pairs, "problems": self.problems, "engine": engine, "ranks": ranks}
        return [
            *(word.format(**values) for word in words),
            *("model=hf", f"model.path={self.model}", "model.dtype=float32", f"cache_dir={cache}"),
            *("resume=auto", f"hydra.run.dir={run_dir}"),
        ]

    def start(self, words: list[str], place: Path) -> subprocess.Popen[str] | ForkedCommand:
        environment = {**ENVIRONMENT, MARK: str(make(place))}
        if self.short:
            return ForkedCommand(words, environment, place)
        return subprocess.Popen(
            [SAGE, *words],
            env=environment,
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def undisturbed(self, run: tuple[str, str, int]) -> tuple[dict[str, Any], float]:
        """What the run leaves, and how long it takes."""
        run_dir = self.folder / "undisturbed" / "_".join(map(str, run))
        seconds = run_dir.with_suffix(".seconds")
        if not seconds.exists():
            began = time.monotonic()
            process = self.start(self.words(run, run_dir, self.folder / "cache"), run_dir.parent)
            output, _ = process.communicate()
            assert process.returncode == 0, output
            seconds.write_text(str(time.monotonic() - began))
        return outcome(run, run_dir), float(seconds.read_text())

    def trial(self, number: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{number}")
        run, situation = self.plan[number % len(self.plan)]
        expected, seconds = self.undisturbed(run)
        folder = self.folder / "trials" / str(number)
        run_dir, cache = folder / "run", folder / "cache"
        result: dict[str, Any] = {"trial": number, "run": run, "situation": situation, "kills": 0, "flips": 0}
        result |= {"lost": "", "said": []}
        for attempt in range(5):
            process = self.start(self.words(run, run_dir, cache), folder)
            if attempt < self.times:
                time.sleep(rng.uniform(*self.moments) * seconds)
                while situation == FLIPS[0] and process.poll() is None and not checkpoints(run_dir):
                    time.sleep(0.01)
                if process.poll() is None:
                    result["kills"] += disturb(situation, process.pid, folder, rng)
            output, _ = process.communicate(timeout=600)
            wait_until_gone(folder)
            if "Traceback" in output:
                result["lost"] = "a traceback"
                result["said"].append(output[-3000:])
            if process.returncode == 0:
                break
            if situation in FLIPS and attempt < self.times:
                result["flips"] += flip(situation, run_dir, cache, rng)
            result["said"] += output.splitlines()[-1:]
        if process.returncode != 0:
            result["lost"] = result["lost"] or f"status {process.returncode}"
        elif not result["lost"] and (found := outcome(run, run_dir)) != expected:
            differing = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
            result["lost"] = f"differs: {', '.join(differing[:3])}"
        return result


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def outcome(run: tuple[str, str, int], run_dir: Path) -> dict[str, Any]:
    """What a run is for: of training the losses and the policy, of other commands every file."""
    if run[0] == "train":
        weights = (run_dir / "final" / "model.safetensors").read_bytes()
        return {"loss": column(run_dir, "loss"), "final": weights}
    found: dict[str, Any] = {
        name: content.replace(str(run_dir).encode(), b"RUN") for name, content in files(run_dir).items()
    }
    if "summary.json" in found:
        summary = json.loads(found["summary.json"])
        found["summary.json"] = {name: value for name, value in summary.items() if name not in TIMELESS}
    return found


def present(place: Path) -> list[int]:
    """Live processes of a trial, by the environment that they were started with, or by where they work."""
    found = set(left_over(f"{MARK}={place}"))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(place):
                found.add(process.pid)
    return sorted(found)


def disturb(situation: str, launcher: int, place: Path, rng: random.Random) -> bool:
    """Do what the situation says, and return whether a live process got a signal.

    A flip begins with the kill of everything.
    """
    ranks = [child.pid for child in psutil.Process(launcher).children()]
    targets, signum = {
        "SIGKILL of a rank": (ranks and [rng.choice(ranks)], signal.SIGKILL),
        "SIGKILL of the launcher": ([launcher], signal.SIGKILL),
        "SIGTERM": ([launcher], signal.SIGTERM),
        "SIGINT": ([launcher], signal.SIGINT),
    }.get(situation, (present(place), signal.SIGKILL))
    alive = False
    for pid in targets or [launcher]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            alive |= psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            os.kill(pid, signum)
    return alive


def flip(situation: str, run_dir: Path, cache: Path, rng: random.Random) -> bool:
    """Flip a bit of a random file of the newest checkpoint, or of the cache, if there is one."""
    folder = cache
    if "checkpoint" in situation:
        saved = checkpoints(run_dir)
        folder = saved[-1] if saved else run_dir / "checkpoints"
    found = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size and f.suffix != ".lock")
    if found:
        file = rng.choice(found)
        place = rng.randrange(file.stat().st_size)
        with file.open("r+b") as content:
            content.seek(place)
            (byte,) = content.read(1)
            content.seek(place)
            content.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return bool(found)


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*[0-9]"), key=lambda p: int(p.name[5:]))


def wait_until_gone(place: Path, seconds: float = 120.0) -> None:
    """Ranks whose launcher was killed may end their step, and then no process may be left."""
    deadline = time.monotonic() + seconds
    while left := present(place):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.2)


def table(trials: list[dict[str, Any]]) -> str:
    """The trials by situation, as Markdown."""
    lines = ["| situation | runs | times | equal to the undisturbed run | lost |", "|---|---|---|---|---|"]
    for situation in SITUATIONS + FLIPS:
        here = [t for t in trials if t["situation"] == situation]
        kind = "flips" if situation in FLIPS else "kills"
        lost = Counter(t["lost"] for t in here if t["lost"])
        equal = sum(not t["lost"] for t in here)
        words = "; ".join(f"{n} x {what}" for what, n in lost.items()) or "nothing"
        lines.append(f"| {situation} | {len(here)} | {sum(t[kind] for t in here)} | {equal} | {words} |")
    return "\n".join(lines)


def main(write: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, help="default: 56, with --short 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    make(arguments.folder)
    suite = Suite(arguments.folder.resolve(), arguments.seed, arguments.short)
    done = [json.loads(line) for line in suite.kept.read_text().splitlines()] if suite.kept.exists() else []
    if not arguments.table:
        for number in range(len(done), arguments.trials or len(suite.plan)):
            result = suite.trial(number)
            with suite.kept.open("a") as kept:
                kept.write(json.dumps(result) + "\n")
            done.append(result)
            write(f"{number}: {result['run']}, {result['situation']}: {result['lost'] or 'equal'}")
    write(table(done))
    sys.exit(any(trial["lost"] for trial in done))


if __name__ == "__main__":
    main()
