"""Rounds: which problems are asked, what ends the loop, and that kills at any moment change nothing."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, refused, write_jsonl
from forks import on_ranks
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from whole_runs import files, in_this_process, kill_often

from sage import config
from sage.answering.asking import Outcome, choose, samples_of
from sage.answering.attempts import BEGUN_FILE, PROBLEMS, Attempt, read_attempts, write_lines
from sage.answering.problems import load_problems, read_problems
from sage.commands.build_pairs import other_attempts
from sage.commands.more import give_rounds
from sage.commands.pairing import make_pairs
from sage.commands.report import report
from sage.commands.rounds import rounds
from sage.commands.rounds_inputs import claim_inputs, warn_of_known_problems
from sage.commands.rounds_pool import stay
from sage.commands.rounds_results import check_attempts
from sage.data.source import resolve_path
from sage.reporting.runs import Rounds, read
from sage.util import checksums
from sage.util.errors import UserError
from sage.util.files import sha256
from sage.util.locks import lock

# --- which problems


SEEN = {
    **{f"m{i}": Outcome(4, 4) for i in range(20)},
    **{f"h{i}": Outcome(4, 0) for i in range(20)},
    **{f"f{i}": Outcome(4, 1 + i % 3) for i in range(20)},
}
IDS = [*SEEN, *(f"u{i}" for i in range(20))]


def chosen(seed="0/2", **options):
    given = {"max_samples": 16, "floor": 0.1, "budget": None, **options}
    return choose(dict.fromkeys(IDS, 4), SEEN, seed=seed, **given)


def test_open_problems_are_asked_and_settled_ones_rarely():
    counts = chosen()
    assert Counter(i[0] for i in counts) == {"f": 20, "u": 20, "m": 2, "h": 2}
    assert {i[0]: n for i, n in counts.items()} == {"f": 4, "u": 4, "m": 4, "h": 8}
    assert list(counts) == [i for i in IDS if i in counts]
    assert counts == chosen() and counts.keys() != chosen("1/2").keys()


def test_a_budget_asks_a_part_of_the_same_problems():
    whole, part = chosen(), chosen(budget=90)
    assert sum(part.values()) in range(87, 91) and part.items() <= whole.items()


def test_a_floor_never_leaves_a_round_without_problems():
    """One settled problem is one that is asked, however small the floor."""
    asked = choose({"a": 4}, {"a": Outcome(4, 0)}, max_samples=4, floor=0.01, budget=None, seed="")
    assert asked == {"a": 4}


def test_a_problem_never_needs_more_than_the_budget():
    """Hopeless problems want ever more responses. A budget for one problem always asks one."""
    last = {i: Outcome(4, 0) for i in "abc"}
    asked = choose(dict.fromkeys("abc", 4), last, max_samples=32, floor=1, budget=5, seed="")
    assert list(asked.values()) == [5]
    assert choose({"a": 9}, {}, max_samples=32, floor=1, budget=5, seed="") == {"a": 5}


def test_samples_grow_until_an_answer_is_right():
    asked, last = [], None
    for right in (0, 0, 0, 1, 1, 30):
        asked.append(samples_of(last, 4, 20))
        last = Outcome(asked[-1], right)
    assert asked == [4, 8, 16, 20, 20, 20] and samples_of(last, 4, 20) == 4


def test_problems_may_say_how_many_responses_they_want(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2", "samples": n} for n in (3, "2")]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    assert [p.samples for p in load_problems(str(file))] == [None, None], "only a column that is named"
    assert [p.samples for p in load_problems(str(file), columns={"samples": "samples"})] == [3, 2]
    for bad in (0, -1, "many", None, 1.5):
        file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1=", "answer": "2", "samples": bad}])
        with pytest.raises(UserError, match="samples must be a whole number above 0"):
            load_problems(str(file), columns={"samples": "samples"})


def test_rounds_ask_as_often_as_a_problem_says(begin, monkeypatch, tmp_path):
    rows = [{"prompt": f"Q{i}", "answer": str(i), "n": i + 3} for i in range(4)]
    file = write_jsonl(tmp_path / "own.jsonl", rows)
    words = [f"data.problems.path={file}", "data.problems.columns.samples=n", "rounds=1"]
    rounds(begin("run", *words, "round.max_samples=4"), Parts(monkeypatch))
    assert [o["samples"] for o in outcomes(begin("run") / "round_1")] == [3, 4, 5, 6]


# --- the loop, with parts that only write what the real ones would


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Parts:
    """Stands for the ranks of a part. A policy has a skill, which training raises by 1.

    It counts what happens: the beginning and the middle of each part, and each file that is written. Event
    number `kill` ends the process.
    """

    def __init__(self, monkeypatch, kill: int = -1, gain: int = 1, skill: int = 0, rule: str = "hash/number"):
        # Resampling takes long.
        monkeypatch.setattr("sage.commands.evaluate.difference_interval", lambda values: (0.0, 0.0))
        self.events, self.kill, self.gain, self.skill, self.rule = 0, kill, gain, skill, rule
        for module in ("sage.util.files", "sage.answering.attempts"):
            monkeypatch.setattr(f"{module}.write_text", self.write_text)

    def event(self) -> None:
        self.events += 1
        if self.events - 1 == self.kill:
            raise Killed

    def write_text(self, file: Path, text: str) -> None:
        self.event()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        self.event()

    def __call__(self, world_size: int, folder: Path) -> None:
        self.event()
        cfg = config.load(folder)  # with its checks, as a rank reads it
        assert isinstance(cfg, config.RunConfig)
        mark = Path(cfg.model.path) / "skill"
        skill = int(mark.read_text()) if mark.exists() else self.skill
        parts = {"build-pairs": self.build, "train": self.train, "eval": self.evaluate}
        {**parts, "score-dataset": self.score}[cfg.command](cfg, folder, skill)

    def attempts(self, problems, samples: int, seed: int, skill: int) -> list[Attempt]:
        """Problem i is right in a share of (skill - i + 4) / 5 of its answers."""
        found = []
        for p in problems:
            for n in range(p.samples or samples):
                right = random.Random(f"{seed}/{p.problem_id}/{n}").random() < (skill - int(p.answer) + 4) / 5
                text = p.answer if right else f"wrong {n} {seed}"
                verdict = p.answer, text, right, self.rule, None
                found.append(
                    Attempt(p.problem_id, n, p.prompt, text, 3, "end", *verdict, [1, 2], [3, 4, 5], False)
                )
        return found

    def build(self, cfg, folder: Path, skill: int) -> None:
        problems = read_problems(cfg.data.problems)
        text = cfg.data.problems.prompt
        attempts = [
            replace(a, prompt=text.replace("{problem}", a.prompt))
            for a in self.attempts(problems, cfg.pairing.samples, cfg.seed, skill)
        ]
        write_lines(folder / "generations.jsonl", attempts)
        self.event()
        golds, others = [None] * len(problems), other_attempts(cfg, problems, "t")
        pairs, counts = make_pairs(problems, golds, attempts, cfg.pairing, cfg.seed, "t", others)
        write_lines(folder / "pairs.jsonl", pairs)
        counts |= {
            "problems": len(problems),
            "responses": len(attempts),
            "response_tokens": 3 * len(attempts),
        }
        counts["right"] = sum(a.correct for a in attempts)
        content = {"counts": counts, "tokenizer": "t", "checksum": sha256(folder / "pairs.jsonl")}
        self.write_text(folder / "manifest.json", json.dumps(content))

    def score(self, cfg, folder: Path, skill: int) -> None:
        """The policy prefers the chosen response to problems up to its skill."""
        rows = [json.loads(line) for line in Path(cfg.data.path).read_text().split("\n")[:-1]]
        margins = [float(skill - int(row["answer"])) - 0.5 for row in rows]
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        scores = pa.table({"pair_id": [row["pair_id"] for row in rows], "policy_mean": margins})
        pq.write_table(scores, folder / "scores" / "00000.parquet")
        self.write_text(folder / "summary.json", json.dumps({"pairs": len(rows)}))

    def train(self, cfg, folder: Path, skill: int) -> None:
        assert cfg.patience is None and list(cfg.benchmark) == ["arithmetic"] * bool(cfg.select)
        before = Path(cfg.model.path)
        kept = "optimizer" if cfg.optimizer.continue_from else "float32"
        assert (before / kept / "skill").exists() == (before / "skill").exists()
        assert cfg.optimizer.continue_from in (None, str(before / "optimizer"))
        for name in ("final", "checkpoints", *["best"] * bool(cfg.select)):
            self.write_text(folder / name / "skill", str(skill + self.gain))
            for behind in ["float32"] * cfg.export_float32 + ["optimizer"] * cfg.export_optimizer:
                if name == ("best" if cfg.select else "final"):
                    self.write_text(folder / name / behind / "skill", str(skill + self.gain))
                    checksums.seal(folder / name / behind)
        costs = {"cost/forward_pairs": 8, "cost/backward_pairs": 4, "dtype": "bfloat16"}
        costs["before"] = {"benchmark/arithmetic/accuracy": skill / 100}
        best = {"best": {"value": (skill + self.gain) / 100}} if cfg.select else {}
        self.write_text(folder / "summary.json", json.dumps({"steps": cfg.steps, **costs, **best}))

    def evaluate(self, cfg, folder: Path, skill: int) -> None:
        attempts = self.attempts(read_problems(cfg.benchmark["arithmetic"]), 1, 0, skill)
        write_lines(folder / "arithmetic" / "generations.jsonl", attempts)
        (folder / "arithmetic" / BEGUN_FILE).write_text(json.dumps({PROBLEMS: "these"}))
        measured = {
            "accuracy": sum(a.correct for a in attempts) / len(attempts),
            "interval": [0, 1],
            "problems": 12,
        }
        self.write_text(folder / "summary.json", json.dumps({"benchmarks": {"arithmetic": measured}}))


def freeze(run_dir: Path, *overrides: str) -> Path:
    if not (run_dir / "config.yaml").exists():
        words = [*overrides, f"cache_dir={run_dir.parent / 'cache'}"]
        with initialize_config_module("sage.conf", version_base="1.3"):
            config.freeze(config.load(compose("rounds", words), overrides), run_dir)
    return run_dir


@pytest.fixture
def begin(tmp_path):
    """Freezes rounds over 12 problems, the last of which is out of reach for long."""
    rows = [{"problem_id": f"p{i}", "prompt": f"Q{i}", "answer": str(i)} for i in range(12)]
    file = write_jsonl(tmp_path / "problems.jsonl", rows)
    words = [
        "+experiment=arithmetic",
        "+benchmark=arithmetic",
        f"data.problems.path={file}",
        "round.floor=0.5",
    ]
    words += [f"benchmark.arithmetic.path={file}", "benchmark.arithmetic.split=validation"]

    def freeze_in(name: str, *overrides: str) -> Path:
        return freeze(tmp_path / name, *words, *overrides)

    return freeze_in


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def results(run_dir: Path) -> dict[str, bytes]:
    """Every file that does not say how long something took, or what a killed training did after its last
    checkpoint. Manifests and the metadata of tables name the run's folder."""
    timed, here = ("summary.json", "metrics.jsonl", "times.jsonl", "config.yaml"), str(run_dir).encode()
    timed += ("metrics.superseded.jsonl", "summary.superseded.json")
    found = {name: data for name, data in files(run_dir).items() if not name.endswith(timed)}
    for name in found:
        if name.endswith(".parquet"):
            found[name] = str(pq.read_table(run_dir / name).to_pydict()).encode()
    return {name: data.replace(here, b"RUN_DIR") for name, data in found.items()}


