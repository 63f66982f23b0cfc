"""Problems that a run trains on are noticed, whatever stands around them."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import datasets
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from test_tokens import make_tokenizer

from sage import config
from sage.config import ModelConfig
from sage.data import overlap
from sage.data.chat import ChatFormat, encode_prompts
from sage.data.overlap import EDGE, WINDOW, trained_on
from sage.data.source import resolve_path
from sage.data.tokens import TokenizedPairs
from sage.model.loading import load_tokenizer
from sage.training.setup import read_data


def pairs_of(tokenizer, prompts: list[str], chunks: int = 3) -> TokenizedPairs:
    """Pairs with these prompts, in several chunks, as a large file has them."""
    ids = encode_prompts(tokenizer, prompts, ChatFormat())
    parts = [
        datasets.Dataset.from_dict(
            {"prompt_ids": part, "chosen_ids": [[1]] * len(part), "rejected_ids": [[2]] * len(part)}
        )
        for part in np.array_split(np.array(ids, dtype=object), chunks)
        if len(part)
    ]
    return TokenizedPairs(datasets.concatenate_datasets(parts), {}, "")


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(count))


def holds(prompt: str, problem: str) -> bool:
    """Whether the problem stands in the prompt, and not as a part of a longer word or number."""
    before, _, after = f" {prompt} ".partition(problem)
    return after != "" and not before[-1].isalnum() and not after[0].isalnum()


@pytest.mark.parametrize("bits", [24, 2])
def test_problems_are_found_in_any_prompt(bits, monkeypatch):
    """Against `in` on texts. With a table of 4 places, nearly every hash is looked up."""
    monkeypatch.setattr(overlap, "BITS", bits)
    rng, tokenizer = random.Random(0), make_tokenizer()
    problems = [words(rng, n) for n in (40, 30, 20, 12, 9, 8, 40, 30)]
    problems.append(problems[0] + " and more")  # whose beginning is there, but not the rest
    problems += [problems[1][:-1] + end for end in ("A", "")]  # another last letter, and none
    problems += [f"Add {words(rng, 8)} to {number}" for number in (1234, 123, 234)]
    problems += ["12 + 7", "13 + 8"]
    prompts = [
        f"Solve this: {problems[0]}\nThink step by step.",
        f"{problems[1]}",
        f"({problems[2]})",
        words(rng, 50),
        problems[3] + " " + problems[4],
        problems[6][: len(problems[6]) // 2],  # half a problem
        f"Say it: {problems[-5]}",  # whose beginning is another problem
        "12 + 7",
        "13 + 8 + 1",
    ] * 2
    found = trained_on(pairs_of(tokenizer, prompts), problems, problems, tokenizer, ChatFormat())
    short = [len(tokenizer.encode(p)) < WINDOW + 2 * EDGE for p in problems]
    assert short == [False] * 14 + [True] * 2
    assert found == [
        problem in prompts if is_short else any(holds(prompt, problem) for prompt in prompts)
        for problem, is_short in zip(problems, short, strict=True)
    ]


def test_no_pair_and_no_problem_need_no_care():
    tokenizer = make_tokenizer()
    assert trained_on(pairs_of(tokenizer, ["a"]), [], [], tokenizer, ChatFormat()) == []
    assert trained_on(pairs_of(tokenizer, ["a", "bc"]), ["", "x"], ["", "x"], tokenizer, ChatFormat()) == [
        False,
        False,
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_warns_of_a_benchmark_that_it_trains_on(split, tmp_path, capsys):
    folder = Path(resolve_path("pkg://sage.assets/arithmetic"))
    problems, pairs = (
        [json.loads(line)["prompt"] for line in (folder / name).read_text().splitlines()]
        for name in (f"problems_{split}.jsonl", "pairs_train.jsonl")
    )
    known = sum(problem in pairs for problem in problems[:60])
    assert (known > 30) == (split == "train")
    words = ["+experiment=arithmetic", "+benchmark=arithmetic", "benchmark_limit=60", f"cache_dir={tmp_path}"]
    words += [f"benchmark.arithmetic.path=pkg://sage.assets/arithmetic/problems_{split}.jsonl"]
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("train", words))
    read_data(cfg, load_tokenizer(str(folder), ModelConfig(str(folder))), tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    warning = f"{known} of 60 problems of benchmark.arithmetic are in training prompts"
    assert (warning in said) == ("warning" in said) == (known > 0)
