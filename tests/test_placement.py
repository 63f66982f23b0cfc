r"""Rarer templates: channels, words instead of special tokens, switches and marks of thoughts.

The templates imitate those of gpt-oss, Vicuna, SmolLM3 and Qwen3.5.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from templates import CHATML_TOKENS, HARMONY, QWEN3, SWITCHED, THINK, VICUNA, byte_level, sentencepiece
from test_chat import BAD, CALL, GOOD, QUESTION, TOOL, asks, encode, says, whole

# Qwen3.5: the generation prompt opens the thought, and every answer has one.
OPENING = QWEN3[: QWEN3.index("{%- if add_generation_prompt %}")] + (
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)


def harmony():
    names = ("start", "message", "end", "channel", "call", "return")
    return byte_level(HARMONY, [f"<|{name}|>" for name in names], "<|return|>")


def opening():
    return byte_level(OPENING, CHATML_TOKENS, "<|im_end|>", THINK)


def test_each_response_keeps_the_channel_that_the_template_gives_it():
    """Protects pairs of which one side has a thought or a call: the other needs its channel all the same."""
    tokenizer = harmony()
    thought = says(GOOD, thinking="two and two")
    for answers, tools in (([thought, says(BAD)], None), ([says("", tool_calls=[CALL]), says(BAD)], [TOOL])):
        (prompt, *sides), rules = encode(tokenizer, [asks(QUESTION)], *([a] for a in answers), tools=tools)
        assert prompt[1].endswith("<|start|>assistant") and not rules
        assert sides[1][1] == f"<|channel|>final<|message|>{BAD}<|return|>"
        if not tools:
            for side, answer in zip(sides, answers, strict=True):
                assert prompt[0] + side[0] == whole(tokenizer, asks(QUESTION), answer)
    (prompt, chosen, _), _ = encode(tokenizer, QUESTION, GOOD, BAD)
    assert prompt[1].endswith("<|channel|>final<|message|>") and chosen[1] == f"{GOOD}<|return|>"


@pytest.mark.parametrize("make", [sentencepiece, lambda template: byte_level(template, ["</s>"], "</s>")])
def test_a_space_of_the_templates_own_stands_before_both(make):
    """One response begins with the space that the template would write before it, the other does not."""
    tokenizer = make(VICUNA)
    (prompt, chosen, rejected), rules = encode(tokenizer, QUESTION, f" {GOOD}", BAD)
    for side, text in ((chosen, GOOD), (rejected, BAD)):
        assert prompt[0] + side[0] == whole(tokenizer, asks(QUESTION), says(text))
    assert not rules


def test_a_template_of_words_is_not_applied_twice():
    tokenizer = byte_level(VICUNA, ["</s>"], "</s>")
    plain, _ = encode(tokenizer, QUESTION, GOOD, BAD)
    for written in (f"A chat. USER: {QUESTION} ASSISTANT:", f"A chat. USER: {QUESTION} ASSISTANT: "):
        again, rules = encode(tokenizer, written, GOOD, BAD)
        assert again == plain and rules == {"rendered"}
    asked, rules = encode(tokenizer, "What does ASSISTANT: mean?", GOOD, BAD)
    assert asked[0][1] == "A chat. USER: What does ASSISTANT: mean? ASSISTANT:" and not rules


def test_rendered_prompts_get_the_channel_too():
    tokenizer = harmony()
    plain, _ = encode(tokenizer, QUESTION, GOOD, BAD)
    written = tokenizer.apply_chat_template([asks(QUESTION)], add_generation_prompt=True, tokenize=False)
    assert encode(tokenizer, written, GOOD, BAD) == (plain, {"rendered"})
    channel = "<|channel|>final<|message|>"
    (prompt, *sides), _ = encode(tokenizer, written, channel + GOOD, channel + BAD)
    assert prompt[1] == written and [text for _, text in sides] == [
        f"{channel}{text}<|return|>" for text in (GOOD, BAD)
    ]


@pytest.mark.parametrize("where", ["/no_think", "Be brief. /no_think", "/no_think\nBe brief."])
def test_a_switch_that_the_template_takes_away_is_not_lost(where):
    tokenizer = byte_level(SWITCHED, CHATML_TOKENS, "<|im_end|>")
    prompt = [{"role": "system", "content": where}, asks(QUESTION)]
    (head, chosen, _), _ = encode(tokenizer, prompt, [says(GOOD)], [says(BAD)])
    assert head[1].endswith("<think>\n\n</think>\n\n") and "/no_think" not in head[1]
    assert chosen[1] == f"{GOOD}<|im_end|>"


def test_marks_in_quotes_are_no_thought():
    """Protects answers about the marks: they are neither cut off nor refused."""
    texts = "Write `<think>`, then `</think>`.", "Write '</think>' alone.", "Use `<think>`."
    for chosen, rejected in pairwise(texts):
        (prompt, *sides), rules = encode(opening(), QUESTION, chosen, rejected)
        assert [text for _, text in sides] == [f"{chosen}<|im_end|>", f"{rejected}<|im_end|>"]
        assert prompt[1].endswith("<think>\n\n</think>\n\n") and "unclosed" not in rules
    _, (_, text), _ = encode(opening(), QUESTION, "say `4`</think>4", "two</think>5")[0]
    assert text == "say `4`</think>4<|im_end|>"  # a thought that ends in code


def test_an_answer_beside_one_with_its_thought_in_a_field_is_whole():
    """A plain answer goes on with the prompt's thought only where the other text does so too."""
    tokenizer = opening()
    answers = says(GOOD, reasoning_content="two and two"), says(BAD)
    (prompt, *sides), rules = encode(tokenizer, [asks(QUESTION)], *([answer] for answer in answers))
    assert prompt[1].endswith("<think>\n") and rules == {"closed_first"}
    for side, answer in zip(sides, answers, strict=True):
        written = whole(tokenizer, asks(QUESTION), answer)
        assert written[: len(prompt[0] + side[0])] == prompt[0] + side[0]
        assert side[1].endswith("<|im_end|>")
