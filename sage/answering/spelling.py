r"""One spelling for answers that differ only in typesetting, and the exact value of plain numbers.

Answers are hostile input: every function takes linear time in its text and evaluates nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from sage.answering.spoken import SCALES, SPOKEN, read_spoken

LONGEST_NUMBER = 1000  # characters
MIN_DIGITS = 6  # a decimal with this many significant digits may stand for a number that rounds to it

CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **dict.fromkeys("−–—‐‑‒", "-"),
        **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # full-width ASCII
        **{
            char: rf"\{name} "
            for char, name in zip(
                "∞πθαβγλωφ×·⋅±≤⩽≥⩾≠≈∪∩∈∅…",
                [
                    "infty",
                    "pi",
                    "theta",
                    "alpha",
                    "beta",
                    "gamma",
                    "lambda",
                    "omega",
                    "phi",
                    "times",
                    "cdot",
                    "cdot",
                    "pm",
                    "le",
                    "le",
                    "ge",
                    "ge",
                    "ne",
                    "approx",
                    "cup",
                    "cap",
                    "in",
                    "emptyset",
                    "ldots",
                ],
                strict=True,
            )
        },
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("′’", "'"),
        "ℝ": r"\mathbb{R}",
        "°": " degrees ",
    }
)
VULGAR = {
    char: rf"\frac{{{a}}}{{{b}}}"
    for char, (a, b) in zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞",
        ("12", "13", "23", "14", "34", "15", "25", "35", "45", "16", "56", "18", "38", "58", "78"),
        strict=True,
    )
}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ", "0123456789+-nx")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} and 0.1666... as the fraction that they are."""
    whole, digits, block = match["whole"] or "0", match["digits"], match["block"]
    if block is None:  # it must stand there three times, or twice where it has several digits
        for length in range(1, len(digits) // 2 + 1):
            times = 3 if length == 1 else 2
            if digits.endswith(digits[-length:] * times):
                block = digits[-length:]
                break
        else:
            return match[0]
        while digits.endswith(block):
            digits = digits[: -len(block)]
    scale = 10 ** len(digits)
    value = Fraction(int(whole + digits), scale) + Fraction(int(block), scale * (10 ** len(block) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


CURRENCY = (
    r"(?:(?:(?:US|CA|AU|NZ|HK|SG|[ACRS])?\$|[€£¥₹₩₱₽₺₫₦]"
    r"|(?<![A-Za-z])(?:Rs\b\.?|(?:USD|EUR|GBP|INR|CAD|AUD|CNY|JPY)\b)) ?)"
)
MAGNITUDES = {
    "k": "thousand",
    "m": "million",
    "mn": "million",
    "mil": "million",
    "b": "billion",
    "bn": "billion",
}
MAGNITUDE = "(?:mn|mil|bn)"  # those that need no currency before them


def _magnitude(match: re.Match[str]) -> str:
    return f"{match[1] or ''} {MAGNITUDES[match[match.lastindex or 0].lower()]}"


SET_TYPE = "text|mbox|mathrm|mathbf|textbf|textrm|textit|mathit|mathsf|boldsymbol|bm|operatorname|emph"
FRAMES = "underline|boxed|fbox|framebox|ensuremath|displaystyle"
NO_UNIT = (
    r"and\b|or\b|[ap]\.?m\b|thousand|million|billion|trillion|dozen|hundred|percent"
    r"|[^{}]*[\d!+*=]|(?:plus|minus|times|to|over|squared|cubed)\b|[kKMBie]\s*\}"
)
POWER = re.compile(r"(?:(?<=[\d)])|(?<=\b[A-Za-z]))\*\*(?=-?\d+(?!\d|\*\*))")  # Python's, not Markdown
# Spelling only: none of these changes what an expression says. The order matters.
SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda match: VULGAR[match[0]]),
        ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ]+", lambda match: f"^{{{match[0].translate(RAISED)}}}"),
        ("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: f"_{{{match[0].translate(LOWERED)}}}"),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?:√|(?<![A-Za-z\\])sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(?=\{)", r"\\sqrt"),
        (r"\\(?:left|right|displaystyle|limits|quad|qquad|[Bb]igg?[lr]?)(?![A-Za-z])", " "),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=\d)(?:\{,\}|,?\\[,!; ])(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<=\d)'(?=\d{3}(?!\d))", ""),
        (r"(?<=\d) \([A-Za-z]{2,}\)$", ""),  # 42 (km)
        (r"(?<!\\)\\[!,;: ]|~", " "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])inf(?:ty)?(?![A-Za-z])", r"\\infty "),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (rf"\\(?:{FRAMES})\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r"\1"),
        # A unit: "15\text{ cm}^2". Elsewhere such a macro only sets type.
        (
            rf"(?:(?<=[\d}}])|(?<=\\pi))\s*\\(?:text|mbox|mathrm|textrm)\s*\{{(?!\s*(?:{NO_UNIT}))[^{{}}]*\}}(?:\^\{{?-?\d\}}?)?$",
            "",
        ),
        (r"\\(?:text|mbox|mathrm|textrm)\s*\{\s*([ie])\s*\}", r" \1 "),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (rf"\\(?:{SET_TYPE})\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r"\1"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", " degrees "),
        (r"\\%", "%"),
        (r"\\\$", "$"),
        (POWER.pattern, "^"),
        (r"(?<!\\)\\[()\[\]]|\*\*", ""),
        (r"\\(?:leq|leqslant|le)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=", r"\\ne "),
        (r"\\(?:dots|cdots|dotsc|dotsb)(?![A-Za-z])|(?<=,)\s*(?:\.\.\.|…)", r"\\ldots "),
        (r"\(?(?<![A-Za-z])\\?[pb]?mod(?![A-Za-z])\s*\{?\s*(\w+)\s*\}?\)?", r"\\pmod{\1}"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:mathbb|mathbf)\s*\{?R\}?|\ball real numbers\b", r"(-\\infty , \\infty )"),
        (
            r"\(-\\infty , \\infty \)\s*\\(?:setminus|backslash)\s*\\\{([^{}\\,]*)\\\}",
            r"(-\\infty , \1) \\cup (\1, \\infty )",
        ),
        (r"\binfinity\b", r"\\infty "),
        (r"(?<![\w)}])\+\s*(?=\\infty)", ""),
        (
            r"(?<![\d.])(?P<whole>\d*)\.(?P<digits>\d*)\\(?:overline|bar|dot)\s*\{?(?P<block>\d+)\}?",
            _repeating,
        ),
        (r"(?<![\d.])(?P<whole>\d*)\.(?P<digits>\d*)\((?P<block>\d+)\)", _repeating),
        (r"(?<![\d.])(?P<whole>\d*)\.(?P<digits>\d{3,40})(?P<block>(?!))?(?:\.\.\.|\\ldots)", _repeating),
        (r"\\infty(?![A-Za-z])", r"\\infty "),
        # 3/4 x is three quarters of x.
        (r"(?<![\w.^_/{])(\d+)/(\d+) ?(?=[A-Za-z](?![A-Za-z]))", r"\\frac{\1}{\2} "),
        (
            rf"^(-?{CURRENCY}-?\d[\d,.]*) ?((?i:{'|'.join(MAGNITUDES)}))\.?$|(?<=\d) ?((?i:{MAGNITUDE}))\.?$",
            _magnitude,
        ),
    ]
]


