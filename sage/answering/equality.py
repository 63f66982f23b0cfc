r"""Whether two answers are the same: structure and plain numbers here, formulas by a function passed in.

An answer is a value, a list of values (unordered: "3, 5"), a tuple or an interval (ordered: "(3, 5]"), a
union, a matrix, or a relation. For each pair of parts that is compared, the time is linear in their text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from sage.answering.measures import BASED, same_dates, same_in_base, same_in_units, same_times
from sage.answering.spelling import as_number, canonical, is_words, same_number

MOST_PARTS = 60
DEEPEST = 40  # brackets in brackets

BRACKETS = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\[{}]|\\.|[()\[\]{}]", re.S)
OPENING, CLOSING = set("([{") | {r"\{"}, set(")]}") | {r"\}"}
AND_OR = re.compile(r"\b(?:and|or)\b")
SET_LIST = re.compile(rf"[,;]|{AND_OR.pattern}")
LIST = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))|;|\b(?:and|or)\b")
COMMA = re.compile("[,;]")
CUP = re.compile(r"\\cup(?![A-Za-z])")
EQUALS = re.compile(r"(?<![<>!:])=|\\approx(?![A-Za-z])")
ORDER = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
UNEQUAL = re.compile(r"\\ne(?![A-Za-z])")
PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
VARIABLE = re.compile(r"\\?(?!infty|pi\b)[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z]\s?\([a-z]\)")
MATRIX = re.compile(
    r"[(\[|]?\s*\\begin\{([pbvB]?matrix|array)\}(?:\{[lcr| ]*\})?((?:(?!\\begin).)*)\\end\{\1\}\s*[)\]|]?",
    re.S,
)
PROSE_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?")
LABEL = re.compile(r"\(([A-J])\)\s*(?=\S)|([A-J])[.)]\s+(?=\S)")

Compare = Callable[[str, str], bool]


def same(given: str, truth: str, formula: Compare) -> bool:
    """Whether two answers are the same. `formula` compares canonical values that are not plain numbers."""
    given, truth = canonical(given), canonical(truth)
    if max((depth for text in (given, truth) for _, depth in _depths(text)), default=0) > DEEPEST:
        return given == truth or formula(given, truth)
    if match := LABEL.match(given):
        return _same(given, truth, formula) or _same(given[match.end() :], truth, formula)
    # Two dozen is 24, and 2 where the question asks for dozens.
    return _same(given, truth, formula) or (
        " dozen" in given and _same(given.replace(" dozen", "", 1), truth, formula)
    )


def _same(a: str, b: str, formula: Compare) -> bool:
    if a == b:
        return True
    if (known := _plain(a, b)) is not None:
        return known
    if "$" in a and "$" in b and (prose := _prose(a, b, formula)) is not None:
        return prose
    a, b = _bare(a), _bare(b)
    if " ".join(a.split()) == " ".join(b.split()):
        return True
    if max(len(re.findall(r"[,;&]", text)) for text in (a, b)) > MOST_PARTS:
        return False
    return _structured(a, b, formula)


def _plain(a: str, b: str) -> bool | None:
    """Numbers, times, numbers with a base and words; None where either is something else."""
    first, second = as_number(a), as_number(b)
    if first and second:
        return same_number(first, second)
    if (times := same_times(a, b)) is not None:
        return times
    if (dates := same_dates(a, b)) is not None:
        return dates
    if (units := same_in_units(a, b)) is not None:
        return units
    if BASED.fullmatch(a) or BASED.fullmatch(b):
        return same_in_base(a, b)
    if is_words(a) or is_words(b):
        return _same_words(a, b) or (None if LIST.search(a) or LIST.search(b) else False)
    return None


def _same_words(a: str, b: str) -> bool:
    """Whether two texts have the same words: "No solutions" is "no solution"."""
    first, second = (re.sub(r"(?<=[a-z]{3})s\b", "", text.lower()) for text in (a, b))
    return first == second


def _prose(a: str, b: str, formula: Compare) -> bool | None:
    """Prose with the same words around formulas, by its formulas; None for anything else."""
    (words, formulas), (others, further) = (
        (PROSE_FORMULA.sub("$", text).lower().split(), PROSE_FORMULA.findall(text)) for text in (a, b)
    )
    if words != others or not any(re.search("[a-z]{3}", word) for word in words):
        return None
    return len(formulas) <= MOST_PARTS and _pairwise(formulas, further, formula)


def _bare(text: str) -> str:
    r"""Without what only introduces an answer: "x \in", a set's "x |", dollars, a full stop."""
    text = text.replace("$", " ").strip().rstrip(".,;").strip()
    text = re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text)
    if match := re.fullmatch(
        r"\\\{\s*[A-Za-z](?:\s*\\in\s*\(-\\infty , \\infty \))?\s*(?:\||:|\\mid)\s*(.*)\\\}", text
    ):
        text = match[1].strip()
    while len(text) > 2 and text[0] == "{" and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _structured(a: str, b: str, formula: Compare) -> bool:
    if (matrices := _matrices(a, b, formula)) is not None:
        return matrices
    first, second = _interval(a), _interval(b)
    if (first and not ORDER.search(b)) or (second and not ORDER.search(a)) or (first and second):
        return _same(canonical(first or a), canonical(second or b), formula)
    joints = [{*AND_OR.findall(text)} for text in (a, b) if ORDER.search(text)]
    if joints in ([{"and"}, {"or"}], [{"or"}, {"and"}]):
        return False  # x > 1 and x < 2 is an interval, with "or" it is everything
    lists = [_list(a), _list(b)]
    tuples = [_tuple(a), _tuple(b)]
    if tuples[0] and tuples[1]:
        return tuples[0][1] == tuples[1][1] and _pairwise(tuples[0][0], tuples[1][0], formula)
    for parts, other in zip(lists, reversed(tuples), strict=True):
        # "3, 5" for "(3, 5)": the order then counts, as it does for the tuple.
        if len(parts) > 1 and other and other[1] == "()" and r"\{" not in (a[:2], b[:2]):
            mine = [_right_side(part) for part in parts]
            if parts is lists[0]:
                return _pairwise(mine, other[0], formula)
            return _pairwise(other[0], mine, formula)
    if any(len(parts) > 1 for parts in lists):
        sets = [text.startswith(r"\{") for text in (a, b)]
        if _unordered(lists[0], lists[1], any(sets), formula):
            return True
        if sets[0] == sets[1]:
            return False
        lists = [
            _list(text if is_set else rf"\{{{text}\}}") for text, is_set in zip((a, b), sets, strict=True)
        ]
        return _unordered(lists[0], lists[1], True, formula)
    (a,), (b,) = lists if all(lists) else ([a], [b])
    if " ".join(a.split()) == " ".join(b.split()):
        return True
    return _relations(a, b, formula)


