r"""Where a response says its answer: after its thought, in a mark, in a phrase, or at its end.

Responses are hostile input: every function takes linear time in its text and evaluates nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from sage.answering.prose import first_answer
from sage.answering.spelling import CURRENCY, POWER
from sage.answering.spoken import PARTS
from sage.data.thoughts import CLOSE, OPEN

LONGEST = 4000  # characters of an answer that are read
TAIL = 1000  # characters at the end of a response without a marked answer
MARKS = 16  # how many boxes or phrases are looked at, from the end

# The marks of templates, of Sky-T1, and of gpt-oss, whose channels stand for them.
THOUGHT_OPENS = re.compile(rf"{OPEN.pattern}|<\|begin_of_thought\|>|<\|channel\|>analysis<\|message\|>", re.I)
THOUGHT_CLOSES = re.compile(rf"{CLOSE.pattern}|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>", re.I)
ANSWER_TAG = re.compile(r"<answer>|</answer>", re.I)

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
NOT_THIS = re.compile(r"\b(?:not|instead of|rather than)\s*(?:\\\(|\\\[|[$*\s])*$", re.I)  # just before a box
BARE_BOX = re.compile(r"[^\n$]*?(?=\$|\n|\\[)\]]|[.,;:!?](?:\s|$)|\s(?:and|or)\s|$)")
BRACE = re.compile(r"\\.|[{}]", re.S)
JOINED = re.compile(
    r"(?:[\s$*,;]|\\[()\[\]]|\\(?:quad|qquad)|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)*"
    r"(?:\(?(?:[a-h]|i{1,3}|iv|v)\)[\s:$]*|(?:\\\(\s*)?[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\in)\s*)?"
)
PLACEHOLDER = re.compile(
    r"(?:\\text\s*\{)?\s*(?:(?:your |the |final )*answer(?: here)?|\.\.\.|\\l?dots|…|\\cdots)?\s*\}?", re.I
)

HASH = re.compile(rf"(?<!#)####\s*((?:[-+−]|{CURRENCY})*[\d.(\[\\½⅓⅔¼¾√].*|\(?[A-J]\)?\.?\s*$)", re.M)
HEADING = re.compile(r"\(?(?:\d+|[a-h])[.)]\s+[A-Za-z*]")  # "#### 1. Find the cost" is Markdown, not GSM8K

SUBJECT = r"(?:\s+(?:to|for|of)\b[^.\n:]{0,60}?)?"
PHRASE = re.compile(
    rf"^A:|\b(?P<final>final\s+)?answers?{SUBJECT}(?:\s+(?:is|are|was|(?:would|will|should|must)\s+be|equals)\b"
    r"|(?:\s+is)?\s*\**\s*[:=])|\b(?:correct|right|best)\s+(?:option|choice)\s+(?:is|:)",
    re.M | re.I,
)
UNREAL = re.compile(
    r"\b(?:if|whether|suppose|assume|unless|wrong|incorrect)\s+(?:that\s+)?(?:the\s+|an\s+|his\s+)?$", re.I
)
DENIED = re.compile(
    r"(?:\bdoubt|(?:\bnot|\bnever|n['’]t)\s+(?:think|believe|say|mean))\s+(?:that\s+)?(?:the\s+)?$", re.I
)
# Signs and operations in words: "negative 5", "is minus 5", "plus or minus 5", "5 squared", "3 times 4".
BEFORE_NUMBER = r"\s+(?=[$(]{0,2}(?:[\d.]|\\[dt]?frac))"
WORDED: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern, re.I | re.M), sign)
    for pattern, sign in [
        (rf"\b(?:plus|positive) or (?:minus|negative){BEFORE_NUMBER}", r"\\pm "),
        (rf"(?:\bnegative|(?<=\bis )minus|(?<=\bto )minus|(?<=: )minus){BEFORE_NUMBER}", "-"),
        (r"(?<=\d) (?:squared|to the second power)\b", "^2"),
        (r"(?<=\d) (?:cubed|to the third power)\b", "^3"),
        (r"(?<=\d) to the power (?:of )?(?=\d)", "^"),
        (r"(?<=\d) factorial\b", "!"),
        (r"(?<=\d) plus (?=\$?\d)", " + "),
        (r"(?<=\d) minus (?=\$?\d)", " - "),
        (r"(?<=\d) (?:times|multiplied by) (?=\$?\d)", " * "),
        (r"(?<=\d) divided by (?=\$?\d)", " / "),
        (r"(?<=\d) (?:over|out of) (?=\d+[.!?]?(?:\s*$|\s+(?-i:[A-Z])))", "/"),  # not "5 out of 8 people"
        (rf"(?<=\d)[- ](?!quarter|hal)({'|'.join(PARTS)})s\b", lambda match: f"/{PARTS[match[1].lower()]}"),
        (POWER.pattern, "^"),
    ]
]
PHRASE_START = re.compile(r"(?:[\s:*>]|\\\[|\$\$)*")
ABBREVIATED = "".join(
    rf"(?<!\b{word})" for word in ("Rs", "approx", "ca", "St", "Mt", "Dr", "Mr", "Mrs", "Ms")
)
PHRASE_END = re.compile(rf"(?:(?<!\.){ABBREVIATED}\.|[!?])(?=\s|$|\*)|\n|\*\*|</")


class Found(NamedTuple):
    """`where` is "tag", "boxed", "hash", "phrase" or "last". With "last", `text` is the response's end."""

    where: str
    text: str


