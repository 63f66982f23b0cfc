"""Texts and chat messages as public data sets write them, brought into one form.

A message is a dict with `role` and `content` (always a str). Every other key of the source's message stays as
it is (`reasoning_content`, `tool_calls`, `tool_call_id`, `name`, ...), because a chat template may use it.
"""

import ast
import json
import re
from typing import Any

from sage.util.errors import UserError

Messages = list[dict[str, Any]]

# Names of roles in ShareGPT, LLaMA-Factory, ms-swift, OASST and Gemini data.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
PLAIN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SAID = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
CALLS = ("function_call", "tool_call")  # roles whose content is the JSON of a tool call
TEXT_PARTS = ("text", "input_text", "output_text")
# Columns, and keys of messages, that must be empty, because sage trains on text only.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SPEECH = re.compile(r"\s*(?:\n\n)?Human:")
TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):[ ]?")
CLOSE_TURN = re.compile(r"(?:^\s*|\n)(Human|Assistant):[ ]?")


def read_turns(name: str, value: Any) -> str | Messages:
    """The value of a column that holds a text or messages: the text as it is, or the messages in our form.

    Takes a text, one message, a list of messages, and messages written as JSON or as a Python literal, as CSV
    files have them. `name` is for errors.

    Raises:
        UserError: it is something else, or something that sage cannot train on.
    """
    if isinstance(value, str):
        parsed = _parse_messages(value)
        if parsed is None:
            if re.match(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:", value):
                raise UserError(f"{name} looks like messages written as text, but is not valid JSON")
            return value
        value = parsed
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{name} is neither a text nor messages but {type(value).__name__}")
    return [_message(name, message) for message in messages]


def read_transcript(text: str) -> Messages | None:
    r"""Messages of a transcript in HH's form ("\n\nHuman: ...\n\nAssistant: ..."); None for other texts.

    One space after a speaker's colon belongs to the mark. An "Assistant:" with nothing behind it is left out.
    If the transcript ends with it, there may be a text before the first speaker, which is the system's, and
    one line break is enough between speakers.
    """
    before, human, rest = text.partition("Human:")
    unanswered = rest.rstrip().endswith("\nAssistant:")
    said_before = before.strip() and unanswered and before.endswith("\n\n")
    if not human or (before.strip() and not said_before):
        return None
    if "\n\nAssistant:" not in rest and not unanswered:
        return None
    parts = (TURN if "\n\nAssistant:" in rest else CLOSE_TURN).split(human + rest)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns = turns[:-1]
    return [{"role": "system", "content": before.strip()}, *turns] if said_before else turns


def is_empty(message: dict[str, Any]) -> bool:
    """Whether a message says nothing: no text, no thought and no tool call."""
    said = (message.get(key) for key in SAID)
    return not any(value.strip() if isinstance(value, str) else value for value in said)


def _parse_messages(text: str) -> Any:
    """The messages that a text spells out, or None where it is just a text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        messages = [value] if isinstance(value, dict) else value
        named = isinstance(messages, list) and all(
            isinstance(message, dict)
            and ({"role", "content"} <= message.keys() or {"from", "value"} <= message.keys())
            for message in messages
        )
        return value if messages and named else None
    return None


def _message(name: str, message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    keys = ", ".join(message) or "none"
    if media := next((key for key in MEDIA if message.get(key)), None):
        raise UserError(f"{name} has a message with {media}; sage trains on text only")
    theirs = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", message.pop("value", None))
    if not isinstance(theirs, str):
        raise UserError(f"{name} has a message without a role; its keys are {keys}")
    role = theirs.lower() if theirs.lower() in (*PLAIN_ROLES, *ROLES) else theirs
    if content is None and not message:
        raise UserError(f"{name} has a message without content")
    if isinstance(content, list):
        content, thought = _join_parts(name, content)
        if thought:
            message.setdefault("reasoning_content", thought)
    if not isinstance(content, str | None):
        raise UserError(f"{name} has a message whose content is not a text but {type(content).__name__}")
    if role in CALLS:
        message.setdefault("tool_calls", _read_calls(name, content or ""))
        content = ""
    return {"role": ROLES.get(role, role), "content": content or "", **message}


def _join_parts(name: str, parts: list[Any]) -> tuple[str, str]:
    """(text, thought) of a content that is a list of parts, as in OpenAI's and Anthropic's interfaces."""
    text = thought = ""
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise UserError(f"{name} has a content part that is not an object but {type(part).__name__}")
        kind = part.get("type", "text")
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("thinking", "reasoning") and isinstance(said := part.get(kind, part.get("text")), str):
            thought += said
        else:
            raise UserError(f"{name} has a content part of type {kind!r}; sage trains on text only")
    return text, thought


def _read_calls(name: str, content: str) -> list[dict[str, Any]]:
    """Tool calls from ShareGPT's `function_call` turns: one JSON object, or a list, of name and arguments."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} has a function_call that is not valid JSON: {error}") from error
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"{name} has a function_call without a name")
    return [{"type": "function", "function": call} for call in calls]
