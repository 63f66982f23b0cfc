"""Verdicts on responses that are already there; needs no model.

RUN_DIR/verdicts.jsonl   every row of the input, with correct, extracted and rule
RUN_DIR/summary.json     the accuracy with its interval; written last

Given the folder of a finished `sage eval`, RUN_DIR becomes a copy of that evaluation with new verdicts.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from sage.answering.problems import ANSWERS, refuse_solutions
from sage.answering.statistics import wilson
from sage.answering.verify import UNDECIDED, Verdict, Verifier, rules_of_verdicts
from sage.config import CONFIG_FILE, SUMMARY_FILE, EvalConfig, VerifyConfig, freeze, load
from sage.data.source import read_rows, refuse_bad_rows
from sage.util.errors import UserError
from sage.util.files import write_json, write_text
from sage.util.progress import console, track

VERDICTS_FILE = "verdicts.jsonl"
BATCH = 256  # responses between two steps of the progress bar


def verify(cfg: VerifyConfig, run_dir: Path) -> None:
    """Verify the responses of a file, or of a finished evaluation, and write the verdicts to `run_dir`.

    Raises:
        UserError: the source cannot be read, has bad rows, or is an unfinished evaluation; the output exists.
    """
    assert cfg.path is not None
    source = Path(cfg.path).expanduser()
    if (source / CONFIG_FILE).is_file():
        verify_evaluation(cfg, source, run_dir)
    else:
        verify_rows(cfg, run_dir)


def verify_rows(cfg: VerifyConfig, run_dir: Path) -> None:
    assert cfg.path is not None
    output = Path(cfg.output).expanduser() if cfg.output else run_dir / VERDICTS_FILE
    if output.exists():
        raise UserError(f"output={output}: this file exists; remove it, or name another")
    records, responses, answers = read_responses(cfg)
    freeze(cfg, run_dir)
    verdicts = judge_all(cfg, responses, answers, "verify")
    lines = (
        # ASCII, because a text may have half of a character.
        json.dumps({**record, **verdict._asdict()}, default=str) + "\n"
        for record, verdict in zip(records, verdicts, strict=True)
    )
    write_text(output, "".join(lines))
    right, total = sum(verdict.correct for verdict in verdicts), len(verdicts)
    low, high = wilson(right, total)
    rules = Counter(verdict.rule for verdict in verdicts)
    summary = {
        "path": cfg.path,
        "verdicts": str(output),
        "responses": total,
        "right": right,
        "accuracy": right / total,
        "interval": [low, high],
        "interval_by": "wilson",
        "no_answer": rules["none"] / total,
        "rules": dict(rules.most_common()),
    }
    write_json(run_dir / SUMMARY_FILE, summary)
    console.print(
        f"accuracy {right / total:.1%}, 95% interval {low:.1%} to {high:.1%}: {right} of {total} right, "
        f"{rules['none']} without an answer"
    )
    if stopped := sum(count for rule, count in rules.items() if rule.endswith(UNDECIDED)):
        console.print(f"{stopped} exceeded the limit of time or memory, and count as wrong")
    if own := [name for name in Verdict._fields if any(name in record for record in records)]:
        console.print(f"{output} holds the new verdicts in place of the file's own {', '.join(own)}")
    console.print(f"verdicts: {output}")


def read_responses(cfg: VerifyConfig) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The rows of a source, their responses and their answers. Raises UserError that names bad rows."""
    assert cfg.path is not None
    rows = list(islice(read_rows(cfg.path, cfg.split), cfg.limit))
    if not rows:
        raise UserError(f"{cfg.path}: no rows")
    records, responses, answers, bad = [], [], [], []
    for row in rows:
        try:
            if isinstance(row.record, UserError):
                raise row.record
            if not isinstance(row.record, dict):
                raise UserError("not an object with columns")
            response, answer = (column(row.record, ours, cfg) for ours in ("response", "answer"))
            if not isinstance(response, str):
                raise UserError(f"the response is not a text but {type(response).__name__}")
            answers.append(answer_of(answer, cfg))
            responses.append(response)
            records.append(row.record)
        except UserError as error:
            bad.append(f"{row.place}: {error}")
    refuse_bad_rows(cfg.path, bad, len(rows))
    if cfg.answer_from == "plain":
        refuse_solutions(cfg.path, answers)
    return records, responses, answers


