"""Whether two formulas are equal. Runs in a process that may be killed: sympy can hang, or take all memory.

math-verify reads the LaTeX. It does not compare numbers, since it compares floats, where 1/2006! equals
1/2004!. Numbers are compared as exact rationals. Other constants, and functions at several points, are
compared at high precision, relative to their size.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from sage.answering.equality import EQUALS, ORDER, split
from sage.answering.measures import TRIGONOMETRY, without_unit
from sage.answering.spelling import PlainNumber, as_number

DIGITS = 60  # of the precision at which values are compared
TOLERANCE = mpmath.mpf(10) ** -40  # relative
POINTS = 8  # where functions of variables are compared
ENOUGH = 3  # of these must give finite values

DEGREES = re.compile(r"(\d+(?:\.\d+)?) ?degrees\b")
DOTS = re.compile(r"\\(?:ldots|cdots|dots)(?![A-Za-z])")
PRIMES = re.compile(r"(?<=[A-Za-z)])'+")
TOKEN = re.compile(r"\\[A-Za-z]+|(?<!_)(?<!_\{)[A-Za-z]")  # not an index
SPARE = "abcghjkmnpqrstuvwxyz"  # letters that mean nothing of their own
# math-verify would take the variables of "x^2 t" and "2x + 3c" for units.
READING = LatexExtractionConfig(
    normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
)
DECIMAL = re.compile(r"(?<![\d.,_])(\d*)\.(\d+)(?![\d.])")


def same_formula(a: str, b: str) -> bool:
    """Whether two canonical values or relations are equal. A long decimal equals what rounds to it."""
    if sorted(map(len, PRIMES.findall(a))) != sorted(map(len, PRIMES.findall(b))):
        return False
    bare = without_unit(b)
    return any(_same(*pair) for pair in dict.fromkeys([(a, b), (without_unit(a, bare), bare)]))


def _same(a: str, b: str) -> bool:
    a, b = _cases_apart(a, b)
    signs = [[match[0] for match in ORDER.finditer(text)] for text in (a, b)]
    if signs[0] or signs[1]:
        return _same_order(a, b)
    equations = [split(text, EQUALS) for text in (a, b)]
    if all(len(sides) == 2 for sides in equations):
        first, second = (_difference(*sides) for sides in equations)
        return first is not None and second is not None and _proportional(first, second, positive=False)
    first, second = read(a), read(b)
    if isinstance(first, sympy.MatrixBase) and isinstance(second, sympy.MatrixBase):
        return first.shape == second.shape and all(map(equal, first.flat(), second.flat()))
    if isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr):
        return equal(first, second) or _rounds(a, second) or _rounds(b, first)
    if first is None or second is None:
        return False
    return bool(verify(second, first, allow_set_relation_comp=True, timeout_seconds=0))  # pyright: ignore


def _cases_apart(a: str, b: str) -> tuple[str, str]:
    """The texts with other letters for capitals that one of them has in lower case, too.

    math-verify reads R as r, which is right only where one letter is meant.
    """
    used = [{token for token in TOKEN.findall(text) if len(token) == 1} for text in (a, b)]
    capitals = sorted({x for letters in used for x in letters if x.isupper() and x.lower() in letters})
    taken = {x.lower() for x in used[0] | used[1]}
    names = dict(zip(capitals, (x for x in SPARE if x not in taken), strict=False))
    first, second = (TOKEN.sub(lambda match: names.get(match[0], match[0]), text) for text in (a, b))
    return first, second


def read(latex: str) -> Any:
    """LaTeX as a sympy object, with decimals as exact fractions; None if it cannot be read as a whole."""
    latex = DOTS.sub(r" \\Xi ", latex)  # whatever they stand for, it is not nothing
    exact = DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", latex)
    exact = DEGREES.sub(r"(\\frac{\1 \\pi}{180})" if TRIGONOMETRY.search(exact) else r"\1 ", exact)
    found = parse(
        f"${exact}$",
        [READING],
        "no_fallback",
        "first_match",
        parsing_timeout=0,  # pyright: ignore
    )
    value = found[0] if found else None
    if not isinstance(value, sympy.Basic | sympy.MatrixBase) or value.has(sympy.Derivative):
        return None  # sympy would take the derivative of y by x for 0
    value = value.doit()
    return (
        value.replace(_is_odd_root, lambda power: -((-power.base) ** power.exp))
        if value.has(sympy.Pow)
        else value
    )


def _is_odd_root(node: Any) -> bool:
    """The cube root of -8 is -2 in school, where sympy takes a complex one."""
    if not node.is_Pow or not node.exp.is_Rational or not node.base.is_negative:
        return False
    return node.exp.q % 2 == 1 and node.exp.q > 1 and node.exp.p % 2 == 1


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Rationals are compared exactly, everything else by its values at high precision."""
    a, b = _plain_symbols(a), _plain_symbols(b)
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return False
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    agreed = 0
    for point in _points(a.free_symbols | b.free_symbols):
        one, other = _value(a, point), _value(b, point)
        if one is None or other is None:
            continue
        if not _close(one, other):
            return False
        agreed += 1
        if not point:
            return _no_difference(a, b)
    return agreed >= ENOUGH


