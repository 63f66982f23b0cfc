"""Problems come out of real benchmark files as they are, and bad files are refused by row."""

from __future__ import annotations

import json

import datasets
import pytest
from conftest import SHARED_DATA, write_jsonl

from sage.answering.problems import Problem, load_problems
from sage.util.errors import UserError

needs_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no benchmark files in {SHARED_DATA}")
GSM8K = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 apples.\n#### 1,005"}
# file, columns, answer_from -> how many, and the first one's answer
BENCHMARKS = {
    "gsm8k/train.jsonl": ({"prompt": "question"}, "hash", 7473, "72"),
    "math500/math500_test.jsonl": (
        {"prompt": "problem", "problem_id": "unique_id", "group": "subject"},
        "plain",
        500,
        r"\left( 3, \frac{\pi}{2} \right)",
    ),
    "math8k/math8k_train.jsonl": ({"prompt": "question", "group": "level"}, "plain", 8521, "118"),
    "math_benchmarks/aime24_test.jsonl": ({"prompt": "question", "problem_id": "id"}, "plain", 30, "204"),
    "math_benchmarks/amc23_test.jsonl": ({"prompt": "question"}, "plain", 40, "27"),
    "math_benchmarks/college_math_test.jsonl": (
        {"prompt": "question", "group": "data_topic"},
        "plain",
        2818,
        "$10-4 n$",
    ),
    "math_benchmarks/gaokao2023en_test.jsonl": (
        {"prompt": "question"},
        "plain",
        383,
        r"$\{x|-2\leq x < 1\}$",
    ),
    "math_benchmarks/minerva_math_test.jsonl": (
        {"prompt": "problem", "answer": "solution"},
        "boxed",
        272,
        "1.6",
    ),
    "math_benchmarks/olympiadbench_test.jsonl": (
        {"prompt": "context+question", "answer": "final_answer", "group": "subfield"},
        "plain",
        675,
        "2",
    ),
    "svamp/SVAMP.json": (
        {"prompt": "Body+Question", "answer": "Answer", "problem_id": "ID"},
        "plain",
        1000,
        "51",
    ),
    "mawps_single/mawps-single_testset.json": (
        {"prompt": "sQuestion", "answer": "lSolutions"},
        "plain",
        199,
        "296",
    ),
}


@needs_data
@pytest.mark.parametrize("file", BENCHMARKS)
def test_real_benchmark_files(file):
    """Every benchmark's own shape loads, whole, with the answer that its first row has."""
    columns, answer_from, count, first = BENCHMARKS[file]
    problems = load_problems(str(SHARED_DATA / file), columns=columns, answer_from=answer_from)
    assert (len(problems), problems[0].answer) == (count, first)
    assert all(p.prompt and p.answer and p.problem_id for p in problems)


def test_gsm8k_row(tmp_path):
    """The answer is taken from the solution, which stays whole; the id is the row."""
    file = write_jsonl(tmp_path / "p.jsonl", [GSM8K, GSM8K])
    first, second = load_problems(str(file), columns={"prompt": "question"}, answer_from="hash")
    assert first == Problem("1", "How many?", "1,005", GSM8K["answer"], None)
    assert second.problem_id == "2"


def test_boxed_row_and_parquet(tmp_path):
    """The last box is the answer, braces and all, from Parquet as from JSON."""
    row = {"problem": "?", "solution": r"Not \boxed{1} but \boxed{\frac{1}{2}}.", "level": 3}
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "p.parquet"))
    columns = {"prompt": "problem", "answer": "solution", "group": "level"}
    (problem,) = load_problems(str(tmp_path / "p.parquet"), columns=columns, answer_from="boxed")
    assert problem == Problem("1", "?", r"\frac{1}{2}", row["solution"], "3")


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so the count is $\boxed 2$.", "2"),
        (r"so $x=\boxed{\text{(C)}}$.", r"\text{(C)}"),
        (r"so $\boxed12$ remain.", "12"),
        (r"so $\fbox{$\frac{1}{2}$}$.", r"$\frac{1}{2}$"),
        (r"so $\boxed\frac{3}{4}$ and we are done.", r"\frac{3}{4}"),
    ],
)
def test_boxes_as_math_writes_them(tmp_path, solution, answer):
    r"""MATH's own rows have boxes without braces; such a row is a problem like any other."""
    file = write_jsonl(tmp_path / "p.jsonl", [{"problem": "?", "solution": solution}])
    columns = {"prompt": "problem", "answer": "solution"}
    (problem,) = load_problems(str(file), columns=columns, answer_from="boxed")
    assert problem.answer == answer


