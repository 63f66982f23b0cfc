"""Memory of the ranks while ZeRO-3 loads a model: `python benchmarks/sharded_loading.py`.

It writes a random model of Qwen2.5-0.5B's shape to a temporary folder and loads it with gloo ranks on the
CPU. Mapped pages of the model's files are not counted: all processes share them, and the system drops them
when it needs memory. What counts is a process's private memory, sampled every few milliseconds. It needs the
extra `lora`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


class Peak:
    """The largest private memory of this process while the context lasts."""

    def __enter__(self) -> Peak:
        self.bytes, self.done = private_bytes(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.004):
            self.bytes = max(self.bytes, private_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def rank_main(folder: Path, how: str, dtype_name: str) -> None:
    """Load as `how` says, and print every rank's peak, less its memory before."""
    import peft  # noqa: F401  part of an empty process
    import torch

    from sage.config import EngineConfig, ModelConfig
    from sage.model import loading
    from sage.model.engine import Frozen, init_distributed, split_weights
    from sage.model.policy import Policy
    from sage.model.sharding import load_sharded
    from sage.util import ranks

    device, dtype = init_distributed(), getattr(torch, dtype_name)
    cfg = ModelConfig(path=str(folder))
    split = partial(split_weights, engine=EngineConfig(zero_stage=3), dtype=dtype)
    torch.nn.Linear(8, 8)(torch.ones(1, 8)).sum().backward()
    ranks.barrier()
    empty, started = private_bytes(), time.perf_counter()

    def read():
        return loading.load_model(str(folder), cfg, dtype, 0)

    with Peak() as peak:
        model = load_sharded(read, split, dtype) if how == "sharded" else read()
        loaded = peak.bytes
        engine = Frozen(Policy(model), True, dtype, device)
    seconds = time.perf_counter() - started
    size = sum(p.ds_numel * p.element_size() for p in engine.policy.parameters())
    numbers = ranks.gather((loaded - empty, peak.bytes - empty, private_bytes() - empty, empty))
    if ranks.rank() == 0:
        mib = [[round(n / 2**20) for n in row] for row in numbers]
        print(
            json.dumps(
                {
                    "how": how,
                    "dtype": dtype_name,
                    "model_mib": round(size / 2**20),
                    "seconds": round(seconds, 1),
                    "peak_mib": [row[1] for row in mib],
                    "after_mib": [row[2] for row in mib],
                    "empty_mib": [row[3] for row in mib],
                    "sum_of_peaks": round(sum(row[1] for row in numbers) / size, 2),
                    "largest_peak": round(max(row[1] for row in numbers) / size, 2),
                }
            )
        )
    ranks.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", help="of the run and of the files")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--how", nargs="+", choices=("sharded", "whole"), default=["sharded", "whole"])
    parser.add_argument("--rank-main", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_main:
        rank_main(Path(args.rank_main[0]), args.rank_main[1], args.dtype)
        return
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        config = transformers.Qwen2Config(**SHAPE | {"num_hidden_layers": args.layers})
        with torch.no_grad():
            torch.set_default_dtype(getattr(torch, args.dtype))
            model = transformers.Qwen2ForCausalLM(config)
            model.save_pretrained(folder)
            del model
        for how in args.how:
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={args.ranks}",
            ]
            words = [__file__, "--dtype", args.dtype, "--rank-main", folder, how]
            subprocess.run([*launcher, *words], check=True)


if __name__ == "__main__":
    main()