def find_answer(response: str) -> Found:
    r"""A response's answer, after its thought. The first of these that is there:

    the last <answer>, the last \boxed{}, the first `#### N`, what "the final answer is",
    what "the answer is", the end of the response.
    """
    text = after_thought(response)
    for pattern, sign in WORDED:
        text = pattern.sub(sign, text)
    if (tagged := _tagged(text)) is not None:
        inner = _marked(tagged)
        return inner or Found("tag", (_phrase(tagged)[0] or tagged.strip())[:LONGEST])
    if found := _marked(text):
        return found
    answer, rest = _phrase(text)
    return Found("phrase", answer) if answer else Found("last", rest.strip()[-TAIL:])


def after_thought(response: str) -> str:
    """The response without its thoughts.

    A thought may be closed, or opened by the prompt and only closed here, or unfinished at the end.
    """
    if closes := list(THOUGHT_CLOSES.finditer(response)):
        opened = THOUGHT_OPENS.search(response, 0, closes[-1].start())
        response = (response[: opened.start()] if opened else "") + "\n" + response[closes[-1].end() :]
    opened = THOUGHT_OPENS.search(response)
    return response[: opened.start()] if opened else response


def _tagged(text: str) -> str | None:
    """What stands in the last <answer> that is not empty; one that is not closed ends with the text."""
    tags = list(ANSWER_TAG.finditer(text))
    for i in reversed(range(len(tags))):
        if tags[i][0].startswith("</"):
            continue
        content = text[tags[i].end() : tags[i + 1].start() if i + 1 < len(tags) else len(text)]
        if content.strip(" .\n"):
            return content
    return None


def _marked(text: str) -> Found | None:
    if (answer := boxed(text)) is not None:
        return Found("boxed", answer)
    if (answer := hashed(text)) is not None:
        return Found("hash", answer[:LONGEST])
    return None


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} that is closed and not empty, the innermost of nested ones.

    Several in a list ("\boxed{2} or \boxed{3}") make one answer. \fbox{7}, \boxed7 and \boxed 7 count too.
    """
    answer, begin = None, len(text)
    for match in reversed(list(BOX.finditer(text))[-MARKS:]):
        if (span := _box(text, match.end())) is None:
            continue
        content = text[match.end() : span].strip().removeprefix("{").strip()
        if PLACEHOLDER.fullmatch(content) or (answer is not None and span >= begin):
            continue  # nothing in it, or a box around the one that counts
        if NOT_THIS.search(text, max(match.start() - 40, 0), match.start()):
            continue
        if answer is None:
            answer = content
        elif JOINED.fullmatch(text, span + (text[span : span + 1] == "}"), begin):
            answer = f"{content}, {answer}"
        else:
            break
        begin = match.start()
    return answer


def _box(text: str, start: int) -> int | None:
    """The end of the content of the box whose command ends at `start`; None if the box is not closed."""
    if not text.startswith("{", start):
        end = BARE_BOX.match(text, start, start + LONGEST)
        return end.end() if end and end[0].strip() else None
    depth = 0
    for match in BRACE.finditer(text, start, start + LONGEST):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def hashed(text: str) -> str | None:
    """GSM8K's `#### N`: the first of several, since what follows an answer is a model that runs on."""
    answers = (match[1].strip() for match in HASH.finditer(text))
    return next((answer for answer in answers if not HEADING.match(answer)), None)


def _phrase(text: str) -> tuple[str | None, str]:
    """The answer of the last phrase that gives one, and the text that is left to search where none does.

    "The final answer is" comes before other phrases. Phrases without an answer ("it is not 5") are cut off.
    """
    matches = [
        match
        for match in list(PHRASE.finditer(text))[-MARKS:]
        if not UNREAL.search(text, max(match.start() - 40, 0), match.start())
    ]
    cut = len(text)
    for match in sorted(matches, key=lambda m: (not m["final"], -m.start())):
        start = match.end() + len(PHRASE_START.match(text, match.end())[0])  # pyright: ignore
        sentence, asked = _sentence(text, start)
        denied = DENIED.search(text, max(match.start() - 40, 0), match.start())
        if not asked and not denied and (answer := first_answer(sentence)):
            return answer, text
        if sentence.strip():
            cut = min(cut, match.start())
    return None, text[:cut]


def _sentence(text: str, start: int) -> tuple[str, bool]:
    """The formula or the sentence that begins at `start`, and whether it is a question."""
    opening = text[max(start - 2, 0) : start]
    if opening in ("\\[", "$$"):
        end = text.find({"\\[": "\\]", "$$": "$$"}[opening], start, start + LONGEST)
        if end > 0:
            return f"${text[start:end].strip()}$", False
    end = PHRASE_END.search(text, start, start + LONGEST)
    return text[start : end.start() if end else start + LONGEST].strip(" *"), bool(end and end[0] == "?")
