"""Memory of a micro-batch whose tokens several ranks share: `python benchmarks/sequence_parallel.py`.

Gloo ranks on the CPU build the same random model and compute one micro-batch, forward and backward. It prints
how much each rank's private memory grew, beyond the weights and their gradients: after the forward pass, and
at most (sampled every few milliseconds).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from sharded_loading import Peak, private_bytes

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,
}
PROMPT, RESPONSE = 512, 1792  # tokens of a pair: 4,096 in all


def rank_main(layers: int, pairs: int, checkpointing: bool) -> None:
    import torch
    import transformers

    from sage.data.packing import collate
    from sage.data.tokens import Pair
    from sage.model.engine import init_distributed
    from sage.model.policy import Policy
    from sage.model.sequence import sequence_group
    from sage.util import ranks

    init_distributed()
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, num_hidden_layers=layers))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, group=sequence_group(ranks.world_size()))

    def micro_batch(n: int, shrink: int):
        sizes = PROMPT // shrink, RESPONSE // shrink, RESPONSE // shrink
        made = [[torch.randint(0, SHAPE["vocab_size"], (size,)).tolist() for size in sizes] for _ in range(n)]
        return collate([Pair("", None, *ids) for ids in made], "shared")

    def forward(batch):
        logps = policy(batch)
        return (logps.chosen - logps.rejected).sum()

    forward(micro_batch(1, 32)).backward()  # gradients and kernels have their memory from here on
    batch = micro_batch(pairs, 1)
    ranks.barrier()
    before, started = private_bytes(), time.perf_counter()
    with Peak() as peak:
        loss = forward(batch)
        kept = private_bytes()
        loss.backward()
    numbers = ranks.gather((kept - before, peak.bytes - before))
    if ranks.rank() == 0:
        found = {
            "ranks": ranks.world_size(),
            "tokens": batch.input_ids.shape[1],
            "layers": layers,
            "checkpointing": checkpointing,
            "kept_mib": [round(kept / 2**20) for kept, _ in numbers],
            "peak_mib": [round(most / 2**20) for _, most in numbers],
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(found), flush=True)
    ranks.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="that share the tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=4, help="of 4,096 tokens each")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rank-main", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_main:
        return rank_main(args.layers, args.pairs, args.checkpointing)
    words = [f"--layers={args.layers}", f"--pairs={args.pairs}", "--rank-main"]
    words += ["--checkpointing"] * args.checkpointing
    for ranks in args.ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        # A large tensor has its own pages, so memory that is freed goes back at once.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        subprocess.run([sys.executable, *launcher, __file__, *words], check=True, env=env)


if __name__ == "__main__":
    main()