INTRODUCTION = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is)?:? (?=\S)", re.I
)
PLAINEST = re.compile(r"[-+]?\d+\.?")  # nothing to respell


def canonical(answer: str) -> str:
    """One spelling for answers that differ only in typesetting. A second call may change the result again."""
    answer = _undollar(answer.strip())
    if PLAINEST.fullmatch(answer):
        return answer.rstrip(".")
    answer = answer.translate(CHARACTERS)
    for pattern, replacement in SPELLINGS:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"\s+", " ", _undollar(answer)).strip().rstrip(".\\ ")
    return INTRODUCTION.sub("", answer)


def _undollar(answer: str) -> str:
    whole = answer.count("$") == 2 and answer.startswith("$") and answer.endswith("$")
    return answer[1:-1].strip() if whole else answer


# --- plain numbers

DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
FRACTION = re.compile(
    rf"^(?P<before>[-+]?{CURRENCY}?(?P<whole>\d*) ?)"
    r"\\frac ?(?:\{ ?(?P<a>-?\d+) ?\} ?\{ ?(?P<b>-?\d+) ?\}|(?P<c>\d) ?(?P<d>\d)|(?P<e>\d) ?\{(?P<f>\d+)\})"
)
NO_WORD_UNIT = (
    "sqrt|(?:sin|cos|tan|cot|csc)[hxy]?|sec|log|exp|mod|and|or|than|not|if|squared|cubed|factorial|plus|minus"
    "|halved|doubled|tripled|alpha|beta|gamma|delta|theta|lambda|omega|sigma|" + "|".join([*SCALES, *SPOKEN])
)
WORD_UNIT = rf"(?!(?:{NO_WORD_UNIT})\b)[A-Za-z][A-Za-z.'-]{{2,}}"
SHORT_UNIT = (
    r"(?:[mcdk]m|mi|ft|in|yd|[mk]?g|lbs?|oz|[mc]l|mL|hr?s?|min|sec|ms|mph|kmh|kph|[kM]?Hz|k?Pa|[kM]?J|[kM]?W|kWh|kN|eV|(?-i:°?[CF])"
    r"|(?-i:[mgslLhNJWVK]))(?![A-Za-z])"
)
RAISED_UNIT = r"(?: ?\^ ?\{? ?-?\d ?\}?| squared\b| cubed\b)?"
UNIT = rf"(?:sq\.? |cu\.? )?(?:{WORD_UNIT}|{SHORT_UNIT}){RAISED_UNIT}"
TOUCHING_UNIT = rf"(?: ?(?:[mck]m|kg|ft|mph|lbs?)(?![A-Za-z]){RAISED_UNIT})?"
UNITS = rf"{TOUCHING_UNIT}(?: {UNIT})*(?: ?/ ?{UNIT})?(?: per {UNIT})?"
NUMBER = re.compile(
    rf"{CURRENCY}?(?P<sign>[-+]?) ?{CURRENCY}?"
    rf"(?:(?P<whole>\d+) (?:and )?(?P<over>\d+) ?/ ?(?P<by>\d+)|(?P<number>{DIGITS})"
    r"(?: ?/ ?(?P<under>-?\d+)|e(?P<e>[-+]?\d{1,3})"
    r"| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{? ?(?P<ten>[-+]?\d{1,3}) ?\}?)?)"
    rf"(?P<scales>(?: ?(?:{'|'.join(SCALES)}))*)(?: ?{CURRENCY}|(?: US)\b)?"
    rf"(?P<percent> ?%| percent\b)?{UNITS}",
    re.I,
)


