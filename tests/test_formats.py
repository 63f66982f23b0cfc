"""sage.data: public formats, fields and conversations become one record, and nothing is lost silently."""

import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import REPO

from sage.answering.check import check_answers
from sage.answering.verify import Verdict, Verifier
from sage.data.pairs import read_pair_set, turns_of
from sage.util.errors import UserError

CASES = REPO.parent / "shared" / "cases" / "data"
SHARED = pytest.mark.skipif(not CASES.is_dir(), reason=f"no cases in {CASES}")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def user(text):
    return {"role": "user", "content": text}


def says(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def system(text):
    return {"role": "system", "content": text}


def sides(chosen, rejected):
    return {"chosen": [says(chosen)], "rejected": [says(rejected)]}


def load(tmp_path, *rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pair_set(str(file), **options)


def read(pair):
    """(prompt, chosen, rejected) of a record."""
    return tuple(turns_of(pair[name]) for name in ("prompt", "chosen", "rejected"))


def option(name):
    """What `data=NAME` says of columns."""
    columns = yaml.safe_load((REPO / "conf" / "data" / f"{name}.yaml").read_text()).get("columns", {})
    return {ours: theirs for ours, theirs in columns.items() if theirs is not None}


# ---------------------------------------------------------------- formats

CONVERSATION = [user("Hi"), says("Hello"), user("2 + 2?")]
GPT = {"from": "gpt", "value": "4"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2 + 2?\n\nAssistant:"
SPLIT = (CONVERSATION, [says("4")], [says("5")])
PARTS = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]
# name -> (option, row, what it means)
FORMATS = {
    "LLaMA-Factory, ShareGPT": (
        "pairs",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "2 + 2?"},
            ],
            "system": "Be brief.",
            "tools": "[]",
            "chosen": GPT,
            "rejected": {**GPT, "value": "5"},
        },
        ([system("Be brief."), *CONVERSATION], *SPLIT[1:]),
    ),
    "LLaMA-Factory, ShareGPT with tools": (
        "pairs",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "12 C"},
            ],
            "tools": json.dumps(TOOLS),
            "chosen": GPT,
            "rejected": {**GPT, "value": "5"},
        },
        (
            [
                system("s"),
                user("Weather?"),
                says(
                    "",
                    tool_calls=[
                        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
                    ],
                ),
                {"role": "tool", "content": "12 C"},
            ],
            *SPLIT[1:],
        ),
    ),
    "Alpaca": (
        "pairs",
        {
            "instruction": "2 +",
            "input": "2?",
            "system": "s",
            "history": [["Hi", "Hello"]],
            "chosen": "4",
            "rejected": "5",
        },
        ([system("s"), *CONVERSATION[:2], user("2 +\n2?")], *SPLIT[1:]),
    ),
    "Alpaca without input": (
        "pairs",
        {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5", "system": None, "history": []},
        ("2 + 2?", "4", "5"),
    ),
    "ms-swift": ("pairs", {"messages": [*CONVERSATION, says("4")], "rejected_response": "5"}, SPLIT),
    "ms-swift with rejected messages": (
        "pairs",
        {"messages": [*CONVERSATION, says("4")], "rejected_messages": [*CONVERSATION, says("5")]},
        SPLIT,
    ),
    "ms-swift 2": (
        "pairs",
        {"query": "2 + 2?", "response": "4", "rejected_response": "5", "history": [["Hi", "Hello"]]},
        SPLIT,
    ),
    "OpenAI preferences": (
        "pairs",
        {
            "input": {"messages": CONVERSATION, "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [says("4")],
            "non_preferred_output": [says("5")],
        },
        SPLIT,
    ),
    "messages with text parts": (
        "pairs",
        {
            "prompt": [user(PARTS)],
            "chosen": [says([{"type": "text", "text": "4"}])],
            "rejected": [says(["5"])],
            "images": [],
        },
        ([user("2 + 2?")], *SPLIT[1:]),
    ),
    "messages as JSON text": (
        "pairs",
        {
            "prompt": json.dumps(CONVERSATION),
            "chosen": json.dumps([says("4")]),
            "rejected": json.dumps(says("5")),
        },
        SPLIT,
    ),
    "messages as Python text": (
        "pairs",
        {"prompt": str(CONVERSATION), "chosen": str([says("4")]), "rejected": str([says("5")])},
        SPLIT,
    ),
    "HH": ("hh", {"chosen": f"{HH} 4", "rejected": f"{HH} 5"}, SPLIT),
    "HH with a prompt column": (
        "pairs",
        {"prompt": HH, "chosen": " 4", "rejected": " 5"},
        SPLIT,
    ),
    "UltraFeedback": (
        "ultrafeedback",
        {
            "prompt": "2 + 2?",
            "prompt_id": "a",
            "messages": [user("2 + 2?"), says("4")],
            "chosen": [user("2 + 2?"), says("4")],
            "rejected": [user("2 + 2?"), says("5")],
            "score_chosen": 8.0,
        },
        ([user("2 + 2?")], *SPLIT[1:]),
    ),
    "Orca": (
        "orca",
        {"system": "s", "question": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"},
        ([system("s"), user("2 + 2?")], [says("It is 4")], [says("It is 5")]),
    ),
    "Orca, distilabel": (
        "orca_distilabel",
        {"system": "", "input": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5", "generations": ["x"]},
        ("2 + 2?", "It is 4", "It is 5"),
    ),
    "Step-DPO": (
        "step_dpo",
        {
            "prompt": "2 + 3 * 4?",
            "initial_reason_steps": "Step 1: 3 * 4 = 12.\nStep 2:",
            "chosen": " 14",
            "rejected": " 20",
            "full_chosen": "x",
            "full_rejected": "y",
        },
        (
            [user("2 + 3 * 4?"), says("Step 1: 3 * 4 = 12.\nStep 2:")],
            [says(" 14")],
            [says(" 20")],
        ),
    ),
    "Step-DPO, whole solutions": (
        "step_dpo_full",
        {
            "prompt": "2 + 2?",
            "initial_reason_steps": "Step 1:",
            "chosen": "c",
            "rejected": "r",
            "full_chosen": " 4",
            "full_rejected": " 5",
        },
        ([user("2 + 2?"), says("Step 1:")], [says(" 4")], [says(" 5")]),
    ),
    "Step-DPO, whole solutions that repeat the start": (
        "step_dpo_full",
        {
            "prompt": "2 + 2?",
            "initial_reason_steps": "Step 1:",
            "full_chosen": "Step 1: 4",
            "full_rejected": "Step 1: 5",
        },
        ([user("2 + 2?"), says("Step 1:")], [says(" 4")], [says(" 5")]),
    ),
    "TRL with tools": (
        "pairs",
        {"prompt": CONVERSATION, **sides("4", "5"), "tools": TOOLS},
        SPLIT,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("store", ["jsonl", "parquet"])
def test_formats(name, store, tmp_path):
    """Protects that a public set is read as its authors mean it, from any store."""
    form, row, expected = FORMATS[name]
    if store == "jsonl":
        pairs = load(tmp_path, row, columns=option(form)).pairs
    elif name == "messages with text parts":
        pytest.skip("Arrow has no lists of texts and objects")
    else:
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
        pairs = read_pair_set(str(tmp_path / "rows.parquet"), columns=option(form)).pairs
    assert read(pairs[0]) == expected
    assert (pairs["tools"][0] is None) == (
        name not in ("TRL with tools", "OpenAI preferences", "LLaMA-Factory, ShareGPT with tools")
    )


def test_formats_are_recognised_by_their_columns(tmp_path):
    """Protects `data.path=FILE` without an option if the columns can mean one thing only."""
    for name, (form, row, expected) in FORMATS.items():
        if form not in ("orca", "orca_distilabel", "step_dpo_full"):
            assert read(load(tmp_path, row).pairs[0]) == expected, name
    notes = load(tmp_path, FORMATS["Alpaca"][1]).notes
    assert "read in the format of Alpaca" in notes


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("You are kind.\n\nHuman: 2 + 2?\n\nAssistant:", [system("You are kind."), user("2 + 2?")]),
        ("Human: Hi\nAssistant: Hello\nHuman: 2 + 2?\nAssistant: ", CONVERSATION),
        ("What does Human: mean?\n\nHuman: is a mark.", "What does Human: mean?\n\nHuman: is a mark."),
    ],
)
def test_transcripts_with_a_preface_or_single_line_breaks(prompt, messages, tmp_path):
    """A prompt that ends with "Assistant:" is a conversation, and not one text of the user's."""
    found = load(tmp_path, {"prompt": prompt, "chosen": " 4", "rejected": " 5"}).pairs[0]
    text = isinstance(messages, str)
    assert read(found) == (messages, *((" 4", " 5") if text else ([says("4")], [says("5")])))


def test_a_transcript_stays_text_without_a_template(tmp_path):
    """Protects base models: with data.chat_template=false HH's own marks are the template."""
    row = {"chosen": f"{HH} 4 more", "rejected": f"{HH} 4 less"}
    assert read(load(tmp_path, row, chat=False).pairs[0]) == (HH, " 4 more", " 4 less")


# ---------------------------------------------------------------- siblings of the formats

WHOLE = [user("Hi"), says("Hello"), user("2 + 2?")]
SIBLINGS = {
    "a system message before a prompt that the responses repeat": (
        {
            "prompt": [system("s"), user("Hi")],
            "chosen": [*WHOLE, says("4")],
            "rejected": [*WHOLE, says("5")],
        },
        ([system("s"), *WHOLE], *SPLIT[1:]),
    ),
    "one response whole, the other alone": (
        {"prompt": "Hi", "chosen": [*WHOLE, says("4")], "rejected": [says("5")]},
        SPLIT,
    ),
    "messages with ids of their own": (
        {
            "prompt": "q",
            "chosen": [{**user("q"), "id": 1}, says("4")],
            "rejected": [{**user("q"), "id": 2}, says("5")],
        },
        ([{**user("q"), "id": 1}], *SPLIT[1:]),
    ),
    "a started answer that both responses repeat": (
        {"prompt": [user("q"), says("So ")], **sides("So 4", "So 5")},
        ([user("q"), says("So ")], *SPLIT[1:]),
    ),
    "texts that repeat the prompt": (
        {"prompt": "What is it?", "chosen": "What is it? 4", "rejected": "What is it?\n5"},
        ("What is it?", "4", "5"),
    ),
    "a thought as OpenAI's parts": (
        {"prompt": "q", **sides([{"type": "reasoning", "text": "t"}, {"type": "text", "text": "4"}], "5")},
        ([user("q")], [says("4", reasoning_content="t")], [says("5")]),
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_of_the_formats(name, tmp_path):
    """Protects rows that say the same in another shape: nothing is asked twice, and no row is refused."""
    row, expected = SIBLINGS[name]
    assert read(load(tmp_path, row).pairs[0]) == expected


def test_a_restated_question_is_not_taken_away(tmp_path):
    """Protects answers that restate the question: all rows must do it, else it is no format."""
    row = {"prompt": "2 + 2", "chosen": "2 + 2 is 4", "rejected": "2 + 2 is 5"}
    source = load(tmp_path, row, {"prompt": "Hi", "chosen": "Hello", "rejected": "No"})
    assert read(source.pairs[0]) == ("2 + 2", "2 + 2 is 4", "2 + 2 is 5")
    assert "all responses begin with the prompt, which is removed from them" in load(tmp_path, row).notes


@pytest.mark.parametrize("tools", [str(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_in_other_spellings(tools, tmp_path):
    """Protects Parquet files, whose tools are often texts, because their schemas differ."""
    row = {"prompt": "q", **sides("4", "5"), "tools": tools}
    assert json.loads(load(tmp_path, row).pairs[0]["tools"]) == TOOLS


# ---------------------------------------------------------------- fields


def test_every_key_of_a_message_is_kept(tmp_path):
    """Protects thoughts, tool calls and whatever else a template may read; through Arrow too."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    other = {
        "id": "c2",
        "type": "function",
        "function": {"name": "clock", "arguments": {"zone": None, "hour": 1}},
    }
    prompt = [
        user("?"),
        says(None, tool_calls=[call]),
        {"role": "tool", "tool_call_id": "c1", "content": "12 C"},
    ]
    row = {
        "prompt": prompt,
        "chosen": [says("4", reasoning_content="two and two", weight=1)],
        "rejected": [says("", tool_calls=[other])],
        "tools": TOOLS,
    }
    kept = [prompt[0], says("", tool_calls=[call]), prompt[2]]
    pair = load(tmp_path, row).pairs[0]
    assert read(pair) == (kept, row["chosen"], row["rejected"])
    assert json.loads(pair["tools"]) == TOOLS
    plain = {**row, "rejected": [says("5", reasoning_content="two or three")]}
    datasets.Dataset.from_list([plain, {**row, "prompt": [user("?")], "rejected": [says("5")]}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    first, second = read_pair_set(str(tmp_path / "rows.parquet")).pairs
    assert read(first) == (kept, plain["chosen"], plain["rejected"])
    assert read(second) == ([user("?")], row["chosen"], [says("5")])


def test_pairs_that_differ_only_in_the_thought_are_pairs(tmp_path):
    """Protects reasoning models: the thought is what is trained."""
    row = {
        "prompt": [user("?")],
        "chosen": [says("4", reasoning_content="a")],
        "rejected": [says("4", reasoning_content="b")],
    }
    assert len(load(tmp_path, row).pairs) == 1


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"images": ["x.png"]}, "the row has images"),
        ({"audio": {"path": "a.wav"}}, "the row has audio"),
        ({"prompt": [user("")]}, "nothing that the user says"),
        ({"prompt": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "part of type 'image_url'"),
        ({"prompt": [user([{"type": "tool_use", "id": "1"}])]}, "part of type 'tool_use'"),
        (
            {"prompt": [{"from": "function_call", "value": "weather()"}]},
            "function_call that is not valid JSON",
        ),
        ({"prompt": "[{'role': 'user', 'content': array(['x'])}]"}, "looks like messages written as text"),
        ({"chosen": [says("4", images=["x.png"])]}, "chosen has a message with images"),
        ({"tools": "weather"}, "tools is not valid JSON"),
        ({"tools": ["weather"]}, "tools is not valid JSON"),
        ({"tools": [5]}, "tools is not a list of objects"),
        ({"tools": 5}, "tools is not a list of objects"),
        ({"system": ["s"]}, "system is not a text"),
        (
            {"prompt": [system("one"), user("?")], "system": "two"},
            "the system column and the system message differ",
        ),
        (
            {"prompt": "Other?", "chosen": [user("Q"), says("4")], "rejected": [user("Q"), says("5")]},
            "is not part of",
        ),
        ({"prompt_ids": [1.5], "tokenizer": "t"}, "prompt_ids is not a list of token ids"),
        ({"chosen": "half \ud83d"}, "chosen has half of a character"),
        ({"pair_id": "\ud83d"}, "pair_id has half of a character"),
        ({"tools": [{"name": "\ud83d"}]}, "tools has half of a character"),
        ({"pass_rate": 10**400}, "not a number from 0 to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(extra, reason, tmp_path):
    """Protects from training on a part of a row as if it were the whole."""
    row = {"prompt": "?", "chosen": "4", "rejected": "5"}
    with pytest.raises(UserError) as error:
        load(tmp_path, {**row, **extra})
    assert reason in str(error.value) and "rows.jsonl:1:" in str(error.value)


def test_unused_columns_are_named_once(tmp_path):
    """Protects from a column that was meant and misspelt; what is used is not in the list."""
    row = {"prompt": "?", "chosen": "4", "rejected": "5", "images": [], "sytem": "x", "id": 3, "answer": "4"}
    row["videos"] = float("nan")  # a table's null
    assert load(tmp_path, row, row).notes == ["columns not used: sytem, id"]


def test_keys_of_messages_that_templates_may_not_use_are_named(tmp_path):
    """Protects thoughts under a name that no template knows."""
    notes = load(tmp_path, {"prompt": "q", "chosen": [says("4", thought="t")], "rejected": [says("5")]}).notes
    assert "keys of messages that only some chat templates use: thought" in notes


@pytest.mark.parametrize("question", [[user("2 + 2?")], {"text": "2 + 2?"}, "2 + 2?"])
def test_a_prompt_of_any_shape_is_not_passed_over(question, tmp_path):
    """Protects from prompts such as "The answer is": the first row's question may be missing, too."""
    row = {"question": question, "chosen": "The answer is 4.", "rejected": "The answer is 5."}
    for first in ({}, {"question": None}, {"question": ""}, {"prompt": None}):
        rows = [{**row, **first}, {**row, **({"prompt": ""} if "prompt" in first else {})}]
        with pytest.raises(UserError, match=r"no prompt column was found.*data.columns.prompt=question"):
            load(tmp_path, *rows)


def test_an_unnamed_prompt_column_is_not_passed_over(tmp_path):
    """Protects from "The answer is" as the prompt where the question stands in a column of another name."""
    rows = [
        {
            "system": "s",
            "question": f"{n} + 2?",
            "chosen": f"The answer is {n}.",
            "rejected": "The answer is x.",
        }
        for n in range(3)
    ]
    with pytest.raises(
        UserError, match=r"no prompt column was found; it has system, question, chosen, rejected"
    ):
        load(tmp_path, *rows, max_bad=1.0 - 1e-9)
    with pytest.raises(UserError, match=r"data\.columns\.prompt=question"):
        load(tmp_path, *rows)
    pair = load(tmp_path, *rows, columns={"prompt": "question"}).pairs[0]
    assert read(pair)[0] == [system("s"), user("0 + 2?")]
    implicit = load(tmp_path, *rows, columns={"prompt": "", "system": ""})
    assert read(implicit.pairs[0])[0] == "The answer is"
    assert "no prompt column; the prompt is what chosen and rejected both begin with" in implicit.notes
    with pytest.raises(UserError, match=r"no prompt column was found"):
        load(tmp_path, {"question": "?", **sides("4", "5")})


# ---------------------------------------------------------------- the prompt, repeated in responses

PROMPTS = {
    "first turn of many": ("Hi", CONVERSATION, CONVERSATION),
    "last turn of many": ("2 + 2?", CONVERSATION, CONVERSATION),
    "with spaces around it": (" Hi\n", CONVERSATION, CONVERSATION),
    "messages, after a system message": (
        [user("2 + 2?")],
        [system("s"), user("2 + 2?")],
        [system("s"), user("2 + 2?")],
    ),
    "messages, whole": (CONVERSATION, CONVERSATION, CONVERSATION),
    "messages, of which the responses repeat the last": (
        [system("s"), user("?")],
        [user("?")],
        [system("s"), user("?")],
    ),
    "the responses share a system message alone": ("?", [system("s")], [system("s"), user("?")]),
    "the responses begin with an assistant's turn": (
        [user("?")],
        [says("a"), user("b")],
        [user("?"), says("a"), user("b")],
    ),
    "null": (None, CONVERSATION, CONVERSATION),
    "an empty list": ([], CONVERSATION, CONVERSATION),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_the_responses_repeat_is_asked_once(name, tmp_path):
    """Protects UltraFeedback and its like from asking twice."""
    prompt, shared, expected = PROMPTS[name]
    row = {"prompt": prompt, "chosen": [*shared, says("4")], "rejected": [*shared, says("5")]}
    assert read(load(tmp_path, row).pairs[0]) == (expected, [says("4")], [says("5")])


def test_a_started_answer_is_continued(tmp_path):
    """Protects prefilled answers, in the prompt or shared by both lists."""
    started = [user("?"), says("Step 1:")]
    for row in (
        {"prompt": started, **sides(" 4", " 5")},
        {"prompt": started, "chosen": " 4", "rejected": " 5"},
        {"chosen": [*started, says(" 4")], "rejected": [*started, says(" 5")]},
    ):
        assert read(load(tmp_path, row).pairs[0]) == (started, [says(" 4")], [says(" 5")])


def test_ids_are_texts_and_all_different(tmp_path):
    """Protects caches keyed by pair_id; ids of public sets repeat, are numbers, or are missing."""
    row = {"prompt": "?", "chosen": "4", "rejected": "5"}
    ids = [1.0, 1, "a", "a", "a#2", "a", None, float("nan"), "", 2.5, 10**30]
    found = load(tmp_path, *({**row, "pair_id": name} for name in ids))
    assert found.pairs["pair_id"][:] == [
        "1",
        "1#2",
        "a",
        "a#2",
        "a#2#2",
        "a#3",
        "7",
        "8",
        "9",
        "2.5",
        str(10**30),
    ]
    assert "4 pair_ids were taken already and got a number, such as #2" in found.notes


def test_pass_rates_and_answers_of_tables(tmp_path):
    """Protects CSV files, where numbers are text, and NaN, which stands for nothing."""
    row = {"prompt": "?", "chosen": "4", "rejected": "5"}
    values = [float("nan"), "", "0.5", 1, None]
    answers = [float("nan"), " 4 ", 27.0, ["1", 2.5], {"a": 1}]
    pairs = load(
        tmp_path, *({**row, "pass_rate": rate, "answer": a} for rate, a in zip(values, answers, strict=True))
    ).pairs
    assert pairs["pass_rate"][:] == [None, None, 0.5, 1.0, None]
    assert pairs["answer"][:] == [None, "4", "27", "1, 2.5", None]


def test_sampled_ids_are_handed_on(tmp_path):
    """Protects pairs that sage built: training uses the very tokens that were sampled."""
    row = {"prompt": "?", "chosen": "4", "rejected": "5", "prompt_ids": [1], "rejected_ids": [2, 3]}
    first, second = load(tmp_path, {**row, "chosen_ids": None, "tokenizer": "t"}, row).pairs
    assert (first["prompt_ids"], first["chosen_ids"], first["rejected_ids"], first["tokenizer"]) == (
        [1],
        None,
        [2, 3],
        "t",
    )
    assert second["prompt_ids"] is second["tokenizer"] is None


def test_columns_are_mapped_once(tmp_path):
    """Protects from one column in two roles, whose pairs would all be equal."""
    row = {"prompt": "?", "chosen": "4", "rejected": "5"}
    with pytest.raises(UserError, match="chosen and rejected are both mapped to 'rejected'"):
        load(tmp_path, row, columns={"chosen": "rejected"})


@pytest.mark.parametrize(
    "column, advice",
    [("Chosen", "data.columns.chosen=Chosen"), ("chosen ", "'data.columns.chosen=\"chosen \"'")],
)
def test_advice_names_the_column_that_was_meant(tmp_path, column, advice):
    """Protects from training on the prompt as the chosen response, on our own advice."""
    row = {"Prompt": "?", column: "4", "rejected": "5"}
    with pytest.raises(UserError) as refused:
        load(tmp_path, row)
    assert str(refused.value).endswith(f"for example {advice}")


# ---------------------------------------------------------------- answers


def test_answers_of_both_sides_are_checked(tmp_path):
    """Protects from training towards wrong answers: a public set has 755 right rejected responses of 844."""
    rows = [
        {"prompt": "2 + 2?", "chosen": "The answer is 4.", "rejected": "The answer is 5.", "answer": 4},
        {"prompt": "2 + 2?", "chosen": "The answer is 5.", "rejected": "The answer is 4.", "answer": "4.0"},
        {
            "prompt": "2 + 2?",
            "chosen": "It is \\boxed{4}.",
            "rejected": "It is \\boxed{4}!",
            "answer": "So 2 + 2\n#### 4",
        },
        {
            "prompt": [user("?")],
            "chosen": [says("I do not know.")],
            "rejected": [says("5")],
            "answer": "x = \\boxed{4}",
        },
        {"prompt": [user("?"), says("1.")], **sides(" 2", " 3"), "answer": "4"},
        {"prompt": "?", "chosen": "8", "rejected": "9"},
    ]
    source = load(tmp_path, *rows)
    check = check_answers(source.pairs)
    assert check.checked == 4
    assert [(found.pair_id, found.reason, found.answer) for found in check.findings] == [
        ("2", "wrong_chosen", "4.0"),
        ("2", "right_rejected", "4.0"),
        ("3", "right_rejected", "4"),
        ("4", "wrong_chosen", "4"),
    ]
    left = source.without({found.pair_id for found in check.findings})
    assert left.pairs["pair_id"][:] == ["1", "5", "6"] and left.count == 3
    assert left.content != source.content
    assert check.summary(True).endswith("2 chosen are wrong, 2 rejected are right; these 3 pairs are dropped")


def test_an_answer_that_could_not_be_compared_is_no_wrong_one(tmp_path, monkeypatch):
    """Protects data.answers=drop from a busy machine: a timeout says nothing about the answer."""
    right, late = Verdict(True, "4", "last/number"), Verdict(False, "4", "boxed/timeout")
    monkeypatch.setattr(
        Verifier, "verify", lambda self, texts, truths: [late if "4" in t else right for t in texts]
    )
    check = check_answers(
        load(tmp_path, {"prompt": "?", "chosen": "4", "rejected": "is 4", "answer": 4}).pairs
    )
    assert not check.findings and "2 answers could not be compared in time" in check.summary(True)


# ---------------------------------------------------------------- the cases that people have reported


@SHARED
@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        (
            "prompt_first_turn.jsonl",
            {},
            ([user("Hi"), says("Hello"), user("Q2")], [says("good")], [says("bad")]),
        ),
        (
            "reasoning.jsonl",
            {},
            (
                [user("2 + 2?")],
                [says("4", reasoning_content="two and two")],
                [says("5", reasoning_content="two or three")],
            ),
        ),
        (
            "sharegpt_system.jsonl",
            {},
            ([system("Answer in French."), user("2 + 2?")], [says("quatre")], [says("four")]),
        ),
        (
            "alpaca.jsonl",
            {"prompt": "instruction"},
            ([system("Answer in JSON."), user("Add the numbers.\n2 and 2")], [says("4")], [says("5")]),
        ),
        ("parts.jsonl", {}, ([user("2 + 2?")], [says("4")], [says("5")])),
        (
            "prefill.jsonl",
            {},
            (
                [user("2 + 3 * 4?"), says("Step 1: 3 * 4 = 12.\nStep 2:")],
                [says(" 2 + 12 = 14.")],
                [says(" 5 * 4 = 20.")],
            ),
        ),
        ("equal.jsonl", {}, ("p", "a", "b")),
        ("floatid.jsonl", {}, ("p", "4", "5")),
        ("wrapped.json", {}, ("p", "4", "5")),
        ("pairs.jsonl.gz", {}, ("p", "4", "5")),
    ],
)
def test_reported_cases(name, columns, expected):
    """Protects the right value of each file that people had trouble with."""
    assert read(read_pair_set(str(CASES / name), columns=columns).pairs[0]) == expected


@SHARED
def test_reported_case_of_tools():
    """Protects tool calls with empty content, and the tools that they call."""
    (row,) = map(json.loads, (CASES / "tools_empty.jsonl").read_text().splitlines())
    pair = read_pair_set(str(CASES / "tools_empty.jsonl")).pairs[0]
    assert read(pair) == (row["prompt"], row["chosen"], row["rejected"])
    assert json.loads(pair["tools"]) == row["tools"]


@SHARED
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("orca_unmapped.jsonl", "no prompt column was found; it has system, question, chosen, rejected"),
        ("surrogate.jsonl", "surrogate.jsonl:1: prompt has half of a character"),
    ],
)
def test_reported_cases_that_are_refused(name, reason):
    with pytest.raises(UserError) as error:
        read_pair_set(str(CASES / name))
    assert reason in str(error.value)


# --- columns that belong to the conversation, and tables in other layouts


def test_other_responses_of_step_dpo_need_its_started_answer(tmp_path):
    row = {"prompt": "2 + 2?", "initial_reason_steps": "Step 1:", "chosen": " a", "rejected": " b"}
    row |= {"full_chosen": " 2 + 2 = 4", "full_rejected": " 2 + 2 = 5"}
    with pytest.raises(UserError, match=r"'initial_reason_steps' would be left out.*columns\.started="):
        load(tmp_path, row, columns={"chosen": "full_chosen", "rejected": "full_rejected"})


@pytest.mark.parametrize(
    ("column", "ours", "value", "said"),
    [
        ("input", "input", "2?", "2 + 2?\\n2?"),
        ("history", "history", [["Hi", "Hello"]], "Hello"),
        ("system_prompt", "system", "Be brief.", "Be brief."),
        ("functions", "tools", TOOLS, "weather"),
        ("chosen_reasoning", "chosen_reasoning", "two and two", "two and two"),
        ("rejected_thinking", "rejected_reasoning", "two or three", "two or three"),
    ],
)
def test_a_column_of_the_conversation_is_used_or_refused(tmp_path, column, ours, value, said):
    """Protects from training on a part of what the model was to read or to write."""
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", column: value}
    with pytest.raises(UserError, match=rf"'{column}' would be left out.*{ours}={column}.*{ours}=''"):
        load(tmp_path, row)
    assert load(tmp_path, {**row, column: type(value)()}).notes == [f"columns not used: {column}"]
    assert load(tmp_path, row, columns={ours: ""}).notes == [f"columns not used: {column}"]
    used = load(tmp_path, row, columns={ours: column})
    (pair,) = used.pairs
    written = "".join(str(pair[name]) for name in ("prompt", "chosen", "rejected", "tools"))
    assert not used.notes and said in written
    if ours == "chosen_reasoning":
        assert json.loads(pair["chosen"]) == [
            {"role": "assistant", "content": "4", "reasoning_content": value}
        ]
        assert json.loads(pair["rejected"]) == [{"role": "assistant", "content": "5"}]


TABLE = [{"prompt": f"p{i}", "chosen": "a, b", "rejected": "c; d"} for i in range(3)]
LISTS = {name: [row[name] for row in TABLE] for name in TABLE[0]}
LAYOUTS = {
    "lists.json": json.dumps(LISTS),
    "indented.json": json.dumps(LISTS, indent=1),
    "pandas.json": json.dumps({name: dict(enumerate(cells)) for name, cells in LISTS.items()}),
    "pandas_split.json": json.dumps(
        {"columns": list(LISTS), "index": [0, 1, 2], "data": [list(row.values()) for row in TABLE]}
    ),
    "viewer.json": json.dumps(
        {
            "features": [{"feature_idx": 0, "name": "prompt", "type": {"dtype": "string"}}],
            "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(TABLE)],
        }
    ),
    "semicolons.csv": "prompt;chosen;rejected\n" + "".join(f'p{i};a, b;"c; d"\n' for i in range(3)),
    "tabs.csv": "prompt\tchosen\trejected\n" + "".join(f"p{i}\ta, b\tc; d\n" for i in range(3)),
    "commas.csv": "prompt,chosen,rejected\n" + "".join(f'p{i},"a, b",c; d\n' for i in range(3)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_in_other_layouts_are_read(tmp_path, name):
    file = tmp_path / name
    file.write_text(LAYOUTS[name], encoding="utf-8")
    pairs = read_pair_set(str(file)).pairs
    assert [{key: json.loads(row[key]) for key in TABLE[0]} for row in pairs] == TABLE


@pytest.mark.parametrize(
    "name, change, what",
    [
        ("a.jsonl", lambda content: content.decode().encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.csv", lambda content: content.decode().encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.jsonl", gzip.compress, "compressed by gzip: add .gz to its name"),
        ("a.json", lambda content: parquet_of(TABLE), "Parquet: let its name end in .parquet"),
    ],
    ids=["utf-16 jsonl", "utf-16 csv", "gzip", "parquet"],
)
def test_files_that_are_not_what_their_names_say_are_named(tmp_path, name, change, what):
    (tmp_path / name).write_bytes(change(b'{"prompt": "?", "chosen": "4", "rejected": "5"}\n'))
    with pytest.raises(UserError, match=what):
        read_pair_set(str(tmp_path / name))


def parquet_of(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def test_one_row_of_messages_is_no_table(tmp_path):
    row = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    file = tmp_path / "row.json"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "q"}], **row}))
    assert len(read_pair_set(str(file)).pairs) == 1


def test_rows_that_the_viewer_has_cut_are_refused(tmp_path):
    file = tmp_path / "page.json"
    file.write_text(json.dumps({"rows": [{"row": TABLE[0], "row_idx": 0, "truncated_cells": ["chosen"]}]}))
    with pytest.raises(UserError, match="has cut chosen short"):
        read_pair_set(str(file))
