"""The packaged arithmetic task: what its files promise, and that training on it raises the accuracy it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from many_runs import execute, freeze
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage.pairs import resolve_path

SPLITS = ("train", "validation", "test")
FOLDER = Path(resolve_path("pkg://sage.assets/arithmetic"))


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def final_number(response: str) -> str:
    return response.rpartition("#### ")[2]


def test_problems_have_their_true_answers_and_no_split_shares_one():
    """Protects every accuracy measured on this task: a wrong answer or a leaked problem would spoil them unseen."""
    prompts = []
    for split in SPLITS:
        problems = read(f"problems_{split}")
        assert all(str(eval(problem["prompt"].rstrip("="))) == problem["answer"] for problem in problems)
        prompts += [problem["prompt"] for problem in problems]
        assert {pair["prompt"] for pair in read(f"pairs_{split}")} <= {p["prompt"] for p in problems}
    assert len(set(prompts)) == len(prompts)


def test_pairs_prefer_the_right_answer():
    """Protects the labels: chosen is right, rejected is wrong, and a pass rate says that both were sampled."""
    for split in SPLITS:
        for pair in read(f"pairs_{split}"):
            assert final_number(pair["chosen"]) == pair["answer"] != final_number(pair["rejected"])
            assert 0 < pair["pass_rate"] < 1


def test_it_stays_small():
    """Protects the wheel's size."""
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6


def greedy_accuracy(folder: Path) -> float:
    """Of 200 held-out problems; their prompts have equal lengths, so nothing is padded."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).float(),
    )
    problems = read("problems_validation")[:200]
    ids = torch.tensor(tokenizer([problem["prompt"] for problem in problems])["input_ids"])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    right = [final_number(text) == problem["answer"] for text, problem in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


@pytest.mark.slow
def test_a_few_steps_raise_the_accuracy(tmp_path):
    """Protects the task's purpose, and the whole path from pairs to a model that answers better."""
    overrides = ["+experiment=arithmetic", "steps=20", "optimizer.warmup_ratio=0", "data.eval_limit=32"]
    execute(1, [freeze(tmp_path / "run", *overrides, f"cache_dir={tmp_path / 'cache'}")])
    before, after = greedy_accuracy(FOLDER), greedy_accuracy(tmp_path / "run" / "final")
    assert 0.55 < before < 0.8
    assert after > before + 0.03