def _unordered(first: list[str], second: list[str], sets: bool, formula: Compare) -> bool:
    """Whether the parts given are the true ones, in any order and as often, unless they are `sets`.

    A single true part may be given again ("5, 5" for 5), and one of several in several forms ("1/2, 0.5, 3"
    for "0.5, 3"). Parts with different names ("x = 1, y = 2") keep their order.
    """
    names = [[_name(part) for part in parts] for parts in (first, second)]
    for mine, theirs in (names, reversed(names)):
        if None not in mine and len({*mine}) == len(mine) > 1 and {*theirs} == {None}:
            return len(first) == len(second) and _pairwise(
                [_right_side(part) for part in first], [_right_side(part) for part in second], formula
            )
    table = [[_same(a, b, formula) for b in second] for a in first]
    if not (all(map(any, table)) and all(map(any, zip(*table, strict=True)))):
        return False
    for row in () if sets or len(second) == 1 else table:
        forms = [part for part, theirs in zip(first, table, strict=True) if theirs == row]
        if len(forms) != sum(row) and (sum(row) > 1 or len({*forms}) < len(forms)):
            return False
    return True


def _pairwise(first: Sequence[str], second: Sequence[str], formula: Compare) -> bool:
    return len(first) == len(second) and all(_same(a, b, formula) for a, b in zip(first, second, strict=True))


def _relations(a: str, b: str, formula: Compare) -> bool:
    """Values and equations. "x = 5" is 5, and so is "2 + 3 = 5"; "1 = 5" and "2x + 1 = 5" are not."""
    first, second = ([part.strip() for part in split(text, EQUALS)] for text in (a, b))
    if len(first) > 1 and len(second) > 1:
        if _same(first[0], second[0], formula):
            return _same(first[-1], second[-1], formula)
        return formula(f"{first[0]}={first[-1]}", f"{second[0]}={second[-1]}")
    for parts, other in ((first, b), (second, a)):
        if len(parts) == 2 and VARIABLE.fullmatch(parts[1]) and not _is_name(parts[0]):
            parts.reverse()  # 5 = x
        if len(parts) > 1:
            if not _is_name(parts[0]) and not _same(parts[0], parts[-1], formula):
                return False
            return _same(parts[-1], other, formula) if parts is first else _same(other, parts[-1], formula)
    if (known := _plain(a, b)) is not None:
        return known
    return formula(a, b)


def _name(text: str) -> str | None:
    """What an assignment names: x of "x = 5"; None for anything else."""
    parts = split(text, EQUALS)
    return re.sub(r"[\s$]", "", parts[0]) if len(parts) > 1 and _is_name(parts[0]) else None


def _is_name(text: str) -> bool:
    r"""Whether this stands for a value: x, f(2), S_{10}, P(A), \angle ABC, a + b, width; not 2x, x^2 or 1."""
    text = re.sub(r"_\s?(?:\{[^{}]*\}|\w)|\^\s?\{?-1\}?", "", text)
    for _ in range(3):
        text = re.sub(r"\([^()]*\)", "()", text)
    return not re.search(r"[\d^<>]", text.replace("()", "x")) and bool(re.search(r"[A-Za-z(]", text))


