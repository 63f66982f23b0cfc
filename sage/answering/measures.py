"""Whether two times, dates, quantities in several units, or numbers with a base are the same."""

from __future__ import annotations

import re

from sage.answering.spelling import RAISED_UNIT, SHORT_UNIT, WORD_UNIT, as_number
from sage.answering.spoken import DATE, UNITS, in_units, read_date

TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s?(?:([ap])\.?m\.?)?", re.I)
BASED = re.compile(
    r"(-?[\dA-Fa-f]+)\s?_\s?\{?\s?(\d+|two|three|four|five|six|seven|eight|nine|ten|sixteen)\s?\}?"
)
BASES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

# A unit after a formula is a word of four letters or more that stands apart, or a known shorter one.
FORMULA_UNIT = (
    rf"(?:sq\.? |cu\.? )?(?:(?<=[ /])(?!degrees\b)(?=[a-z]{{4}}){WORD_UNIT}|{SHORT_UNIT}"
    rf"|(?:cups?|days?|deg|gal|mol|ohms?|rad|yds?)(?![A-Za-z])){RAISED_UNIT}"
)
UNIT_END = re.compile(
    rf"(?:(?<=[\d}})])|(?<=\\pi)|(?<=\s)) ?"
    rf"(?P<unit>{FORMULA_UNIT}(?: {FORMULA_UNIT})*(?: ?/ ?{FORMULA_UNIT})?(?: per {FORMULA_UNIT})?)$"
)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
BRACKETED = re.compile(r"-?[\d.]*\([^()]*\)")


def without_unit(formula: str, truth: str | None = None) -> str:
    r"""A formula without the unit at its end: 4\pi for 4\pi cm. `truth` is the true answer if it is another.

    One or two letters are a unit only after a product of plain numbers: those of x^2 t and 5 + 3m are
    variables. In a true answer they are two that stand apart (4\pi cm). Else the true one has no letter.
    """
    if formula.endswith(" degrees") and not TRIGONOMETRY.search(formula):
        return formula.removesuffix(" degrees").strip()
    match = UNIT_END.search(formula)
    if not match:
        return formula
    rest = formula[: match.start()].strip()
    longest = max(map(len, re.findall("[A-Za-z]+", match["unit"])))
    if longest <= 2:
        sure = longest == 2 and formula[match.start("unit") - 1] == " "
        variable = not sure if truth is None else VARIABLE.search(truth)
        a_sum = re.search(r"\S ?[-+=<>]", rest) and not BRACKETED.fullmatch(rest)
        if variable or a_sum or VARIABLE.search(rest):
            return formula
    return rest or formula


def same_times(a: str, b: str) -> bool | None:
    """Times of day; None where neither is one. Without a.m. or p.m. on one side, the clock's face counts."""
    first, second = TIME.fullmatch(a), TIME.fullmatch(b)
    if not any(match and (match[2] or match[4]) for match in (first, second)):
        return None
    if not first or not second:
        return False

    def read(match: re.Match[str]) -> tuple[int, int, int]:
        hour = int(match[1])
        if match[4]:
            hour = hour % 12 + 12 * (match[4].lower() == "p")
        return hour, int(match[2] or 0), int(match[3] or 0)

    one, other = read(first), read(second)
    unit_left_out = bool(first[4]) != bool(second[4]) and int(first[1]) == int(second[1])
    return one == other or (unit_left_out and one[1:] == other[1:])


def same_dates(a: str, b: str) -> bool | None:
    """Dates; a year may be left out. None where neither is one."""
    matches = [DATE.fullmatch(text) for text in (a, b)]
    if not any(matches):
        return None
    dates = [read_date(match) for match in matches if match]
    return len(dates) == 2 and dates[0][1:] == dates[1][1:] and len({date[0] for date in dates} - {None}) < 2


def same_in_units(a: str, b: str) -> bool | None:
    """2 hours and 30 minutes are 2.5 and 150. None where neither is a quantity in several units."""
    first, second = (match and in_units(match) for match in map(UNITS.fullmatch, (a, b)))
    if first and second:
        return any(first[unit] == second[unit] for unit in {*first} & {*second})
    if not first and not second:
        return None
    number = as_number(b if first else a)
    return number is not None and number.value in (first or second or {}).values()


def same_in_base(a: str, b: str) -> bool:
    """2516_7 is not 2516_8. A base may be left out, like a unit."""

    def read(text: str) -> tuple[str, int | None]:
        match = BASED.fullmatch(text)
        if not match:
            return text.replace(",", "").lower(), None
        base = match[2]
        return match[1].lower(), int(base) if base.isdigit() else 16 if base == "sixteen" else BASES.index(
            base
        )

    (first, base), (second, other) = read(a), read(b)
    return first == second and (base == other or base is None or other is None)
