"""Accuracy, its intervals and comparisons against textbook numbers; whole evaluations, killed and resumed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from whole_runs import files

from sage import config
from sage.answering.accuracy import check_decided, measure
from sage.answering.attempts import BEGUN_FILE, PROBLEMS, Attempt, read_attempts, write_lines
from sage.answering.problems import read_problems
from sage.answering.statistics import (
    Z95,
    bootstrap,
    difference_interval,
    majority,
    mcnemar,
    pass_at,
    wilson,
)
from sage.commands.evaluate import compare, compare_attempts, evaluate, print_comparison
from sage.util.errors import UserError

BENCHMARKS = {
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "math500": ("math500/math500_test.jsonl", 500),
    "aime24": ("math_benchmarks/aime24_test.jsonl", 30),
    "amc23": ("math_benchmarks/amc23_test.jsonl", 40),
    "olympiadbench": ("math_benchmarks/olympiadbench_test.jsonl", 675),
    "gaokao2023en": ("math_benchmarks/gaokao2023en_test.jsonl", 385),
    "college_math": ("math_benchmarks/college_math_test.jsonl", 2818),
    "minerva_math": ("math_benchmarks/minerva_math_test.jsonl", 272),
    "svamp": ("svamp/SVAMP.json", 1000),
}


def composed(*overrides: str) -> config.EvalConfig:
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("eval", [*overrides]))
    assert isinstance(cfg, config.EvalConfig)
    return cfg


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmarks' files are not here")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_read_their_local_files(name):
    """Every problem of the real files, but for the few whose answer the source left empty."""
    path, size = BENCHMARKS[name]
    cfg = composed(f"benchmark={name}", f"benchmark.{name}.path={SHARED_DATA / path}")
    assert size - 3 <= len(read_problems(cfg.benchmark[name])) <= size


def test_bad_evaluations_are_refused():
    for overrides, message in (
        (["samples=4"], "sampling.temperature"),
        (["benchmark.gsm8k.prompt=Solve it."], r"benchmark.gsm8k.prompt must hold .problem."),
        (["benchmark=[]"], "no benchmark"),
    ):
        with pytest.raises(UserError, match=message):
            composed(*overrides)


# --- numbers


def test_wilson_against_published_values():
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0


def test_bootstrap_agrees_with_the_normal_interval_and_is_repeatable():
    values = np.random.default_rng(1).random(400)
    half = 1.96 * values.std() / 20
    assert bootstrap(list(values)) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)
    assert bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])


def test_equal_differences_have_a_width():
    """By hand, Bonett and Price (2012): 5 of 5 gained are 6 of 7 against 1 of 7; none of 8 changed is 1 of
    10 on each side.
    """
    half = Z95 * math.sqrt((1 - (5 / 7) ** 2) / 7)
    assert difference_interval([1.0] * 5) == (pytest.approx(5 / 7 - half), 1.0)
    assert difference_interval([-1.0] * 5) == (-1.0, pytest.approx(half - 5 / 7))
    half = Z95 * math.sqrt(0.2 / 10)
    assert difference_interval([0.0] * 8) == pytest.approx((-half, half))
    assert difference_interval([0.0, 1.0, 0.0, -1.0] * 9) == bootstrap([0.0, 1.0, 0.0, -1.0] * 9)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for right in range(7):
        samples = [True] * right + [False] * (6 - right)
        for k in range(1, 7):
            assert pass_at(k, 6, right) == pytest.approx(
                np.mean([any(draw) for draw in combinations(samples, k)])
            )


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(5, 5) == 1.0


def test_majority():
    assert majority(["1", "2", "2"], [True, False, False]) is False
    assert majority(["1", "2", "1"], [True, False, True]) is True
    assert majority(["1", "2"], [True, False]) is True  # a tie goes to the first
    assert majority([None, None, "3"], [False, False, True]) is True
    assert majority([None], [False]) is False


def attempt(problem: int, sample: int, correct: bool) -> Attempt:
    extracted = "7" if correct else f"wrong {sample}"
    return Attempt(
        str(problem),
        sample,
        "Q",
        "R",
        10 + problem,
        "end",
        "7",
        extracted,
        correct,
        "last/number",
        None,
        [1, 2],
        [3],
        False,
    )


def test_measure_by_hand():
    """Two problems, four samples: right 4 of 4 and 1 of 4; the second problem's group is another."""
    attempts = [
        replace(attempt(p, s, p == 0 or s == 0), group=f"level {p}") for p in range(2) for s in range(4)
    ]
    attempts[5] = replace(attempts[5], finish="length", extracted=None)
    got = measure(attempts)
    assert got["accuracy"] == 0.625 and got["problems"] == 2 and got["samples"] == 4
    assert got["maj@4"]["accuracy"] == 1.0
    assert got["pass@k"] == {"1": 0.625, "2": 0.75, "4": 1.0}
    assert {name: g["accuracy"] for name, g in got["groups"].items()} == {"level 0": 1.0, "level 1": 0.25}
    assert got["tokens"] == {
        "mean": 10.5,
        "median": 10.5,
        "longest": 11,
        "mean_right": 10.2,
        "mean_wrong": 11,
    }
    assert got["truncated"] == got["unparsable"] == 0.125
    single = measure([a for a in attempts if a.sample == 0])
    assert single["accuracy"] == 1.0 and single["interval"] == list(wilson(2, 2)) and "pass@k" not in single
    half = measure([attempt(p, s, s == 0) for p in range(3) for s in range(2)])
    assert half["accuracy"] == 0.5 and half["interval"] == list(wilson(1.5, 3))
    assert sum(half["interval"]) == pytest.approx(1.0)
    alike = measure([attempt(p, s, False) for p in range(30) for s in range(4)])  # resampling shows no doubt
    assert alike["interval"] == list(wilson(0, 30)) and alike["interval_by"] == "wilson"


