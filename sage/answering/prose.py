"""The answer in a sentence of prose: its first complete value or list of values, or its last number.

"12 apples for 4 children" is 12; "12, 3 more than 9" is 12; "3, 4 or 5" is all three; "not 5 but 6" is 6.
Every function takes linear time in its text and evaluates nothing.
"""

from __future__ import annotations

import re

from sage.answering.spelling import CURRENCY, MAGNITUDE, MAGNITUDES, VULGAR
from sage.answering.spoken import DATE, NUMBER_WORD, SCALES, UNITS, in_units, read_spoken

# "$35 + $22" holds amounts, not a formula: a formula has a space inside both of its dollars or neither.
FORMULA = re.compile(
    r"\$\$[^$]+\$\$|\$(?! )[^$\n]+(?<! )\$(?!\d)|\$ [^$\n]* \$(?!\d)|\\\(.*?\\\)|\\\[.*?\\\]", re.S
)
THOUSANDS = (
    r"\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,3}(?:['’]\d{3})+(?!\d)|\d{1,3}(?:[ '’\u00a0\u202f\u2009]\d{3})+(?!\d)"
)
FRACTIONS = "".join(VULGAR)
TIME = r"\d{1,2}(?::\d\d){0,2}\s?[ap]\.?m\b\.?|\d{1,2}:\d\d(?::\d\d)?(?!\d)"
MIXED = rf"\d+ (?:and )?\d+/\d+(?![\d,])|(?:\d+ ?)?[{FRACTIONS}]"
PLAIN = rf"(?:{TIME}|{MIXED}|(?:{THOUSANDS}|\d+)(?:\.\d+(?:\.\.\.|…)?)?(?:\s*/\s*\d+)?|\.\d+)"
SCALED = re.compile(
    rf"(?:\s*\\?%|\s+(?:{'|'.join(SCALES)}|percent|degrees)\b|\s?{MAGNITUDE}\b|\s*[ap]\.?m\b\.?|\s+and\s+a\s+half\b)*",
    re.I,
)

# A formula may stand in prose without dollars: a run of numbers, signs, single letters and bracketed groups.
FUNCTION = r"(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|mod)(?![A-Za-z])"
INNER = r"[(\[](?:\\[A-Za-z]+|(?![A-Za-z]{3})[^()\[\]\\]){0,200}[)\]]"
GROUP = (
    rf"[(\[](?:\\[A-Za-z]+|{INNER}|(?![A-Za-z]{{3}})[^()\[\]\\]){{0,200}}[)\]]"
    r"|\\\{(?:\\[A-Za-z]+|[^\\]){0,200}\\\}|\{[^{}A-Za-z]{0,200}\}"
)
ATOM = (
    rf"{PLAIN}|{GROUP}|\\[A-Za-z]+|\\[{{}},;!% ]|{FUNCTION}|[A-Za-z](?![A-Za-z'’]|\.[a-z])"
    r"|[A-Za-z]['’]{1,2}(?=\s?\()|[−–√∞π²³⁴⁵ⁿθ°×÷±≤≥≠∪∩∈]|[-+*/^=<>_|!:(){}\[\]]"
)
RUN = re.compile(rf"(?:{CURRENCY}?(?:{ATOM})\s*)+", re.I)
ARTICLE = re.compile(r"[AaI]\s+(?!(?:is|are|because|since|or|and|as|with|for|if|but|not|in)\b)[a-z]{2,}")
MATHS = re.compile(rf"[\d\\√∞π{FRACTIONS}]|^\s*[^A-Za-z\s]*[A-Za-z](?![A-Za-z])")
VALUE_START = re.compile(
    rf"(?<![\w.])(?={CURRENCY}?[-−+]?{CURRENCY}?(?:\\(?:[dt]?frac|sqrt)|[\d.{FRACTIONS}√]))|{FORMULA.pattern}",
    re.S,
)

