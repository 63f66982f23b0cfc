"""Pairs from problems: the rules of pairing by hand-made attempts, and whole runs of the tiny model, killed
and resumed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import write_jsonl
from hydra import compose, initialize_config_module
from whole_runs import files, kill_after
from whole_runs import sage as run_sage

import sage
import sage.util.files as files_module
from sage import config, launch
from sage.answering.attempts import Attempt, Sampler, write_lines
from sage.answering.problems import Problem
from sage.commands.build_pairs import build_pairs, check_finished, other_attempts, recipe_key
from sage.commands.pairing import BuiltPair, gold_response, make_pairs
from sage.config import PairingConfig
from sage.data.pairs import read_pair_set
from sage.util.errors import UserError
from sage.util.files import sha256, write_json


def attempt(
    problem_id: str, sample: int, response: str, *, correct=False, finish="end", extracted: str | None = "1"
) -> Attempt:
    return Attempt(
        problem_id,
        sample,
        f"Q{problem_id}",
        response,
        5,
        finish,
        "7",
        extracted,
        correct,
        "last/number",
        None,
        [1, 2],
        [*map(ord, response), *([0] if finish == "end" else [])],
        False,
    )


def pairs_of(attempts: list[Attempt], golds=(None,), **options):
    """(problem_id-number, chosen, rejected, pass_rate, source) of each pair, and the counts."""
    problems = [Problem(str(i), f"Q{i}", "7", None, None) for i in range(len(golds))]
    pairs, counts = make_pairs(problems, golds, attempts, PairingConfig(**options), 0, "tokenizer")
    assert all(p.prompt == "Q" + p.pair_id.split("-")[0] and p.answer == "7" for p in pairs)
    return [(p.pair_id, p.chosen, p.rejected, p.pass_rate, p.source) for p in pairs], counts


MIXED = [
    attempt("0", 0, "it is seven 7", correct=True),
    attempt("0", 1, "it is eight 8"),
    attempt("0", 2, "no answer here", extracted=None),
    attempt("0", 3, "it goes on and", finish="length"),
]


def test_own_right_against_own_wrong():
    """The parsable and whole wrong response comes first; the pass rate counts all attempts."""
    assert pairs_of(MIXED)[0] == [("0-0", "it is seven 7", "it is eight 8", 0.25, "own")]


@pytest.mark.parametrize("rule", ["boxed/timeout", "last/crash"])
def test_a_response_without_a_verdict_is_in_no_pair(rule):
    """It may be right, and would be learned as wrong."""
    got, counts = pairs_of([MIXED[0], dataclasses.replace(MIXED[1], rule=rule)])
    assert got == [] and counts["undecided_responses"] == 1 and counts["problems_without_wrong"] == 1


def test_chosen_from_own_gold_or_both():
    wrong = [a for a in MIXED if not a.correct]
    assert pairs_of(wrong, ["gold"])[0] == [] and pairs_of(wrong, ["gold"])[1]["problems_without_right"] == 1
    for chosen, attempts, source in (
        ("gold", MIXED, "gold"),
        ("own_then_gold", MIXED, "own"),
        ("own_then_gold", wrong, "gold"),
    ):
        got, counts = pairs_of(attempts, ["gold"], chosen=chosen)
        assert [pair[-1] for pair in got] == [source] and counts[f"pairs_{source}"] == 1
    assert pairs_of([MIXED[0]])[1]["problems_without_wrong"] == 1


def test_pairs_carry_the_sampled_ids():
    """The ids are those that were sampled: an end token only where one was. Text that was not sampled has
    none.
    """
    problems = [Problem(str(i), f"Q{i}", "7", None, None) for i in range(3)]
    attempts = [
        attempt("0", 0, "so 7", correct=True),
        attempt("0", 1, "so 8 and", finish="length"),
        attempt("1", 0, "it is 8"),
        attempt("2", 0, "7", correct=True),
        attempt("2", 1, "8", finish="stop"),
    ]
    cfg = PairingConfig(chosen="own_then_gold")
    pairs, _ = make_pairs(problems, [None, "gold 7", None], attempts, cfg, 0, "tokenizer")
    assert [(p.prompt_ids, p.chosen_ids, p.rejected_ids, p.tokenizer) for p in pairs] == [
        ([1, 2], [*map(ord, "so 7"), 0], [*map(ord, "so 8 and")], "tokenizer"),
        ([1, 2], None, [*map(ord, "it is 8"), 0], "tokenizer"),
        ([1, 2], [*map(ord, "7"), 0], None, "tokenizer"),
    ]


def other_build(folder: Path, tokenizer: str, *attempts: Attempt) -> str:
    """The folder of a finished build-pairs by another policy."""
    folder.mkdir()
    (folder / "pairs.jsonl").touch()
    write_lines(folder / "generations.jsonl", attempts)
    manifest = {"tokenizer": tokenizer, "checksum": sha256(folder / "pairs.jsonl")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def test_rejected_responses_of_other_policies(words, tmp_path):
    """The first folder with wrong answers to a problem gives them all, with ids where the tokenizer is the
    same. The pass rate and the chosen stay the policy's own."""
    weakest = other_build(
        tmp_path / "a",
        "same",
        attempt("0", 0, "weakest 5"),
        attempt("0", 1, "7", correct=True),
        attempt("1", 0, "  "),
        attempt("9", 0, "never asked"),
    )
    weak = other_build(tmp_path / "b", "other", attempt("0", 0, "weak 6"), attempt("1", 0, "weak 4"))
    own = [attempt(i, n, f"own {7 + n}", correct=not n) for i in "012" for n in range(2)]
    problems = [Problem(i, f"Q{i}", "7", None, None) for i in "012"]
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("build_pairs", [*words, "data.problems.prompt='Q{problem}'"]))
    assert isinstance(cfg, config.TrainConfig)
    cfg.pairing.rejected_from = [weakest, weak]
    problems = [dataclasses.replace(p, prompt=p.problem_id) for p in problems]
    others = other_attempts(cfg, problems, "same")
    pairs, _ = make_pairs(problems, [None] * 3, own, PairingConfig(), 0, "same", others)
    assert [(p.chosen, p.rejected, p.pass_rate, p.rejected_ids) for p in pairs] == [
        ("own 7", "weakest 5", 0.5, [*map(ord, "weakest 5"), 0]),
        ("own 7", "weak 4", 0.5, None),
        ("own 7", "own 8", 0.5, [*map(ord, "own 8"), 0]),
    ]
    problems[1] = dataclasses.replace(problems[1], answer="8")
    with pytest.raises(UserError, match=r"problem 1 of .*a is not that of .*its answer differs"):
        other_attempts(cfg, problems, "same")
    check_finished([weakest, weak])
    Path(weak, "manifest.json").unlink()
    with pytest.raises(UserError, match=r"rejected_from: .*b holds no finished"):
        check_finished([weakest, weak])


