"""Pairs as a person reads them: tokens as text, special tokens visible, and what looks wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.text import Text

from sage.data.thoughts import CLOSE, OPEN, OPENED
from sage.data.tokens import Pair

COLOURS = {"prompt": "cyan", "chosen": "green", "rejected": "red"}
ALIKE = 8  # tokens with which responses may begin alike before that is worth a warning
# Markup of common chat templates.
MARKUP = (
    *(f"<|{word}|>" for word in ("im_start", "im_end", "endoftext", "user", "assistant", "system")),
    *(f"<|{word}|>" for word in ("start_header_id", "eot_id", "end")),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜end▁of▁sentence｜>", "</s>"),
)
LONGER = 3.0  # times the other response's length


def texts_of(pairs: Sequence[Pair], tokenizer: Any) -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected of each pair, decoded from their ids with all special tokens."""
    prompts = decode(tokenizer, [pair.prompt_ids for pair in pairs])
    # Some tokenizers drop a text's first space, so a response is decoded after the prompt's last token.
    before = decode(tokenizer, [pair.prompt_ids[-1:] for pair in pairs])
    sides = [
        decode(tokenizer, [pair.prompt_ids[-1:] + getattr(pair, name) for pair in pairs])
        for name in ("chosen_ids", "rejected_ids")
    ]
    for prompt, start, *responses in zip(prompts, before, *sides, strict=True):
        chosen, rejected = (text.removeprefix(start) for text in responses)
        yield prompt, chosen, rejected


def decode(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        return backend.decode_batch(ids, skip_special_tokens=False)  # batch_decode checks every id in Python
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def shown(pair: Pair, tokenizer: Any, ends: set[int], width: int | None = None) -> Text:
    """A pair in colours, its special tokens highlighted.

    Args:
        ends: the tokens that end a response. One that ends otherwise is marked as cut off.
        width: the most characters of each part: the end of the prompt, both ends of the responses.
    """
    out = Text(f"pair {pair.pair_id}")
    for name, text in zip(COLOURS, next(texts_of([pair], tokenizer)), strict=True):
        ids: list[int] = getattr(pair, f"{name}_ids")
        cut_off = name != "prompt" and ids[-1] not in ends
        note = ", cut off: no end token" if cut_off else ""
        out.append(f"\n{name} ({len(ids)} tokens{note})\n", style="bold")
        if width and len(text) > width:
            text = (
                f"... {text[-width:]}"
                if name == "prompt"
                else f"{text[: width // 2]} ... {text[-width // 2 :]}"
            )
        part = Text(text, style=COLOURS[name])
        for token in {str(tokenizer.added_tokens_decoder.get(index, "")) for index in set(ids)} - {""}:
            part.highlight_words([token], style=f"reverse {COLOURS[name]}")
        out.append_text(part)
    return out


def foreign_markup(special: Iterable[str]) -> re.Pattern[str]:
    """Finds the markup of other templates, which a tokenizer with these special tokens reads as text."""
    return re.compile("|".join(re.escape(mark) for mark in sorted({*MARKUP} - {*special})))


def warnings_of(
    pair: Pair, texts: tuple[str, str, str], ends: set[int], marks: set[int], foreign: re.Pattern[str]
) -> list[str]:
    """What looks wrong in a pair, as keys of WARNINGS.

    Args:
        texts: prompt, chosen and rejected with special tokens.
        ends: the tokens that end a response.
        marks: the special tokens of the chat template.
        foreign: markup that is none of the tokenizer's special tokens.
    """
    found = []
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    bodies = [ids[:-1] if ids[-1] in ends else ids for ids in (chosen, rejected)]
    if any(not marks.isdisjoint(body) for body in bodies) or any(map(foreign.search, texts[1:])):
        found.append("template_in_response")
    if any(_opened_twice(texts[0], response) for response in texts[1:]):
        found.append("thought_opened_twice")
    if bodies[0] == bodies[1]:
        found.append("only_the_end_differs")
    shorter, longer = sorted((len(chosen), len(rejected)))
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shorter)
    if common >= max(ALIKE, shorter / 2):
        found.append("begin_alike")
    if longer > LONGER * shorter:
        found.append("one_much_longer")
    return found


WARNINGS = {
    "template_in_prompt": "the prompt's own text has the markup of a chat template in it",
    "template_in_response": "a response has the markup of a chat template in it",
    "thought_opened_twice": "a thought is opened twice",
    "only_the_end_differs": "chosen and rejected differ only at the end token",
    "same_as_another": "another pair has the same prompt and the same responses",
    "contradicted": "another pair has chosen and rejected exchanged",
    "begin_alike": f"chosen and rejected begin with the same {ALIKE} tokens or more, half of the shorter one",
    "one_much_longer": f"one response has more than {LONGER:g} times the tokens of the other",
    "wrong_chosen": "the chosen response's answer is wrong",
    "right_rejected": "the rejected response's answer is right",
}


def _opened_twice(prompt: str, response: str) -> bool:
    """Whether two thoughts are open at once, the first perhaps at the prompt's end."""
    is_open = OPENED.search(prompt) is not None
    marks = sorted(
        [(match.start(), True) for match in OPEN.finditer(response)]
        + [(match.start(), False) for match in CLOSE.finditer(response)]
    )
    for _, opening in marks:
        if opening and is_open:
            return True
        is_open = opening
    return False
