"""Values of columns that hold one number, text or list, as all kinds of files write them."""

import ast
import json
from decimal import Decimal
from typing import Any

from sage.util.errors import UserError

ENCODER = json.JSONEncoder(ensure_ascii=False)
DEEPEST = 100  # lists and objects in each other; at some hundreds, code that recurses fails


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than DEEPEST deep."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list | tuple)]:
        if depth == DEEPEST:
            return True
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
        depth += 1
    return False


def as_json(name: str, value: Any) -> str:
    if is_deep(value):
        raise UserError(f"{name} is nested too deeply")
    try:
        text = ENCODER.encode(value)
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} has half of a character (a lone surrogate), which is not text") from error
    except (TypeError, RecursionError, ValueError) as error:
        raise UserError(f"{name} cannot be written as JSON: {error}") from error
    return text


def _number(value: Any) -> Any:
    """A number that CSV holds as text, and null for what stands for none."""
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            return value
    if isinstance(value, Decimal):
        value = float(value)
    return None if value != value else value


def read_pass_rate(value: Any) -> float | None:
    number = _number(value)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise UserError(f"pass_rate is {str(value)[:40]}, not a number from 0 to 1")
    return float(number)


def read_answer(value: Any) -> str | None:
    """The true answer as text; a whole number without a point, several answers joined by commas."""
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        if isinstance(part, float | Decimal):
            part = None if part != part else int(part) if part == part // 1 else str(part)
        if isinstance(part, str | int | float) and not isinstance(part, bool):
            texts.append(str(part).strip())
    text = ", ".join(filter(None, texts))
    as_json("answer", text)
    return text or None


def read_tools(value: Any) -> list[Any] | None:
    """A list of tools, from a list or its text, as JSON or Python writes it; None where there are none.

    Each tool may be such a text, too: Arrow cannot hold different schemas in one column.
    """
    value = _spelled(value)
    if not value or value != value or isinstance(value, str):
        return None
    listed = value if isinstance(value, list) else [value]
    tools = [_spelled(tool) for tool in listed]
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools is not a list of objects")
    return tools


def _spelled(value: Any) -> Any:
    """What a text spells out in JSON or as a Python literal; other values as they are."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UserError(f"tools is not valid JSON: {error}") from error


def holds_text(value: Any) -> bool:
    """Whether a value is a text that is no number, or holds one."""
    if isinstance(value, dict | list):
        return any(map(holds_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and isinstance(_number(value), str)