@pytest.mark.parametrize("optimizer", ["fresh", "continued"])
def test_a_kill_at_any_moment_changes_nothing(optimizer, begin, monkeypatch):
    """Killed before, in and after every part and every write, and then at three such moments in one run."""
    whole_dir = begin(
        "whole", "rounds=2", "round.keep=0.5", "round.rejected=earlier", f"round.optimizer={optimizer}"
    )
    kept = {}  # configs in memory: reading and writing them would take most of the time
    cfg = config.load(whole_dir)
    monkeypatch.setattr(config, "load", lambda folder: kept.get(folder, cfg))
    monkeypatch.setattr(config, "write", lambda cfg, folder: kept.update({folder: cfg}))
    parts = Parts(monkeypatch)
    rounds(whole_dir, parts)
    expected, moments = results(whole_dir), range(parts.events)
    assert len(moments) > 50 and (whole_dir / "round_2/pool.jsonl").exists()
    rng = random.Random(0)
    for number, kills in enumerate(
        [*([m] for m in moments), *(rng.choices(moments[:20], k=3) for _ in range(10))]
    ):
        run_dir = whole_dir.with_name(f"killed_{number}")
        run_dir.mkdir()
        shutil.copy(whole_dir / "config.yaml", run_dir)
        for kill in kills:
            with suppress(Killed):
                rounds(run_dir, Parts(monkeypatch, kill))
        if not (run_dir / "summary.json").exists():
            rounds(run_dir, Parts(monkeypatch))
        got = results(run_dir)
        assert got.keys() == expected.keys() and not [n for n in got if got[n] != expected[n]], kills
        whole, mine = summary_of(whole_dir), summary_of(run_dir)
        for summary in (whole, mine):
            summary.pop("final")
            seconds = [r.pop("seconds") for r in summary["rounds"]]
            assert all(seconds) or summary is mine  # a kill may come before a part's are written
        assert mine == whole


