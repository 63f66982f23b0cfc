"""What the rounds of `sage rounds` did and cost, read from their folders."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from sage.answering.asking import Outcome
from sage.answering.attempts import BEGUN_FILE, GENERATIONS_FILE, Attempt, read_attempts
from sage.commands.build_pairs import MANIFEST_FILE
from sage.commands.evaluate import compare_attempts, problems_of
from sage.config import SUMMARY_FILE, RoundsConfig, load
from sage.model.masters import MASTERS_FOLDER
from sage.reporting.rounds import RoundsRun
from sage.training.optimizer_state import OPTIMIZER_FOLDER
from sage.util import checksums, stopping
from sage.util.errors import UserError, named
from sage.util.files import write_text
from sage.util.locks import alive
from sage.util.progress import console

OUTCOMES_FILE, TIMES_FILE = "outcomes.jsonl", "times.jsonl"
OLDER_FOLDER, POOL_FILE = "older", "pool.jsonl"
POLICY_FILE = "policy.sha256"  # names the policy that a round began with


def folder_of(run_dir: Path, number: int) -> Path:
    return run_dir / f"round_{number}"


def results(run_dir: Path, number: int, names: Sequence[str]) -> dict[str, Any]:
    """What a round did and cost, and the accuracy of its policy on each benchmark.

    A problem is gained if it is right now and was wrong after the round before, and lost if it is the
    other way round.
    """
    folder, result = folder_of(run_dir, number), {"round": number, "seconds": seconds(run_dir, number)}
    if number:
        counts = read_json(folder / "pairs" / MANIFEST_FILE)["counts"]
        training = read_json(folder / "train" / SUMMARY_FILE)
        result |= {
            **{name: counts[name] for name in ("problems", "responses", "right", "response_tokens", "pairs")},
            **older_pairs(folder, counts["pairs"]),
            "steps": training["steps"],
            "forward_pairs": training["cost/forward_pairs"],
            "backward_pairs": training["cost/backward_pairs"],
            "outcomes": dict(Counter(o.kind for o in read_outcomes(folder).values())),
        }
    benchmarks: dict[str, Any] = {}
    for name in names:
        measured = read_json(folder / "eval" / SUMMARY_FILE)["benchmarks"][name]
        benchmarks[name] = {k: measured[k] for k in ("accuracy", "interval", "problems")}
        if number:
            before, after = (folder_of(run_dir, n) / "eval" / name for n in (number - 1, number))
            for answers in (before, after):  # which of them is damaged, if one is
                attempts_in(answers, measured["problems"])
                with whole(answers / BEGUN_FILE):
                    problems_of(answers)
            changes = compare_attempts(before, after)
            benchmarks[name] |= {k: changes[k] for k in ("difference", "gained", "lost")}
            benchmarks[name]["difference_interval"] = changes["interval"]
    return {**result, "benchmarks": benchmarks}


def older_pairs(folder: Path, new: int) -> dict[str, int]:
    """How many pairs of the round before were scored again, and how many of them stay."""
    scored = folder / OLDER_FOLDER / SUMMARY_FILE
    if not scored.exists():
        return {"rescored_pairs": 0, "kept_pairs": 0}
    with (folder / POOL_FILE).open(encoding="utf-8") as lines:
        return {"rescored_pairs": read_json(scored)["pairs"], "kept_pairs": sum(1 for _ in lines) - new}


def read_json(file: Path) -> dict[str, Any]:
    with whole(file):
        return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def whole(file: Path) -> Iterator[None]:
    """Say how to make a file of a finished part again, if it is missing or cannot be read.

    A part depends on its config and on earlier parts only, so it is the same when it is done again.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as e:
        inside = r"round_\d+"
        run_dir = next((f.parent for f in file.parents if re.fullmatch(inside, f.name)), file.parent)
        part = next((f for f in file.parents if re.fullmatch(inside, f.parent.name)), file)
        reason = "is missing" if isinstance(e, FileNotFoundError) else "is damaged"
        parts = dict.fromkeys((part, run_dir / SUMMARY_FILE))  # with a summary, the rounds count as finished
        delete = " and ".join(str(path) for path in parts if path == part or path.exists())
        raise UserError(
            f"{file} {reason}: delete {delete}, and resume the rounds, which then make it again"
        ) from e


def check_export(folder: Path) -> None:
    """Seal the policy that a round has exported, or check that it is still as it was sealed."""
    if not (folder / checksums.CHECKSUMS_FILE).exists():
        with whole(folder):
            if not any(folder.iterdir()):
                raise FileNotFoundError
        checksums.seal(folder, without=[MASTERS_FOLDER, OPTIMIZER_FOLDER])
        return
    for name in checksums.damaged(folder):
        with whole(file := folder / name):
            raise ValueError if file.exists() else FileNotFoundError