def test_joined_prompt_and_limit(tmp_path):
    """A prompt may be two columns, of which one may be null; limit reads no further."""
    rows = [
        {"a": "Ann has 3.", "b": "How many?", "answer": 3.0},
        {"a": None, "b": "Why?", "answer": [1, 2.5]},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", [*rows, {}])
    problems = load_problems(str(file), columns={"prompt": "a+b"}, limit=2)
    assert [(p.prompt, p.answer) for p in problems] == [("Ann has 3. How many?", "3"), ("Why?", "1, 2.5")]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"answer": "5"}, "no column 'prompt' for prompt; it has answer"),
        ({"prompt": "?"}, "no column 'answer' for answer; it has prompt"),
        ({"prompt": " ", "answer": "5"}, "prompt is empty"),
        ({"prompt": "?", "answer": {"value": 5}}, "answer is neither a text nor a number but dict"),
        ("text", "not an object"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, reason):
    """A missing field or an empty problem is refused with file and row before anything is sampled."""
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "?", "answer": "1"}, row])
    with pytest.raises(UserError, match=rf"(?s)1 of 2 rows are bad.*p\.jsonl:2: {reason}"):
        load_problems(str(file))


def test_answer_without_its_mark_is_refused(tmp_path):
    """Reading MATH as GSM8K fails at once, not with an accuracy of zero."""
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "?", "answer": r"It is \boxed{5}."}])
    with pytest.raises(UserError, match="no hash answer in a text that ends"):
        load_problems(str(file), answer_from="hash")


def test_whole_solutions_are_no_plain_answers(tmp_path):
    """No response equals a solution, so every accuracy would be zero. A box alone is an answer."""
    for solution, answer_from in (("2 + 3 = 5\n#### 5", "hash"), (r"It is \boxed{5}.", "boxed")):
        file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "?", "answer": solution}] * 3)
        with pytest.raises(UserError, match=f"3 of 3 answers are whole solutions.*answer_from={answer_from}"):
            load_problems(str(file))
        assert load_problems(str(file), answer_from=answer_from)[0].answer == "5"
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "?", "answer": r"$\boxed{5}$"}] * 3)
    assert len(load_problems(str(file))) == 3


def test_empty_answers_are_left_out_aloud(tmp_path, capsys):
    """A row that nothing can be verified against is dropped and named; a file of such rows is refused."""
    rows = [
        {"prompt": "?", "answer": ""},
        {"prompt": "?", "answer": "1"},
        {"prompt": "?", "answer": float("nan")},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    assert [p.problem_id for p in load_problems(str(file))] == ["2"]
    assert "2 of 3 rows have an empty answer and are left out: 1, 3" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row has an answer"):
        load_problems(str(file), limit=1)


def test_a_bad_row_among_hundreds_is_left_out_aloud(tmp_path, capsys):
    """Public files have a few rows without a mark, and cannot be mended by hand; too many mean a wrong
    setting.
    """
    rows = [{"prompt": "?", "answer": rf"It is \boxed{{{i}}}."} for i in range(198)]
    rows += [{"prompt": "?", "answer": "It is [2]."}, {"prompt": "\ud800", "answer": r"\boxed{1}"}]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    assert len(load_problems(str(file), answer_from="boxed")) == 198
    out = capsys.readouterr().out
    assert "2 of 200 rows are bad and are left out" in out and "p.jsonl:199: no boxed answer" in out
    write_jsonl(file, [*rows, {"prompt": "?"}])
    with pytest.raises(UserError, match=r"(?s)3 of 201 rows are bad.*p\.jsonl:199.*p\.jsonl:200"):
        load_problems(str(file), answer_from="boxed")


def test_settings_are_checked(tmp_path):
    """A clash of ids, an empty file and a torn one are named."""
    file = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "?", "answer": "1", "id": "a"}] * 2))
    with pytest.raises(UserError, match="problem_id 'a' is already taken by row 1"):
        load_problems(file, columns={"problem_id": "id"})
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        load_problems(str(tmp_path / "empty.jsonl"))
    (tmp_path / "torn.jsonl").write_text(json.dumps({"prompt": "?", "answer": "1"}) + '\n{"prompt"')
    with pytest.raises(UserError, match=r"torn\.jsonl:2: not valid JSON"):
        load_problems(str(tmp_path / "torn.jsonl"))