def test_a_truncated_response_is_never_chosen():
    assert pairs_of([attempt("0", 0, "7 and", correct=True, finish="length"), attempt("0", 1, "8")])[0] == []


def test_pairs_per_problem_use_each_rejected_once_and_spread_the_chosen():
    right = [
        attempt("0", i, f"right {word} 7", correct=True) for i, word in enumerate(("one way", "another"))
    ]
    wrong = [attempt("0", 2 + i, f"wrong {i} {'x' * i}") for i in range(4)]
    got, _ = pairs_of(right + wrong, per_problem=3)
    assert [pair[0] for pair in got] == ["0-0", "0-1", "0-2"]
    assert len({pair[2] for pair in got}) == 3
    assert sorted(sum(pair[1] == r.response for pair in got) for r in right) == [1, 2]


def test_length_balance():
    """The closest in length is taken, and none beyond the ratio."""
    right = [attempt("0", i, "r" * n, correct=True) for i, n in enumerate((10, 40))]
    assert pairs_of([*right, attempt("0", 2, "w" * 36)], max_length_ratio=1.5)[0][0][1] == "r" * 40
    got, counts = pairs_of([*right, attempt("0", 2, "w" * 100)], max_length_ratio=1.5)
    assert got == [] and counts["problems_unbalanced"] == 1


def test_duplicates_are_removed():
    """Equal but for white space, or nearly; how near is the user's."""
    words = " ".join(f"w{i}" for i in range(50))
    wrong = [
        attempt("0", i, text)
        for i, text in enumerate((words, words.replace(" ", "  "), words + " end", "other"))
    ]
    right = [attempt("0", 9, "7", correct=True)]
    for near, kept in ((0.9, 2), (1.0, 3)):
        got, counts = pairs_of(right + wrong, per_problem=9, near_duplicate=near)
        assert len(got) == kept and counts["duplicate_responses"] == 4 - kept
    wrong = [attempt("0", i, "8 " * (4 + i)) for i in range(3)]  # one triple, again and again
    assert len(pairs_of(right + wrong, per_problem=9, near_duplicate=1.0)[0]) == 3


