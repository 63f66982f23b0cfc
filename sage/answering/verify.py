"""Whether responses give the right answer: plain rules here, formulas in processes of their own.

On a short formula sympy can run forever, in C code that no exception interrupts, or take all memory. So each
worker is a process with a cap on its memory, and timers of the kernel kill it. The next question then starts
a new one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue
from typing import NamedTuple

from sage.answering.answers import Found, find_answer
from sage.answering.equality import Compare, same
from sage.answering.measures import TIME
from sage.answering.prose import FORMULA, first_answer, last_number
from sage.answering.spelling import as_number, canonical, is_words
from sage.util.files import source_digest

MEMORY = 2 << 30  # bytes of address space that a worker may have
PATIENCE = 60  # an answer may take this many times its CPU time by the clock
READY = "ready\n"

JOINED = re.compile(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*")

CHOICE = re.compile(r"\(?([A-J])\)?\.?")
CHOSEN = re.compile(r"\W*\(?([A-J])\)?(?=$|[.:,;)/&\s])")
MORE_CHOSEN = re.compile(r"[\s)]*(?:(?:[,/&;]|or\b|and\b)\s*)+\(?[A-J]\b")
NAMED_CHOICE = re.compile(
    r"\b(?:choos(?:e|ing)|pick(?:ing)?|select(?:ing)?|go(?:ing)? (?:with|for)|option|choice|answer)"
    r"(?:\s+(?:is|option|choice|answer))*\s+\(?([A-J])\b\)?"
    r"|\b([A-J])\)?\s+(?:is|must be|would be)\s+(?:the\s+)?(?:correct|right|best|answer)\b"
    r"|\b[Ii]t(?:['’]s| is| must be)\s+\(?([A-J])\)?(?=\s*(?:[.,;]|$))"
)
SHOWN_CHOICE = re.compile(r"\(([A-J])\)|\b([A-J])\W*$")
BEGINS_WITH = re.compile(r"\A\W*([A-J])[.):]\s(?!.*\b[A-J][.):]\s)")  # "B. The moon", but no list of choices
REJECTED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\brather than|\binstead of|\brul(?:ed?|ing) out|\beliminat(?:ed?|ing))"
    r"(?:\s+\w+)?\s*$",
    re.I,
)


class NeedsMathematics(Exception):
    """No plain rule decides."""


PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")
UNDECIDED = ("/timeout", "/crash")  # ends of the rules of verdicts that are no comparison


class Verdict(NamedTuple):
    """`rule` is WHERE/HOW: where the answer stood and what decided; "none" where no answer was found.

    WHERE: tag (<answer>), boxed, hash (`#### N`), phrase ("the answer is"), last (the end of the response).
    HOW: number, text (the same but for typesetting), choice (a letter), math (formulas), timeout, crash.
    """

    correct: bool
    extracted: str | None
    rule: str

    @property
    def undecided(self) -> bool:
        """Whether the answer could not be compared, so it counts as wrong but may be right."""
        return self.rule.endswith(UNDECIDED)


def rules_of_verdicts() -> dict[str, str]:
    """What verdicts depend on: sage's own rules, and the packages that compare formulas."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"code": source_digest("answering", "data/thoughts.py"), **packages}


