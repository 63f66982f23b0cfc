"""From the columns of one row to a prompt and two responses to it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sage.data.messages import SPEECH, Messages, is_empty, read_transcript, read_turns
from sage.util.errors import UserError

Turns = str | Messages


class Useless(UserError):
    """A row that is well formed but teaches nothing. Public data have such rows; they are not bad rows."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class MissingPrompt(UserError):
    """The row has no prompt: neither a column nor a beginning that both responses share."""


class Pair(NamedTuple):
    """All three are texts, or all three are messages. Each response is then one assistant's message."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


def read_pair(values: Mapping[str, Any], chat: bool, implicit: bool) -> Pair:
    """The pair in one row.

    Args:
        values: our column name (`formats.COLUMNS`) -> the row's value, for the columns that the source has.
        chat: texts in HH's form ("\\n\\nHuman: ...") become messages. Otherwise they stay texts.
        implicit: without a prompt, the text with which both responses begin is the prompt.

    Raises:
        Useless: the responses are the same, or one is empty.
        MissingPrompt: there is no prompt.
        UserError: anything else that is wrong with the row.
    """
    pair = _split(
        _read("prompt", values.get("prompt"), chat),
        _read_response("chosen", values.get("chosen"), chat),
        _read_response("rejected", values.get("rejected"), chat),
        implicit,
    )
    pair = _surround(pair, values)
    if isinstance(pair.prompt, str):
        if not pair.prompt.strip():
            raise MissingPrompt("prompt is empty")
        empty = [name for name in ("chosen", "rejected") if not getattr(pair, name).strip()]
    else:
        if all(message["role"] in ("system", "developer") or is_empty(message) for message in pair.prompt):
            raise MissingPrompt(
                "no prompt: nothing that the user says, in a column or shared by both responses"
            )
        _check_started(pair)
        empty = [name for name in ("chosen", "rejected") if is_empty(getattr(pair, name)[0])]
    if empty:
        raise Useless("empty_response", f"{empty[0]} is empty")
    return pair


def _read(name: str, value: Any, chat: bool) -> Turns | None:
    """A column's text or messages; None where it is null or empty."""
    if value is None or value == [] or value == "":
        return None
    turns = read_turns(name, value)
    transcript = read_transcript(turns) if chat and isinstance(turns, str) else None
    return transcript or turns


def _read_response(name: str, value: Any, chat: bool) -> Turns:
    if value is None:
        raise UserError(f"{name} is missing")
    turns = _read(name, value, chat)
    if turns is None or (isinstance(turns, str) and not turns.strip()):
        raise Useless("empty_response", f"{name} is empty")
    return turns


def _split(prompt: Turns | None, chosen: Turns, rejected: Turns, implicit: bool) -> Pair:
    # If one side is a text and the other messages (ms-swift), the text replaces the last message.
    if isinstance(chosen, str) and not isinstance(rejected, str):
        chosen = [*rejected[:-1], _says(chosen)]
    elif isinstance(rejected, str) and not isinstance(chosen, str):
        rejected = [*chosen[:-1], _says(rejected)]
    if chosen == rejected:
        raise Useless("same_responses", "chosen and rejected are the same")
    if not isinstance(chosen, str):
        assert not isinstance(rejected, str)
        return _split_messages(prompt, chosen, rejected)
    assert isinstance(rejected, str)
    if prompt is None:
        if not implicit:
            raise MissingPrompt("prompt is missing")
        return _split_texts(chosen, rejected)
    if isinstance(prompt, str):
        return Pair(prompt, chosen, rejected)
    return Pair(prompt, [_says(chosen)], [_says(rejected)])


