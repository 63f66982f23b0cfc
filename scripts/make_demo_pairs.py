"""Makes the demo's preference pairs (sage/assets/gsm8k_demo) from OpenAI's example model solutions.

python scripts/make_demo_pairs.py ../shared/data/gsm8k/example_model_solutions.jsonl sage/assets/gsm8k_demo
"""

import json
import random
import re
import sys
from pathlib import Path

# From the weakest system to the strongest: verification picks the best of many samples.
SOURCES = ("6b_finetuning", "175b_finetuning", "6b_verification", "175b_verification")
HELD_OUT = 256
SEED = 0


def clean(solution: str) -> str:
    """Without calculator annotations: "16 - 3 = <<16-3=13>>13" becomes "16 - 3 = 13"."""
    return re.sub(r"<<[^<>]*>>", "", solution).strip()


def finished(solution: str) -> bool:
    """A handful of solutions run into the length limit: an unfinished text teaches length, not reasoning."""
    return re.search(r"\nA: \S+$", solution) is not None and "<<" not in solution


def make_pair(line: int, record: dict) -> dict | None:
    """One pair for the question on this 1-based line, or None when no finished solution is wrong.

    Chosen is the strongest system's right solution, or the ground truth if none is right. Rejected is the
    weakest system's wrong solution.
    """
    texts = {source: clean(record[source]["solution"]) for source in SOURCES}
    right = [source for source in SOURCES if record[source]["is_correct"]]
    wrong = [source for source in SOURCES if source not in right and finished(texts[source])]
    if not wrong:
        return None
    texts["ground_truth"] = clean(record["ground_truth"])
    chosen = ["ground_truth", *(source for source in right if finished(texts[source]))][-1]
    rejected = wrong[0]
    return {
        "pair_id": f"gsm8k-test-{line:04d}-{chosen}-{rejected}",
        "prompt": record["question"].strip(),
        "chosen": texts[chosen],
        "rejected": texts[rejected],
        "pass_rate": len(right) / len(SOURCES),
        "answer": texts["ground_truth"].rsplit("A: ", 1)[1].replace(",", ""),
        "chosen_source": chosen,
        "rejected_source": rejected,
    }


def main(source: str, output: str) -> None:
    records = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    pairs = [pair for line, record in enumerate(records, 1) if (pair := make_pair(line, record))]
    # One pair a question, so a split by pair is a split by question.
    held_out = set(random.Random(SEED).sample(range(len(pairs)), HELD_OUT))
    files = {"train.jsonl": [], "heldout.jsonl": []}
    for index, pair in enumerate(pairs):
        files["heldout.jsonl" if index in held_out else "train.jsonl"].append(pair)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(output, name).write_bytes(text.encode())
        print(f"{name}: {len(rows)} pairs, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
