"""From the columns of one row to a prompt and two responses to it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sage.data.messages import SAID, SPEECH, Messages, is_empty, read_transcript, read_turns
from sage.util.errors import UserError

Turns = str | Messages


class Useless(UserError):
    """A row that is well formed but teaches nothing. Public data have such rows; they are not bad rows."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class MissingPrompt(UserError):
    """The row has no prompt: neither a column nor a beginning that both responses share."""


class PairTurns(NamedTuple):
    """All three are texts, or all three are messages. Each response is then one assistant's message."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


def read_pair(values: Mapping[str, Any], chat: bool, implicit: bool, repeated: bool = False) -> PairTurns:
    """The pair in one row.

    Args:
        values: our column name (`formats.COLUMNS`) -> the row's value, for the columns that the source has.
        chat: texts in HH's form ("\\n\\nHuman: ...") become messages. Otherwise they stay texts.
        implicit: without a prompt, the text with which both responses begin is the prompt.
        repeated: the source's responses begin with the prompt, so it is taken away from them.

    Raises:
        Useless: the responses are the same, or one is empty.
        MissingPrompt: there is no prompt.
        UserError: anything else that is wrong with the row.
    """
    given = values.get("prompt")
    prompt = _read("prompt", given, chat)
    responses = [_read_response(name, values.get(name), chat) for name in ("chosen", "rejected")]
    if isinstance(given, str) and not isinstance(prompt, str) and given.rstrip().endswith("Assistant:"):
        # The space after a speaker's colon belongs to the mark.
        responses = [side.removeprefix(" ") if isinstance(side, str) else side for side in responses]
    pair = _split(prompt, *responses, implicit)
    if repeated and isinstance(pair.prompt, str):
        rests = (side.removeprefix(pair.prompt) for side in pair[1:] if isinstance(side, str))
        pair = PairTurns(pair.prompt, *(rest.lstrip() if chat else rest for rest in rests))
    pair = _with_thoughts(_continue(_surround(pair, values)), values)
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


def _split(prompt: Turns | None, chosen: Turns, rejected: Turns, implicit: bool) -> PairTurns:
    chosen, rejected = _in_place(chosen, rejected), _in_place(rejected, chosen)
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
        return PairTurns(prompt, chosen, rejected)
    return PairTurns(prompt, [_says(chosen)], [_says(rejected)])


def repeats(head: str, chosen: str, rejected: str) -> bool:
    """Whether both responses begin with this text and go on."""
    return bool(head.strip()) and all(
        side.startswith(head) and side[len(head) :].strip() for side in (chosen, rejected)
    )


def _continue(pair: PairTurns) -> PairTurns:
    """The pair with the started answer once: some sources repeat it at the beginning of both responses."""
    prompt, chosen, rejected = pair
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant":
        return pair
    started, (one,), (other,) = prompt[-1]["content"], chosen, rejected
    assert isinstance(one, dict) and isinstance(other, dict)
    if not repeats(started, one["content"], other["content"]):
        return pair
    return PairTurns(
        prompt, *([{**side, "content": side["content"].removeprefix(started)}] for side in (one, other))
    )


def _in_place(response: Turns, other: Turns) -> Turns:
    """A response that is a text, or the assistant's message alone, beside a whole conversation (ms-swift).

    It replaces that conversation's last message.
    """
    if isinstance(other, str) or len(other) < 2:
        return [_says(response)] if isinstance(response, str) and not isinstance(other, str) else response
    if isinstance(response, str):
        return [*other[:-1], _says(response)]
    alone = [message["role"] for message in response] == ["assistant"]
    return [*other[:-1], *response] if alone and other[0]["role"] != "assistant" else response


def _split_texts(chosen: str, rejected: str) -> PairTurns:
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
    return PairTurns(chosen[:end], chosen[end:], rejected[end:])


def _split_messages(prompt: Turns | None, chosen: Messages, rejected: Messages) -> PairTurns:
    """The messages with which both responses begin belong to the prompt."""
    end = _shared([_spoken(message) for message in chosen], [_spoken(message) for message in rejected])
    shared, responses = chosen[:end], (chosen[end:], rejected[end:])
    for name, messages in zip(("chosen", "rejected"), responses, strict=True):
        if not messages:
            raise Useless("empty_response", f"{name} is empty: it is where the other response begins")
        if (roles := [message["role"] for message in messages]) != ["assistant"]:
            raise UserError(
                f"{name} must be one assistant message after what both responses share, not {roles}; end "
                "both after the first message in which they differ, or make a pair of each turn"
            )
    return PairTurns(_join_prompt(prompt, shared), *responses)


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
    heads = sum(role in ("system", "developer") for role, _ in ours)
    if heads and ours[heads:] and theirs[: len(ours) - heads] == ours[heads:]:
        return given[:heads] + shared  # the responses repeat the prompt without its system message
    if all(role in ("system", "developer") for role, _ in theirs):
        return shared + given
    if theirs[0][0] in ("assistant", "tool"):
        return given + shared
    raise UserError(
        "the prompt column is not part of the conversation that chosen and rejected share; to use that "
        "conversation alone, set data.columns.prompt=''"
    )


def _surround(pair: PairTurns, values: Mapping[str, Any]) -> PairTurns:
    """Add what other columns say about the prompt: input, history, system and the started answer."""
    prompt, chosen, rejected = pair
    system, history = _text(values, "system"), _history(values.get("history"))
    added, started = _text(values, "input"), _text(values, "started")
    if added:
        if not isinstance(prompt, str):
            raise UserError("input follows a prompt that is a text, but this prompt is messages")
        prompt = f"{prompt}\n{added}"
    if not (system or history or started):
        return PairTurns(prompt, chosen, rejected)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if history and messages and messages[0]["role"] in ("system", "developer"):
        messages = [messages[0], *history, *messages[1:]]
    else:
        messages = history + messages
    if system:
        if not messages or messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"].strip() != system.strip():
            raise UserError("the system column and the system message differ")
    if started:
        messages = [*messages, _says(started)]
    chosen, rejected = ([_says(side)] if isinstance(side, str) else side for side in (chosen, rejected))
    return PairTurns(messages, chosen, rejected)


def _with_thoughts(pair: PairTurns, values: Mapping[str, Any]) -> PairTurns:
    """The pair with the thoughts that other columns hold, as `reasoning_content` of its responses."""
    thoughts = [_text(values, f"{name}_reasoning") for name in ("chosen", "rejected")]
    if not any(thoughts):
        return pair
    prompt = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
    sides = [[_says(side)] if isinstance(side, str) else side for side in pair[1:]]
    for side, thought in zip(sides, thoughts, strict=True):
        if thought:
            side[0] = {"reasoning_content": thought, **side[0]}
    return PairTurns(prompt, *sides)


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


def _check_started(pair: PairTurns) -> None:
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


def _spoken(message: dict[str, Any]) -> list[Any]:
    """What a message says, without ids, times and the like."""
    return [message.get(key) for key in ("role", "name", *SAID)]


def _shared(chosen: Sequence, rejected: Sequence) -> int:
    """Length of the longest common beginning."""
    same = (index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    return next(same, min(len(chosen), len(rejected)))