def test_each_round_starts_from_the_policy_before_and_asks_by_its_outcomes(begin, monkeypatch):
    run_dir = begin("run", "round.budget=60", "pairing.samples=4", "seed=3")
    rounds(run_dir, Parts(monkeypatch))
    for number in (1, 2, 3):
        folder = run_dir / f"round_{number}"
        parts = {name: config.load(folder / name) for name in ("pairs", "train", "eval")}
        before = (
            str(run_dir / f"round_{number - 1}/train/final") if number > 1 else "pkg://sage.assets/arithmetic"
        )
        assert {p.model.path for p in (parts["pairs"], parts["train"])} == {before}  # pyright: ignore
        assert parts["eval"].model.path == str(folder / "train/final")  # pyright: ignore
        assert parts["pairs"].seed == parts["train"].seed == 3000 + number  # pyright: ignore
        assert parts["train"].data.path == str(folder / "pairs/pairs.jsonl")  # pyright: ignore
        attempts = read_attempts(folder / "pairs" / "generations.jsonl")
        assert Counter(a.problem_id for a in attempts) == {
            o["problem_id"]: o["samples"] for o in outcomes(folder)
        }
        assert len(attempts) <= 60 and not (folder / "train/checkpoints").exists()
    result = summary_of(run_dir)["rounds"][2]
    assert result["responses"] == sum(o["samples"] for o in outcomes(run_dir / "round_2"))
    assert result["response_tokens"] == 3 * result["responses"] and set(result["seconds"]) == {
        "pairs",
        "train",
        "eval",
    }
    assert (result["forward_pairs"], result["backward_pairs"]) == (8, 4)
    assert sum(result["outcomes"].values()) == result["problems"]
    doubled = [o for o in outcomes(run_dir / "round_2") if o["samples"] == 8]
    first = {o["problem_id"]: o["right"] for o in outcomes(run_dir / "round_1")}
    assert doubled and all(first[o["problem_id"]] == 0 for o in doubled)
    assert (run_dir / "final/skill").read_text() == "3"


def outcomes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]


def test_temperatures_references_and_weaker_policies_by_round(begin, monkeypatch):
    options = ["round.temperatures=[1.5,0.7]", "round.reference=initial", "round.rejected=earlier"]
    run_dir = begin("run", *options, "pairing.samples=4")
    rounds(run_dir, Parts(monkeypatch))
    given = {n: {p: config.load(run_dir / f"round_{n}" / p) for p in ("pairs", "train")} for n in (1, 2, 3)}
    assert [g["pairs"].sampling.temperature for g in given.values()] == [1.5, 0.7, 0.7]  # pyright: ignore
    references = [g["train"].reference_model for g in given.values()]  # pyright: ignore
    assert references == [None, "pkg://sage.assets/arithmetic", "pkg://sage.assets/arithmetic"]
    wrong = {
        n: {(a.problem_id, a.response) for a in attempts_of(run_dir, n) if not a.correct} for n in (1, 2, 3)
    }
    asked = {i for i, _ in wrong[1]}
    found = [json.loads(line) for line in (run_dir / "round_2/pairs/pairs.jsonl").read_text().splitlines()]
    sources = Counter()
    for row in found:
        problem = row["pair_id"].rpartition("-")[0]
        assert (problem, row["rejected"]) in wrong[1 if problem in asked else 2]
        sources[problem in asked] += 1
    assert sources[True]


def attempts_of(run_dir: Path, number: int) -> list[Attempt]:
    return read_attempts(run_dir / f"round_{number}/pairs/generations.jsonl")