def check_start(policy: Path, needed: Path, folder: Path) -> None:
    """Refuse to mix a round's files with those of another policy, or to train without what belongs to it.

    Args:
        needed: the folder of the round before that the training begins with: float32 weights, which a run in
            float32 does not need, or the optimizer's state. It is deleted once this round is trained.
    """
    file, made = folder / POLICY_FILE, checksums.digest(read_json(policy / checksums.CHECKSUMS_FILE))
    if file.exists() and file.read_text(encoding="utf-8") != made:
        raise UserError(
            f"{folder} was made from another policy than {policy} is now: delete it and all rounds after it, "
            "and resume the rounds, which then make them again"
        )
    write_text(file, made)
    train, instead = folder / "train", "with a fresh optimizer"
    if needed.name == MASTERS_FOLDER:
        if read_json(policy.parent / SUMMARY_FILE)["dtype"] == "float32":
            return
        instead = "whose weights are rounded"
    if not (train / SUMMARY_FILE).exists() and (damaged := checksums.damaged(needed)):
        reason = f"is damaged ({named(damaged)})" if needed.is_dir() else "is gone"
        raise UserError(
            f"{train} begins with {needed}, which {reason}: put it back, or delete the folder `train` of all "
            "rounds before it too, and resume the rounds, which train them again. Other rounds may begin "
            f"with model.path={policy}, {instead}"
        )


def attempts_in(folder: Path, number: int) -> list[Attempt]:
    """The attempts that a part has left in `folder`, of which there must be this number."""
    file = folder / GENERATIONS_FILE
    with whole(file):
        if len(found := read_attempts(file)) != number:
            raise ValueError(f"{len(found)} of {number} responses")
        return found


def check_attempts(number: int, attempts: Sequence[Attempt], file: Path) -> None:
    """Refuse a round in which no answer could be compared in time: its right answers would count as wrong."""
    answered = [a for a in attempts if a.extracted is not None]
    lost = sum(a.undecided for a in answered)
    if lost and lost == len(answered):
        raise UserError(
            f"round {number}: the verifier timed out or crashed on all {lost} answers, so none counts as "
            f"right. The machine may be overloaded, or the true answers may not be formulas. See {file}. To "
            f"sample and verify again, delete {file.parent}, then {stopping.go_on(file.parents[2])}"
        )
    if lost:
        console.print(
            f"round {number}: the verifier timed out or crashed on {lost} of {len(answered)} answers: they "
            "count as not right, and make no pair",
            markup=False,
        )


def write_outcomes(folder: Path, attempts: Sequence[Attempt]) -> None:
    found: dict[str, list[bool]] = {}
    for attempt in attempts:
        found.setdefault(attempt.problem_id, []).append(attempt.correct)
    rows = [{"problem_id": i, "samples": len(v), "right": sum(v)} for i, v in found.items()]
    write_text(folder / OUTCOMES_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    checksums.seal_file(folder / OUTCOMES_FILE)


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """The outcome of each problem that a round asked."""
    file = folder / OUTCOMES_FILE
    with whole(file), file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
        return {row["problem_id"]: Outcome(row["samples"], row["right"]) for row in rows}


def seconds(run_dir: Path, number: int) -> dict[str, float]:
    """The seconds of each part of a round, over all its attempts, but those that SIGKILL ended."""
    total: Counter[str] = Counter()
    file = run_dir / TIMES_FILE
    with whole(file):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            row = json.loads(line)
            folder, part = row["part"].split("/")
            if folder == folder_of(run_dir, number).name:
                total[part] += row["seconds"]
    return {part: round(value, 1) for part, value in total.items()}


def read_rounds(run_dir: Path, name: str) -> RoundsRun:
    """The rounds in a run directory, as far as they are done. `name` stands for them in tables."""
    cfg = load(run_dir)
    assert isinstance(cfg, RoundsConfig)
    benchmarks, file, found = list(cfg.benchmark), run_dir / SUMMARY_FILE, []
    if file.exists():
        with whole(file):
            status, found = "finished", read_json(file)["rounds"]
    else:
        status = "running" if alive(run_dir) else "interrupted"
        while done(folder_of(run_dir, len(found)), len(found), benchmarks):
            found.append(results(run_dir, len(found), benchmarks))
    asked = [read_outcomes(folder_of(run_dir, result["round"])) for result in found[1:]]
    return RoundsRun(name, status, found, asked)


def done(folder: Path, number: int, benchmarks: Sequence[str]) -> bool:
    """Whether a round is finished, with its evaluation if there are benchmarks."""
    last = [*(["train"] if number else []), *(["eval"] if benchmarks else [])]
    return all((folder / part / SUMMARY_FILE).exists() for part in last)


def table(found: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="rounds", title_justify="left")
    names = list(found[0]["benchmarks"])
    for column in ("round", "problems", "right", "pairs", *names, "gained", "lost", "seconds"):
        shown.add_column(column, justify="right")
    for result in found:
        asked = result["round"] > 0
        accuracies = [
            f"{b['accuracy']:.1%} ({b['interval'][0]:.1%} to {b['interval'][1]:.1%})"
            for b in result["benchmarks"].values()
        ]
        changed = [
            " ".join(str(len(b[kind])) for b in result["benchmarks"].values()) if asked else ""
            for kind in ("gained", "lost")
        ]
        shown.add_row(
            str(result["round"]),
            f"{result['problems']}" if asked else "",
            f"{result['right'] / result['responses']:.1%}" if asked else "",
            f"{result['pairs']}" if asked else "",
            *accuracies,
            *changed,
            f"{sum(result['seconds'].values()):.0f}",
        )
    return shown
