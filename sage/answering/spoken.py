"""Numbers in words, quantities in several units, and dates. Linear in the text; nothing is evaluated."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
SMALL += ["twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SPOKEN = {word: n for n, word in enumerate(SMALL)} | {word: 20 + 10 * n for n, word in enumerate(TENS)}
PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "twentieth": 20}
PARTS |= {f"{word}th": SPOKEN[word] for word in SMALL[11:] if word != "twelve"}
PARTS |= {f"{word}th": value for word, value in SCALES.items() if word != "dozen"}
NUMBER_WORD = rf"(?:{'|'.join([*SPOKEN, *SCALES])})\b"
WORD = re.compile(rf"(?P<join>[- ]|,? and )?(?P<word>{NUMBER_WORD})", re.I)
SIGN = re.compile(r"(?:minus|negative) ", re.I)
ARTICLE = re.compile(rf"an? (?=(?:{'|'.join([*SCALES, *PARTS])})\b)", re.I)
PART = re.compile(rf"[- ]?({'|'.join(PARTS)})s?\b", re.I)
POINT = re.compile(rf" point((?: (?:{'|'.join(SMALL[:10])})\b)+)", re.I)
AND_PART = re.compile(rf" and (an?|{'|'.join(SMALL[1:10])})[- ]({'|'.join(PARTS)})s?\b", re.I)


def read_spoken(text: str, start: int = 0) -> tuple[str, int] | None:
    """A number in words that begins at `start`, in digits ("120", "2/3", "3 1/2"), and where it ends."""
    at = start
    if sign := SIGN.match(text, at):
        at = sign.end()
    total, current, room, large = 0, 0, 100, 10**15
    spoken = False
    if article := ARTICLE.match(text, at):
        at, current, room, spoken = article.end(), 1, 0, True
    first = at
    while match := WORD.match(text, at):
        word, value = match["word"].lower(), SPOKEN.get(match["word"].lower())
        follows = match["join"] is not None
        if follows != spoken and not (article and at == first and not follows):
            break
        if value is not None:
            scaled = room >= 100 and spoken
            if value >= room or ("and" in (match["join"] or "") and not scaled) or (spoken and not value):
                break
            current += value
            room = 10 if value in range(20, 100, 10) and match["word"].lower() in TENS else 0
        elif word == "hundred" and 0 < current < 100:
            current, room = current * 100, 100
        elif word == "dozen" and current and not total:
            current, room = current * 12, 0
        elif word not in ("hundred", "dozen") and current and SCALES[word] < large:
            large = SCALES[word]
            total, current, room = total + current * large, 0, 100
        else:
            break
        spoken, at = True, match.end()
    if not spoken:
        return None
    number, mark = str(total + current), "-" if sign else ""
    if point := POINT.match(text, at):
        return (
            f"{mark}{number}.{''.join(str(SPOKEN[word]) for word in point[1].lower().split())}",
            point.end(),
        )
    if (part := PART.match(text, at)) and (at > first or article) and total + current < 100:
        return f"{mark}{number}/{PARTS[part[1].lower()]}", part.end()
    if article and at == first:
        return None
    if part := AND_PART.match(text, at):
        over = SPOKEN.get(part[1].lower(), 1)
        return f"{mark}{number} {over}/{PARTS[part[2].lower()]}", part.end()
    return mark + number, at


# --- several units: "2 hours and 30 minutes", "5 feet 7 inches", "1 day, 2 hours and 3 minutes"

SPELLINGS: dict[str, str] = {
    "hours": "hour",
    "hr": "hour",
    "hrs": "hour",
    "h": "hour",
    "minutes": "minute",
    "min": "minute",
    "mins": "minute",
    "seconds": "second",
    "sec": "second",
    "secs": "second",
    "s": "second",
    "feet": "foot",
    "ft": "foot",
    "inches": "inch",
    "in": "inch",
    "lb": "pound",
    "lbs": "pound",
    "oz": "ounce",
    "pence": "penny",
    "pennies": "penny",
    "km": "kilometer",
    "kg": "kilogram",
    "g": "gram",
    "cm": "centimeter",
    "mm": "millimeter",
    "l": "liter",
    "ml": "milliliter",
}
SMALLER = {
    ("week", "day"): 7,
    ("day", "hour"): 24,
    ("hour", "minute"): 60,
    ("hour", "m"): 60,
    ("minute", "second"): 60,
    ("m", "second"): 60,
    ("year", "month"): 12,
    ("mile", "yard"): 1760,
    ("mile", "foot"): 5280,
    ("yard", "foot"): 3,
    ("foot", "inch"): 12,
    ("pound", "ounce"): 16,
    ("gallon", "quart"): 4,
    ("quart", "pint"): 2,
    ("dollar", "cent"): 100,
    ("euro", "cent"): 100,
    ("pound", "penny"): 100,
    ("kilometer", "meter"): 1000,
    ("kilometer", "m"): 1000,
    ("meter", "centimeter"): 100,
    ("m", "centimeter"): 100,
    ("centimeter", "millimeter"): 10,
    ("kilogram", "gram"): 1000,
    ("liter", "milliliter"): 1000,
}
SPELLINGS |= {
    f"{unit}s": unit for pair in SMALLER for unit in pair if unit not in ("m", "foot", "inch", "penny")
}
UNIT = "|".join(sorted({*SPELLINGS, *(unit for pair in SMALLER for unit in pair)}, key=len, reverse=True))
QUANTITY = re.compile(rf"(\d{{1,9}}(?:\.\d{{1,9}})?) ?({UNIT})\b", re.I)
DOT = r"\b(?:(?:(?<=hr|ft|in|lb|oz)|(?<=min|sec|hrs|lbs))\.)?"  # that of an abbreviation ends no sentence
UNITS = re.compile(
    rf"(?P<sign>-?)\d{{1,9}} ?(?:{UNIT}){DOT}"
    rf"(?:(?:,? and |,? )\d{{1,9}}(?:\.\d{{1,9}})? ?(?:{UNIT}){DOT})+(?![\w])",
    re.I,
)


def in_units(match: re.Match[str]) -> dict[str, Fraction] | None:
    """A match of UNITS, as a whole in each of its units; None where they do not belong together."""
    parts = [(Fraction(part[1]), part[2].lower()) for part in QUANTITY.finditer(match[0])]
    units = [SPELLINGS.get(unit, unit) for _, unit in parts]
    value, factors = parts[0][0], [SMALLER.get(pair) for pair in pairwise(units)]
    for factor, (number, _) in zip(factors, parts[1:], strict=True):
        if factor is None:
            return None
        value = value * factor + number
    whole = {units[-1]: -value if match["sign"] else value}
    for unit, smaller, factor in reversed(list(zip(units, units[1:], factors, strict=False))):
        whole[unit] = whole[smaller] / (factor or 1)
    return whole


# --- dates

MONTHS = ["january", "february", "march", "april", "may", "june"]
MONTHS += ["july", "august", "september", "october", "november", "december"]
MONTH = "|".join(f"{month[:3]}(?:{month[3:]})?" for month in MONTHS)
DAY = r"(?P<{}>\d{{1,2}})(?:st|nd|rd|th)?"
DATE = re.compile(
    rf"(?P<m1>{MONTH})\.? {DAY.format('d1')}(?:,? (?P<y1>\d{{4}}))?(?!\w)"
    rf"|{DAY.format('d2')} (?:of )?(?P<m2>{MONTH})\b\.?(?:,? (?P<y2>\d{{4}}))?(?!\w)"
    r"|(?P<y3>\d{4})-(?P<m3>\d\d)-(?P<d3>\d\d)(?!\w)",
    re.I,
)


def read_date(match: re.Match[str]) -> tuple[int | None, int, int]:
    """Year, month and day of a match of DATE."""
    form = next(form for form in "123" if match[f"m{form}"])
    month = match[f"m{form}"].lower()
    number = int(month) if month.isdigit() else [name[:3] for name in MONTHS].index(month[:3]) + 1
    year = match[f"y{form}"]
    return int(year) if year else None, number, int(match[f"d{form}"])