def test_older_pairs_stay_while_they_are_wrong(begin, monkeypatch):
    """Those of problems that are asked again go, and so do those that the policy has right."""
    lines = [json.dumps({"pair_id": f"p{i}-{n}"}) + "\n" for i in range(4) for n in range(2)]
    margins = {f"p{i}-{n}": i - 3.5 + n for i in range(4) for n in range(2)}
    del margins["p0-0"]
    names = [json.loads(line)["pair_id"] for line in stay(lines, margins, {"p1"}, 1.0)]
    assert names == ["p0-1", "p2-0", "p2-1", "p3-0"]
    assert stay(lines, margins, {"p1"}, 0.25) == [lines[1], lines[4]] and not stay(lines, margins, {}, 0.1)

    run_dir = begin("run", "round.keep=1", "round.budget=48", "rounds=2")
    rounds(run_dir, Parts(monkeypatch, skill=4))
    folder, before = run_dir / "round_2", run_dir / "round_1"
    score, train = config.load(folder / "older"), config.load(folder / "train")
    assert score.model.path == train.model.path == str(before / "train/final")  # pyright: ignore
    older = Path(score.data.path)  # pyright: ignore
    assert older == before / "pairs/pairs.jsonl"
    pool, new = (folder / "pool.jsonl").read_text(), (folder / "pairs/pairs.jsonl").read_text()
    assert train.data.path == str(folder / "pool.jsonl") and pool.startswith(new)  # pyright: ignore
    kept = [json.loads(line) for line in pool[len(new) :].splitlines()]
    asked = {o["problem_id"] for o in outcomes(folder)}
    expected = [
        row
        for row in map(json.loads, older.read_text().splitlines())
        if row["pair_id"].rpartition("-")[0] not in asked and int(row["answer"]) >= 5
    ]
    assert kept == expected
    result = summary_of(run_dir)["rounds"][2]
    assert result["kept_pairs"] == len(kept)
    assert result["rescored_pairs"] == len(older.read_text().splitlines()) and "older" in result["seconds"]
    assert kept


def test_texts_with_other_line_ends_stay_in_one_line(begin, monkeypatch):
    """JSON may hold U+2028 and U+0085 as they are, where `splitlines` would cut a pair in two."""
    odd = ["round.keep=1", "round.budget=48", "rounds=2", "data.problems.prompt='{problem}\u2028=\u0085'"]
    for name, options in (("odd", odd), ("plain", odd[:3])):
        rounds(begin(name, *options), Parts(monkeypatch, skill=4))
    odd, plain = ((begin(name) / "round_2/pool.jsonl").read_text() for name in ("odd", "plain"))
    assert "\u2028" in odd and odd.count("\n") == plain.count("\n")
    assert summary_of(begin("odd"))["rounds"][2]["kept_pairs"]


def test_the_report_of_rounds(begin, monkeypatch, capsys):
    """Its tables are those of the outcomes on disk, also after a kill. Each part is named by its round."""
    run_dir = begin("run", "round.keep=1", "pairing.samples=4", "rounds=2")
    rounds(run_dir, Parts(monkeypatch, skill=4))
    report([str(run_dir)])
    assert "Accuracy after each round" in capsys.readouterr().out
    rows = {name: table_of(run_dir, name) for name in ("rounds", "rounds_accuracy", "rounds_cost", "runs")}
    seen, last = {}, {}
    for number, row in enumerate(rows["rounds"], 1):
        asked = {o["problem_id"]: o for o in outcomes(run_dir / f"round_{number}")}
        solved = [i for i, o in asked.items() if i in last and o["right"] and not last[i]["right"]]
        lost = [i for i, o in asked.items() if i in last and not o["right"] and last[i]["right"]]
        last = seen = {**seen, **asked}
        always = sum(o["right"] == o["samples"] for o in seen.values())
        never = sum(o["right"] == 0 for o in seen.values())
        assert int(row["newly solved"]) == len(solved) and int(row["newly lost"]) == len(lost)
        assert (int(row["always right"]), int(row["never right"])) == (always, never)
        assert int(row["sometimes right"]) == len(seen) - always - never
        assert int(row["responses"]) == sum(o["samples"] for o in asked.values())
    found = summary_of(run_dir)["rounds"]
    for row, result in zip(rows["rounds_accuracy"], found, strict=True):
        measured = result["benchmarks"]["arithmetic"]
        assert float(row["accuracy"]) == measured["accuracy"] and row["benchmark"] == "arithmetic"
        assert row["newly solved"] == (str(len(measured["gained"])) if result["round"] else "")
    assert [row["trained"] for row in rows["rounds_cost"]] == ["", *["4"] * (len(found) - 1)]
    assert [row["run"] for row in rows["runs"]] == [f"round_{n}/train" for n in range(1, len(found))]
    page = (run_dir / "report.html").read_text()
    assert "accuracy on arithmetic" in page and "pass rates as last seen: run" in page

    (run_dir / "round_2/outcomes.jsonl").unlink()  # rounds with a summary are finished, so not resumed
    with pytest.raises(
        UserError,
        match=rf"is missing: delete {run_dir}/round_2/outcomes.jsonl and {run_dir}/summary.json, and",
    ):
        report([str(run_dir)])

    with suppress(Killed):
        rounds(begin("killed"), Parts(monkeypatch, skill=4, kill=45))
    report([str(begin("killed"))])
    assert len(table_of(begin("killed"), "rounds")) == 1
    assert "rounds killed: interrupted" in capsys.readouterr().out


def test_rounds_of_a_sweep_are_named_by_what_differs(begin, monkeypatch):
    """Protects a sweep over a key of the rounds, whose training runs would look like those of other seeds."""
    for name, keep in (("sweep/0", "0"), ("sweep/1", "1")):
        rounds(begin(name, f"round.keep={keep}", "rounds=1"), Parts(monkeypatch))
    folder = begin("sweep/0").parent
    report([str(folder)])
    assert [row["rounds"] for row in table_of(folder, "rounds")] == [
        "0 (round.keep=0.0)",
        "1 (round.keep=1.0)",
    ]
    assert [row["setting"] for row in table_of(folder, "runs")] == ["A", "B"]


def table_of(run_dir: Path, name: str) -> list[dict[str, str]]:
    with (run_dir / "report_tables" / f"{name}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_best_round_is_kept_and_patience_ends(begin, monkeypatch):
    select = "select=benchmark/arithmetic/accuracy"
    rounds(begin("up", select, "patience=1"), Parts(monkeypatch))
    assert summary_of(begin("up"))["best"] == {"metric": select[7:], "value": 0.03, "round": 3}
    assert summary_of(begin("up"))["ended"] is None
    rounds(begin("down", select, "patience=2", "rounds=9"), Parts(monkeypatch, gain=-1, skill=10))
    summary = summary_of(begin("down"))
    assert summary["ended"] == "no better benchmark/arithmetic/accuracy in 2 rounds"
    # No round was better than the first policy, so that is kept.
    assert summary["best"] == {"metric": select[7:], "value": 0.1, "round": 0}
    assert (
        len(summary["rounds"]) == 3
        and summary["after"][select[7:]] == summary["rounds"][0]["benchmarks"]["arithmetic"]["accuracy"]
    )
    assert kept_in(begin("up"), "float32") == ["round_3/train/best/float32"]


def kept_in(run_dir: Path, name: str) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob(name))