@pytest.mark.parametrize(
    "reason, bad", [("unparsable", {"extracted": None}), ("truncated", {"finish": "length"})]
)
def test_shares_of_unparsable_and_truncated(reason, bad):
    """Of 4 clean and 6 flagged pairs: all at 1, none at 0, and at 1/3 two of six, so that two of six pairs
    are.
    """
    attempts = []
    for i in range(10):
        attempts += [
            attempt(str(i), 0, "7", correct=True),
            attempt(str(i), 1, "8", **(bad if i >= 4 else {})),
        ]
    for share, kept in ((1.0, 10), (0.0, 4), (1 / 3, 6)):
        got, counts = pairs_of(attempts, [None] * 10, **{reason: share})
        assert len(got) == kept and counts[f"pairs_over_{reason}_cap"] == 10 - kept
        assert {pair[0] for pair in got} >= {f"{i}-0" for i in range(4)}


def test_both_shares_hold_at_the_end():
    """One cap drops pairs that the other's share counted: 10 truncated, 80 without an answer, 10 clean."""
    attempts = []
    for i in range(100):
        bad = {"finish": "length"} if i < 10 else {"extracted": None} if i < 90 else {}
        attempts += [attempt(str(i), 0, "7", correct=True), attempt(str(i), 1, "8", **bad)]
    got, counts = pairs_of(attempts, [None] * 100, truncated=0.1, unparsable=0.1)
    kept = [int(pair[0].split("-")[0]) for pair in got]
    truncated, unparsable = sum(i < 10 for i in kept), sum(10 <= i < 90 for i in kept)
    assert set(range(90, 100)) <= set(kept)
    assert max(truncated, unparsable) <= 0.1 * len(kept) and min(truncated, unparsable) == 1
    assert counts["pairs_over_truncated_cap"] + counts["pairs_over_unparsable_cap"] == 100 - len(kept)


def test_gold_solutions_answer_our_prompt():
    problem = Problem("1", "Q", "1,072", "He has <<2*24=48>>48.\n#### 1,072", None)
    assert gold_response(problem) == "He has 48.\nThe answer is \\boxed{1,072}."
    assert gold_response(Problem("1", "Q", "7", "So \\boxed{7}.", None)) == "So \\boxed{7}."
    assert gold_response(Problem("1", "Q", "7", None, None)) is None


# --- whole runs


@pytest.fixture
def words(tiny_model, problem_file, tmp_path):
    """Overrides of a small run: 24 responses in chunks of two problems."""
    return [
        "model=hf",
        f"model.path={tiny_model}",
        "model.dtype=float32",
        "data=gsm8k",
        f"data.problems.path={problem_file}",
        "data.problems.prompt='{problem}'",
        "pairing.samples=2",
        "pairing.chosen=own_then_gold",
        "sampling.max_new_tokens=60",
        "generation.batch_size=2",
        "generation.chunk=4",
        f"cache_dir={tmp_path / 'cache'}",
    ]


def test_gold_solutions_that_are_not_there_are_noticed_before_sampling(words, tmp_path, monkeypatch):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    file = write_jsonl(tmp_path / "bare.jsonl", rows)
    words = [*words, f"data.problems.path={file}", "data.problems.answer_from=plain"]
    with initialize_config_module("sage.conf", version_base="1.3"):
        config.freeze(config.load(compose("build_pairs", words)), tmp_path / "run")
    monkeypatch.setattr(Sampler, "attempts", lambda *_: pytest.fail("responses were sampled"))
    with pytest.raises(UserError, match=r"pairing\.chosen=own_then_gold: no problem of .*columns\.solution"):
        build_pairs(tmp_path / "run")


