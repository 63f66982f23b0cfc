"""Responses end where training ended them: in evaluation, and for anyone who loads the exported folder."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED_DATA
from many_runs import execute, freeze
from templates import family

from sage.answering.attempts import read_attempts

CASES = SHARED_DATA.parent / "cases" / "data"


@pytest.fixture
def base_model(tmp_path):
    """A base model whose configs name only <|endoftext|>, while its template closes turns with <|im_end|>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer, folder = family("chatml on a base model"), tmp_path / "base"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Like many published configs, this one sets a temperature but does not sample. transformers refuses to
    # save it once it is changed.
    faulty = {"eos_token_id": tokenizer.eos_token_id, "do_sample": False, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(faulty))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
def test_generation_stops_where_training_ended_responses(base_model, tmp_path):
    """Protects sage eval and every other user of the export from models that never stop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    common = ["model=hf", f"cache_dir={tmp_path / 'cache'}"]
    train = freeze(
        tmp_path / "train",
        *[*common, f"model.path={base_model}", f"data.path={CASES / 'memorise.jsonl'}"],
        *["steps=200", "batch_size=2", "optimizer.lr=0.01", "log_every=200", "+baseline=dpo"],
    )
    final = train / "final"
    measured = freeze(
        tmp_path / "eval",
        *[*common, f"model.path={final}", "sampling.max_new_tokens=40"],
        *[f"benchmark.gsm8k.path={CASES / 'bench.jsonl'}", "benchmark.gsm8k.answer_from=plain"],
        *["benchmark.gsm8k.columns.prompt=problem", "benchmark.gsm8k.prompt='{problem}'"],
        command="eval",
    )
    execute(1, [train, measured])

    summary = json.loads((measured / "summary.json").read_text())
    assert summary["benchmarks"]["gsm8k"]["accuracy"] == 1.0
    attempts = read_attempts(measured / "gsm8k" / "generations.jsonl")
    assert [(a.finish, a.tokens, a.response) for a in attempts] == [("end", 2, "2"), ("end", 2, "4")]

    tokenizer = AutoTokenizer.from_pretrained(final)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    config = GenerationConfig.from_pretrained(final)
    assert config.eos_token_id == [end, tokenizer.eos_token_id] and config.temperature == 0.6
    model = AutoModelForCausalLM.from_pretrained(final)
    for question, answer in (("What is 1 + 1?", "2"), ("What is 2 + 2?", "4")):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        written = model.generate(**asked, max_new_tokens=40)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == f"{answer}<|im_end|>"
