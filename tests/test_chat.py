"""sage.data.chat, placement and encoding: the tokens trained are those that a model reads and writes.

The templates and tokenizers of tests/templates.py imitate those of released models.
"""

from __future__ import annotations

import json

import pytest
from conftest import SHARED_DATA, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import CHATML, CHATML_TOKENS, FAMILIES, QWEN3, byte_level, family, sentencepiece

from sage.data.chat import (
    MARK,
    ChatFormat,
    Renderer,
    encode_prompts,
    encode_texts,
    response_ends,
    tokenizer_fingerprint,
)
from sage.data.encoding import Encoder
from sage.data.pairs import read_pair_set
from sage.data.placement import place
from sage.data.thoughts import OPENED
from sage.data.tokens import tokenize_pairs
from sage.util.errors import UserError

QUESTION = "What is 2 + 2?"
TWO, THREE = "<think>\ntwo and two\n</think>\n\n", "<think>\ntwo or three\n</think>\n\n"
GOOD, BAD = "The answer is 4.", "The answer is 5."
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"location": "Paris"}'},
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def asks(content):
    return {"role": "user", "content": content}


def encode(name, prompt, chosen, rejected, tools=None, chat=None, **more):
    """Prompt, chosen and rejected as (ids, text with special tokens), and the rules; or why it is refused."""
    tokenizer = family(name) if isinstance(name, str) else name
    record = {"pair_id": "1", "pass_rate": None, "tools": json.dumps(tools) if tools else None, **more}
    record |= {"prompt": json.dumps(prompt), "chosen": json.dumps(chosen), "rejected": json.dumps(rejected)}
    out = Encoder(Renderer(tokenizer, chat or ChatFormat()))({key: [value] for key, value in record.items()})
    if out["reason"][0]:
        return out["reason"][0]
    ids = [out[column][0] for column in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return [(row, tokenizer.decode(row)) for row in ids], set(out["rules"][0])


def whole(tokenizer, *messages, **more):
    """Ids of a conversation as the template writes it."""
    return tokenizer.apply_chat_template(list(messages), return_dict=False, **more)


# --- the template's own tokens


@each_family
def test_texts_have_the_ids_that_the_tokenizer_gives_them(name):
    """Protects the fast path, whatever settings earlier calls have left in the tokenizer."""
    tokenizer = FAMILIES[name]()
    texts = ["", " two  and two", QUESTION, "a<|im_end|>b</s>\n", "¼ 数学 🙂", " two  and two"]
    right = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(texts, padding=True, truncation=True, max_length=4)
    assert encode_texts(tokenizer, texts) == right and encode_texts(tokenizer, []) == []


def test_a_tokenizer_with_a_call_of_its_own_is_asked():
    """Some classes change the text before the shared code sees it."""
    tokenizer = FAMILIES["chatml"]()

    class Own(type(tokenizer)):
        def _encode_plus(self, text, *args, **more):
            return super()._encode_plus([part.replace("x", "y") for part in text], *args, **more)

    tokenizer.__class__ = Own
    assert encode_texts(tokenizer, ["x"]) == encode_texts(FAMILIES["chatml"](), ["y"])


def test_a_repeated_prompt_is_written_once_and_others_are_not_mixed_up():
    renderer = Renderer(family("qwen3"), ChatFormat())
    prompts = [QUESTION, [asks(QUESTION)], [asks("other")], QUESTION]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for prompt in prompts:
        messages = [asks(prompt)] if isinstance(prompt, str) else prompt
        for offered in (None, tools):
            right = whole(
                renderer.tokenizer, *messages, tools=offered, add_generation_prompt=True, tokenize=False
            )
            assert renderer.prompt(prompt, offered) == right
    assert len(renderer.heads) == 4


@each_family
@pytest.mark.parametrize("system", [False, True])
def test_plain_pairs_have_the_ids_of_the_whole_conversation(name, system):
    """Protects the rule of all rules, against `apply_chat_template` itself: no ▁ or merge that
    the whole does not have."""
    tokenizer = family(name)
    messages = [{"role": "system", "content": "Be brief."}] * system + [asks(QUESTION)]
    if system and name == "gemma":
        assert encode(name, messages, [says(GOOD)], [says(BAD)]) == "template_refuses"
        return
    (prompt, *sides), rules = encode(name, messages, [says(GOOD)], [says(BAD)])
    generated = whole(tokenizer, *messages, add_generation_prompt=True)
    for (ids, text), response in zip(sides, (GOOD, BAD), strict=True):
        reference = whole(tokenizer, *messages, says(response))
        if system and name.startswith("mistral"):  # it leaves the system message out once there is an answer
            reference = [*generated, *whole(tokenizer, asks(QUESTION), says(response))][-len(ids) :]
            assert prompt[0] == generated and ids == reference and rules == {"raw"}
            continue
        assert reference[: len(prompt[0] + ids)] == prompt[0] + ids
        end = ids[-1]
        assert end in response_ends(tokenizer, ChatFormat()) and ids.count(end) == 1
        assert end not in reference[len(prompt[0] + ids) :], "cut at the first end token"
        assert text.removesuffix(tokenizer.decode([end])).strip() == response
    assert rules - {"raw"} == ({"not_opened"} if name == "r1 distill" else set())
    if name not in (
        "r1 distill",
        "qwen3 thinking",
    ):  # whose templates write plain answers after another prompt
        assert prompt[0][: len(generated)] == generated
    assert encode_prompts(tokenizer, [messages], ChatFormat()) == [generated]


@pytest.mark.parametrize(
    "written", ["{{ 9 ** 9 }}", "{{ messages[-1].content }}", "{{ messages[0].content }}"]
)
def test_a_question_of_which_the_template_leaves_out_a_part_is_not_asked(written):
    """Training refuses it, too. An accuracy on questions that the model did not see is none."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = written
    prompt = [{"role": "system", "content": "Be brief."}, asks(QUESTION)]
    with pytest.raises(UserError, match="leaves out the content of a"):
        encode_prompts(tokenizer, [prompt], ChatFormat())


@each_family
def test_finished_thoughts_are_trained_as_written(name):
    """Protects reasoning: opened once, closed once, unchanged, on whatever template."""
    (prompt, *sides), rules = encode(name, QUESTION, TWO + GOOD, THREE + BAD)
    for (_, text), response in zip(sides, (TWO + GOOD, THREE + BAD), strict=True):
        conversation = prompt[1] + text
        assert response in conversation
        assert conversation.count("<think>") == conversation.count("</think>") == 1
    assert rules == {"nemotron super": {"raw"}, "r1 distill": {"opened_by_prompt"}}.get(name, set())
    assert prompt[0] == whole(family(name), asks(QUESTION), add_generation_prompt=True)


@each_family
def test_pairs_that_differ_in_the_thought_alone_are_pairs(name):
    (_, chosen, rejected), _ = encode(name, QUESTION, TWO + GOOD, THREE + GOOD)
    assert chosen[0] != rejected[0] and "two and two" in chosen[1] and "two or three" in rejected[1]


@each_family
def test_cut_off_thoughts_have_no_end_and_nothing_before_them(name):
    """Protects from an end token that nobody wrote, and from a template's
    thought before the response's own."""
    (prompt, chosen, rejected), rules = encode(name, QUESTION, TWO + GOOD, "<think>\ntwo or")
    assert "unclosed" in rules
    assert (prompt[1] + rejected[1]).endswith("<think>\ntwo or")
    assert (prompt[1] + rejected[1]).count("<think>") == 1 and "</think>" not in prompt[1] + rejected[1]
    assert chosen[0][-1] in response_ends(family(name), ChatFormat())


@each_family
def test_a_plain_answer_is_never_inside_a_thought(name):
    (prompt, chosen, rejected), _ = encode(name, QUESTION, TWO + GOOD, BAD)
    assert (prompt[1] + chosen[1]).count("<think>") == (prompt[1] + chosen[1]).count("</think>") == 1
    plain = prompt[1] + rejected[1]
    assert plain.count("<think>") == plain.count("</think>") and BAD in plain.rpartition("</think>")[2]


@pytest.mark.parametrize("name", ["r1 distill", "qwen3 thinking"])
def test_texts_sampled_after_an_opened_thought_go_on_with_it(name):
    """Protects what vLLM returns for such models: thoughts without their opening
    mark, some of them cut off."""
    (prompt, chosen, rejected), rules = encode(name, QUESTION, TWO[8:] + GOOD, "two or")
    assert prompt[1].endswith("<think>\n") and chosen[1].startswith(TWO[8:] + GOOD)
    assert rejected[1] == "two or" and rules == {"unclosed"}


def test_what_the_template_adds_on_both_sides_is_the_prompts():
    (prompt, chosen, rejected), _ = encode("qwen3", QUESTION, GOOD, BAD)
    assert prompt[1].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (chosen[1], rejected[1]) == (GOOD + "<|im_end|>", BAD + "<|im_end|>")
    (prompt, chosen, _), _ = encode("qwen3", QUESTION, TWO[8:] + GOOD, THREE[8:] + BAD)  # only closed
    assert prompt[1].endswith("assistant\n<think>\n") and chosen[1] == TWO[8:] + GOOD + "<|im_end|>"


def test_enable_thinking_false_closes_the_thought():
    chat = ChatFormat(True, {"enable_thinking": False})
    (prompt, chosen, _), rules = encode("qwen3", QUESTION, GOOD, BAD, chat=chat)
    assert prompt[0] == encode_prompts(family("qwen3"), [QUESTION], chat)[0] and not rules
    assert prompt[1].endswith("</think>\n\n") and chosen[1] == GOOD + "<|im_end|>"
    assert encode("qwen3", QUESTION, TWO + GOOD, BAD, chat=chat) == "second_thought"


@each_family
def test_text_that_a_template_would_trim_stays(name):
    (_, chosen, rejected), rules = encode(name, QUESTION, " 4\n", "5  ")
    ends = [side[1].rpartition(family(name).decode([side[0][-1]]))[0] for side in (chosen, rejected)]
    assert ends[0].lstrip() in ("4\n", "4\n ") and ends[1].lstrip() in ("5  ", "5   ")
    assert ("raw" in rules) == (name in ("llama 3", "nemotron super", "llama 2", "gemma"))


@each_family
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_reproduce_the_text(name, data):
    """Property: for every accepted pair, prompt and response decode to the very text, whatever is in it."""
    piece = st.text(alphabet="ab 4\n<>é漢😀▁", min_size=1, max_size=8)
    prompt, chosen, rejected = (data.draw(piece.filter(str.strip)) for _ in range(3))
    tokenizer, found = family(name), encode(name, prompt, chosen, rejected)
    renderer = Renderer(tokenizer, ChatFormat())
    placed = place(renderer, prompt, chosen, rejected)
    (ids, _), *sides = found[0]
    for (response, _), text in zip(sides, (placed.chosen, placed.rejected), strict=True):
        reference = tokenizer(placed.prompt + placed.lead + text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids + response) == tokenizer.decode(reference)
        assert ids == tokenizer(placed.prompt + placed.lead, add_special_tokens=False)["input_ids"]


# --- fields


def test_reasoning_content_is_trained_or_refused():
    """Protects thoughts that are not in the content. Inline and apart they give the same ids."""
    apart = [[says(GOOD, reasoning_content="two and two")], [says(BAD, reasoning_content="two or three")]]
    inline = [[says(TWO + GOOD)], [says(THREE + BAD)]]
    for name in ("qwen3", "qwen3 thinking"):
        assert encode(name, [asks(QUESTION)], *apart)[0] == encode(name, [asks(QUESTION)], *inline)[0]
    for name in set(FAMILIES) - {"qwen3", "qwen3 thinking"}:
        assert encode(name, [asks(QUESTION)], *apart) == "lost"


def test_tools_and_calls_reach_the_prompt_or_are_refused():
    tool = {"role": "tool", "tool_call_id": "c1", "content": "12 C"}
    for content, names in (("", ("qwen3", "llama 3")), (None, ("qwen3",))):
        messages = [asks("Weather in Paris?"), says(content, tool_calls=[CALL]), tool]
        for name in names:
            (prompt, chosen, _), _ = encode(
                name, messages, [says("It is 12 C.")], [says("It is hot.")], [TOOL]
            )
            assert '{"location": "Paris"}' in prompt[1] and "get_weather" in prompt[1] and "12 C" in prompt[1]
            assert chosen[1].startswith("It is 12 C.")
        for name in ("chatml", "phi 4", "zephyr", "nemotron super"):
            assert encode(name, messages, [says("a")], [says("b")], [TOOL]) in ("lost", "template_refuses")
    assert encode("mistral", [asks("hi")], [says("a")], [says("b")], [TOOL]) == "lost"


def test_a_call_as_response():
    """Protects pairs that prefer a tool call: the template writes it, and both sides share what it adds."""
    (prompt, chosen, rejected), _ = encode(
        "qwen3", [asks("Weather in Paris?")], [says("", tool_calls=[CALL])], [says("It is hot.")], [TOOL]
    )
    assert prompt[1].endswith("<think>\n\n</think>\n\n") and rejected[1] == "It is hot.<|im_end|>"
    assert chosen[1] == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Paris"}}\n</tool_call><|im_end|>'
    )


