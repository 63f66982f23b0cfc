"""Verdicts: what counts as the answer, what counts as equal, and that no text can hang or break them."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SHARED_DATA, write_jsonl

from sage import cli
from sage.answering.answers import find_answer
from sage.answering.attempts import Sampler
from sage.answering.problems import Problem
from sage.answering.responses import Response
from sage.answering.verify import MEMORY, Verifier
from sage.config import EvalConfig, ProblemsConfig, VerifyConfig, freeze
from sage.config.data import ResponseColumns
from sage.util.errors import UserError

HARD = Path(__file__).parent / "data" / "verdicts.jsonl"
SHARED_CASES = SHARED_DATA.parent / "cases" / "verdicts.jsonl"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout=10) as verifier:
        yield verifier


@pytest.mark.parametrize(
    "response, where, text",
    [
        (r"So \boxed{12}.", "boxed", "12"),
        (r"\boxed{1} is wrong, so \boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "boxed", "5"),
        (r"$x=\boxed{2}$ and $x=\boxed{3}$", "boxed", "2, 3"),
        (r"\boxed{1\frac12}, or \boxed{\frac{3}{2}}", "boxed", r"1\frac12, \frac{3}{2}"),
        (r"so \boxed 7 cm", "boxed", "7 cm"),
        (r"I fill \boxed{} in: \fbox{8}. No.", "boxed", "8"),
        (r"<think>\boxed{1}</think><answer>2</answer>", "tag", "2"),
        (r"\boxed{1}</think>It is 2.", "last", "It is 2."),
        (r"<think>\boxed{1}, or", "last", ""),
        ("The answer is 12 apples for 4 children.", "phrase", "12"),
        ("The answer is 3. The answer is not 4.", "phrase", "3"),
        (r"\boxed{7} and then \boxed{8", "boxed", "7"),
        ("2+3 = 5\n#### 5", "hash", "5"),
        ("#### 5\n\nQuestion: next?\n#### 6", "hash", "5"),
        ("#### 1. Find the cost\nIt is 7.\n#### $7", "hash", "$7"),
        ("#### Step 1: add\nThe answer is 7.", "phrase", "7"),
        ("The answer is 3. No: the final answer is **4.5**.", "phrase", "4.5"),
        ("The answer is 5, since he had 8 and gave 3 away.", "phrase", "5"),
        ("The answer is:\n\\[\n\\frac{1}{2}\n\\]", "phrase", r"\frac{1}{2}"),
        ("**Answer:** 4", "phrase", "4"),
        ("She sells 9. #### 5", "hash", "5"),
        ("She makes 9 * 2 = <<9*2=18>>18\nA: 18", "phrase", "18"),
        ("Thus she has 5 apples.", "last", "Thus she has 5 apples."),
    ],
)
def test_where_the_answer_stands(response, where, text):
    """After the thought, marks in order of clarity: tag, last box, first `####`, last phrase, end."""
    assert find_answer(response) == (where, text)


def test_a_thought_that_the_prompt_opens(verifier):
    """Protects accuracy on models whose template opens the thought: one that is cut off has no answer."""
    texts = [r"so \boxed{5}. Wait", r"so \boxed{5}.</think>It is \boxed{6}."]
    responses = dict(enumerate(Response(text, [1], "length") for text in texts))
    tokenizer = SimpleNamespace(decode=lambda ids: "assistant<think>\n" if ids == [7] else "assistant")
    sampler: Any = SimpleNamespace(
        generator=lambda requests: responses.items(), seed=0, sampling=SimpleNamespace(max_new_tokens=1)
    )
    sampler.verifier, sampler.tokenizer = verifier, tokenizer
    for ids, found in (([7], [None, "6"]), ([8], ["5", "6"])):
        work = [(Problem("0", "?", "5", None, None), "?", ids, n) for n in range(2)]
        attempts = Sampler.chunk(sampler, work, SimpleNamespace(advance=lambda: None))  # pyright: ignore
        assert [a.extracted for a in attempts] == found and [a.response for a in attempts] == texts
        assert [find_answer(a.whole).where for a in attempts][1] == "boxed"


RIGHT = [
    ("#### 1,234", "1234", "hash/number"),
    ("#### $18.00", "18", "hash/number"),
    ("#### -3", "-3", "hash/number"),
    ("She pays $1,050.50 in all.", "1050.5", "last/number"),
    ("The answer is 12 apples.", "12", "phrase/number"),
    ("Answer: she makes 9 * 2 = $18 a day", "18", "phrase/number"),
    ("In all there are **18** eggs", "18", "last/number"),
    ("They scored 5-10", "10", "last/number"),
    ("The answer is $-3.", "-3", "phrase/number"),
    (r"\boxed{5 cm}", "5", None),
    (r"\boxed{20 mph}", "20", None),
    (r"\boxed{$18}", "18", None),
    (r"\boxed{1\,000}", "1000", "boxed/number"),
    (r"\boxed{1{,}000}", "1000", "boxed/number"),
    (r"\boxed{10{,}000.50}", "10000.5", "boxed/number"),
    (r"\boxed{x=3 \text{ or } x=-1}", "-1,3", "boxed/text"),
    (r"\boxed{\{1,2,3\}}", "3,2,1", "boxed/text"),
    (r"\boxed{\{1,1,2\}}", r"\{2,1\}", "boxed/text"),
    (r"\boxed{2,1,1}", "1,1,2", "boxed/text"),
    (r"\boxed{R(R-2r)}", "R^2-2rR", "boxed/math"),
    (r"\boxed{X+1}", "1+x", "boxed/math"),
    (r"\boxed{3+5\mathrm{i}}", "3+5i", None),
    (r"\boxed{1+\cdots+n}", r"1 + \dots + n", None),
    (r"The answer is \boxed{7}, not \boxed{5}.", "7", "boxed/number"),
    ("The answer is negative 5.", "-5", None),
    ("The answer is plus or minus 5.", r"\pm 5", None),
    ("It fell to minus 5 degrees.", "-5", None),
    (r"It is not a square but \boxed{5}", "5", None),
    (r"\boxed{\frac12 \text{ or } 0.5}", "0.5", None),
    (r"\boxed{1, 2, 3, ...}", r"1, 2, 3, \dots", None),
    (r"\boxed{2x+3y=6}", "6=3y+2x", "boxed/math"),
    (r"\boxed{-1 < x \leq 3}", "(-1, 3]", "boxed/text"),
    (r"\boxed{2^{10}}", "1024", "boxed/math"),
    (r"\boxed{\text{(B) }12}", "B", "boxed/choice"),
    (r"\boxed{\textbf{(C)}}", "C", "boxed/choice"),
    (r"\boxed{50\%}", "50", "boxed/number"),
    ("The answer is 50%.", "0.5", "phrase/number"),
    (r"\boxed{\frac{3}{4}}", r"\dfrac34", "boxed/number"),
    ("The answer is 3/4.", r"\frac{3}{4}", "phrase/number"),
    (r"\boxed{0.75}", r"\frac{3}{4}", "boxed/number"),
    (r"\boxed{15 \text{ cm}^2}", r"15\mbox{ cm}^2", "boxed/number"),
    (r"\boxed{15}", r"15\mbox{ cm}^2", "boxed/number"),
    (r"\boxed{90^\circ}", "90", "boxed/number"),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", "boxed/number"),
    (r"\boxed{$10-4n$}", "$10-4 n$", None),
    (r"\boxed{\text{East}}", r"\text{east}", "boxed/text"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})", None),
    (r"\boxed{(B)}", "B", "boxed/choice"),
    (r"The answer is B. $\frac12$", "B", "phrase/choice"),
    ("so I would choose (C)", "C", "last/choice"),
    (r"\boxed{0.333333}", r"\frac{1}{3}", "boxed/number"),
    (r"\boxed{x = 5}", "5", "boxed/text"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}", "boxed/math"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", "boxed/math"),
    (r"\boxed{42, 14}", "14,42", "boxed/text"),
    (r"\boxed{3} and \boxed{-1}", "-1, 3", "boxed/text"),
    (r"\boxed{1 \pm \sqrt{5}}", r"1+\sqrt5, 1-\sqrt5", "boxed/math"),
    (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"(3,\infty) \cup (-\infty, 2)", None),
    (r"\boxed{x \in [1, 2]}", "[1,2]", "boxed/text"),
    (r"\boxed{6\frac{2}{3}}", r"\frac{20}{3}", "boxed/number"),
    (r"so the probability is $\frac{1}{2}$.", r"\frac12", "last/number"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", None),
]
WRONG = [
    ("#### 1,234", "1235", "hash/number"),
    ("#### 18.5", "18", "hash/number"),
    ("The answer is 18.", "-18", "phrase/number"),
    (r"\boxed{5x}", "5", "boxed/math"),
    (r"\boxed{50\%}", "5", "boxed/number"),
    (r"\boxed{\frac{1}{3}}", "0.33", "boxed/number"),
    (r"so the probability is $\frac{1}{2}$.", "2", "last/number"),
    (r"\boxed{\text{west}}", r"\text{east}", "boxed/text"),
    (r"\boxed{No solution}", "No", "boxed/text"),
    (r"\boxed{A}", "B", "boxed/choice"),
    (r"\boxed{(3,5)}", "(5,3)", "boxed/text"),
    (r"\boxed{[1,2)}", "[1,2]", "boxed/text"),
    (r"\boxed{14}", "14,42", "boxed/text"),
    (r"\boxed{1, 2}", "1,1,2", "boxed/text"),
    (r"\boxed{R(R-2r)}", "-R^2", None),
    (r"\boxed{p(1-P)}", "p(1-p)", None),
    (r"\boxed{3+5\mathrm{i}}", "8", None),
    (r"\boxed{2\mathrm{e}}", "2", None),
    (r"\boxed{5\text{/8}}", "5", None),
    (r"\boxed{5\text{ squared}}", "5", None),
    (r"\boxed{3}", "3 n", None),
    (r"\boxed{0,125}", "125", None),
    (r"\boxed{\frac{dy}{dx}}", "0", None),
    (r"\boxed{y''+y=0}", "y'+y=0", None),
    (r"\boxed{1+2+\cdots+10}", "13", None),
    (r"\boxed{15 : 00}", "05 : 00", None),
    (r"The answer is \boxed{7}, not \boxed{5}.", "5", None),
    ("The answer is negative 5.", "5", None),
    ("It fell to minus 5 degrees.", "5", None),
    (r"\boxed{1, 1, 2}", "1,2", "boxed/text"),
    (r"\boxed{1, 2, 2}", "2,1,1", "boxed/text"),
    (r"\boxed{2, 4, 6, ...}", "2, 4, 6", None),
    (r"\boxed{x^2+2x}", "x^2+2x+1", "boxed/math"),
    ("", "5", "none"),
    ("I do not know.", "5", "none"),
    (r"\boxed{}", "5", "none"),
]


@pytest.mark.parametrize("correct, cases", [(True, RIGHT), (False, WRONG)], ids=["right", "wrong"])
def test_equal_and_unequal_answers(verifier, correct, cases):
    """Another form of the answer is right, another answer is wrong, and the verdict names its rule."""
    verdicts = verifier.verify([case[0] for case in cases], [case[1] for case in cases])
    for case, verdict in zip(cases, verdicts, strict=True):
        assert verdict.correct is correct, (case, verdict)
        assert case[2] in (None, verdict.rule), (case, verdict)
        assert (verdict.extracted is None) == (verdict.rule == "none"), (case, verdict)


@pytest.mark.parametrize("file", [HARD, SHARED_CASES], ids=["ours", "shared"])
def test_hard_verdicts(verifier, file):
    """Answers that are easy to misjudge: thoughts, prose, spelling, tiny numbers, lists, choices."""
    if not file.exists():
        pytest.skip(f"no {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    verdicts = verifier.verify([row["response"] for row in rows], [row["answer"] for row in rows])
    wrong = [
        (row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict.correct != row["right"]
    ]
    assert not wrong and len(rows) > 40


def test_a_hang_is_killed_and_the_worker_replaced():
    """One power in C that no Python exception can interrupt; its neighbours are answered, in order."""
    hang = r"\boxed{10^{10^{10}}}"
    with Verifier(workers=1, timeout=1) as verifier:
        verdicts = verifier.verify([r"\boxed{x+x}", hang, r"\boxed{x+x}"], ["2x"] * 3)
        assert [v.rule for v in verdicts] == ["boxed/math", "boxed/timeout", "boxed/math"]
        assert [v.correct for v in verdicts] == [True, False, True]


def test_a_worker_that_dies_costs_one_verdict(verifier):
    """Whatever ends a worker (the out-of-memory killer, a crash in C), the next question gets a new one."""
    assert verifier.verify([r"\boxed{x+x}"], ["2x"])[0].correct
    worker = verifier.idle.get()
    verifier.idle.put(worker)
    worker.process.kill()
    assert [v.rule for v in verifier.verify([r"\boxed{x+x}"] * 2, ["2x"] * 2)] == [
        "boxed/crash",
        "boxed/math",
    ]


def test_memory_is_capped(verifier):
    """A worker that answers is one whose memory the kernel bounds."""
    assert verifier.verify([r"\boxed{x+x}"], ["2x"])[0].correct
    worker = verifier.idle.get()
    verifier.idle.put(worker)
    assert resource.prlimit(worker.process.pid, resource.RLIMIT_AS) == (MEMORY, MEMORY)


def test_workers_end_with_the_verifier():
    """Nothing stays behind, even where nobody asked a second question."""
    with Verifier(workers=2) as verifier:
        verifier.verify([r"\boxed{x+x}"] * 4, ["2x"] * 4)
        workers = [verifier.idle.get() for _ in range(2)]
        processes = [worker.process for worker in workers if worker.process]
        for worker in workers:
            verifier.idle.put(worker)
    assert processes and all(process.poll() is not None for process in processes)


def test_plain_numbers_start_no_process():
    """GSM8K never waits for sympy: the fast path alone decides."""
    with Verifier(workers=1) as verifier:
        assert verifier.verify(["#### 5", "#### 6"], ["5", "5"]) == [
            (True, "5", "hash/number"),
            (False, "6", "hash/number"),
        ]
        assert verifier.idle.get().process is None


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" + "{" * 10_000 + "1" + "}" * 10_001,
        "\\boxed{" * 10_000,
        "$" * 100_000,
        "9" * 100_000,
        "-" * 100_000 + "1",
        "answer is " * 10_000,
        "#### 1. A\n" * 10_000,
        "\\boxed{\x00\x07\x1b[31m\ud800}",
        "x" * 1_000_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_text_is_wrong_and_nothing_more(verifier, response):
    """Ten thousand braces, control characters, a megabyte: a verdict, no exception."""
    (verdict,) = verifier.verify([response], ["5"])
    assert not verdict.correct


# --- sage verify

GIVEN = [
    {"output": "The answer is 12 apples for 4 children.", "gold": 12, "model": "a"},
    {"output": r"\boxed{x + x}", "gold": "2x", "model": "b"},
    {"output": "I do not know.", "gold": "3", "model": "a"},
    {"output": "So $x = 3$ or $x = 5$.", "gold": [3, 5], "model": "b"},
]


def test_verify_a_file(tmp_path, monkeypatch, capsys):
    """`sage verify FILE` takes any file name, keeps the rows, adds verdicts, and says the accuracy."""
    file = write_jsonl(tmp_path / "it's a=b.jsonl", GIVEN)
    words = [
        "columns.response=output",
        "columns.answer=gold",
        "workers=1",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    monkeypatch.setattr(sys, "argv", ["sage", "verify", str(file), *words])
    cli.main()
    rows = [json.loads(line) for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k in GIVEN[0]} for row in rows] == GIVEN
    assert [(row["correct"], row["extracted"], row["rule"]) for row in rows] == [
        (True, "12", "phrase/number"),
        (True, "x + x", "boxed/math"),
        (False, None, "none"),
        (True, "$x = 3$, $x = 5$", "last/text"),
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["right"], summary["responses"], summary["no_answer"]) == (3, 4, 0.25)
    assert summary["interval"] == pytest.approx([0.30064, 0.95441], abs=1e-4)  # Wilson's, of 3 in 4
    assert "accuracy 75.0%, 95% interval 30.1% to 95.4%: 3 of 4 right, 1 without" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, message",
    [
        ({"response": "5"}, r"v\.jsonl:2: no column 'answer'; it has response: set columns\.answer=COLUMN"),
        ({"response": None, "answer": "5"}, "v.jsonl:2: the response is not a text but NoneType"),
        ({"response": "5", "answer": " "}, "v.jsonl:2: the answer is empty"),
        ({"response": "5", "answer": True}, "v.jsonl:2: the answer is neither a text nor a number"),
        ({"response": "5", "answer": {"value": 5}}, "v.jsonl:2: the answer is neither a text nor a number"),
    ],
)
def test_verify_refuses_bad_rows(tmp_path, row, message):
    """A row that cannot be judged is named before any work, and nothing is written."""
    from sage.commands.verify import verify

    file = write_jsonl(tmp_path / "v.jsonl", [{"response": "5", "answer": "5"}, row])
    with pytest.raises(UserError, match=message):
        verify(VerifyConfig(path=str(file)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verify_refuses_whole_solutions_as_answers(tmp_path):
    from sage.commands.verify import verify

    row = {"response": "So\n#### 5", "answer": "So\n#### 5"}
    file = str(write_jsonl(tmp_path / "v.jsonl", [row]))
    with pytest.raises(UserError, match="answer_from=hash"):
        verify(VerifyConfig(path=file), tmp_path / "run")
    verify(VerifyConfig(path=file, answer_from="hash"), tmp_path / "run")


def test_columns_of_the_file_that_verdicts_replace_are_said(tmp_path, capsys):
    """Protects a file's own verdicts, perhaps by hand, from vanishing without a word."""
    from sage.commands.verify import verify

    file = write_jsonl(tmp_path / "v.jsonl", [{"response": "5", "answer": "5", "correct": "yes", "rule": 0}])
    verify(VerifyConfig(path=str(file)), tmp_path / "run")
    assert "holds the new verdicts in place of the file's own correct, rule" in " ".join(
        capsys.readouterr().out.split()
    )


