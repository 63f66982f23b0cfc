r"""Problems with a known answer, from benchmark files: GSM8K's `#### N`, MATH's `\boxed{}`, plain answers."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sage.answering.answers import boxed, hashed
from sage.config import ProblemsConfig
from sage.data.source import read_rows, refuse_bad_rows
from sage.util.errors import UserError

COLUMNS = ("problem_id", "prompt", "answer", "solution", "group")
ANSWERS: dict[str, Callable[[str], str | None]] = {"hash": hashed, "boxed": boxed, "plain": str}


@dataclass(frozen=True)
class Problem:
    problem_id: str
    prompt: str
    answer: str
    solution: str | None  # the source's own, with its marker
    group: str | None  # level or subject, for a breakdown


def load_problems(
    path: str,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    answer_from: str = "plain",
    limit: int | None = None,
) -> list[Problem]:
    """Problems from a .jsonl, .json or .parquet file, a `save_to_disk` folder or a hub name.

    `columns` maps our names (COLUMNS) to the source's; a prompt may be several, joined by "+" ("Body+Question").
    Without problem_id it is the row's number. `answer_from` says how the answer stands in its column: "hash" (after
    `####`), "boxed" (in the last box) or "plain"; where it is found in a solution, that column is the solution too.
    A number becomes text (27.0: "27"), a list its elements joined by commas. Rows whose answer is empty, which public
    benchmarks have, are left out with a warning. Raises UserError for a source that cannot be read, and for rows
    with a column missing, an empty prompt or an answer without its mark, naming the first five.
    """
    columns = dict(columns or {})
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise UserError(f"columns: unknown name {unknown[0]!r}; it maps {', '.join(COLUMNS)} to the source's")
    if answer_from not in ANSWERS:
        raise UserError(f"answer_from is {answer_from!r}; it can be {', '.join(ANSWERS)}")
    if answer_from != "plain":
        columns.setdefault("solution", columns.get("answer", "answer"))
    rows = list(islice(read_rows(path, split), limit))
    if not rows:
        raise UserError(f"{path}: no rows")
    problems, bad, unanswered, first_rows = [], [], [], {}
    for row, record in rows:
        try:
            if (problem := _problem(row, record, columns, answer_from)) is None:
                unanswered.append(row)
            elif (first := first_rows.setdefault(problem.problem_id, row)) != row:
                raise UserError(f"problem_id {problem.problem_id!r} is already taken by row {first}")
            else:
                problems.append(problem)
        except UserError as error:
            bad.append(f"{path}:{row}: {error}")
    refuse_bad_rows(path, bad, len(rows))
    if not problems:
        raise UserError(f"{path}: no row has an answer in {columns.get('answer', 'answer')!r}")
    if unanswered:
        warnings.warn(
            f"{path}: {len(unanswered)} of {len(rows)} rows have an empty answer and are left out: "
            f"{', '.join(map(str, unanswered[:5]))}{', ...' if len(unanswered) > 5 else ''}",
            stacklevel=2,
        )
    return problems


def _problem(row: int, record: Any, columns: Mapping[str, str], answer_from: str) -> Problem | None:
    """A row's problem, None where its answer is empty, or a UserError with the reason alone."""
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"not an object with columns but {str(record)[:40]}")
    prompt = " ".join(_texts(record, "prompt", columns)).strip()
    told = ", ".join(_texts(record, "answer", columns)).strip()
    if not prompt:
        raise UserError("prompt is empty")
    if not told:
        return None
    if not (answer := ANSWERS[answer_from](told)):
        raise UserError(f"no {answer_from} answer in a text that ends {told[-40:]!r}")
    # Of several solutions, which OlympiadBench has, the first.
    problem_id, solution, group = (
        next(iter(_texts(record, name, columns)), None) for name in ("problem_id", "solution", "group")
    )
    return Problem(problem_id or str(row), prompt, answer, solution, group)


def _texts(record: dict[str, Any], name: str, columns: Mapping[str, str]) -> list[str]:
    """The texts that a record has for one of our names; none for a column that may be left out."""
    texts: list[str] = []
    for column in columns.get(name, name).split("+"):
        if column not in record and (name in columns or name in ("prompt", "answer")):
            raise UserError(f"no column {column!r} for {name}; it has {', '.join(record)}")
        value = record.get(column)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, float) and part.is_integer():
                part = int(part)
            if isinstance(part, str | int | float):
                texts.append(str(part).strip())
            elif part is not None:
                raise UserError(f"{name} is neither a text nor a number but {type(part).__name__}")
    return texts


def read_problems(cfg: ProblemsConfig) -> list[Problem]:
    assert cfg.path is not None
    return load_problems(
        cfg.path, split=cfg.split, columns=cfg.columns.given(), answer_from=cfg.answer_from, limit=cfg.limit
    )