def test_answers_that_could_not_be_compared_are_said(capsys):
    """Protects an accuracy from a verifier that failed: they count as wrong, and may be right."""
    attempts = [attempt(p, 0, p == 0) for p in range(4)]
    attempts[1] = replace(attempts[1], rule="equal/crash")
    check_decided("gsm8k", attempts, Path("x"))
    assert "warning: gsm8k: the verifier timed out or crashed on 1 of 4" in capsys.readouterr().out
    assert measure(attempts)["undecided"] == 0.25
    with pytest.raises(UserError, match="timed out or crashed on all 4 answers"):
        check_decided("gsm8k", [replace(a, rule="equal/timeout") for a in attempts], Path("x"))


def test_compare_by_hand(tmp_path):
    """Ten problems: A solves 0-4, B 1-8. Gained 5-8, lost 0."""
    for name, solved in (("a", range(5)), ("b", range(1, 9))):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "generations.jsonl", [attempt(p, 0, p in solved) for p in range(10)])
        (tmp_path / name / BEGUN_FILE).write_text(json.dumps({PROBLEMS: "these"}))
    got = compare_attempts(tmp_path / "a", tmp_path / "b")
    assert got["gained"] == ["5", "6", "7", "8"] and got["lost"] == ["0"]
    assert got["difference"] == pytest.approx(0.3) and got["mcnemar_p"] == mcnemar(1, 4) == 0.375
    assert got["interval"][0] < 0.3 < got["interval"][1]
    write_lines(tmp_path / "b" / "generations.jsonl", [attempt(p, 0, True) for p in range(9)])
    with pytest.raises(UserError, match="different problems"):
        compare_attempts(tmp_path / "a", tmp_path / "b")
    write_lines(tmp_path / "b" / "generations.jsonl", [attempt(p, 0, True) for p in range(10)])
    compare_attempts(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / BEGUN_FILE).write_text(json.dumps({PROBLEMS: "others"}))
    with pytest.raises(UserError, match="different problems"):  # other texts under the same ids and answers
        compare_attempts(tmp_path / "a", tmp_path / "b")


# --- whole runs


def test_two_benchmarks_and_their_comparison(tiny_model, problem_file, tmp_path, capsys):
    """Every file of a run of the tiny model, and a comparison with another seed's. (Kills: test_kills.py.)

    A run that goes on after a part of it was answered does not mix two models or two sets of problems.
    """
    model, problems = tmp_path / "model", tmp_path / "problems.jsonl"
    shutil.copytree(tiny_model, model)
    shutil.copy(problem_file, problems)
    words = [
        "model=hf",
        f"model.path={model}",
        "model.dtype=float32",
        "benchmark=[gsm8k,gaokao2023en]",
        f"benchmark.gsm8k.path={problem_file}",
        f"benchmark.gaokao2023en.path={problems}",
        "benchmark.gaokao2023en.answer_from=hash",
        "samples=2",
        "sampling.temperature=1",
        "sampling.max_new_tokens=20",
        "benchmark_limit=8",
    ]
    for seed in (0, 1):
        run_dir = tmp_path / f"seed_{seed}"
        config.freeze(composed(*words, f"seed={seed}"), run_dir)
        evaluate(run_dir)
        assert set(files(run_dir)) == {
            "gsm8k/generations.jsonl",
            "gaokao2023en/generations.jsonl",
            "summary.json",
        }
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {name: r["problems"] for name, r in summary["benchmarks"].items()} == {
        "gsm8k": 8,
        "gaokao2023en": 8,
    }
    rows = read_attempts(run_dir / "gsm8k" / "generations.jsonl")
    assert [(r.problem_id, r.sample) for r in rows] == [(str(i), s) for i in range(1, 9) for s in range(2)]
    assert len({r.response for r in rows}) > 8

    print_comparison(tmp_path / "seed_0", run_dir)
    out = capsys.readouterr().out
    assert "McNemar" in out and "differ too" not in out
    sampled = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(sampled.replace("max_new_tokens: 20", "max_new_tokens: 10"))
    print_comparison(tmp_path / "seed_0", run_dir)
    assert "warning: their sampling.max_new_tokens differ too" in capsys.readouterr().out
    (run_dir / "config.yaml").write_text(sampled)
    (run_dir / "summary.json").write_text(json.dumps({**summary, "verdicts": {"code": "older"}}))
    print_comparison(tmp_path / "seed_0", run_dir)
    assert "warning: their verdicts come from different versions" in capsys.readouterr().out
    result = json.loads((run_dir / "compared_to_seed_0.json").read_text())
    assert set(result) == {"gsm8k", "gaokao2023en"} and result["gsm8k"]["problems"] == 8
    with pytest.raises(UserError, match="not a finished evaluation"):
        compare(tmp_path, run_dir)

    (run_dir / "summary.json").unlink()  # as if it had been killed before its end
    rows = problems.read_text()
    problems.write_text(rows.replace("apples", "pears"))
    with pytest.raises(UserError, match="gaokao2023en was begun with another set of problems"):
        evaluate(run_dir)
    problems.write_text(rows)
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="gsm8k was begun with another model"):
        evaluate(run_dir)