def test_a_template_that_loses_a_message_is_noticed():
    last_only = "<|im_start|>{{ messages[-1].content }}<|im_end|>"
    tokenizer = byte_level(last_only, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    messages = [asks("first"), says("yes"), asks("second")]
    assert encode(tokenizer, messages, [says("a")], [says("b")]) == "lost"


def test_earlier_thoughts_may_go_as_at_generation():
    messages = [asks(QUESTION), says(TWO + GOOD), asks("Sure?")]
    (prompt, *_), _ = encode("qwen3", messages, [says("Yes")], [says("No")])
    assert "two and two" not in prompt[1] and GOOD in prompt[1]


# --- what the data bring along


@each_family
def test_rendered_data_are_not_rendered_again(name):
    tokenizer = family(name)
    head = tokenizer.apply_chat_template([asks(QUESTION)], add_generation_prompt=True, tokenize=False)
    end = tokenizer.decode([encode(name, QUESTION, GOOD, BAD)[0][1][0][-1]])
    for given_head in {head, head.removeprefix(tokenizer.bos_token or ""), head.rstrip()}:
        (prompt, chosen, _), rules = encode(name, given_head, GOOD + end, BAD)
        assert "rendered" in rules and prompt[1].count("What is") == 1
        assert chosen[0].count(chosen[0][-1]) == 1
        if tokenizer.bos_token and prompt[0][0] == tokenizer.bos_token_id:
            assert prompt[0].count(tokenizer.bos_token_id) == 1
    assert encode_prompts(tokenizer, [head], ChatFormat()) == encode_prompts(
        tokenizer, [QUESTION], ChatFormat()
    )


@each_family
def test_rendered_data_without_the_generation_prompt(name):
    """Protects data sets whose prompt and responses were rendered apart, each turn with its own header."""
    tokenizer = family(name)
    asked = [asks(QUESTION)]
    head = tokenizer.apply_chat_template(asked, tokenize=False)
    full = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    header = OPENED.sub("", full)[len(head) :]
    if not MARK.match(head):
        pytest.skip("the template writes no markup around a question")
    (prompt, chosen, rejected), rules = encode(name, head, header + GOOD, BAD)
    assert "rendered" in rules and prompt[1].count("What is") == 1 and header.strip() in prompt[1]
    assert prompt[1].count(MARK.findall(head)[-1]) <= full.count(MARK.findall(head)[-1])
    assert chosen[1].lstrip().startswith(GOOD) and rejected[1].lstrip().startswith(BAD)
    talk = [asks("Hi"), says("Hello"), *asked]  # the answer's header stands in it already
    renderer = Renderer(tokenizer, ChatFormat())
    assert renderer.prompt(renderer.render(talk)).endswith(renderer.surroundings[1])


def test_a_question_about_the_markup_is_no_rendered_prompt():
    (prompt, *_), rules = encode("chatml", "What does <|im_start|> mean?", "a", "b")
    assert prompt[1].startswith("<|im_start|>user\nWhat does <|im_start|> mean?") and not rules


@each_family
def test_a_question_about_the_end_of_a_turn_is_no_rendered_prompt(name):
    turn = Renderer(family(name), ChatFormat()).surroundings[1].strip()
    if not MARK.search(turn):
        pytest.skip("the template writes no markup after a question")
    (prompt, *_), rules = encode(name, f"What does {turn} mean?", "a", "b")
    assert "rendered" not in rules
    asked = [asks(f"What does {turn} mean?")]
    head = family(name).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert prompt[1].replace(" ", "").startswith(OPENED.sub("", head).replace(" ", "")[:40])


@each_family
def test_started_answers_are_continued(name):
    started = "Step 1: 3 * 4 = 12.\nStep 2:"
    messages = [asks("2 + 3 * 4?"), says(started)]
    (prompt, chosen, _), _ = encode(name, messages, [says(" 2 + 12 = 14.")], [says(" 5 * 4 = 20.")])
    assert prompt[1].endswith(started)
    assert started + " 2 + 12 = 14." in family(name).decode(prompt[0] + chosen[0])
    assert encode("qwen3", messages, [says("a", tool_calls=[CALL])], [says("b")]) == "started_answer"


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_plain_text_has_one_begin_token(begin):
    tokenizer = sentencepiece(None, legacy=True)
    (prompt, chosen, _), _ = encode(tokenizer, begin + "The sky", " is blue", " is 4", chat=ChatFormat(False))
    assert prompt[0].count(1) == 1 and prompt[0][0] == 1
    assert prompt[0] + chosen[0] == [*tokenizer("The sky is blue")["input_ids"], 2]


# --- sampled ids


def test_sampled_ids_are_used_exactly():
    """Protects on-policy pairs: not one token more, no end where none was sampled."""
    tokenizer = family("qwen3")
    good, bad = ([ids[0] for ids in encode_texts(tokenizer, list(text))] for text in (GOOD, BAD))
    assert good != encode_texts(tokenizer, [GOOD])[0]  # the tokenizer would merge some letters
    end = tokenizer.eos_token_id
    prompt = encode_prompts(tokenizer, [QUESTION], ChatFormat())[0]
    sampled = {"prompt_ids": prompt, "chosen_ids": [*good, end], "rejected_ids": bad}
    mine = {**sampled, "tokenizer": tokenizer_fingerprint(tokenizer)}
    rows, rules = encode("qwen3", QUESTION, GOOD, BAD, **mine)
    assert [ids for ids, _ in rows] == list(sampled.values()) and not rules
    for texts, chat, change, rule in (
        ((QUESTION, GOOD, BAD), None, {"tokenizer": "another"}, "other_tokenizer"),
        ((QUESTION, BAD, GOOD), None, {}, "other_text"),  # columns that are mapped to each other
        (("What?", GOOD, BAD), None, {}, "other_text"),
        ((QUESTION, GOOD, BAD), ChatFormat(False), {}, "other_text"),
    ):
        rows, rules = encode("qwen3", *texts, chat=chat, **{**mine, **change})
        assert rows == encode("qwen3", *texts, chat=chat)[0] and rule in rules


@pytest.mark.parametrize("name", ["chatml", "qwen3", "qwen3 thinking", "r1 distill", "mistral"])
def test_a_solution_beside_a_sampled_response_follows_the_sampled_prompt(name):
    """Protects pairs of a gold solution and a cut-off response: the prompt stays, and
    the solution is whole and ends."""
    tokenizer = family(name)
    prompt = encode_prompts(tokenizer, [QUESTION], ChatFormat())[0]
    cut_off = encode_texts(tokenizer, ["so"])[0]
    mine = {"prompt_ids": prompt, "chosen_ids": None, "rejected_ids": cut_off}
    mine["tokenizer"] = tokenizer_fingerprint(tokenizer)
    (head, chosen, rejected), _ = encode(name, QUESTION, GOOD, "so", **mine)
    assert head[0] == prompt and rejected[0] == cut_off
    assert chosen[0][-1] in response_ends(tokenizer, ChatFormat()) and GOOD in chosen[1]
    assert (head[1] + chosen[1]).count("<think>") == (head[1] + chosen[1]).count("</think>")


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    from transformers import AutoTokenizer

    for name in ("qwen3", "llama 2"):
        family(name).save_pretrained(tmp_path / name)
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(family(name))
    assert tokenizer_fingerprint(family("qwen3")) != tokenizer_fingerprint(family("llama 2"))


# --- choosing a template, and ends


def test_templates_are_chosen_by_name_or_file(tmp_path):
    tokenizer = byte_level(
        {"default": "D {{ messages[0].content }}", "short": "S {{ messages[0].content }}"}, [], "x"
    )
    file = tmp_path / "mine.jinja"
    file.write_text("F {{ messages[0].content }}{{ kind }}")
    assert Renderer(tokenizer, ChatFormat()).prompt("q") == "D q"
    assert Renderer(tokenizer, ChatFormat("short")).prompt("q") == "S q"
    assert Renderer(tokenizer, ChatFormat(str(file), {"kind": "!"})).prompt("q") == "F q!"
    for chat, message in (
        (ChatFormat("long"), "its templates are default, short"),
        (ChatFormat(True, {"enable_thinking": False}), "no such argument"),
        (ChatFormat(True, {"messages": []}), "no such argument"),
        (ChatFormat(False, {"kind": 1}), "needs a chat template"),
    ):
        with pytest.raises(UserError, match=message):
            Renderer(tokenizer, chat)
    with pytest.raises(UserError, match=r"a, b"):
        Renderer(byte_level({"a": "x", "b": "y"}, [], "x"), ChatFormat())


def test_generation_stops_where_training_ends_responses(tmp_path):
    """Protects base models with a chat template: their eos is not the token that ends a turn."""
    tokenizer = family("chatml on a base model")
    assert response_ends(tokenizer, ChatFormat()) == {0, 2} and response_ends(
        tokenizer, ChatFormat(False)
    ) == {0}
    (_, chosen, _), _ = encode("chatml on a base model", QUESTION, "4", "5")
    assert chosen[1] == "4<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    from transformers import AutoTokenizer

    assert response_ends(AutoTokenizer.from_pretrained(tmp_path), ChatFormat()) == {0, 2, 7, 9}


def test_strict_templates_still_have_an_end():
    """A template that refuses two turns ends its responses with eos."""
    tokenizer = byte_level("{{ raise_exception('no') }}", ["<|end|>"], "<|end|>")
    assert response_ends(tokenizer, ChatFormat()) == {tokenizer.eos_token_id}


# --- the shared cases


@pytest.mark.parametrize(
    "file", ["think", "reasoning", "tools_empty", "memorise", "rendered", "prefill", "good"]
)
@each_family
def test_shared_cases(file, name, tmp_path):
    """Each small public case is trained right or refused by name, on every template."""
    path = SHARED_DATA.parent / "cases" / "data" / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer, pairs = family(name), read_pair_set(str(path))
    try:
        found = tokenize_pairs(
            pairs, tokenizer, chat=ChatFormat(), max_length=2048, num_proc=1, cache_dir=str(tmp_path)
        )
    except UserError as error:
        assert file in ("reasoning", "tools_empty", "rendered"), error
        assert "leaves out" in str(error) or "refuses" in str(error)
        return
    ends = response_ends(tokenizer, ChatFormat())
    for pair in found.data:
        for ids in (pair["chosen_ids"], pair["rejected_ids"]):
            assert ids[-1] in ends and sum(index in ends for index in ids) == 1
            text = tokenizer.decode(pair["prompt_ids"] + ids)
            assert text.count("<think>") == text.count("</think>") <= 1
            if file == "reasoning":
                assert "two and two" in text or "two or three" in text
            if file == "prefill":
                assert "Step 2: " in text and text.count("Step 2:") == 1
            if file == "good":
                assert tokenizer.convert_ids_to_tokens(ids[0]) not in ("▁",)


@each_family
def test_conversations_are_written_as_transformers_writes_them(name):
    """Protects the short way to the template: plain messages do not pass through `apply_chat_template`."""
    tokenizer, renderer = family(name), Renderer(family(name), ChatFormat())
    asked = [{"role": "user", "content": "q <b>\n"}]
    answered = [*asked, {"role": "assistant", "content": "<think>\nt\n</think>\n\na"}]
    for messages, answering in ((asked, True), (answered, False), ([*answered, *asked], True)):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=answering, tokenize=False)
        assert renderer.render(messages, answering=answering) == expected


def test_a_tokenizer_with_a_way_of_its_own_writes_conversations_in_it():
    class Own(type(family("chatml"))):
        def apply_chat_template(self, conversation, **more):
            return f"own {conversation[0]['content']}"

    tokenizer = byte_level(CHATML, CHATML_TOKENS, "<|im_end|>")
    tokenizer.__class__ = Own
    assert Renderer(tokenizer, ChatFormat()).prompt("q") == "own q"


def test_argument_typos_do_not_pass_silently():
    tokenizer = byte_level(QWEN3, ["<|im_end|>"], "<|im_end|>")
    with pytest.raises(UserError, match=r"template_arguments\.enable_thinkin:"):
        Renderer(tokenizer, ChatFormat(True, {"enable_thinkin": False}))
