r"""Problems with a known answer, read from benchmark files (GSM8K's `#### N`, MATH's `\boxed{}`, plain)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sage.answering.answers import boxed, hashed
from sage.config import ProblemsConfig
from sage.data.source import first_five, read_rows, refuse_bad_rows
from sage.util.errors import UserError
from sage.util.progress import console

COLUMNS = ("problem_id", "prompt", "answer", "solution", "group", "samples")
MAX_BAD = 0.01  # share of bad rows that are left out; public files have a few, and cannot be mended by hand
ANSWERS: dict[str, Callable[[str], str | None]] = {"hash": hashed, "boxed": boxed, "plain": str}


@dataclass(frozen=True)
class Problem:
    problem_id: str
    prompt: str
    answer: str
    solution: str | None  # the source's own text, with the mark of its answer
    group: str | None  # level or subject, for a breakdown
    samples: int | None = None  # responses to sample; None = as many as the command says


def load_problems(
    path: str,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    answer_from: str = "plain",
    limit: int | None = None,
) -> list[Problem]:
    """Problems from whatever `sage.data.source.read_rows` reads: files, a folder or a hub name.

    A number becomes text (27.0: "27"), and the elements of a list are joined by commas. Rows with an empty
    answer, which public benchmarks have, are left out with a message. So are bad rows, up to a share of
    MAX_BAD. A row is bad if a column is missing, its prompt is empty, its id is taken, or its answer has no
    mark.

    Args:
        columns: our names (COLUMNS) -> the source's. A prompt may join several columns ("Body+Question").
            Without a problem_id, the row's number is the id. `samples` is read only if it is mapped.
        answer_from: where the answer stands in its column: "hash" (after `####`), "boxed" (in the last box)
            or "plain". With the first two, the column is a solution, and becomes the problem's solution too.
        limit: rows to read.

    Raises:
        UserError: the source cannot be read, too many rows are bad (the first five are named), or none is
            left.
    """
    columns = dict(columns or {})
    if answer_from != "plain":
        columns.setdefault("solution", columns.get("answer", "answer"))
    rows = list(islice(read_rows(path, split), limit))
    if not rows:
        raise UserError(f"{path}: no rows")
    problems, bad, unanswered, first_rows = [], [], [], {}
    for row, place, record in rows:
        try:
            if (problem := _problem(row, record, columns, answer_from)) is None:
                unanswered.append(row)
            elif (first := first_rows.setdefault(problem.problem_id, row)) != row:
                raise UserError(f"problem_id {problem.problem_id!r} is already taken by row {first}")
            else:
                problems.append(problem)
        except UserError as error:
            bad.append(f"{place}: {error}")
    if len(bad) > MAX_BAD * len(rows):
        refuse_bad_rows(path, bad, len(rows))
    if answer_from == "plain":
        refuse_solutions(path, [problem.answer for problem in problems])
    if not problems:
        raise UserError(f"{path}: no row has an answer in {columns.get('answer', 'answer')!r}")
    if unanswered:
        left_out = ", ".join(map(str, unanswered[:5])) + (", ..." if len(unanswered) > 5 else "")
        console.print(
            f"{path}: {len(unanswered)} of {len(rows)} rows have an empty answer and are left out: {left_out}"
        )
    if bad:
        head = f"{path}: {len(bad)} of {len(rows)} rows are bad and are left out"
        console.print(first_five(head, bad), markup=False)
    return problems


def refuse_solutions(path: str, answers: Sequence[str]) -> None:
    """Refuse answers that are whole solutions: no response would be equal to one."""
    for mark, answer_from in (("\n#### ", "hash"), ("\\boxed", "boxed")):
        solutions = sum(mark in answer.strip("$ ").removeprefix(mark) for answer in answers)
        if 2 * solutions > len(answers):
            raise UserError(
                f"{path}: {solutions} of {len(answers)} answers are whole solutions, with {mark.strip()!r} in"
                f" them: set answer_from={answer_from}, or name the column of the bare answers"
            )


def _problem(row: int, record: Any, columns: Mapping[str, str], answer_from: str) -> Problem | None:
    """A row's problem, or None if its answer is empty. Raises UserError with the reason alone."""
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"not an object with columns but {str(record)[:40]}")
    prompt = " ".join(_texts(record, "prompt", columns)).strip()
    text = ", ".join(_texts(record, "answer", columns)).strip()
    if not prompt:
        raise UserError("prompt is empty")
    if not text:
        return None
    if not (answer := ANSWERS[answer_from](text)):
        raise UserError(f"no {answer_from} answer in a text that ends {text[-40:]!r}")
    # OlympiadBench has several solutions; the first is taken.
    problem_id, solution, group = (
        next(iter(_texts(record, name, columns)), None) for name in ("problem_id", "solution", "group")
    )
    return Problem(problem_id or str(row), prompt, answer, solution, group, _samples(record, columns))


def _samples(record: dict[str, Any], columns: Mapping[str, str]) -> int | None:
    """How many responses the source wants, if it has a column for that, which must be named."""
    if "samples" not in columns:
        return None
    text = next(iter(_texts(record, "samples", columns)), "")
    if not text.isdecimal() or not int(text):
        raise UserError(f"samples must be a whole number above 0, not {text or 'empty'}")
    return int(text)


def _texts(record: dict[str, Any], name: str, columns: Mapping[str, str]) -> list[str]:
    """The texts that a record has for one of our names; empty if an optional column is absent."""
    texts: list[str] = []
    for column in columns.get(name, name).split("+"):
        if column not in record and (name in columns or name in ("prompt", "answer")):
            raise UserError(f"no column {column!r} for {name}; it has {', '.join(record)}")
        value = record.get(column)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, float):
                part = None if math.isnan(part) else int(part) if part.is_integer() else part
            if isinstance(part, str | int | float):
                texts.append(str(part).strip())
                if any("\ud800" <= c <= "\udfff" for c in texts[-1]):
                    raise UserError(f"{name} has half of a surrogate pair, which is no text")
            elif part is not None:
                raise UserError(f"{name} is neither a text nor a number but {type(part).__name__}")
    return texts


def read_problems(cfg: ProblemsConfig) -> list[Problem]:
    assert cfg.path is not None
    return load_problems(
        cfg.path, split=cfg.split, columns=cfg.columns.given(), answer_from=cfg.answer_from, limit=cfg.limit
    )


def prompts_of(problems: Sequence[Problem], prompt: str) -> list[str]:
    """The text of each problem's prompt; `prompt` has {problem} in it."""
    return [prompt.replace("{problem}", problem.prompt) for problem in problems]


def warn_of_known(name: str, known: int, count: int, where: str) -> None:
    """Say that `known` of the `count` problems of the benchmark `name` are trained on, if any are."""
    if known:
        console.print(
            f"warning: {known} of {count} problems of benchmark.{name} are in {where}: its accuracy does not "
            "show what the policy has learned in general",
            markup=False,
        )
