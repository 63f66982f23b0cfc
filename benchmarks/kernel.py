"""The language-model head alone, side by side: forward and backward of the mean log-probability.

    python benchmarks/kernel.py      # CPU, float32: V = 151,936, H = 896, 4,096 tokens
    python benchmarks/kernel.py --device cuda --dtype bfloat16

Contenders are sage's backends and TRL 1.16's tiled function with TRL's chunk size. On CUDA they are also
Liger-Kernel and cut-cross-entropy, if installed. Each measurement runs in its own process, and contenders
take turns. The run stops if a contender's loss or gradients differ from the first one's. Time on a CPU is
processor time, which other work on the machine disturbs less than the clock. So run it with one thread.
Memory is the peak above the inputs: resident on CPU, allocated on CUDA. The oracle holds several [tokens, V]
tensors: 7 GB above the inputs at the default size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CONTENDERS = ["oracle", "tiled", "triton", "trl", "liger", "cut-cross-entropy"]
CUDA_ONLY = {"triton", "liger", "cut-cross-entropy"}
REFERENCE = "oracle"


def loss_function(name: str):
    """(hidden, weight, labels) -> minus the mean log-probability. ImportError if a package is missing."""
    if name == "trl":
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

        return lambda x, w, y: (
            -ChunkedLogProbFunction.apply(x, w, None, y, 1.0, chunk, None, 1.0, ())[0].mean()
        )
    if name == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda x, w, y: liger_fused_linear_cross_entropy(x, w, y)
    if name == "cut-cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        # cce_exact: the default drops gradients below a threshold, which random weights would flatter.
        return lambda x, w, y: linear_cross_entropy(x, w, y, impl="cce_exact")
    from sage.model.kernels import token_stats

    return lambda x, w, y: -token_stats(x, w, y, backend=name).logps.mean()


class Memory:
    """The peak above what was held at the start, in bytes."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self.peak()

    def peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def above_start(self) -> int:
        return self.peak() - self.start


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of forward and backward in this process, peak bytes, and numbers to check the result with."""
    cuda = args.device == "cuda"
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.width, device=args.device, dtype=dtype)
    weight = torch.empty(args.vocabulary, args.width, device=args.device, dtype=dtype)
    weight.normal_(std=2 / args.width**0.5)
    labels = torch.randint(args.vocabulary, (args.tokens,), device=args.device)
    loss_of = loss_function(name)

    def clock() -> float:
        if not cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def once(hidden, weight, labels) -> tuple[float, float, float]:
        memory, start = Memory(cuda), clock()
        loss = loss_of(hidden, weight, labels)
        middle = clock()
        loss.backward()
        return middle - start, clock() - middle, memory.above_start()

    # Compiles the kernels on CUDA, at the size to be measured; loads the libraries on CPU.
    warm = (hidden, weight) if cuda else (hidden[:8].clone(), weight[:64].clone())
    for _ in range(3 if cuda else 1):
        once(*(x.detach().requires_grad_() for x in warm), labels if cuda else labels[:8] % 64)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    forward, backward, peak = once(hidden, weight, labels)
    with torch.no_grad():
        figures = {
            "loss": loss_of(hidden[:256], weight, labels[:256]).item(),
            "hidden_gradient": hidden.grad.norm().item(),
            "weight_gradient": weight.grad.norm().item(),
        }
    return {"forward": forward, "backward": backward, "peak": peak, **figures}


def machine(args: argparse.Namespace) -> dict[str, str | int]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = cpu[1] if cpu else platform.machine()
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor,
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def absent(name: str, device: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name in CUDA_ONLY and device != "cuda":
        return "needs CUDA"
    try:
        loss_function(name)
    except ImportError as e:
        return f"not installed ({e.name})"
    return None


def check(results: dict[str, list[dict[str, float]]], tolerance: float) -> None:
    expected = next(iter(results.values()))[0]
    for name, runs in results.items():
        for figure in ("loss", "hidden_gradient", "weight_gradient"):
            if abs(runs[-1][figure] / expected[figure] - 1) > tolerance:
                sys.exit(f"{name}: {figure} is {runs[-1][figure]}, should be {expected[figure]}")


def table(results: dict[str, list[dict[str, float]]], missing: dict[str, str]) -> str:
    """Medians, and each contender's speed and memory as multiples of the oracle's or the first one's."""
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in results.items()}
    base = next(iter(medians.values()))
    lines = [
        "| head | forward s | backward s | total s | speed | peak MB | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in medians.items():
        total = m["forward"] + m["backward"]
        lines.append(
            f"| {name} | {m['forward']:.4g} | {m['backward']:.4g} | {total:.4g} "
            f"| {(base['forward'] + base['backward']) / total:.2f}x | {m['peak'] / 1e6:.0f} "
            f"| {m['peak'] / base['peak']:.3f}x |"
        )
    return "\n".join([*lines, *(f"| {name} | {why} |" + " |" * 5 for name, why in missing.items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="Qwen2.5's")
    parser.add_argument("--width", type=int, default=896, help="Qwen2.5-0.5B's")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every contender")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--json", type=Path, help="write settings, machine and every measurement here")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return

    missing = {name: why for name in args.contenders if (why := absent(name, args.device))}
    results: dict[str, list[dict[str, float]]] = {n: [] for n in args.contenders if n not in missing}
    for turn in range(args.repeats):
        for name, runs in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(out.splitlines()[-1]))
            print(
                f"turn {turn + 1}, {name}: {runs[-1]['forward'] + runs[-1]['backward']:.4g} s",
                file=sys.stderr,
            )
        check(results, 1e-3 if args.dtype == "float32" else 2e-2)
    described = machine(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "measure", "contenders")}
    print(json.dumps({**settings, **described}))
    print(table(results, missing))
    if args.json:
        everything = {"settings": settings, "machine": described, "results": results, "missing": missing}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
