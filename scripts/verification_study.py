"""Measures `sage.answering.verify` on real data, for docs/verify.md. Prints tables and unexpected verdicts.

python scripts/verification_study.py ../shared/data own next slashes openai lm_eval    # or some of them

own       ground-truth solutions against their own answers: must be right
next      the same solutions against the next row's answer, where it differs: must be wrong (half an hour)
slashes   answers with fractions, rewritten as a/b, against the answers as they were: must be right
openai    four models' GSM8K solutions against OpenAI's verdicts on them
lm_eval   the same solutions against lm-evaluation-harness's GSM8K task (pip install lm-eval==0.4.13)
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from sage.answering.problems import Problem, load_problems
from sage.answering.spelling import as_number, canonical
from sage.answering.verify import Verdict, Verifier

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
# file, columns, where the answer stands, and whether the solution marks it, so that it can be the response
SETS = {
    "GSM8K train": ("gsm8k/train.jsonl", {"prompt": "question"}, "hash", True),
    "MATH-500": ("math500/math500_test.jsonl", {"prompt": "problem"}, "plain", True),
    "OlympiadBench": (
        "math_benchmarks/olympiadbench_test.jsonl",
        {"prompt": "question", "answer": "final_answer"},
        "plain",
        False,
    ),
    "Minerva": (
        "math_benchmarks/minerva_math_test.jsonl",
        {"prompt": "problem", "answer": "solution"},
        "boxed",
        True,
    ),
    "College Math": ("math_benchmarks/college_math_test.jsonl", {"prompt": "question"}, "plain", False),
}


def respond(problem: Problem, marked: bool) -> str:
    """The solution if it marks its answer, else the solution (if any) and a last sentence that does."""
    if marked:
        return problem.solution or ""
    answer = re.sub(r"^\$([^$]*)\$$", r"\1", problem.answer)
    return f"{problem.solution or ''}\n\nThe final answer is $\\boxed{{{answer}}}$.".strip()


def ground_truth(data: Path, verifier: Verifier, shift: int) -> None:
    head("The next row's answer" if shift else "Its own answer")
    unexpected = []
    for name, (file, columns, answer_from, marked) in SETS.items():
        problems = load_problems(str(data / file), columns=columns, answer_from=answer_from)
        truths = [problem.answer for problem in problems[shift:] + problems[:shift]]
        rows = [
            (row, problem, truth)
            for row, (problem, truth) in enumerate(zip(problems, truths, strict=True), 1)
            if not shift or truth != problem.answer
        ]
        verdicts = verifier.verify([respond(p, marked) for _, p, _ in rows], [truth for *_, truth in rows])
        lines = [
            f"- {name}, row {row}: answered {problem.answer!r}, the truth was {truth!r}; {verdict.rule}"
            for (row, problem, truth), verdict in zip(rows, verdicts, strict=True)
            if verdict.correct == bool(shift)
        ]
        table_row(name, len(rows) - len(lines), verdicts)
        unexpected += lines
    print(*unexpected, sep="\n")


def slashes(data: Path, verifier: Verifier) -> None:
    """An answer equals its own text trivially. These differ in text, so formulas must be compared."""
    head("Fractions written a/b")
    for name, (file, columns, answer_from, _) in SETS.items():
        problems = load_problems(str(data / file), columns=columns, answer_from=answer_from)
        rewritten = [(row, p.answer, with_slashes(p.answer)) for row, p in enumerate(problems, 1)]
        rows = [
            row
            for row in rewritten
            if "frac" in row[1] and row[2].count("/") > row[1].count("/") and not as_number(canonical(row[1]))
        ]
        if not rows:
            continue
        verdicts = verifier.verify(
            [f"\\boxed{{{text}}}" for *_, text in rows], [truth for _, truth, _ in rows]
        )
        bad = [row for row, verdict in zip(rows, verdicts, strict=True) if not verdict.correct]
        table_row(name, len(rows) - len(bad), verdicts)
        for row, truth, text in bad:
            print(f"- {name}, row {row}: answered {text!r}, the truth was {truth!r}")


def with_slashes(answer: str) -> str:
    """The innermost fractions as ((a)/(b)), and no dollars around the whole."""
    answer = re.sub(r"^\$([^$]*)\$$", r"\1", answer)
    return re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", answer)


def head(title: str) -> None:
    print(f"\n## {title}\n\n| set | rows | as expected | | rules |\n|---|---|---|---|---|")


def table_row(name: str, good: int, verdicts: list[Verdict]) -> None:
    rows = len(verdicts)
    rules = ", ".join(f"{rule} {count}" for rule, count in Counter(v.rule for v in verdicts).most_common())
    print(f"| {name} | {rows:,} | {good:,} | {good / rows:.2%} | {rules} |", flush=True)


def model_solutions(data: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(where, solution, answer, OpenAI's verdict) of each of the 4 x 1,319."""
    with (data / "gsm8k/example_model_solutions.jsonl").open(encoding="utf-8") as lines:
        for row, line in enumerate(lines, 1):
            record = json.loads(line)
            answer = record["ground_truth"].rsplit("A: ", 1)[1]
            for model in MODELS:
                yield f"row {row} {model}", record[model]["solution"], answer, record[model]["is_correct"]


