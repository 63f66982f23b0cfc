"""Where a text says its answer, and what number a plain answer is.

Responses are hostile input: every function here takes time linear in its text and evaluates nothing.
"""

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 4000  # characters; what is longer is no answer
LONGEST_NUMBER = 1000
TAIL = 1000  # of a response without a marked answer
MARKS = 8  # how many boxes or phrases, from the end, are looked at

BOX = "\\boxed{"
BRACE = re.compile(r"\\.|[{}]", re.S)
JOINED = re.compile(r"[\s$]*(?:,|,?\s*and\b)[\s$]*(?:[A-Za-z]\s*=\s*)?")

HASH = re.compile(r"(?<!#)####\s*([-+$\\]*[\d.].*)")
HEADING = re.compile(r"\d+[.)]\s+[A-Za-z*]")  # "#### 1. Find the cost" is Markdown, not GSM8K
PHRASE = re.compile(r"^A:|\banswers?(?:\s+(?:is|are|would\s+be|will\s+be)\b|\s*\**\s*[:=])", re.M | re.I)
PHRASE_START = re.compile(r"(?:[\s:*]|\\\[|\$\$)*")
PHRASE_END = re.compile(r"\.(?=\s|$|\*)|\n|,?\s(?:because|since|which|so)\b")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
LAST_NUMBER = re.compile(rf"(?<![\w.])[-+]?\$?(?:{DIGITS})(?:\s*/\s*\d+)?(?:\s*\\?%)?")
IN_LATEX = set("{}^_\\/*")  # next to a number: it is a part of an expression

FRACTION = re.compile(r"^(-?)\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)|(\d)\{(\d+)\})$")
WORD_UNIT = (
    r"(?!sqrt|sin|cos|tan|log|exp|mod|and|thousand|million|billion|trillion|dozen)[A-Za-z][A-Za-z.'-]{2,}"
)
NUMBER = re.compile(
    rf"[$€£]?(?P<sign>[-+]?)[$€£]?(?P<number>{DIGITS})"
    r"(?:/(?P<under>\d+)|e(?P<e>[-+]?\d{1,3})|(?:\\times|\\cdot|\*)10\^\{?(?P<ten>[-+]?\d{1,3})\}?)?"
    rf"(?P<percent>%|\s+percent\b)?(?:\s+{WORD_UNIT}(?:/[A-Za-z]+)?)*",
    re.I,
)
WORDS = re.compile(r"[A-Za-z][A-Za-z ,.;:'-]*")

# Spelling only: none of these changes what an expression says.
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right|displaystyle|limits|quad|qquad|[Bb]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?<=\d)(?:\{,\}|,?\\[,!; ])(?=\d{3}(?!\d))", ""),  # thousands
        (r"\\[!,;: ]|~", " "),
        # A unit: "15\text{ cm}^2". Elsewhere such a macro only sets type.
        (r"(?<=[\d}])\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?$", ""),
        (r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm|textit|mathit|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\^\{?\\circ\}?|°|\\degree", " degrees "),
        (r"\\%", "%"),
        (r"\\\$", "$"),
        (r"\\\(|\\\)|\\\[|\\\]|\*\*", ""),
        (r"[−–]", "-"),
        (r"\\leq?(?![A-Za-z])", r"\\le"),
        (r"\\geq?(?![A-Za-z])", r"\\ge"),
    ]
]


class Found(NamedTuple):
    """`where` is "boxed", "hash", "phrase" or, for the end of an unmarked text, "last"."""

    where: str
    text: str


class PlainNumber(NamedTuple):
    value: Fraction
    percent: bool
    ratio: bool  # written a/b


def boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{}, the innermost of nested ones; several in a list make one answer."""
    answer, begin, end = None, 0, len(text)
    for _ in range(MARKS):  # an unclosed one is searched to its limit
        if (start := text.rfind(BOX, 0, end)) < 0:
            break
        end = start
        if (close := _closing(text, start + len(BOX))) is None:
            continue
        content = text[start + len(BOX) : close].strip()
        if answer is None:
            answer = content
        elif JOINED.fullmatch(text, close + 1, begin):
            answer = f"{content}, {answer}"
        else:
            break
        begin = start
    return answer


def _closing(text: str, start: int) -> int | None:
    """Where the brace closes that opens just before `start`."""
    depth = 1
    for match in BRACE.finditer(text, start, start + LONGEST):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def hashed(text: str) -> str | None:
    """GSM8K's `#### N`: of several the first, since what follows an answer is a model running on."""
    answers = (match[1].strip() for match in HASH.finditer(text))
    return next((answer for answer in answers if not HEADING.match(answer)), None)


def find_answer(response: str) -> Found:
    r"""A response's answer: the last \boxed{}, else `#### N`, else what "the answer is", else the response's end."""
    if (answer := boxed(response)) is not None:
        return Found("boxed", answer)
    if (answer := hashed(response)) is not None:
        return Found("hash", answer)
    for match in reversed(list(PHRASE.finditer(response))[-MARKS:]):
        rest = PHRASE_START.sub("", response[match.end() : match.end() + LONGEST], count=1)
        if answer := PHRASE_END.split(rest, maxsplit=1)[0].strip(" *"):
            return Found("phrase", answer)
    return Found("last", response.strip()[-TAIL:])


def last_number(text: str) -> str | None:
    """The last number of a prose text; None where there is none or it is a part of an expression."""
    matches = list(LAST_NUMBER.finditer(text))
    if not matches or IN_LATEX & {*text[: matches[-1].start()][-1:], *text[matches[-1].end() :][:1]}:
        return None
    return matches[-1][0]


def canonical(answer: str) -> str:
    """One spelling for answers that differ in typesetting alone; idempotent is not promised."""
    answer = answer.strip()
    for pattern, replacement in SPELLINGS:
        answer = pattern.sub(replacement, answer)
    if answer.count("$") == 2 and answer.startswith("$") and answer.endswith("$"):
        answer = answer[1:-1]
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip()


def as_number(answer: str) -> PlainNumber | None:
    r"""A canonical answer that is one number, maybe with a unit in words; None for anything else.

    Takes 1,234.5  -3/4  \frac{3}{4}  50%  $18  1.5e-7  1.5 \times 10^{-7}  12 apples.
    """
    if len(answer) > LONGEST_NUMBER:
        return None
    answer = FRACTION.sub(lambda match: match[1] + "/".join(filter(None, match.groups()[1:])), answer)
    answer = re.sub(r"\s*(/|\\times|\\cdot|\*)\s*(?=\d)", r"\1", answer)
    if not (match := NUMBER.fullmatch(answer)):
        return None
    under = int(match["under"] or 1)
    if under == 0:
        return None
    value = Fraction(match["sign"] + match["number"].replace(",", "")) / under
    exponent = int(match["e"] or match["ten"] or 0)
    return PlainNumber(value * Fraction(10) ** exponent, bool(match["percent"]), bool(match["under"]))


def is_words(answer: str) -> bool:
    """Whether a canonical answer is prose ("east", "no solution") and so has no mathematics to compare."""
    longest = max(map(len, re.findall("[A-Za-z]+", answer)), default=0)
    return bool(WORDS.fullmatch(answer)) and (longest > 2 or answer.lower() == "no")