def test_float32_weights_are_kept_for_the_next_round_only_unless_asked_for(begin, monkeypatch):
    rounds(begin("run"), Parts(monkeypatch))
    assert kept_in(begin("run"), "float32") == ["round_3/train/final/float32"]
    rounds(begin("all", "export_float32=true"), Parts(monkeypatch))
    every = [f"round_{n}/train/final/float32" for n in (1, 2, 3)]
    assert kept_in(begin("all"), "float32") == ["final/float32", *every]


def test_the_optimizer_of_a_round_may_go_on(begin, monkeypatch):
    """With that of the round before, which nothing else needs. A fresh one never sees it."""
    for name, kept in (("fresh", []), ("continued", ["round_3/train/final/optimizer"])):
        run_dir = begin(name, f"round.optimizer={name}")
        rounds(run_dir, Parts(monkeypatch))
        begun = [config.load(run_dir / f"round_{n}/train").optimizer for n in (1, 2, 3)]  # pyright: ignore
        before = [f"{run_dir}/round_{n}/train/final/optimizer" for n in (1, 2)]
        assert [o.continue_from for o in begun] == [None, *(before if kept else [None, None])]
        assert kept_in(run_dir, "optimizer") == kept
        assert kept_in(run_dir, "float32") == ([] if kept else ["round_3/train/final/float32"])
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "round_3" / "train")
    with pytest.raises(UserError, match=f"round_3/train begins with {before[1]}, which is gone: put it back"):
        rounds(run_dir, Parts(monkeypatch))
    needed = Path(before[1])
    needed.mkdir()
    (needed / "skill").write_text("2")
    checksums.seal(needed)
    rounds(run_dir, Parts(monkeypatch))
    with pytest.raises(UserError, match="continue_from=nowhere: there is no optimizer's state"):
        rounds(begin("nowhere", "optimizer.continue_from=nowhere"), Parts(monkeypatch))
    assert not (begin("nowhere") / "round_1").exists()


def test_training_again_what_began_with_deleted_weights_is_refused(begin, monkeypatch, tmp_path):
    """Protects from rounded weights in place of the float32 ones, which the round before no longer has."""
    run_dir = begin("run")
    rounds(run_dir, Parts(monkeypatch))
    expected = results(run_dir)
    (run_dir / "summary.json").unlink()
    for number in (3, 2):
        shutil.rmtree(run_dir / f"round_{number}" / "train")
        with pytest.raises(UserError, match=rf"round_{number - 1}/train/final/float32, which is gone: put"):
            rounds(run_dir, Parts(monkeypatch))
    shutil.rmtree(run_dir / "round_1" / "train")
    rounds(run_dir, Parts(monkeypatch))
    assert results(run_dir) == expected