JOINER = re.compile(r"\s*(?:[,;]\s*(?:and\s+|or\s+)?|(?:and|or)\s+|&\s*)(?=\S)", re.I)
UNIT_WORDS = re.compile(r"\s*(?:(?!(?:and|or)\b)[A-Za-z][A-Za-z.'²³-]*(?:\^\{?\d\}?)?\s*){0,4}")
# After "12, 3" these say that 3 is no second answer: "12, 3 more than 9".
STOPS = re.compile(
    r"\b(?:more|less|fewer|(?:great|larg|small|old|young|high|low|long|short)er|than|for|per|of|each|times|not|instead"
    r"|rather|from|if|with|without|in|on|at|to|by|as|when|where|because|since|so|which|that|is|are|was|were|would|will"
    r"|has|have|had|can|do|does|did|but|every|after|before|minus|plus|divided|multiplied|left|over|out|remaining)\b",
    re.I,
)
FILLER = re.compile(
    r"(?:therefore|thus|then|hence|simply|just|exactly|precisely|clearly|indeed|still|actually|now|definitely|probably"
    r"|either|both|approximately|approx\.|ca\.|about|around|roughly|equal to|option|choice|letter|always|only"
    r"|also|found to be|the (?:number|value|set|interval|pair)|going to be|given by"
    r"|[,:]|that|≈|=|\\approx)(?![A-Za-z])\s*",
    re.I,
)
NO = r"\bnot|n['’]t|\bnever|\bneither|\bnor|\bcannot|\bno longer"
NEGATION = re.compile(rf"(?:{NO})\b", re.I)
COMPARED = r"(?:more|less|fewer|greater|larger|smaller|bigger|higher|lower) than"
# What makes a number part of a larger value: "half of 10", "one in twelve", "4 remainder 2".
OPERATED = r"\b(?:double|twice|triple|(?:half|third|quarter|fifth|root|square|cube|logarithm|factorial) of)"
GOES_ON = re.compile(
    r"(?:\s+(?:point|plus|minus|times|over|choose|remainder|r|out of|(?:divided|multiplied) by)"
    r"|(?:(?<=\b1)|(?<=\bone))\s+in)"
    rf"\s+(?:{NUMBER_WORD}|\d+)(?![\w,]|\s+[a-z])",
    re.I,
)
RULED_OUT = re.compile(  # just before a number
    rf"(?:(?:{NO})(?:\s+(?:be|equal|equal to|just|only|exactly|the))*"
    rf"|{OPERATED}|\b(?:instead of|rather than|other than|{COMPARED}|between|unlike|over|under|above|below"
    r"|at least|at most|up to))\s*[$(*\s]*$",
    re.I,
)
RANGE = re.compile(
    rf"(?:somewhere )?(?:anything but|between|from|at (?:least|most)|up to|over|under|above|below"
    rf"|{COMPARED})\b",
    re.I,
)
SPAN = re.compile(
    rf"{CURRENCY}?{PLAIN}(?: [a-z]+)? to {CURRENCY}?\d(?![^.]*\b(?:decimal|significant|place))", re.I
)
YES_OR_NO = re.compile(r"(?:yes|no|true|false)\b(?=\s*(?:[,;.]|because|since|as|$))", re.I)
INSTEAD = re.compile(r"(?:\bbut|\brather|it is|it's|it equals)\s+(?:is\s+|it is\s+|rather\s+)?", re.I)
TEXT_END = re.compile(
    r",?\s(?:because|since|which|so|if|but|instead of|rather than|as (?:it|the|we|they)|when|where|after"
    r"|not)\b|,\s(?:and|for)\b"
)

NUMBER = re.compile(
    rf"(?<![\w.])(?:[-−+]?{CURRENCY}[-−+]?{PLAIN}\s?(?:{'|'.join(MAGNITUDES)})\b"
    rf"|(?:[-−+]{CURRENCY}?|{CURRENCY}[-−+]?)?{PLAIN}{SCALED.pattern})",
    re.I,
)
IN_LATEX = set("{}^_\\/*")  # beside a number: it belongs to an expression
RATIO = re.compile(r"\d(?::|\s(?:in|out of)\s| [-+*] )$")  # just before a number: 3:4, 3 in 8, 3 + 4
YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
OR = re.compile(rf"{PLAIN}\$?(?:\s+[a-z]+)?,?\s+or\s+(?:perhaps |maybe |even )?[$(*]*$", re.I)


