"""What choosing pairs costs besides the forward passes: milliseconds per step, with the whole method on.

    python benchmarks/selection.py [--pairs 200000] [--batch 32] [--steps 200]

SAGE's curriculum redraws its pool every 10 steps. The scorer takes the best of the candidates behind every
margin-level gate. Every row goes to the per-pair log. A table of log-probabilities replaces the model, so
only the bookkeeping is measured. The first step, which may look at all pairs, is shown on its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sage.curriculum import Curriculum, SageCurriculum, Setting
from sage.losses import DPO
from sage.model.logps import PairLogps
from sage.scorers import Sage
from sage.static_curricula import EasyToHard, StaticFilter
from sage.training.metrics import PER_PAIR
from sage.training.pair_log import PairLog
from sage.training.selection import Selection


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    n, rng = args.pairs, np.random.default_rng(0)
    chosen, rejected = (torch.tensor(rng.normal(size=n), dtype=torch.float32) for _ in range(2))
    table = PairLogps(chosen, rejected, torch.ones(n), torch.ones(n))

    def rows(indices: np.ndarray) -> PairLogps:
        return PairLogps(*(values[torch.from_numpy(indices)] for values in table))

    scorer = Sage(drop_negative=0.3, drop_curvature=0.1, temperature=0.1, margin="mixed")
    setting = Setting(rng.random(n), np.ones(n, np.int64), args.steps, *scorer.draws(args.batch), 1, 0)
    names = np.array([str(i) for i in range(n)], dtype=object)
    pairs: Any = SimpleNamespace(pair_ids=lambda indices=slice(None): names[indices])
    model: Any = SimpleNamespace(lookup=rows, all_stats=lambda pairs, indices, logit: (rows(indices), None))
    seen = torch.zeros(len(PER_PAIR), args.batch)
    print(f"{n} pairs, {setting.candidates} candidates for {args.batch} a step; CPU time, ms a step")
    for kind in (SageCurriculum, Curriculum, StaticFilter, EasyToHard):
        times = []
        with tempfile.TemporaryDirectory() as folder:
            log = PairLog(Path(folder), args.steps * setting.candidates, 1_000_000, main=True)
            selection = Selection(scorer, kind(setting), DPO(), pairs, model, model, log, args.batch, 0)
            for step in range(args.steps):
                started = time.process_time()
                selection.observe(selection.choose(step).indices, seen)
                times.append(1000 * (time.process_time() - started))
        first, *others = times
        print(
            f"{kind.__name__:15} mean {np.mean(others):6.2f}, median {np.median(others):6.2f}, "
            f"slowest {max(others):6.1f}; the first step {first:.0f}"
        )


if __name__ == "__main__":
    main()