def test_rounds_of_an_earlier_version_do_not_go_on_with_another_adapter(begin, monkeypatch):
    """It trained a fresh adapter on the merged policy, so its last adapter alone is not the policy."""
    run_dir = begin("run", "+model/lora=default", "rounds=1")
    rounds(run_dir, Parts(monkeypatch))
    (run_dir / "summary.json").unlink()
    begun = json.loads((run_dir / ".begun.json").read_text())
    del begun["adapter of a round"]
    (run_dir / ".begun.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match="another adapter of a round: None, and now it is not merged"):
        rounds(run_dir, Parts(monkeypatch))


def test_rounds_warn_of_a_benchmark_that_they_train_on(begin, capsys):
    warn_of_known_problems(config.load(begin("same")))  # pyright: ignore
    said = capsys.readouterr().out
    assert "warning: 12 of 12 problems of benchmark.arithmetic are in data.problems" in said
    file = "pkg://sage.assets/arithmetic/problems_test.jsonl"
    warn_of_known_problems(config.load(begin("other", f"benchmark.arithmetic.path={file}")))  # pyright: ignore
    assert not capsys.readouterr().out


@pytest.mark.parametrize("fault", ["gone", "not sealed", "emptied", "cut"])
def test_more_rounds_need_the_float32_weights_of_the_last(fault, begin, monkeypatch, tmp_path):
    """A user may delete them to save room, and a lost machine may leave an empty file. The round is refused
    before it samples, and goes on once they are put back."""
    run_dir, whole = begin("run"), begin("whole", "rounds=4")
    rounds(run_dir, Parts(monkeypatch))
    kept, part = run_dir / "round_3/train/final/float32", run_dir / "round_3/train/final/float32/skill"
    shutil.copytree(kept, tmp_path / "backup")
    if fault == "gone":
        shutil.rmtree(kept)
    elif fault == "not sealed":
        (kept / "checksums.json").unlink()
    else:
        (part if fault == "cut" else kept / "checksums.json").write_text("")
    cfg = config.load(run_dir)
    give_rounds(cfg, run_dir, 4)
    config.write(cfg, run_dir)
    reason = "is gone: put it back" if fault == "gone" else r"is damaged \((skill|checksums.json)\): put"
    with pytest.raises(
        UserError, match=rf"round_4/train begins with .*round_3/train/final/float32, which {reason}"
    ):
        rounds(run_dir, Parts(monkeypatch))
    assert not (run_dir / "round_4" / "pairs").exists()
    shutil.rmtree(kept, ignore_errors=True)
    shutil.move(tmp_path / "backup", kept)
    rounds(run_dir, Parts(monkeypatch))
    rounds(whole, Parts(monkeypatch))
    assert results(run_dir) == results(whole)


def test_float32_weights_behind_a_link_are_no_obstacle(begin, monkeypatch, tmp_path):
    run_dir = begin("run", "rounds=2")
    with pytest.raises(Killed):
        rounds(run_dir, Parts(monkeypatch, kill=30))
    kept = run_dir / "round_1/train/final/float32"
    shutil.move(kept, tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    rounds(run_dir, Parts(monkeypatch))
    assert not kept.is_symlink() and (tmp_path / "elsewhere" / "skill").exists()


def test_a_round_is_not_mixed_with_another_policy(begin, monkeypatch):
    """A round that is trained again may give another policy, on a GPU or from other float32 weights. The
    rounds after it belong to the old one."""
    run_dir = begin("run")
    rounds(run_dir, Parts(monkeypatch))
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "round_1" / "train")
    with pytest.raises(
        UserError, match=r"round_2 was made from another policy than .*round_1/train/final is now"
    ):
        rounds(run_dir, Parts(monkeypatch, gain=2))
    for number in (2, 3):
        shutil.rmtree(run_dir / f"round_{number}")
    rounds(run_dir, Parts(monkeypatch, gain=2))


def test_an_export_that_is_gone_is_named(begin, monkeypatch):
    rounds(begin("run"), Parts(monkeypatch))
    (begin("run") / "summary.json").unlink()
    shutil.rmtree(begin("run") / "round_3" / "train" / "final")
    for _ in range(2):
        with pytest.raises(UserError, match=r"round_3/train/final is missing: delete .*round_3/train, and"):
            rounds(begin("run"), Parts(monkeypatch))


def test_mastered_problems_end_the_rounds(begin, monkeypatch):
    """At once, if no response is wrong; and after a round, if the policy then knows them all."""
    rounds(begin("known"), Parts(monkeypatch, skill=50))
    summary = summary_of(begin("known"))
    assert summary["ended"] == "nothing is left to learn: all 96 responses were right"
    assert summary["final"] == "pkg://sage.assets/arithmetic" and len(summary["rounds"]) == 1
    rounds(begin("learned", "rounds=5"), Parts(monkeypatch, gain=50))
    summary = summary_of(begin("learned"))
    assert (
        "nothing is left to learn" in summary["ended"]
        and (begin("learned") / "final/skill").read_text() == "50"
    )


def test_rounds_without_pairs_or_verdicts_are_refused(begin, monkeypatch):
    with pytest.raises(UserError, match=r"round 1 gave no pair: 0 of 96 responses.*samples.*own_then_gold"):
        rounds(begin("none"), Parts(monkeypatch, skill=-50))
    rounds(begin("later", "pairing.samples=4", "round.budget=48"), Parts(monkeypatch, gain=-50, skill=6))
    assert summary_of(begin("later"))["ended"].startswith("round 2 gave no pair: 0 of ")
    assert (begin("later") / "final/skill").read_text() == "-44"
    with pytest.raises(UserError, match="timed out or crashed on all"):
        rounds(begin("slow"), Parts(monkeypatch, rule="boxed/timeout"))


def test_a_full_disk_is_one_message(begin, monkeypatch):
    """In a file of the rounds it is theirs; in a part it is the part's, which has spoken."""
    rounds(begin("whole", "rounds=1"), Parts(monkeypatch))
    full = OSError(errno.ENOSPC, "No space left on device")
    for number, name in enumerate(["problems.jsonl", "times.jsonl", "summary.json"]):
        parts, run_dir = Parts(monkeypatch), begin(f"full_{number}", "rounds=1")

        def write(file: Path, text: str, name=name, parts=parts, run_dir=run_dir) -> None:
            if file.name == name and (name != "summary.json" or file.parent == run_dir):
                raise full
            parts.write_text(file, text)

        for module in ("rounds", "rounds_parts", "rounds_results"):
            monkeypatch.setattr(f"sage.commands.{module}.write_text", write)
        monkeypatch.setattr("sage.commands.rounds.write_json", lambda f, v, w=write: w(f, json.dumps(v)))
        with pytest.raises(UserError, match=r"disk of .*full_\d is full: make room, then .*sage resume"):
            rounds(run_dir, parts)
        monkeypatch.undo()
        rounds(run_dir, Parts(monkeypatch))
        assert results(run_dir) == results(begin("whole"))

    def fails(world_size: int, folder: Path) -> None:
        monkeypatch.setattr("sage.commands.rounds_parts.write_text", lambda *_: (_ for _ in ()).throw(full))
        raise SystemExit(2)

    with pytest.raises(SystemExit, match="2"):
        rounds(begin("part", "rounds=1"), fails)


@pytest.mark.parametrize("name", ["pairs/pairs.jsonl", "outcomes.jsonl", "problems.jsonl", "pool.jsonl"])
def test_a_damaged_file_is_made_again(name, begin, monkeypatch):
    """Also if whole lines are missing, which looks like a shorter file."""
    older = name == "pool.jsonl"
    run_dir = begin("run", *["round.keep=1", "rounds=2"] * older)
    rounds(begin("whole", *["round.keep=1"] * older), Parts(monkeypatch))
    if older:  # the third round, which scores that pool again, comes later
        rounds(run_dir, Parts(monkeypatch))
        give_rounds(cfg := config.load(run_dir), run_dir, 3)  # pyright: ignore
        config.write(cfg, run_dir)
    else:
        with suppress(Killed):
            rounds(run_dir, Parts(monkeypatch, kill=30))
    damaged = run_dir / ("round_2" if older else "round_1") / name
    damaged.write_text("".join(damaged.read_text().splitlines(keepends=True)[:-3]))
    rounds(run_dir, Parts(monkeypatch))
    assert results(begin("run")) == results(begin("whole"))


# --- the real parts


@pytest.mark.slow
def test_real_parts(tmp_path):
    """Rounds of real sampling, scoring, training and evaluation, killed at random moments.

    SAGE_ROUNDS and SAGE_KILLS set the numbers of rounds (1) and of kills (2).
    """
    number, kills = (int(os.environ.get(name, n)) for name, n in (("SAGE_ROUNDS", 1), ("SAGE_KILLS", 2)))
    small = ["data.problems.limit=10", "benchmark_limit=4", "data.eval_path=null", "pairing.samples=4"]
    short = ["steps=2", "batch_size=4", "save_every=1", "generation.chunk=16"]
    options = ["round.keep=1", "round.rejected=earlier", "round.reference=initial", f"rounds={number}"]
    words = ["+experiment=arithmetic", "+benchmark=arithmetic_validation", *small, *short, *options]
    words += [f"cache_dir={tmp_path / 'cache'}", "model.dtype=bfloat16"]
    whole, killed = kill_often("rounds", words, tmp_path, kills, (0.05, 0.9))
    expected = results(whole)
    for run_dir in killed:
        got = results(run_dir)
        assert got.keys() == expected.keys() and not [n for n in got if got[n] != expected[n]]
    assert (whole / "final/model.safetensors").is_file()
    assert summary_of(whole)["rounds"][1]["backward_pairs"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "kept"), [("fresh", "float32"), ("continued", "optimizer")])