def column(record: dict[str, Any], ours: str, cfg: VerifyConfig) -> Any:
    name = cfg.columns.given().get(ours, ours)
    if name not in record:
        raise UserError(f"no column {name!r}; it has {', '.join(record)}: set columns.{ours}=COLUMN")
    return record[name]


def answer_of(value: Any, cfg: VerifyConfig) -> str:
    """The true answer as text: of a list, its elements joined by commas."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
        raise UserError("the answer is neither a text nor a number")
    text = ", ".join(
        str(int(p)) if isinstance(p, float) and p.is_integer() else str(p) for p in parts
    ).strip()
    if not (answer := ANSWERS[cfg.answer_from](text)):
        raise UserError(f"no {cfg.answer_from} answer in {text[-40:]!r}" if text else "the answer is empty")
    return answer


def judge_all(
    cfg: VerifyConfig, responses: Sequence[str], answers: Sequence[str], name: str
) -> list[Verdict]:
    def batches() -> Iterator[list[Verdict]]:
        for start in range(0, len(responses), BATCH):
            chosen = slice(start, start + BATCH)
            yield verifier.verify(responses[chosen], answers[chosen])

    workers = {"workers": cfg.workers} if cfg.workers else {}
    with Verifier(timeout=cfg.timeout, **workers) as verifier:
        return [v for batch in track(batches(), name, len(responses), size=len) for v in batch]


def verify_evaluation(cfg: VerifyConfig, source: Path, run_dir: Path) -> None:
    """Copy a finished evaluation to `run_dir`, with new verdicts and the numbers that follow from them."""
    # Here, because it loads torch.
    from sage.answering.accuracy import check_decided, measure, table
    from sage.answering.attempts import BEGUN_FILE, GENERATIONS_FILE, read_attempts, write_lines

    unread = ("split", "columns", "answer_from", "output", "limit")
    if given := [key for key in unread if getattr(cfg, key) != getattr(VerifyConfig(), key)]:
        raise UserError(
            f"{given[0]} has no effect on {source}: sage verifies all responses of an evaluation. Leave it "
            "out"
        )
    evaluation = load(source)
    if not isinstance(evaluation, EvalConfig) or not (source / SUMMARY_FILE).is_file():
        raise UserError(
            f"{source} is not a finished evaluation: `sage eval` writes one, `sage resume` finishes it"
        )
    summary = json.loads((source / SUMMARY_FILE).read_text(encoding="utf-8"))
    freeze(evaluation, run_dir)  # so that `sage eval --compare` takes the copy
    results = {}
    for name in summary["benchmarks"]:
        old = read_attempts(source / name / GENERATIONS_FILE)
        verdicts = judge_all(cfg, [a.whole for a in old], [a.answer for a in old], name)
        new = [replace(a, **v._asdict()) for a, v in zip(old, verdicts, strict=True)]
        write_lines(run_dir / name / GENERATIONS_FILE, new)
        shutil.copy(source / name / BEGUN_FILE, run_dir / name)  # --compare looks at its problems
        check_decided(name, new, run_dir / name)
        results[name] = measure(new)
        gained = sum(b.correct > a.correct for a, b in zip(old, new, strict=True))
        lost = sum(b.correct < a.correct for a, b in zip(old, new, strict=True))
        console.print(f"{name}: {gained} of {len(new)} verdicts became right, {lost} became wrong")
    summary |= {
        "mean_accuracy": fmean(result["accuracy"] for result in results.values()),
        "benchmarks": results,
        "verdicts": rules_of_verdicts(),
        "verified_again_from": str(source.resolve()),
    }
    write_json(run_dir / SUMMARY_FILE, summary)
    console.print(table(results))
    console.print(f"generations and verdicts: {run_dir}")
