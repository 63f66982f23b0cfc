"""Memory of one pair of two long texts, with and without checkpointing, tiles and offload.

`python benchmarks/activations.py` counts the bytes on CUDA from shapes, as `sage plan` does. With --measure
it computes the pair on the CPU, forward and backward, with random weights in bfloat16. It prints processor
seconds, and how much the process's private memory grew beyond weights and their gradients (sampled every few
milliseconds).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from sharded_loading import Peak, private_bytes

SHAPES = {  # of Qwen2.5: hidden, intermediate, layers, heads, key and value heads, vocabulary
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "32b": (5120, 27648, 64, 40, 8, 152064),
    "72b": (8192, 29568, 80, 64, 8, 152064),
}
PROMPT = 256  # tokens that both texts share
SETTINGS = {
    "kept": {},
    "tiled": {"tiled_mlp": True},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, offloaded": {"gradient_checkpointing": "offload"},
    "checkpointed, tiled": {"gradient_checkpointing": True, "tiled_mlp": True},
    "checkpointed, offloaded, tiled": {"gradient_checkpointing": "offload", "tiled_mlp": True},
}


def write_config(folder: str, shape: str, layers: int | None) -> int:
    """Write the config of a model of this shape. Returns its layers."""
    import transformers

    hidden, intermediate, all_layers, heads, kv_heads, vocabulary = SHAPES[shape]
    transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape in ("0.5b", "1.5b"),
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)
    return layers or all_layers


def pair_of(tokens: int):
    from sage.data.packing import collate
    from sage.data.tokens import Pair

    answer = tokens - PROMPT
    return collate([Pair("", None, [1] * PROMPT, [2] * answer, [3] * answer)], "shared")


def count(shape: str, layers: int | None, tokens: int) -> None:
    import torch

    from sage.config import ModelConfig
    from sage.model import memory

    with tempfile.TemporaryDirectory() as folder:
        layers = write_config(folder, shape, layers)
        for name, options in SETTINGS.items():
            policy = memory.shell(folder, ModelConfig(path=folder, **options), torch.bfloat16)
            found = memory.micro_bytes(policy, pair_of(tokens), cuda=True)
            numbers = {f"{part}_gb": round(value / 1e9, 2) for part, value in found._asdict().items()}
            print(
                json.dumps({"shape": shape, "layers": layers, "tokens": tokens, "setting": name, **numbers})
            )


def measure(shape: str, layers: int | None, tokens: int, name: str) -> None:
    import torch
    import transformers

    from sage.config import ModelConfig
    from sage.model import loading
    from sage.model.policy import Policy

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        layers = write_config(folder, shape, layers)
        config = transformers.AutoConfig.from_pretrained(folder)
    cfg = ModelConfig(path="", **SETTINGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    policy = Policy(loading.prepared(model, cfg, seed=0, offload=False), tiled_mlp=cfg.tiled_mlp)

    def step(length: int) -> tuple[float, float]:
        logps = policy(pair_of(length))
        kept = private_bytes()
        (logps.chosen - logps.rejected).sum().backward()
        return kept, float(logps.chosen.detach())

    step(2 * PROMPT)  # gradients and kernels have their memory from here on
    before, started = private_bytes(), time.process_time()
    with Peak() as peak:
        kept, logps = step(tokens)
    found = {
        "shape": shape,
        "layers": layers,
        "tokens": tokens,
        "setting": name,
        "kept_gb": round((kept - before) / 1e9, 2),
        "peak_gb": round((peak.bytes - before) / 1e9, 2),
        "cpu_seconds": round(time.process_time() - started, 1),
        "logps": logps,
    }
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="of Qwen2.5")
    parser.add_argument("--layers", type=int, help="instead of all of them")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--measure", choices=SETTINGS, nargs="+", help="settings to compute on the CPU")
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args.shape, args.layers, args.tokens, args.child)
    if not args.measure:
        return count(args.shape, args.layers, args.tokens)
    for name in args.measure:
        words = [f"--shape={args.shape}", f"--tokens={args.tokens}", f"--child={name}"]
        words += [f"--layers={args.layers}"] if args.layers else []
        # A large tensor has its own pages, so memory that is freed goes back at once.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        subprocess.run([sys.executable, __file__, *words], check=True, env=env)


if __name__ == "__main__":
    main()