def test_verify_answers_inside_solutions_and_keeps_other_files(tmp_path):
    """GSM8K's own column as the truth; an output file that exists is not overwritten."""
    from sage.commands.verify import verify

    # Half of a character, as generations cut by another tool may have it.
    row = {"text": "\ud83d It is 1,005.", "answer": "2 + 3 = 5\n#### 1,005"}
    file = write_jsonl(tmp_path / "v.jsonl", [row])
    output = tmp_path / "out.jsonl"
    columns = ResponseColumns(response="text")
    cfg = VerifyConfig(path=str(file), answer_from="hash", columns=columns, output=str(output))
    verify(cfg, tmp_path / "run")
    written = json.loads(output.read_text())
    assert written["correct"] is True and written["text"] == row["text"]
    with pytest.raises(UserError, match=r"out\.jsonl: this file exists"):
        verify(cfg, tmp_path / "again")


def test_verify_a_finished_evaluation_again(tmp_path):
    """Verdicts and numbers are made anew in a folder that --compare takes; the old folder stays."""
    from sage.answering.attempts import BEGUN_FILE, PROBLEMS, Attempt, read_attempts, write_lines
    from sage.commands.evaluate import compare
    from sage.commands.verify import verify

    old = tmp_path / "old"
    model = {"_target_": "sage.answering.generation.HF"}
    cfg = EvalConfig(benchmark={"toy": ProblemsConfig(path="toy.jsonl")}, generation=model)
    cfg.model.path = "toy"
    freeze(cfg, old)
    with pytest.raises(UserError, match="is not a finished evaluation"):
        verify(VerifyConfig(path=str(old)), tmp_path / "early")
    with pytest.raises(UserError, match="limit has no effect on"):
        verify(VerifyConfig(path=str(old), limit=1), tmp_path / "early")
    said = ["The answer is 12 apples for 4 children.", "So it is 5."]
    # Other verdicts than ours: the last number counts.
    attempts = [
        Attempt(str(i), 0, "?", text, 9, "end", "12", text[-2:], False, "last/number", None, [1], [2], False)
        for i, text in enumerate(said)
    ]
    write_lines(old / "toy" / "generations.jsonl", attempts)
    (old / "toy" / BEGUN_FILE).write_text(json.dumps({PROBLEMS: "these"}))
    (old / "summary.json").write_text(json.dumps({"model": "toy", "benchmarks": {"toy": {"accuracy": 0.0}}}))
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}

    verify(VerifyConfig(path=str(old), workers=1), tmp_path / "new")
    assert before == {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    rows = read_attempts(tmp_path / "new" / "toy" / "generations.jsonl")
    assert [(row.correct, row.extracted) for row in rows] == [(True, "12"), (False, "5")]
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert (summary["mean_accuracy"], summary["benchmarks"]["toy"]["accuracy"]) == (0.5, 0.5)
    assert summary["model"] == "toy" and summary["verified_again_from"] == str(old)
    assert compare(old, tmp_path / "new")["toy"]["gained"] == ["0"]
    other = shutil.copytree(old, tmp_path / "other")
    (other / "toy" / BEGUN_FILE).write_text(json.dumps({PROBLEMS: "others"}))
    verify(VerifyConfig(path=str(other), workers=1), tmp_path / "other_new")
    for a, b in ((other, tmp_path / "new"), (old, tmp_path / "other_new")):
        with pytest.raises(UserError, match="answer different problems"):
            compare(a, b)


def test_verify_needs_no_torch():
    """Judging generations must not take the time and memory that loading torch takes."""
    program = "import sys, sage.cli, sage.launch, sage.commands.verify; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
