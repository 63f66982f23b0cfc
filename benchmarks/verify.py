"""Speed of `sage.answering.verify` on four models' GSM8K solutions, with the time to start the processes.

python benchmarks/verify.py ../shared/data/gsm8k/example_model_solutions.jsonl
"""

import json
import os
import sys
import time
from pathlib import Path

from sage.answering.verify import Verifier

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
ROUNDS = 5

if __name__ == "__main__":
    records = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    solutions = [record[model]["solution"] for record in records for model in MODELS]
    answers = [record["ground_truth"].rsplit("A: ", 1)[1] for record in records for _ in MODELS]
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        with Verifier(workers=2) as verifier:
            verdicts = verifier.verify(solutions, answers)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        hard = sum(not verdict.rule.endswith("/number") for verdict in verdicts)
        print(
            f"{len(verdicts)} answers in {wall:.2f} s: {len(verdicts) / wall:.0f}/s "
            f"({len(verdicts) / cpu:.0f} per second of this process's CPU); {hard} took formulas; "
            f"load {os.getloadavg()[0]:.1f}"
        )
