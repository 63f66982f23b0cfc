"""Kill runs at random moments, damage their files, fill their disks, and compare what comes out.

    python tests/torture.py FOLDER [--trials N] [--seed N] [--short] [--table]

Each trial starts the same command line again until it ends: what it leaves must be what an undisturbed run
leaves, byte for byte, and no process may be left. Finished trials are kept in FOLDER/trials.jsonl, so the
suite itself can be killed and started again. --table prints the table of docs/reliability.md. --short is for
CI: ten trials, each disturbed once. All processes are forked from this one, because importing torch takes
most of the time of a tiny run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import psutil
from forks import ENVIRONMENT, ForkedCommand
from hydra.utils import get_method
from many_runs import column
from whole_runs import files, present

from sage import worker

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
# Situation -> the exit statuses that it may lead to. Each run may also have ended before.
KILLS = {
    "SIGKILL of everything": [-signal.SIGKILL],
    "SIGKILL of a rank": [128 + signal.SIGKILL],
    "SIGKILL of the launcher": [-signal.SIGKILL],
    "SIGTERM": [128 + signal.SIGTERM],
    "SIGINT": [128 + signal.SIGINT],
}
# A flip comes after the kill of everything, or after the end of a run from which its results are taken.
FLIPS = SAVED, CACHED = "a bit flipped in saved progress", "a bit flipped in the cache"
FULL = "the disk fills"
SITUATIONS = {**KILLS, SAVED: [-signal.SIGKILL], CACHED: [-signal.SIGKILL], FULL: [2]}
# What is tried: a run and a situation. Commands that sample keep nothing in the cache.
LONG = [
    (run, situation)
    for turn in range(len(SITUATIONS))
    for place, run in enumerate(RUNS)
    for situation in [[*SITUATIONS][(turn + place) % len(SITUATIONS)]]
    if situation != CACHED or run[0] in ("train", "score-dataset")
]
SHORT = [
    (("train", "zero2", 2), "SIGKILL of a rank"),
    (("train", "zero0", 1), "SIGTERM"),
    (("build-pairs", "zero0", 1), "SIGKILL of everything"),
    (("score-dataset", "zero0", 2), "SIGKILL of the launcher"),
    (("eval", "zero0", 2), "SIGTERM"),
    (("train", "zero2", 2), "SIGKILL of the launcher"),
    (("train", "zero0", 1), SAVED),
    (("build-pairs", "zero0", 1), "SIGINT"),
    (("score-dataset", "zero0", 2), "SIGKILL of a rank"),
    (("train", "zero0", 1), CACHED),
]
OWN_MOUNTS = "SAGE_TORTURE_MOUNTS"  # environment variable: this process sees file systems that no other does
TIMELESS = ("seconds", "pairs_per_second", "peak_memory_gb")
# Where each command keeps what it has done so far.
PROGRESS = ("checkpoints/step_*[0-9]", "**/progress", "forward")
RESULTS = ("final", "summary.json")  # what ends a run
MOMENTS = (0.1, 0.9)  # when a run is disturbed, as shares of an undisturbed one's time
LIMIT = 300.0  # seconds for one run on a busy machine
PATIENCE = 60.0  # seconds for ranks that outlive their launcher, which may end their step


class Suite:
    def __init__(self, folder: Path, seed: int, short: bool = False):
        self.folder, self.seed = folder, seed
        self.plan = SHORT if short else LONG
        self.times = 1 if short else 2  # that a run is disturbed
        self.model = folder / "model" / "tiny"
        self.pairs, self.problems = folder / "pairs" / "pairs.jsonl", folder / "problems" / "problems.jsonl"
        if not self.problems.exists():
            place = type("Places", (), {"mktemp": lambda _, name: make(folder / name)})()
            for fixture in (conftest.tiny_model, conftest.pair_file, conftest.problem_file):
                fixture._get_wrapped_function()(place)
        for job in worker.JOBS.values():  # imports before the fork
            get_method(job)
        assert threading.active_count() == 1
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

    def start(self, run: tuple[str, str, int], run_dir: Path, cache: Path, place: Path) -> ForkedCommand:
        words = self.words(run, run_dir, cache)
        return ForkedCommand(words, ENVIRONMENT, make(place), place / "output", ranks=run[2])

    def undisturbed(self, run: tuple[str, str, int]) -> tuple[dict[str, Any], float]:
        """What the run leaves, and how long it takes."""
        run_dir = self.folder / "undisturbed" / "_".join(map(str, run))
        seconds = run_dir.with_suffix(".seconds")
        if not seconds.exists():
            began = time.monotonic()
            process = self.start(run, run_dir, self.folder / "cache", run_dir.parent)
            left = wait_until_gone(process, run_dir.parent)
            assert process.returncode == 0 and not left, (run_dir.parent / "output").read_text()
            seconds.write_text(str(time.monotonic() - began))
        return outcome(run, run_dir), float(seconds.read_text())

    def trial(self, number: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{number}")
        run, situation = self.plan[number % len(self.plan)]
        expected, seconds = self.undisturbed(run)
        folder, flips = make(self.folder / "trials" / str(number)), situation in FLIPS
        result: dict[str, Any] = {"trial": number, "run": run, "situation": situation, "times": 0}
        result |= {"lost": "", "said": []}
        with small_disk(folder / "disk") if situation == FULL else contextlib.nullcontext(folder) as room:
            if room is None:
                return result | {"skipped": "no file system can be mounted here"}
            run_dir, cache = room / "run", room / "cache"
            for attempt in range(self.times + 1):
                process = self.start(run, run_dir, cache, folder)
                if attempt < self.times:
                    time.sleep(rng.uniform(*MOMENTS) * seconds)
                    while flips and process.poll() is None and not flippable(situation, run_dir, cache):
                        time.sleep(0.01)
                    result["times"] += disturb(situation, process, folder, rng)
                left = wait_until_gone(process, folder)
                if flips and attempt < self.times:
                    result["times"] += flip(situation, run_dir, cache, rng)
                (room / "filler").unlink(missing_ok=True)
                output = (folder / "output").read_text(errors="replace")
                if "Traceback" in output or left:
                    result["lost"] = f"processes were left: {', '.join(left)}" if left else "a traceback"
                    result["said"].append(output[-20_000:])
                    break
                result["said"] += output.splitlines()[-1:]
                if process.returncode not in (0, *(SITUATIONS[situation] if attempt < self.times else [])):
                    result["lost"] = f"status {process.returncode}"
                    break
                if process.returncode == 0 and not flips:
                    break
            if not result["lost"] and (found := outcome(run, run_dir)) != expected:
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
        # score-dataset removes its progress after that, so a kill in between leaves some, which nobody reads.
        found = {name: content for name, content in found.items() if not name.startswith("forward/")}
    return found


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 64 MB at `folder`; None where it cannot be mounted."""
    make(folder)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if OWN_MOUNTS not in os.environ or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def handles_signals(pid: int) -> bool:
    """Whether a process has begun to handle SIGTERM. Before that a signal ends it as any other program."""
    with contextlib.suppress(OSError):
        (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def disturb(situation: str, process: ForkedCommand, place: Path, rng: random.Random) -> bool:
    """Do what the situation says, and return whether a live process got a signal, or the disk is full."""
    while process.poll() is None and not handles_signals(process.pid):
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    if situation == FULL:
        with contextlib.suppress(OSError), (place / "disk" / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 16)):
                pass
        return True
    launcher, signum, targets = process.pid, signal.SIGKILL, []
    if situation in ("SIGTERM", "SIGINT"):
        signum = signal.Signals[situation]
    elif situation == "SIGKILL of a rank":
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = [child.pid for child in psutil.Process(launcher).children()]
            targets = [rng.choice(ranks)] if ranks else []
    elif situation != "SIGKILL of the launcher":
        targets = present(place)
    alive = False
    for pid in targets or [launcher]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            alive |= psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            os.kill(pid, signum)
    return alive and situation in KILLS