def _split_texts(chosen: str, rejected: str) -> Pair:
    """The longest common beginning is the prompt, as in TRL's `extract_prompt`.

    In HH's form the prompt ends with the last "Assistant:" in that beginning.
    """
    end = _shared(chosen, rejected)
    if SPEECH.match(chosen):
        mark = "\n\nAssistant:"
        end = chosen.rfind(mark, 0, end) + len(mark) if mark in chosen[:end] else 0
    # Tokenizers like a space at a word's beginning, so the responses get it.
    end -= chosen[:end].endswith(" ")
    if not chosen[:end].strip():
        raise MissingPrompt("no prompt: neither a column nor a beginning that chosen and rejected share")
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def _split_messages(prompt: Turns | None, chosen: Messages, rejected: Messages) -> Pair:
    """The messages with which both responses begin belong to the prompt."""
    end = _shared(chosen, rejected)
    shared, responses = chosen[:end], (chosen[end:], rejected[end:])
    for name, messages in zip(("chosen", "rejected"), responses, strict=True):
        if not messages:
            raise Useless("empty_response", f"{name} is empty: it is where the other response begins")
        if (roles := [message["role"] for message in messages]) != ["assistant"]:
            raise UserError(
                f"{name} must be one assistant message after what both responses share, not {roles}"
            )
    return Pair(_join_prompt(prompt, shared), *responses)


def _join_prompt(prompt: Turns | None, shared: Messages) -> Messages:
    """The whole prompt, once, from the prompt column and the messages that both responses begin with.

    Many sources (UltraFeedback) repeat the prompt in the responses, maybe after a system message or as one
    turn of many.
    """
    if prompt is None:
        return shared
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ours, theirs = ([(m["role"], m["content"].strip()) for m in messages] for messages in (given, shared))
    starts = range(len(theirs) - len(ours) + 1)
    if any(theirs[start : start + len(ours)] == ours for start in starts):
        return shared
    if isinstance(prompt, str) and prompt.strip() in [content for _, content in theirs]:
        return shared
    if theirs and ours[-len(theirs) :] == theirs:
        return given
    if all(role in ("system", "developer") for role, _ in theirs):
        return shared + given
    if theirs[0][0] in ("assistant", "tool"):
        return given + shared
    raise UserError(
        "the prompt column is not part of the conversation that chosen and rejected share; to use that "
        "conversation alone, set data.columns.prompt=''"
    )


def _surround(pair: Pair, values: Mapping[str, Any]) -> Pair:
    """Add what other columns say about the prompt: input, history, system and the started answer."""
    prompt, chosen, rejected = pair
    system, history = _text(values, "system"), _history(values.get("history"))
    added, started = _text(values, "input"), _text(values, "started")
    if added:
        if not isinstance(prompt, str):
            raise UserError("input follows a prompt that is a text, but this prompt is messages")
        prompt = f"{prompt}\n{added}"
    if not (system or history or started):
        return Pair(prompt, chosen, rejected)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if history and messages[0]["role"] in ("system", "developer"):
        messages = [messages[0], *history, *messages[1:]]
    else:
        messages = history + messages
    if system:
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"].strip() != system.strip():
            raise UserError("the system column and the system message differ")
    if started:
        messages = [*messages, _says(started)]
    chosen, rejected = ([_says(side)] if isinstance(side, str) else side for side in (chosen, rejected))
    return Pair(messages, chosen, rejected)


def _text(values: Mapping[str, Any], name: str) -> str:
    """A column's text; empty where it is null."""
    value = values.get(name)
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name} is not a text but {type(value).__name__}")
    return value if value.strip() else ""


def _history(value: Any) -> Messages:
    """Alpaca's earlier turns, a list of [user's text, assistant's text] or its JSON text, as messages."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"history is not valid JSON: {error}") from error
    if not value:
        return []
    turns = value if isinstance(value, list) else [value]
    if not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise UserError("history is not a list of [user's text, assistant's text]")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _check_started(pair: Pair) -> None:
    """Refuse a prompt whose last message, a started answer, is already the whole response."""
    last = pair.prompt[-1]
    assert isinstance(last, dict)
    for name in ("chosen", "rejected"):
        if (
            last["role"] == "assistant"
            and last["content"]
            and last["content"] == getattr(pair, name)[0]["content"]
        ):
            raise UserError(f"the prompt ends with the {name} response itself")


def _says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _shared(chosen: Sequence, rejected: Sequence) -> int:
    """Length of the longest common beginning."""
    same = (index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    return next(same, min(len(chosen), len(rejected)))