def openai(data: Path, verifier: Verifier) -> None:
    head("OpenAI's verdicts")
    where, solutions, answers, truths = zip(*model_solutions(data), strict=True)
    verdicts = verifier.verify(solutions, answers)
    bad = [i for i, verdict in enumerate(verdicts) if verdict.correct != truths[i]]
    table_row("model solutions", len(truths) - len(bad), verdicts)
    for i in bad:
        print(f"- {where[i]}: answer {answers[i]}; OpenAI {truths[i]}; {verdicts[i]}; {solutions[i][-80:]!r}")


def lm_eval(data: Path, verifier: Verifier) -> None:
    """lm-evaluation-harness's filters and metric, as its task sets them, on three forms of the solutions."""
    head("lm-evaluation-harness")
    where, solutions, answers, _ = zip(*model_solutions(data), strict=True)
    forms = {
        "A: N": solutions,
        "#### N": [re.sub(r"^A: ", "#### ", text, flags=re.M) for text in solutions],
        "unmarked": [re.sub(r"^A: .*", "", text, flags=re.M).strip() for text in solutions],
    }
    for form, texts in forms.items():
        verdicts = verifier.verify(texts, answers)
        for name, scores in lm_eval_scores(texts, answers).items():
            if not scores:
                continue
            bad = [i for i, (_, right) in scores.items() if verdicts[i].correct != right]
            spelt = [i for i in bad if verdicts[i].correct and same_value(scores[i][0], answers[i])]
            table_row(f"{name}, {form}", len(scores) - len(bad), [verdicts[i] for i in scores])
            if spelt:
                print(
                    f"- {len(spelt)} right numbers in another spelling, to them wrong, to us right: "
                    + ", ".join(f"{where[i]} ({scores[i][0]})" for i in spelt)
                )
            for i in sorted({*bad} - {*spelt}):
                print(
                    f"- {where[i]}: answer {answers[i]}; theirs {scores[i]}; {verdicts[i]}; "
                    f"{texts[i][-80:]!r}"
                )


def lm_eval_scores(texts: Sequence[str], answers: Sequence[str]) -> dict[str, dict[int, tuple[str, bool]]]:
    """Filter's name -> index -> (the extracted text, right or not), for texts in which it finds an answer."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((files("lm_eval") / "tasks/gsm8k/gsm8k.yaml").read_text())
    names = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    options = {name: task["metric_list"][0][name] for name in names}
    found = {}
    for spec in task["filter_list"]:
        first = {name: value for name, value in spec["filter"][0].items() if name != "function"}
        regex = RegexFilter(**first)
        extracted = [text for (text,) in regex.apply([[text] for text in texts], [])]
        found[spec["name"]] = {
            i: (text, exact_match_hf_evaluate([text], [f"#### {answers[i]}"], **options)["exact_match"] == 1)
            for i, text in enumerate(extracted)
            if text != regex.fallback
        }
    return found


def same_value(extracted: str, answer: str) -> bool:
    try:
        return float(re.sub(r"[$,]|\.$", "", extracted)) == float(answer.replace(",", ""))
    except ValueError:
        return False


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with Verifier() as pool:
        for part in sys.argv[2:]:
            if part in ("own", "next"):
                ground_truth(folder, pool, shift=int(part == "next"))
            else:
                {"slashes": slashes, "openai": openai, "lm_eval": lm_eval}[part](folder, pool)