def first_answer(sentence: str) -> str | None:
    """The first complete answer in what follows "the answer is"; None if there is none, as in "not 5"."""
    sentence = sentence.strip()
    if match := NEGATION.match(sentence):
        if not (found := INSTEAD.search(sentence, match.end())):
            return None
        sentence = sentence[found.end() :]
    start = 0
    while (match := FILLER.match(sentence, start)) and not RANGE.match(sentence, start):
        start = match.end()
    if RANGE.match(sentence, start) or SPAN.match(sentence, start):
        return None
    if whole := _whole(sentence, start):
        return whole
    if values := _values(sentence, start):
        return values
    for match in VALUE_START.finditer(sentence, start):
        if not RULED_OUT.search(sentence, max(match.start() - 40, 0), match.start()):
            return _values(sentence, match.start())
    if re.search(r"\d", sentence) or not re.search(r"[A-Za-z]", sentence):
        return None
    return TEXT_END.split(sentence[start:], maxsplit=1)[0].strip(" *,;:") or None


def _whole(text: str, start: int) -> str | None:
    """A date, a quantity in several units, or yes or no: an answer that is more than its first number."""
    if match := DATE.match(text, start):
        return match[0]
    if (match := UNITS.match(text, start)) and in_units(match):
        return match[0]
    match = YES_OR_NO.match(text, start)
    return match[0] if match else None


def _values(text: str, start: int) -> str | None:
    """The value that begins at `start`, or the list of values, joined by commas."""
    items: list[str] = []
    while (item := _value(text, start)) is not None:
        value, end = item
        words = UNIT_WORDS.match(text, end)
        assert words
        after = words.end()
        dangling = bool(STOPS.search(words[0]))
        if items and dangling:
            break
        items.append(value)
        if dangling or not (joiner := JOINER.match(text, after)):
            break
        start = joiner.end()
    return ", ".join(items) or None


def _value(text: str, start: int) -> tuple[str, int] | None:
    """One value with its scale ("million"), and where it ends.

    The value is a formula in dollars, a number in words, or a bare formula.
    """
    if match := FORMULA.match(text, start):
        scale = SCALED.match(text, match.end())
        assert scale
        return (f"{match[0].strip('$')}{scale[0]}" if scale[0] else match[0]), scale.end()
    if spoken := read_spoken(text, start):
        end = more.end() if (more := GOES_ON.match(text, spoken[1])) else spoken[1]
        return text[start:end], end
    match = RUN.match(text, start)
    if not match or ARTICLE.match(text, start) or not MATHS.search(match[0]):
        return None
    run = re.sub(r"(?<=[\d)}%])\s+a\s*$", "", match[0])  # an article: "18 a day"
    run = run.rstrip(":-= ")
    while run.count("(") > run.count(")") and "[" not in run:
        run = run[: run.rindex("(")].rstrip()
    scale = SCALED.match(text, start + len(run))
    assert scale
    run = half(run + scale[0])
    if "=" in run and re.search(rf"\d\s*[-+*/×÷]\s*{CURRENCY}?\d", run.split("=")[0]):
        run = run.rsplit("=", 1)[1].strip()  # 9 * 2 = 18
    if run and (more := GOES_ON.match(text, scale.end())):
        return run + more[0], more.end()
    return (run, scale.end()) if run else None


def half(number: str) -> str:
    return re.sub(r"\s+and\s+a\s+half$", " 1/2", number.strip())


def last_number(text: str) -> str | None:
    """The last number of a prose text that is not ruled out, as in "12 instead of 15".

    None where there is no number, it belongs to a formula or a ratio, or it is one of several: "4 or 5".
    """
    for match in reversed(list(NUMBER.finditer(text))):
        start = match.start()
        if RULED_OUT.search(text, max(start - 40, 0), start):
            continue
        after = re.sub(r"^/(?=[A-Za-z])", "", text[match.end() : match.end() + 2])  # 60/hour is 60
        in_latex = IN_LATEX & {*text[:start][-1:], *after[:1]}
        if RATIO.search(text, max(start - 10, 0), start):
            if YEAR.fullmatch(match[0]):
                continue  # 24200 in 2010
            return None
        if parts := next((m for m in UNITS.finditer(text) if m.start() < start < m.end()), None):
            return parts[0] if in_units(parts) else half(match[0])
        return None if in_latex or OR.search(text, max(start - 80, 0), start) else half(match[0])
    return None
