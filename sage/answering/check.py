"""Check the answers in preference pairs: is the chosen response right, and the rejected one wrong?"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import datasets

from sage.answering.answers import boxed, hashed
from sage.answering.verify import Verifier
from sage.data.pairs import turns_of


class Finding(NamedTuple):
    """A pair whose verdicts are not what its sides claim. `reason` is wrong_chosen or right_rejected."""

    row: int
    pair_id: str
    reason: str
    answer: str
    extracted: str | None


class AnswerCheck(NamedTuple):
    checked: int
    findings: list[Finding]
    undecided: int = 0  # verdicts that ended in a timeout or a crash: their pairs are kept

    def summary(self, drop: bool) -> str:
        """One line for the user."""
        wrong = sum(finding.reason == "wrong_chosen" for finding in self.findings)
        pairs = len({finding.pair_id for finding in self.findings})
        return (
            f"answers of {self.checked} pairs checked: {wrong} chosen are wrong, "
            f"{len(self.findings) - wrong} rejected are right; these {pairs} pairs are "
            + ("dropped" if drop else "kept (data.answers=drop drops them)")
            + (f"; {self.undecided} answers could not be compared in time" if self.undecided else "")
        )


def check_answers(pairs: datasets.Dataset) -> AnswerCheck:
    r"""Verify both responses of each pair that has an answer.

    The true answer may stand after `####` or in a `\boxed{}`, as in GSM8K's and MATH's solutions. A response
    without an answer is wrong. A pair whose prompt ends with a started answer is not checked: Step-DPO's
    responses are single steps.
    """
    table = pairs.select_columns(["row", "pair_id", "prompt", "chosen", "rejected", "answer"])
    rows: list[dict[str, Any]] = [row for row in table if row["answer"] and not _started(row["prompt"])]  # pyright: ignore
    truths = [_true_answer(row["answer"]) for row in rows]
    with Verifier() as verifier:
        chosen, rejected = (
            verifier.verify([_text(row[side]) for row in rows], truths) for side in ("chosen", "rejected")
        )
    findings = []
    for row, truth, good, bad in zip(rows, truths, chosen, rejected, strict=True):
        if not (good.correct or good.undecided):
            findings.append(Finding(row["row"], row["pair_id"], "wrong_chosen", truth, good.extracted))
        if bad.correct:
            findings.append(Finding(row["row"], row["pair_id"], "right_rejected", truth, bad.extracted))
    return AnswerCheck(len(rows), findings, sum(verdict.undecided for verdict in (*chosen, *rejected)))


def _true_answer(text: str) -> str:
    if re.search(r"^\s*####", text, re.M):
        return hashed(text) or text
    return boxed(text) or text


def _text(turns: str) -> str:
    """A response's text, without a thought that has a key of its own."""
    value = turns_of(turns)
    return value if isinstance(value, str) else value[-1]["content"]


def _started(prompt: str) -> bool:
    value = turns_of(prompt)
    return not isinstance(value, str) and value[-1]["role"] == "assistant"
