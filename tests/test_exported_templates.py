"""An export carries the chat template that its model was trained with, for sage and for transformers."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_pairs, write_jsonl
from many_runs import ERROR_FILE, execute, freeze
from templates import CHATML, CHATML_TOKENS, QWEN3, THINK, byte_level
from transformers import AutoTokenizer

from sage.answering.attempts import read_attempts
from sage.data.chat import ChatFormat, Renderer
from sage.data.templates import exported_templates, with_arguments
from sage.util.errors import UserError

VALUES = (
    False,
    None,
    3,
    -2.5,
    1e22,
    "a \"quoted\" '{{ x }}' %} \\ path\n\ttab é 😀",
    [1, "b", [True]],
    {"k": [None]},
)
SCOPES = (
    "{% macro f() %}[{{ x is defined }} {{ x }}]{% endmacro %}{{ f() }}",
    "\n\n{{ x | tojson }}\n",
    "  {% if x %}\n  yes\n{% endif %}{{ x }}",
    "text {{ x }}",
    "{% set x = x | default(7) %}{{ x }}",
    "{% set ns = namespace(y=x) %}{% for m in messages %}{{ ns.y }}{% set x = 3 %}{{ x }}{% endfor %}{{ x }}",
    "{%- generation %}{{ x }}{% endgeneration %}",
)
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CHATML_PROMPT = Renderer(byte_level(CHATML, CHATML_TOKENS, "<|im_end|>"), ChatFormat()).prompt(QUESTION)


@pytest.mark.parametrize("template", SCOPES)
def test_arguments_in_a_template_are_those_of_a_call(template):
    tokenizer = byte_level(template, [], "x")
    for value in VALUES:
        bound = with_arguments(template, {"x": value})
        expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, x=value)
        assert tokenizer.apply_chat_template(QUESTION, chat_template=bound, tokenize=False) == expected
        override = tokenizer.apply_chat_template(QUESTION, chat_template=bound, tokenize=False, x="other")
        assert override == tokenizer.apply_chat_template(QUESTION, tokenize=False, x="other")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), object()])
def test_values_that_a_template_cannot_hold_are_refused(value):
    with pytest.raises(UserError, match=r"template_arguments\.x"):
        with_arguments("{{ x }}", {"x": value})


def named_tokenizer():
    templates = {"default": QWEN3, "short": CHATML, "tool_use": "{{ tools | tojson }}" + QWEN3}
    return byte_level(templates, CHATML_TOKENS, "<|im_end|>", THINK)


ONE, NAMED = "one template", "named templates"


@pytest.mark.parametrize(
    ("own", "chat"),
    [
        (ONE, ChatFormat()),
        (ONE, ChatFormat(True, {"enable_thinking": False})),
        (ONE, ChatFormat("FILE")),
        (NAMED, ChatFormat()),
        (NAMED, ChatFormat(True, {"enable_thinking": False})),
        (NAMED, ChatFormat("short")),
        (NAMED, ChatFormat("tool_use", {"enable_thinking": False})),
        (NAMED, ChatFormat("FILE")),
    ],
    ids=str,
)
def test_the_default_of_an_export_is_what_was_trained(tmp_path, own, chat):
    tokenizer = named_tokenizer()
    if own == ONE:
        tokenizer.chat_template = QWEN3
    if chat.template == "FILE":
        file = tmp_path / "mine.jinja"
        file.write_text(
            "{{ messages[-1].content }}{{ tools | length if tools else '' }} ->", encoding="utf-8"
        )
        chat = ChatFormat(str(file))
    trained = Renderer(tokenizer, chat)
    asked = [(QUESTION, tools) for tools in (None, TOOLS)]
    expected = [trained.prompt(*prompt) for prompt in asked]

    tokenizer.chat_template = exported_templates(tokenizer, chat)
    tokenizer.save_pretrained(tmp_path / "final")
    exported = AutoTokenizer.from_pretrained(tmp_path / "final")
    again = (ChatFormat(), chat, *([ChatFormat("short")] if chat.template == "short" else []))
    for later in again:  # by name too: evaluation inside training looks it up in the export
        assert [Renderer(exported, later).prompt(*prompt) for prompt in asked] == expected
    for (messages, tools), text in zip(asked, expected, strict=True):
        written = exported.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        assert written == text
    if own == NAMED and chat.template != "short":
        assert Renderer(exported, ChatFormat("short")).prompt(QUESTION) == CHATML_PROMPT


@pytest.mark.parametrize(
    "own", [None, CHATML, {"default": CHATML, "short": QWEN3}], ids=["none", "one", "named"]
)
def test_an_export_after_plain_text_has_no_default(tmp_path, own):
    tokenizer = byte_level(own, CHATML_TOKENS, "<|im_end|>")
    for _ in range(2):  # trained twice
        tokenizer.chat_template = exported_templates(tokenizer, ChatFormat(False))
        tokenizer.save_pretrained(tmp_path / "final")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    with pytest.raises(UserError, match=r"data\.chat_template"):
        Renderer(tokenizer, ChatFormat())
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.apply_chat_template(QUESTION)
    assert Renderer(tokenizer, ChatFormat(False)).prompt("q") == "q"
    if own is not None:
        assert Renderer(tokenizer, ChatFormat("original")).prompt(QUESTION) == CHATML_PROMPT


@pytest.mark.slow
def test_a_later_evaluation_asks_as_training_did(tmp_path, problem_file):
    """Protects `sage eval` on an export from asking another question than the model was trained to answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer, folder = named_tokenizer(), tmp_path / "model"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[-1].content }}{{ mood }}\nA:", encoding="utf-8")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(8))
    common = ["model=hf", f"cache_dir={tmp_path / 'cache'}", "sampling.max_new_tokens=4", "benchmark_limit=3"]
    benchmark = [f"benchmark.gsm8k.path={problem_file}"]
    steps = ["steps=1", "batch_size=2", f"data.path={pairs}", "+benchmark=gsm8k", f"model.path={folder}"]
    options = {
        "arguments": ["+data.template_arguments.enable_thinking=false"],
        "name": ["data.chat_template=short"],
        "file": [f"data.chat_template={file}", "+data.template_arguments.mood='?!'", "+model/lora=default"],
        "plain": ["data.chat_template=false"],
    }
    trained = {
        name: freeze(tmp_path / name, *common, *steps, *benchmark, *more) for name, more in options.items()
    }
    measured = {
        name: freeze(
            tmp_path / f"eval_{name}", *common, *benchmark, f"model.path={run / 'final'}", command="eval"
        )
        for name, run in trained.items()
    }
    measured["adapter"] = freeze(
        tmp_path / "eval_adapter",
        *[*common, *benchmark, f"model.path={folder}", "+model/lora=default"],
        f"model.adapter_path={trained['file'] / 'final' / 'adapter'}",
        command="eval",
    )
    execute(1, [*trained.values(), *measured.values()])

    def prompts(folder):
        return [attempt.prompt_ids for attempt in read_attempts(folder / "gsm8k" / "generations.jsonl")]

    seen = {name: prompts(run / "benchmarks" / "step_1") for name, run in trained.items()}
    assert len({json.dumps(ids) for ids in seen.values()}) == len(options)
    for name in ("arguments", "name", "file"):
        assert prompts(measured[name]) == seen[name]
    assert prompts(measured["adapter"]) == seen["file"]
    message = (measured["plain"] / ERROR_FILE).read_text()
    assert "data.chat_template to false" in message and "original, short, tool_use" in message
