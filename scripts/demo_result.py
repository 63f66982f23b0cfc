"""The last lines of `make demo`: what selection did, and what came of it.

python scripts/demo_result.py FOLDER    # with the runs FOLDER/sage and FOLDER/dpo
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq

ACCURACY = "benchmark/arithmetic/accuracy"


def wrong(run: Path) -> float:
    """The share of trained pairs whose wrong response had the higher mean log-probability when chosen."""
    log = pq.read_table(run / "samples", columns=["selected", "policy_mean"])
    margins = log["policy_mean"].to_numpy()[log["selected"].to_numpy()]
    return float((margins < 0).mean())


def main() -> None:
    runs = {name: Path(sys.argv[1]) / name for name in ("sage", "dpo")}
    solved = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
    before, (sage, dpo) = solved["sage"]["before"][ACCURACY], (s["after"][ACCURACY] for s in solved.values())
    print(
        f"\nThe model preferred the wrong answer in {wrong(runs['sage']):.0%} of the pairs that SAGE trained "
        f"on, and in {wrong(runs['dpo']):.0%} of those that plain DPO trained on.\n"
        f"It solved {before:.1%} of 500 held-out problems before training, {sage:.1%} after SAGE, and "
        f"{dpo:.1%} after plain DPO.\n"
        "This is one seed. docs/evidence.md compares them over several seeds, and at equal cost."
    )


if __name__ == "__main__":
    main()