def test_an_adapter_goes_on_as_it_is(optimizer, kept, tmp_path):
    """The final weights are the first model and the last adapter, rounded once. A round that began with the
    merged export of the one before would have lost what that one rounded."""
    small = ["data.problems.limit=10", "data.eval_path=null", "pairing.samples=4"]
    short = ["steps=2", "batch_size=4", "optimizer.lr=1e-3", "rounds=2"]
    words = ["+experiment=arithmetic", *small, *short, "+model/lora=default", "model.dtype=bfloat16"]
    words += [f"round.optimizer={optimizer}"]
    run_dir = freeze(tmp_path / "run", *words)
    on_ranks(1, rounds, run_dir, in_this_process, seconds=600)
    first, last = (
        load_file(run_dir / f"round_{number}/train/final/adapter/adapter_model.safetensors")
        for number in (1, 2)
    )
    assert not all(torch.equal(first[name], last[name]) for name in first)
    other = {"float32": "optimizer", "optimizer": "float32"}[kept]
    assert kept_in(run_dir, kept) == [f"round_2/train/final/adapter/{kept}"] and not kept_in(run_dir, other)
    base = load_file(Path(resolve_path("pkg://sage.assets/arithmetic")) / "model.safetensors")
    final = load_file(run_dir / "final/model.safetensors")
    layers = [name for name in last if "lora_A" in name]
    for name in layers:
        layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
        learned = 2 * last[name.replace("lora_A", "lora_B")] @ last[name]
        expected = (base[layer].to(torch.bfloat16).float() + learned).to(torch.bfloat16)
        assert learned.abs().max() > 0 and torch.equal(final[layer], expected)
    assert layers


# --- what is refused


def test_a_verifier_that_times_out_on_everything(capsys):
    def attempts(*rules: str) -> list[Attempt]:
        return [
            Attempt("0", i, "Q", "x", 1, "end", "7", "x", False, rule, None, [1], [2], False)
            for i, rule in enumerate(rules)
        ]

    check_attempts(1, attempts("boxed/timeout", "boxed/math"), Path("file"))
    assert "on 1 of 2 answers" in capsys.readouterr().out
    file = Path("RUN/round_1/pairs/generations.jsonl")
    with pytest.raises(UserError, match=r"all 2 answers.*delete RUN/round_1/pairs, then.*sage resume RUN`"):
        check_attempts(1, attempts("boxed/timeout", "boxed/crash"), file)


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["select=eval/policy_accuracies"], ["accuracy on problems", "benchmark/arithmetic/accuracy"]),
        (["patience=2"], ["select=benchmark/NAME/accuracy"]),
        (["round.budget=7"], ["round.budget=7", "pairing.samples=8"]),
        (["rounds=0"], ["rounds=0", "at least 1"]),
        (["sampling.temperature=0"], ["sampling.temperature=0", "the same", "sampling.temperature=1"]),
        (["sampling.temperature=0.5", "round.temperatures=[1]"], ["sampling.temperature", "no effect"]),
        (["start=false"], ["start=false"]),
        (["data.path=x.jsonl"], ["data.path has no effect", "data.problems"]),
        (["data.problems.path=null"], ["data.problems is not set", "data.problems.path=FILE"]),
        (["rounds.budget=1"], ["rounds.budget=1", "Integer"]),
        (["data.problems.path=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["round.reference=first"], ["round.reference=first", "previous, initial"]),
        (["round.reference=initial", "reference_model=x"], ["reference_model=x", "leave one of them out"]),
        (["round.reference=initial", "model.allow_missing=true"], ["model.allow_missing", "previous"]),
        (["round.reference=initial", "loss=simpo"], ["needs no reference"]),
        (["round.temperatures=[1,0]"], ["round.temperatures=0.0", "greater than 0"]),
        (["round.keep=1.5"], ["round.keep=1.5", "at most 1"]),
        (["pairing.rejected_from=[nowhere]"], ["pairing.rejected_from", "nowhere"]),
        (["benchmark.arithmetic.columns.samples=n"], ["benchmark.arithmetic.columns.samples"]),
    ],
)
def test_bad_configs_are_refused_before_anything_starts(overrides, parts, sage, tmp_path, monkeypatch):
    monkeypatch.setattr("sage.launch.start", lambda *_: pytest.fail("a rank was started"))
    words = ["+experiment=arithmetic", "+benchmark=arithmetic", f"cache_dir={tmp_path}", *overrides]
    refused(sage("rounds", f"hydra.run.dir={tmp_path / 'run'}", *words), *parts)
    assert not (tmp_path / "run").exists()


def test_what_several_rounds_read_must_not_change_between_them(begin, monkeypatch):
    """Problems that change would be asked by the pass rates of others, and accuracies would not compare."""
    rounds(begin("run", "rounds=1"), Parts(monkeypatch))
    (begin("run") / "summary.json").unlink()
    file = begin("run").parent / "problems.jsonl"
    before = file.read_text()
    file.write_text(before.replace('"Q3"', '"Q33"'))
    with pytest.raises(UserError, match=r"another data.problems.path.*restore the old one"):
        rounds(begin("run"), Parts(monkeypatch))
    file.write_text(before)
    rounds(begin("run"), Parts(monkeypatch))
    monkeypatch.setattr("sage.model.loading.fingerprint", lambda *_: "other weights")
    with pytest.raises(UserError, match=r"another model.path: .*, and now it is other weights"):
        rounds(begin("run"), Parts(monkeypatch))