def flippable(situation: str, run_dir: Path, cache: Path) -> list[Path]:
    """The files of which the situation flips a bit: those of the newest progress, or of the cache."""
    folders = [cache]
    with contextlib.suppress(OSError):  # a live run removes files
        if situation == SAVED:
            folders = [folder for pattern in PROGRESS for folder in run_dir.glob(pattern)]
            folders = sorted(folders, key=lambda folder: folder.stat().st_mtime)[-1:]
        found = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
        return [f for f in found if f.stat().st_size and not f.name.endswith((".lock", ".tmp"))]
    return []


def flip(situation: str, run_dir: Path, cache: Path, rng: random.Random) -> bool:
    """Flip a bit of a random file of a run that has ended, and return whether there was one.

    A run that had the time to finish loses what it left at its end.
    """
    for result in RESULTS if situation == SAVED else [""]:
        path = run_dir / result
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    found = flippable(situation, run_dir, cache)
    if found:
        file = rng.choice(found)
        place = rng.randrange(file.stat().st_size)
        with file.open("r+b") as content:
            content.seek(place)
            (byte,) = content.read(1)
            content.seek(place)
            content.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return bool(found)


def wait_until_gone(process: ForkedCommand, place: Path) -> list[str]:
    """Wait until no process of a run is left. Those that do not end write their stacks, and are killed.

    Ranks whose launcher was killed may end their step.

    Returns:
        The command lines of the processes that had to be killed. Forked ones all have that of this process.
    """
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    deadline = time.monotonic() + (PATIENCE if process.poll() is not None else 0.0)
    while (left := present(place)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for signum in (signal.SIGABRT, signal.SIGKILL):
        for pid in present(place) if left else []:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if signum == signal.SIGABRT:
                    names.append(" ".join(psutil.Process(pid).cmdline()))
                os.kill(pid, signum)
        time.sleep(2.0 if left else 0.0)
    process.wait()
    return names


def table(trials: list[dict[str, Any]]) -> str:
    """The trials by situation, as Markdown."""
    lines = ["| situation | runs | times | equal to the undisturbed run | lost |", "|---|---|---|---|---|"]
    for situation in SITUATIONS:
        here = [t for t in trials if t["situation"] == situation and "skipped" not in t]
        lost = Counter(t["lost"] for t in here if t["lost"])
        equal = sum(not t["lost"] for t in here)
        words = "; ".join(f"{n} x {what}" for what, n in lost.items()) or "nothing"
        lines.append(f"| {situation} | {len(here)} | {sum(t['times'] for t in here)} | {equal} | {words} |")
    return "\n".join(lines)


def main(write: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, help="default: all, which are 61, with --short 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    make(arguments.folder)
    alone = ["unshare", "-rm"]
    if (
        not arguments.short
        and OWN_MOUNTS not in os.environ
        and not subprocess.run([*alone, "true"]).returncode
    ):
        os.execvpe(alone[0], [*alone, sys.executable, *sys.argv], {**os.environ, OWN_MOUNTS: "1"})
    suite = Suite(arguments.folder.resolve(), arguments.seed, arguments.short)
    done = [json.loads(line) for line in suite.kept.read_text().splitlines()] if suite.kept.exists() else []
    if not arguments.table:
        for number in range(len(done), arguments.trials or len(suite.plan)):
            result = suite.trial(number)
            with suite.kept.open("a") as kept:
                kept.write(json.dumps(result) + "\n")
            done.append(result)
            came = result.get("skipped") or result["lost"] or "equal"
            write(f"{number}: {result['run']}, {result['situation']}: {came}")
    write(table(done))
    sys.exit(any(trial["lost"] for trial in done))


if __name__ == "__main__":
    main()