def _right_side(text: str) -> str:
    parts = split(text, EQUALS)
    return parts[-1].strip() if len(parts) > 1 and _is_name(parts[0]) else text


# --- structure


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand outside all brackets."""
    ends = [match.span() for match in separator.finditer(text)]
    depths, depth = iter(_depths(text)), 0
    parts, start, at = [], 0, next(depths, None)
    for begin, end in ends:
        while at and at[0] <= begin:
            depth, at = at[1], next(depths, None)
        if depth == 0 and begin >= start:
            parts.append(text[start:begin])
            start = end
    return [*parts, text[start:]]


def _depths(text: str) -> Iterator[tuple[int, int]]:
    """(place, how many brackets are open from there on)."""
    depth = 0
    for match in BRACKETS.finditer(text):
        if match[0] in OPENING or match[0].startswith(r"\begin"):
            depth += 1
        elif match[0] in CLOSING or match[0].startswith(r"\end"):
            depth = max(depth - 1, 0)
        else:
            continue
        yield match.start(), depth


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character."""
    closed = next((place for place, depth in _depths(text) if depth == 0), None)
    return closed is not None and text[closed:].strip() in (")", "]", "}", r"\}")


def _list(text: str) -> list[str]:
    r"""The values of "3, 5", "3 and 5", "\{3, 5\}", "a \cup b", "1 \pm 2"; one for anything else."""
    separator = LIST
    if text.startswith(r"\{") and text.endswith(r"\}") and _closes_at_end(text):
        text, separator = text[2:-2], SET_LIST  # {100,200} has two numbers, where 100,200 is one
    elif as_number(text):
        return [text]
    parts = [part.strip() for part in split(text, separator) if part.strip()]
    parts = [piece.strip() for part in parts for piece in split(part, CUP)]
    values = []
    for part in parts:
        if len(PLUS_MINUS.findall(part)) == 1:
            values += [PLUS_MINUS.sub(sign, part).strip().removeprefix("+").strip() for sign in ("+", "-")]
        else:
            values.append(part)
    return values or [text]


def _tuple(text: str) -> tuple[list[str], str] | None:
    """The parts of a tuple or an interval, and its brackets."""
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")")
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or not _closes_at_end(text):
        return None
    parts = [part.strip() for part in split(text[1:-1], COMMA)]
    return (parts, text[0] + text[-1]) if len(parts) > 1 else None


def _interval(text: str) -> str | None:
    r"""An inequality in one variable as an interval: "-1 < x \le 3" as "(-1, 3]"; None for anything else."""
    if len(parts := split(text, UNEQUAL)) == 2 and VARIABLE.fullmatch(parts[0].strip()):
        return rf"(-\infty , {parts[1].strip()}) \cup ({parts[1].strip()}, \infty )"
    parts = [part.strip() for part in split(text, ORDER)]
    signs = [match[0] for match in ORDER.finditer(text)]
    if len(parts) != len(signs) + 1 or len(parts) not in (2, 3) or not all(parts):
        return None
    if len(parts) == 2:
        if VARIABLE.fullmatch(parts[1]) and not VARIABLE.fullmatch(parts[0]):
            parts, signs = parts[::-1], [_turned(signs[0])]
        if not VARIABLE.fullmatch(parts[0]):
            return None
        closed = "e" in signs[0]
        if signs[0] in ("<", r"\le"):
            return rf"(-\infty , {parts[1]}{']' if closed else ')'}"
        return rf"{'[' if closed else '('}{parts[1]}, \infty )"
    if not VARIABLE.fullmatch(parts[1]):
        return None
    if all(sign in (">", r"\ge") for sign in signs):
        parts, signs = parts[::-1], [_turned(sign) for sign in signs[::-1]]
    if not all(sign in ("<", r"\le") for sign in signs):
        return None
    return f"{'[' if 'e' in signs[0] else '('}{parts[0]}, {parts[2]}{']' if 'e' in signs[1] else ')'}"


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]


def _matrices(a: str, b: str, formula: Compare) -> bool | None:
    """Matrices by their entries; None where neither is one."""
    first, second = MATRIX.fullmatch(a.strip()), MATRIX.fullmatch(b.strip())
    if not first or not second:
        return None
    determinants = [match[1] == "vmatrix" for match in (first, second)]
    if determinants[0] != determinants[1]:
        return None
    rows = [
        [
            [entry.strip() for entry in split(row, re.compile("&"))]
            for row in match[2].split(r"\\")
            if row.strip()
        ]
        for match in (first, second)
    ]
    return len(rows[0]) == len(rows[1]) and all(
        _pairwise(one, other, formula) for one, other in zip(*rows, strict=True)
    )
