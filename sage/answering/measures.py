"""Whether two times, dates, quantities in two units, or numbers with a base are the same."""

from __future__ import annotations

import re

from sage.answering.spelling import as_number
from sage.answering.spoken import DATE, TWO_UNITS, read_date, two_units

TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s?(?:([ap])\.?m\.?)?", re.I)
BASED = re.compile(
    r"(-?[\dA-Fa-f]+)\s?_\s?\{?\s?(\d+|two|three|four|five|six|seven|eight|nine|ten|sixteen)\s?\}?"
)
BASES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


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


def same_two_units(a: str, b: str) -> bool | None:
    """2 hours and 30 minutes are 2.5 and 150. None where neither is such a quantity."""
    values = [(match and two_units(match)) for match in map(TWO_UNITS.fullmatch, (a, b))]
    if not any(values):
        return None
    mine, theirs = (
        {*value} if value else {number.value} if number else set()
        for value, number in zip(values, (as_number(a), as_number(b)), strict=True)
    )
    return mine == theirs if all(values) else bool(mine & theirs)


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