def _no_difference(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two constants that agree at high precision are equal: sympy's proof, if it finds one."""
    proof = (a - b).equals(0)
    return True if proof is None else bool(proof)


def _plain_symbols(expression: Any) -> Any:
    """The same with symbols that have nothing but a name, and unknown functions as symbols."""
    functions = {f: sympy.Symbol(str(f)) for f in expression.atoms(sympy.core.function.AppliedUndef)}
    expression = expression.xreplace(functions)
    names = {s: sympy.Symbol(s.name) for s in expression.atoms(sympy.Symbol)}
    if not expression.has(sympy.Sum, sympy.Product, sympy.Integral):
        names |= {s: sympy.I for s in names if s.name == "i"}
    return expression.xreplace(names)


def _points(symbols: Any) -> list[dict[Any, Any]]:
    """Where to compare: one empty point for constants, else rational values, positive ones first."""
    if not symbols:
        return [{}]
    ordered = sorted(symbols, key=str)
    return [
        {
            symbol: sympy.Rational(
                (1 if turn < 5 else -1) * (37 + 29 * turn + 11 * place * (turn + 2)), 41 + 13 * turn + place
            )
            for place, symbol in enumerate(ordered)
        }
        for turn in range(POINTS)
    ]


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """A complex number of DIGITS digits; None where there is no finite value."""
    value = expression.subs(point) if point else expression
    value = value.evalf(DIGITS, maxn=10 * DIGITS)
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
        return None
    with mpmath.workdps(DIGITS):
        return mpmath.mpc(
            *(mpmath.mpf(part.p) / part.q if part.is_Rational else part.num for part in (real, imaginary))
        )


def _close(a: Any, b: Any) -> bool:
    with mpmath.workdps(DIGITS):
        return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _rounds(decimal: str, value: sympy.Expr) -> bool:
    """Whether a long decimal is the rounding of a constant that is no decimal: 3.141593 of pi."""
    number = as_number(decimal)
    if number is None or number.place is None or value.free_symbols:
        return False
    if (exact := _value(value, {})) is None or exact.imag:
        return False
    return _nearest(number, exact.real)


def _nearest(number: PlainNumber, value: Any) -> bool:
    with mpmath.workdps(DIGITS):
        near, half = (
            mpmath.mpf(f.numerator) / f.denominator for f in (number.value, (number.place or Fraction(0)) / 2)
        )
        return abs(near - value) <= half


# --- equations and inequalities


def _difference(left: str, right: str) -> sympy.Expr | None:
    sides = [read(left), read(right)]
    return sides[0] - sides[1] if all(isinstance(side, sympy.Expr) for side in sides) else None


def _proportional(first: sympy.Expr, second: sympy.Expr, positive: bool) -> bool:
    """Whether one is a constant times the other, as in x + y = 2 and 2x + 2y = 4."""
    first, second = _plain_symbols(first), _plain_symbols(second)
    if first.free_symbols != second.free_symbols:
        return False
    ratios = []
    for point in _points(first.free_symbols):
        one, other = _value(first, point), _value(second, point)
        if one is not None and other is not None and one != 0 and other != 0:
            with mpmath.workdps(DIGITS):
                ratios.append(one / other)
    if len(ratios) < ENOUGH or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return False
    return not positive or ratios[0].real > 0


def _same_order(a: str, b: str) -> bool:
    """Whether two inequalities of one sign say the same: 2x < 6 and x < 3, or 3 > x."""
    differences = []
    for text in (a, b):
        sides, signs = split(text, ORDER), [match[0] for match in ORDER.finditer(text)]
        if len(sides) != 2 or len(signs) != 1:
            return False
        if signs[0] in (">", r"\ge"):
            sides = sides[::-1]
        differences.append((_difference(sides[0], sides[1]), "e" in signs[0]))
    (first, closed), (second, also) = differences
    return (
        closed == also
        and first is not None
        and second is not None
        and _proportional(first, second, positive=True)
    )
