"""Checks that a chat template uses all that a conversation holds, and nothing is lost silently."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sage.data.thoughts import CLOSE
from sage.util.errors import UserError

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
FIELDS = (*REASONING, "tool_calls", "function_call")  # what an assistant writes besides the content
# A user's switch for thoughts. Some templates act on it and leave it out.
SWITCH = re.compile(r"(?<!<)/(?:no_?)?think\b")


class Refused(UserError):
    """A pair that cannot be trained on as it is; `reason` is the word it is counted by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def fields_of(message: Message) -> list[str]:
    """Which of FIELDS a message has."""
    return [name for name in FIELDS if message.get(name)]


def content_of(message: Message) -> str:
    """A message's text; "" where it has none.

    Raises:
        Refused: the content is not a text.
    """
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise Refused("not_text", f"the content of a message is not a text but {type(content).__name__}")
    return content or ""


def check_prompt(messages: list[Message], tools: list | None, written: str) -> None:
    """Refuse a prompt of which the template leaves out a text, a tool call or the tools.

    Thoughts of earlier turns may go: many templates leave them out, at generation too.
    """
    for message in messages:
        text = content_of(message)
        if message["role"] == "assistant" and not _stands(text, written):
            text = CLOSE.split(text)[-1]
        if not all(_stands(part, written) for part in SWITCH.split(text)):
            raise Refused("lost", f"the chat template leaves out the content of a {message['role']} message")
        _check_calls(message, written)
    for tool in tools or []:
        name = (
            tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
        )
        if not _stands(str(name or ""), written):
            raise Refused("lost", f"the chat template leaves out the tools, such as {name}")


def check_response(message: Message, written: str) -> None:
    """Refuse a response of which the template leaves out the thought, a tool call or the content."""
    for name in REASONING:
        if message.get(name) and not _stands(str(message[name]), written):
            raise Refused(
                "lost",
                f"the chat template leaves out {name}: put the thought into the content, between <think> "
                "and </think>",
            )
    _check_calls(message, written)
    if not _stands(content_of(message), written):
        raise Refused("lost", "the chat template leaves out the content beside a thought or tool calls")


def with_objects(message: Message) -> Message:
    """The message with tool-call arguments as objects where they are JSON text, as serving engines do."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _with_object(inner)}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _check_calls(message: Message, written: str) -> None:
    for name in ("tool_calls", "function_call"):
        for text in _leaves(message.get(name)):
            if not _stands(text, written):
                raise Refused("lost", f"the chat template leaves out {name}, such as {text[:40]!r}")


def _leaves(calls: Any) -> Iterator[str]:
    """The texts in tool calls that must reach the model: names and arguments, but no ids."""
    if isinstance(calls, str):
        yield calls
    elif isinstance(calls, list):
        for part in calls:
            yield from _leaves(part)
    elif isinstance(calls, dict):
        for key, part in calls.items():
            if key not in ("id", "type", "index"):
                yield from _leaves(part)


def _stands(text: str, written: str) -> bool:
    """Whether a text stands in what the template has written, as it is or as JSON writes it."""
    text = text.strip()
    return text in written or any(
        json.dumps(text, ensure_ascii=ascii_only)[1:-1] in written for ascii_only in (True, False)
    )