class PlainNumber(NamedTuple):
    """A number's exact value, and whether it is a percentage.

    `place` is what one more in the last digit would add, for a decimal of MIN_DIGITS digits or more.
    """

    value: Fraction
    percent: bool
    place: Fraction | None


def as_number(answer: str) -> PlainNumber | None:
    r"""A canonical answer that is one number, maybe with a unit; None for anything else.

    Takes 1,234.5  1 234  -3/4  \frac{3}{4}  2 2/3  2\frac23  50%  $18  1.5e-7  1.5 \times 10^{-7}
    1.5 million  12 apples  18 cm^2  twelve.
    """
    if len(answer) > LONGEST_NUMBER:
        return None
    if PLAINEST.fullmatch(answer):
        return PlainNumber(Fraction(int(answer.rstrip("."))), False, None)
    if match := FRACTION.match(answer):
        top, bottom = match["a"] or match["c"] or match["e"], match["b"] or match["d"] or match["f"]
        if match["whole"] and (top + bottom).count("-"):
            return None
        if top.startswith("-") and not match["before"].strip():
            top, answer = top[1:], "-" + answer
            match = FRACTION.match(answer)
            assert match
        answer = (
            f"{match['before'].rstrip()}{' ' if match['whole'] else ''}{top}/{bottom}{answer[match.end() :]}"
        )
    elif spoken := read_spoken(answer):
        answer = spoken[0] + answer[spoken[1] :]
    if not (match := NUMBER.fullmatch(answer)):
        return None
    under = int(match["by"] or match["under"] or 1)
    if under == 0:
        return None
    digits = re.sub("[, ]", "", match["number"] or match["whole"])
    value = (Fraction(digits) + Fraction(int(match["over"] or 0), under if match["by"] else 1)) / (
        1 if match["by"] else under
    )
    factor = Fraction(10) ** int(match["e"] or match["ten"] or 0)
    for scale in match["scales"].lower().split():
        factor *= SCALES[scale]
    _, point, decimals = digits.partition(".")
    exact = not point or len(digits.replace(".", "").lstrip("0")) < MIN_DIGITS or under != 1
    place = None if exact else factor / 10 ** len(decimals)
    sign = -1 if match["sign"] == "-" else 1
    return PlainNumber(sign * value * factor, bool(match["percent"]), place)


def same_number(a: PlainNumber, b: PlainNumber) -> bool:
    """50% equals 50, as answers are marked, and 0.5. A long decimal equals the fraction that rounds to it."""
    if a.percent != b.percent:
        percent, other = (a, b) if a.percent else (b, a)
        scaled = PlainNumber(percent.value / 100, False, percent.place and percent.place / 100)
        return same_number(scaled, other._replace(percent=False)) or same_number(
            percent._replace(percent=False), other
        )
    if (a.place is None) != (b.place is None):
        near = abs(a.value - b.value) <= (a.place or b.place or 0) / 2
        return a.value == b.value or (near and _endless(b if a.place else a))
    return a.value == b.value


def _endless(number: PlainNumber) -> bool:
    """Whether no decimal says the number exactly."""
    rest = number.value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1


def is_words(answer: str) -> bool:
    """Whether a canonical answer is prose ("east", "no solution") and so has no mathematics to compare."""
    longest = max(map(len, re.findall("[A-Za-z]+", answer)), default=0)
    prose = re.fullmatch(r"[A-Za-z][A-Za-z ,.;:'-]*", answer)
    return bool(prose) and (longest > 2 or answer.lower() == "no")