def test_no_pair_is_no_success(sage, words, tmp_path, monkeypatch):
    """A pipeline must not go on with an empty file."""

    def built(world_size, run_dir):
        (run_dir / "pairs.jsonl").touch()
        write_json(run_dir / "manifest.json", {"counts": {"problems": 3, "right": 0, "responses": 6}})

    monkeypatch.setattr("sage.launch.start", built)
    status, _, err = sage("build-pairs", *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert status == 2 and "made no pair from 3 problems (0 of 6 responses were right)" in err


@pytest.mark.slow
def test_a_killed_run_ends_with_the_files_of_an_undisturbed_one(words, tmp_path, capsys):
    """SIGKILL, then `sage resume`: every file equal, and `sage train` reads the pairs."""
    with initialize_config_module("sage.conf", version_base="1.3"):
        config.freeze(config.load(compose("build_pairs", words)), tmp_path / "whole")
    build_pairs(tmp_path / "whole")
    assert re.search(r"at most \d+ minutes for 24 responses", capsys.readouterr().out)
    whole, run_dir = files(tmp_path / "whole"), tmp_path / "killed"
    assert set(whole) == {"generations.jsonl", "pairs.jsonl", "manifest.json"}

    kill_after(run_dir, ["build-pairs", *words, f"hydra.run.dir={run_dir}"], 1)
    made = list(run_dir.glob("progress/chunk_*.jsonl"))
    assert 0 < len(made) < 6 and not (run_dir / "manifest.json").exists()
    text = made[0].read_text()
    made[0].write_text(text.replace("How", "Now", 1))  # damage that is still JSON
    assert f"{made[0]} is damaged, so it is made again" in run_sage("resume", str(run_dir))
    assert files(run_dir) == whole

    manifest = json.loads(whole["manifest.json"])
    pairs = read_pair_set(str(run_dir / "pairs.jsonl")).count
    assert (manifest["counts"]["responses"], manifest["counts"]["pairs"]) == (24, pairs)
    row = json.loads(whole["pairs.jsonl"].splitlines()[0])
    assert list(row) == [field.name for field in dataclasses.fields(BuiltPair)]
    made = {tuple(json.loads(line)["response_ids"]) for line in whole["generations.jsonl"].splitlines()}
    assert row["chosen_ids"] is None and tuple(row["rejected_ids"]) in made
    assert "\\boxed{" in row["chosen"] and row["source"] == "gold"


@pytest.mark.slow
def test_train_builds_its_missing_pairs_once(words, tmp_path):
    """data.build=never refuses; else pairs are built into the cache, trained on, and found again by the next
    run; two ranks that build them make the same ones. A build that a signal ended goes on with the next run,
    also on another number of ranks."""
    training = ["steps=1", "batch_size=4", "data.max_length=256", "micro_batch_tokens=1024"]
    with initialize_config_module("sage.conf", version_base="1.3"):
        plan = config.load(compose("train", [*words, *training]))
    assert isinstance(plan, config.TrainConfig)
    with pytest.raises(UserError, match=r"data.build=never.*sage build-pairs"):
        launch.built_pairs(dataclasses.replace(plan, data=dataclasses.replace(plan.data, build="never")))
    train = ["train", *words, *training, f"hydra.run.dir={tmp_path / 'a'}"]
    err = kill_after(tmp_path / "cache" / "built", [*train, "world_size=2"], 1, signal.SIGTERM)
    assert "SIGTERM ended the run: run the same command again" in err and "sage resume" not in err
    assert list((tmp_path / "cache" / "built").glob("*/progress/chunk_*.jsonl"))
    out = run_sage(*train)
    assert "building the pairs" in out
    cfg = config.load(tmp_path / "a")
    assert isinstance(cfg, config.TrainConfig) and cfg.data.path is not None
    built = Path(cfg.data.path)
    assert built.is_relative_to(tmp_path / "cache") and (tmp_path / "a" / "final").is_dir()
    assert launch.built_pairs(plan) == built

    run_sage("build-pairs", *words, "world_size=2", f"hydra.run.dir={tmp_path / 'two'}")
    assert files(tmp_path / "two") == files(built.parent)


def test_whatever_decides_the_pairs_is_in_their_cache_key(words, tiny_model, tmp_path, monkeypatch):
    """A stale cache would train on pairs that this model and these settings do not make."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    words = [*words, f"model.path={folder}"]

    def key(*more: str) -> str:
        with initialize_config_module("sage.conf", version_base="1.3"):
            cfg = config.load(compose("build_pairs", [*words, *more]))
        assert isinstance(cfg, config.TrainConfig)
        return recipe_key(cfg)

    def rewrite(name: str, old: str, new: str) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    keys = [key(), key("data.chat_template=false"), key("seed=1"), key("sampling.top_p=0.5")]
    assert key() == keys[0]
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + "{{ more or '' }}")
    keys += [key("+data.template_arguments.more=thinking")]
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    keys += [key()]
    rewrite("chat_template.jinja", "assistant", "model")
    keys += [key()]
    rewrite("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    keys += [key()]
    weak = other_build(tmp_path / "weak", "t", attempt("0", 0, "8"))
    keys += [key(f"pairing.rejected_from=[{weak}]")]
    write_lines(Path(weak, "generations.jsonl"), [attempt("0", 0, "9")])
    keys += [key(f"pairing.rejected_from=[{weak}]")]
    for name in ("answering/equality.py", "commands/pairing.py"):  # verdicts and pairing of another version
        edited = copied_package(tmp_path / name.replace("/", "_"))
        (edited / name).write_text((edited / name).read_text() + "\n# changed\n")
        monkeypatch.setattr(files_module, "__file__", str(edited / "util" / "files.py"))
        keys += [key()]
    assert len(set(keys)) == len(keys)


def copied_package(folder: Path) -> Path:
    """A copy of sage's source."""
    return Path(shutil.copytree(Path(sage.__file__).parent, folder, ignore=shutil.ignore_patterns("assets")))


def test_build_pairs_without_problems_is_refused():
    with initialize_config_module("sage.conf", version_base="1.3"):
        composed = compose("build_pairs", [])
    with pytest.raises(UserError, match=r"data.problems.path=FILE"):
        config.load(composed)