def test_a_scorer_without_its_reference_is_refused_before_sampling(begin, monkeypatch):
    """Round 1 would sample for hours before its training refuses."""
    with pytest.raises(UserError, match="this loss needs no reference"):
        rounds(begin("run", "loss=simpo", "scorer=margin_gap"), Parts(monkeypatch))


def test_float32_weights_of_the_first_model_must_not_change(begin, monkeypatch, tmp_path):
    """A first round that is trained again without them would begin with rounded weights."""
    model = shutil.copytree(REPO / "sage/assets/arithmetic", tmp_path / "model")
    (model / "float32").mkdir()
    (model / "skill").write_text("0")
    (model / "float32" / "skill").write_text("0")
    checksums.seal(model / "float32")
    rounds(begin("run", "rounds=1", f"model.path={model}"), Parts(monkeypatch))
    (begin("run") / "summary.json").unlink()
    shutil.rmtree(model / "float32")
    rounds(begin("run"), Parts(monkeypatch))  # round 1 has been trained
    (begin("run") / "summary.json").unlink()
    shutil.rmtree(begin("run") / "round_1" / "train")
    with pytest.raises(UserError, match=r"another float32 of model.path: .*, and now it is None"):
        rounds(begin("run"), Parts(monkeypatch))
    cfg = config.load(begin("run"))
    cfg.model.dtype = "float32"  # such a run does not read them  # pyright: ignore
    claim_inputs(cfg, begin("run"))  # pyright: ignore


def test_held_out_pairs_and_a_reference_must_not_change_either(begin, monkeypatch, tmp_path):
    """Held-out losses of rounds would not compare, and later rounds would have another reference."""
    file, reference = tmp_path / "held_out.jsonl", tmp_path / "reference"
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    write_jsonl(file, [pair])
    shutil.copytree(REPO / "sage/assets/arithmetic", reference)
    rounds(
        begin("run", "rounds=1", f"data.eval_path={file}", f"reference_model={reference}"), Parts(monkeypatch)
    )
    (begin("run") / "summary.json").unlink()
    write_jsonl(file, [pair | {"rejected": "4"}])
    with pytest.raises(UserError, match=r"another data.eval_path"):
        rounds(begin("run"), Parts(monkeypatch))
    write_jsonl(file, [pair])
    weights = reference / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"another reference_model"):
        rounds(begin("run"), Parts(monkeypatch))


@pytest.mark.parametrize(
    "name, again",
    [
        ("round_1/train/summary.json", "round_1/train"),
        ("round_1/pairs/generations.jsonl", "round_1/pairs"),
        ("round_1/eval/arithmetic/generations.jsonl", "round_1/eval"),
        ("round_1/eval/arithmetic/.begun.json", "round_1/eval"),
        ("round_2/eval/summary.json", "round_2/eval"),
        ("round_1/train/best/skill", "round_1/train"),
        ("times.jsonl", "times.jsonl"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_delete(name, again, begin, monkeypatch):
    """And when that is deleted, the run ends as an undisturbed one."""
    select = "select=benchmark/arithmetic/accuracy"
    rounds(begin("whole", "rounds=3", select), Parts(monkeypatch))
    rounds(begin("run", "rounds=2", select), Parts(monkeypatch))
    give_rounds(cfg := config.load(begin("run")), begin("run"), 3)  # pyright: ignore
    config.write(cfg, begin("run"))
    (begin("run") / "summary.json").unlink()
    if name == "round_1/pairs/generations.jsonl":
        (begin("run") / "round_1/outcomes.jsonl").unlink()  # which is made of it
    damaged, part = begin("run") / name, begin("run") / again
    damaged.write_text(damaged.read_text()[:-9])
    with pytest.raises(UserError, match=rf"{damaged} is damaged: delete {part}, and resume the rounds"):
        rounds(begin("run"), Parts(monkeypatch))
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    rounds(begin("run"), Parts(monkeypatch))
    assert results(begin("run")) == results(begin("whole"))


def test_more_rounds_are_those_of_a_longer_run(begin, monkeypatch, sage, tmp_path):
    monkeypatch.setattr("sage.launch.start", lambda ranks, folder, go_on: Parts(monkeypatch)(ranks, folder))
    rounds(begin("run", "rounds=1"), Parts(monkeypatch))
    rounds(begin("whole", "rounds=3"), Parts(monkeypatch))
    run_dir = str(begin("run"))
    refused(sage("resume", run_dir), "this run is finished", "rounds=N gives it more")
    refused(sage("resume", run_dir, "rounds=1"), "rounds=1", "has done 1 already")
    refused(sage("resume", run_dir, "steps=9"), "steps=9 is for `sage train`", "rounds=N")
    refused(sage("resume", run_dir, "rounds=3", "start=false"), "start=false")
    problems = tmp_path / "problems.jsonl"
    before = problems.read_text()
    problems.write_text(before.replace("Q1", "Other"))
    refused(sage("resume", run_dir, "rounds=3"), "another data.problems.path")
    assert config.load(begin("run")).rounds == 1 and (begin("run") / "summary.json").exists()  # pyright: ignore
    problems.write_text(before)
    assert sage("resume", run_dir, "rounds=3")[0] == 0
    assert results(begin("run")) == results(begin("whole"))


def test_rounds_that_still_run_are_not_started_twice(tmp_path):
    run_dir = freeze(tmp_path / "run", "+experiment=arithmetic")
    held = lock(run_dir / ".rank0.lock")
    with pytest.raises(UserError, match="still running"):
        rounds(run_dir, in_this_process)
    held.release()
    found = read(run_dir)
    assert isinstance(found, Rounds) and found.path == run_dir
