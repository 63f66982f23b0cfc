"""Whether responses give the right answer: plain rules here, the rest by `math-verify` in processes of its own.

On a short answer sympy can run forever, in C code that no exception interrupts, or eat all memory. So each worker is a
process with a cap on its memory and timers of the kernel that kill it; the next question then starts a new one.
"""

from __future__ import annotations

import contextlib
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
from fractions import Fraction
from queue import LifoQueue
from typing import NamedTuple

from sage.answering.answers import (
    Found,
    PlainNumber,
    as_number,
    canonical,
    find_answer,
    is_words,
    last_number,
)

MEMORY = 2 << 30  # bytes of address space a worker may have
PATIENCE = 60  # how many times its CPU time an answer may take by the clock
READY = "ready\n"

CHOICE = re.compile(r"[A-J]")
CHOSEN = re.compile(r"\(?([A-J])\)?(?=$|[.:,)\s])")
LAST_CHOSEN = re.compile(r"\(([A-J])\)|\b(?:option|choice|answer)\s+([A-J])\b|\b([A-J])\W*$")


class Verdict(NamedTuple):
    """`rule` is WHERE/HOW: where the answer stood and what decided; "none" where no answer was found.

    WHERE: boxed, hash (`#### N`), phrase ("the answer is"), last (the end of an unmarked response).
    HOW: number, text (the same but for typesetting), choice (a letter), math (math-verify), timeout, crash.
    """

    correct: bool
    extracted: str | None
    rule: str


class Verifier:
    """Verifies in `workers` processes, started when first needed; an answer may take `timeout` seconds of CPU time."""

    def __init__(self, workers: int = os.cpu_count() or 1, timeout: float = 5.0):
        self.threads = ThreadPoolExecutor(workers)
        self.idle: LifoQueue[Worker] = LifoQueue()  # the last one used first, so that few start
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
            verdicts.append(quick_verdict(found, answer) or self.threads.submit(self._ask, found, answer))
        return [verdict if isinstance(verdict, Verdict) else verdict.result() for verdict in verdicts]

    def _ask(self, found: Found, answer: str) -> Verdict:
        worker = self.idle.get()
        try:
            return worker.ask(found, answer)
        finally:
            self.idle.put(worker)


def quick_verdict(found: Found, answer: str) -> Verdict | None:
    """The verdict where a plain rule decides, None where it takes mathematics."""
    truth, text = canonical(answer), canonical(found.text)
    if not text:
        return Verdict(False, None, "none")
    if CHOICE.fullmatch(truth):
        return _by_choice(found.where, text, truth)
    if number := as_number(truth):
        plain = text
        if (value := as_number(text)) is None and found.where in ("phrase", "last"):
            plain = last_number(text) or ""
            value = as_number(plain)
        if value and ((same := same_number(value, number)) or not rounded(value, number)):
            return Verdict(same, plain, f"{found.where}/number")
    if text == truth or (is_words(truth) and text.lower() == truth.lower()):
        return Verdict(True, found.text, f"{found.where}/text")
    if found.where != "last":
        words = is_words(truth) or is_words(text)
        return Verdict(False, found.text, f"{found.where}/text") if words else None
    formula = re.search(r"[\d\\$]", text) and not is_words(truth)
    return None if formula else Verdict(False, None, "none")


def same_number(a: PlainNumber, b: PlainNumber) -> bool:
    """50% equals 50, as answers are marked, and 0.5."""
    return a.value == b.value or (
        a.percent != b.percent and a.value == b.value * (100 if a.percent else Fraction(1, 100))
    )


def rounded(a: PlainNumber, b: PlainNumber) -> bool:
    """0.3333 against 1/3: a question of precision, which math-verify settles."""
    return a.ratio != b.ratio and 1 not in (a.value.denominator, b.value.denominator)


def _by_choice(where: str, text: str, truth: str) -> Verdict:
    """The letter that stands first in a marked answer, or last in an unmarked one."""
    if where != "last" and (match := CHOSEN.match(text)):
        letter = match[1]
    else:
        letters = [match[match.lastindex or 0] for match in LAST_CHOSEN.finditer(text)]
        letter = letters[-1] if letters else None
    return Verdict(letter == truth, letter, f"{where}/choice" if letter else "none")


class Worker:
    """A process that compares answers with math-verify, replaced when it dies."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def ask(self, found: Found, answer: str) -> Verdict:
        process = self.process = self.process or self._start()
        assert process.stdin and process.stdout
        try:
            print(json.dumps([found.where, found.text, answer]), file=process.stdin, flush=True)
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            correct, extracted = json.loads(reply)
            return Verdict(correct, extracted, f"{found.where}/math" if extracted else "none")
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
    """A worker's whole life: a question a line on stdin, an answer a line on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    logging.disable()
    # What sympy prints must not mix with the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    parse("$x$", parsing_timeout=0)  # the first is slow, which is no answer's fault
    print(READY, end="", file=replies, flush=True)
    for line in sys.stdin:
        where, text, answer = json.loads(line)
        # No handler is set, so the kernel ends the process, whatever it is doing. The first timer counts CPU time, so
        # that a busy machine changes no verdict; the second is for a process that waits.
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * timeout)
        truth = parse(_in_dollars(answer), parsing_timeout=0)
        given = parse(text if where == "last" else _in_dollars(text), parsing_timeout=0)
        correct = verify(truth, given, allow_set_relation_comp=True, timeout_seconds=0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        extracted = text if where != "last" else str(given[-1]) if given else None
        print(json.dumps([correct, extracted]), file=replies, flush=True)


def _in_dollars(answer: str) -> str:
    """An answer as math-verify finds it: in a formula, but for prose that has its own."""
    if answer.count("$") % 2 == 0 and re.search(r"\$|\\\(|\\\[", answer):
        return answer
    return f"${answer.replace('$', '')}$"


if __name__ == "__main__":
    serve(float(sys.argv[1]))