class Verifier:
    """Verifies in `workers` processes, which start when they are first needed.

    An answer may take `timeout` seconds of CPU time.
    """

    def __init__(self, workers: int = os.cpu_count() or 1, timeout: float = 5.0):
        self.threads = ThreadPoolExecutor(workers)
        self.idle: LifoQueue[Worker] = LifoQueue()  # the last one is used first, so that few start
        for _ in range(workers):
            self.idle.put(Worker(timeout))

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.shutdown(cancel_futures=True)
        while not self.idle.empty():
            self.idle.get().stop()

    def verify(self, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each response, in order, against the true answer at its place."""
        verdicts = []
        for response, answer in zip(responses, answers, strict=True):
            found = find_answer(response)
            try:
                verdicts.append(judge(found, answer, _no_formula))
            except NeedsMathematics:
                verdicts.append(self.threads.submit(self._ask, found, answer))
        return [verdict if isinstance(verdict, Verdict) else verdict.result() for verdict in verdicts]

    def _ask(self, found: Found, answer: str) -> Verdict:
        worker = self.idle.get()
        try:
            return worker.ask(found, answer)
        finally:
            self.idle.put(worker)


def judge(found: Found, answer: str, formula: Compare) -> Verdict:
    """The verdict on an answer. `formula` compares two formulas, or raises NeedsMathematics."""
    where, text = found
    truth = canonical(answer)
    if letter := CHOICE.fullmatch(truth):
        return _by_choice(where, canonical(text), letter[1])
    if where == "last":
        text = _at_end(text, truth)
    if not text or not canonical(text):
        return Verdict(False, None, "none")
    correct = same(text, answer, formula)
    if as_number(truth) and as_number(canonical(text)):
        how = "number"
    else:
        how = "text" if formula is _no_formula else "math"
    return Verdict(correct, text, f"{where}/{how}")


def _no_formula(a: str, b: str) -> bool:
    raise NeedsMathematics


def _at_end(text: str, truth: str) -> str | None:
    """What an unmarked text says at its end, of the kind that the truth is."""
    text = text.replace("**", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if is_words(truth):
        clauses = [lines[-1], re.split("[,.;!]", lines[-1])[0]]  # "Yes, it is."
        return next((c for c in clauses if canonical(c).lower() == truth.lower()), None)
    formulas = list(FORMULA.finditer(text))
    if as_number(truth) or TIME.fullmatch(truth):
        after = text[formulas[-1].end() :] if formulas else text
        if number := last_number(after):
            return number
        if formulas and len(several := _last_formulas(text, formulas)) == 1:
            return several[0].rsplit("=", 1)[-1]
    if formulas:
        return ", ".join(_last_formulas(text, formulas))
    sentence = re.split(r"(?<=[.!?])\s+", lines[-1])[-1].rstrip(".")
    return first_answer(sentence) if re.search(r"\\(?!boxed|fbox)[a-z]|[\d=√π∞]", sentence) else None


def _last_formulas(text: str, formulas: list[re.Match[str]]) -> list[str]:
    """The last formula, after those that stand with it in a list: "$3$ or $5$"."""
    first = len(formulas) - 1
    while first and JOINED.fullmatch(text, formulas[first - 1].end(), formulas[first].start()):
        first -= 1
    return [formula[0] for formula in formulas[first:]]


def _by_choice(where: str, text: str, truth: str) -> Verdict:
    """The one letter that stands first in a marked answer, or that an unmarked one chooses."""
    letter = None
    if re.fullmatch(r"\(?[a-j]\)?", text):
        text = text.upper()
    if where != "last" and (match := CHOSEN.match(text)):
        if MORE_CHOSEN.match(text, match.end()):
            return Verdict(False, text, f"{where}/choice")
        letter = match[1]
    else:
        for pattern in (NAMED_CHOICE, SHOWN_CHOICE, BEGINS_WITH):
            matches = [
                match
                for match in pattern.finditer(text)
                if not REJECTED.search(text, max(match.start() - 40, 0), match.start())
            ]
            if matches:
                letter = matches[-1][matches[-1].lastindex or 0]
                if MORE_CHOSEN.match(text, matches[-1].end()):
                    return Verdict(False, text, f"{where}/choice")
                break
    return Verdict(letter == truth, letter, f"{where}/choice" if letter else "none")


class Worker:
    """A process that compares formulas, replaced when it dies."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def ask(self, found: Found, answer: str) -> Verdict:
        process = self.process = self.process or self._start()
        assert process.stdin and process.stdout
        try:
            print(json.dumps([*found, answer]), file=process.stdin, flush=True)
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return Verdict(*json.loads(reply))
        timed_out = self.stop() in (-signal.SIGPROF, -signal.SIGALRM)
        return Verdict(False, found.text, f"{found.where}/{'timeout' if timed_out else 'crash'}")

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sage.answering.verify", str(self.timeout)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        assert process.stdout
        if process.stdout.readline() != READY:
            raise RuntimeError(f"the verification process did not start (exit status {process.wait()})")
        return process

    def stop(self) -> int | None:
        """End the process, if there is one; its exit status, negative for the signal that had killed it."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:
            return process.wait()


def serve(timeout: float) -> None:
    """A worker's whole life: a question per line on stdin, a verdict per line on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from sage.answering.symbolic import same_formula

    logging.disable()
    # What sympy prints must not mix with the verdicts.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    same_formula("x + x", "2 x")  # the first is slow, which is no answer's fault
    print(READY, end="", file=replies, flush=True)
    for line in sys.stdin:
        where, text, answer = json.loads(line)
        # No handler is set, so the kernel ends the process, whatever it is doing. The first timer counts CPU
        # time, so that a busy machine changes no verdict. The second is for a process that waits.
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * timeout)
        try:
            verdict = judge(Found(where, text), answer, same_formula)
        except Exception:  # whatever a library makes of it: what cannot be read is not equal
            verdict = Verdict(False, text, f"{where}/math")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
