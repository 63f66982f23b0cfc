"""What a rank of `sage doctor` tries: `python -m sage.commands.doctor_checks FOLDER CHECK...`.

Each check uses the code that a run uses, on this rank's own device, and leaves FOLDER/CHECK.RANK.json. All
output goes to FOLDER/rank_N.log. A check that hangs ends the rank after LIMIT seconds, with the stack in the
log. A check that fails ends it too, since the other ranks may be waiting for it.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from torch import Tensor

from sage import config
from sage.commands.evaluate import evaluate
from sage.config import ModelConfig
from sage.data.packing import collate
from sage.data.tokens import Pair
from sage.model.engine import init_distributed
from sage.model.kernels import choose_backend, token_stats
from sage.model.loading import compute_dtype
from sage.train import train
from sage.training.base import BaseModel, open_model
from sage.training.tracking import METRICS_FILE
from sage.util import ranks, stopping
from sage.util.errors import describe
from sage.util.files import write_json

LIMIT = 300.0  # seconds that one check may take; the first one on a GPU may compile for a minute
MODEL = "pkg://sage.assets/arithmetic"
ACCURACY = 0.25  # the packaged model solves half of its problems; broken generation solves none
HEAD_SIZES = (600, 5000, 256)  # tokens, vocabulary, hidden: multiples of no tile
# Differences that count as rounding: of a log-probability in nats, on average, and of a gradient, relative to
# its norm. In bfloat16 they are coarse, so the model is also asked in float32.
LIMITS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.1, 0.1)}


class Wrong(Exception):
    """A check computed something else than it should have."""


def device_check(folder: Path, device: torch.device) -> str:
    """What this rank computes on."""
    dtype = str(compute_dtype(ModelConfig(path=MODEL), device)).removeprefix("torch.")
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads per rank, {dtype}"
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    if free < total / 2:
        raise Wrong(f"{properties.name}: only {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free")
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, capability {capability}, {free / 2**30:.1f} GiB free, {dtype}"


def exchange_check(folder: Path, device: torch.device) -> str:
    """An all-reduce of 32 MiB gives the sum, and how fast."""
    world, elements = ranks.world_size(), 8 << 20
    for _ in range(2):  # the first one connects the ranks
        values = torch.full((elements,), float(ranks.rank() + 1), device=device)
        started = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])  # waits for the device
        seconds = time.perf_counter() - started
        if total != world * (world + 1) / 2 or not bool((values == total).all()):
            raise Wrong(f"the sum over {world} ranks is {total}, and should be {world * (world + 1) / 2}")
    backend = dist.get_backend()
    return f"{backend}, {world} rank{'s' * (world > 1)}: {4 * elements / seconds / 1e9:.1f} GB/s"


def head_check(folder: Path, device: torch.device) -> str:
    """The head that a run would choose against a simpler one, log-probabilities and gradients."""
    tokens, vocabulary, width = HEAD_SIZES
    dtype = compute_dtype(ModelConfig(path=MODEL), device)
    generator = torch.Generator().manual_seed(ranks.rank())
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    upstream = torch.randn(tokens, generator=generator).to(device)
    chosen = choose_backend(device, dtype)
    simpler = "tiled" if chosen != "tiled" else "oracle"

    def of(backend: str) -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = token_stats(x, w, labels, backend=backend).logps
        assert logps is not None
        return [logps.detach(), *torch.autograd.grad(logps, [x, w], upstream)]

    (logps, *gradients), (expected, *slopes) = of(chosen), of(simpler)
    apart, slope = float((logps - expected).abs().max()), max(map(relative_difference, gradients, slopes))
    # All heads sum in float32. Only their gradients are rounded to the model's dtype.
    check(apart <= LIMITS[torch.float32][0], f"{chosen} and {simpler} differ by {apart:.2g} nats")
    check(slope <= LIMITS[dtype][1], f"the gradients of {chosen} and {simpler} differ by {slope:.2g}")
    return f"{chosen} against {simpler}: {apart:.1g} nats, gradients {slope:.1g}"


def attention_check(folder: Path, device: torch.device) -> str:
    """Packed rows (FlexAttention on CUDA) against padded ones: log-probabilities and gradients of a model."""
    chosen = compute_dtype(ModelConfig(path=MODEL), device)
    found = [packed_against_padded(folder, device, dtype) for dtype in dict.fromkeys((torch.float32, chosen))]
    name = "FlexAttention" if device.type == "cuda" else "packed rows"
    return f"{name} against padded rows: {found[0]}" + f"; in bfloat16 {found[1]}" * (len(found) > 1)


def packed_against_padded(folder: Path, device: torch.device, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    policy = base(folder, device, dtype=name).load().to(device)
    rng = random.Random(0)
    beginning = [rng.randrange(16) for _ in range(12)]

    def ids(length: int) -> list[int]:
        return [rng.randrange(16) for _ in range(length)]

    lengths = [(20, 30, 9), (7, 90, 65), (61, 3, 40), (33, 110, 17)]
    pairs = [Pair(str(i), None, beginning + ids(p), ids(c), ids(r)) for i, (p, c, r) in enumerate(lengths)]

    def of(layout: str) -> list[Tensor]:
        policy.zero_grad()
        batch = collate(pairs, layout, len(beginning) if layout == "shared" else 0).to(device)
        logps = policy(batch, tokens=True)
        logps.mean().backward()
        return [logps.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]

    (logps, *gradients), (expected, *slopes) = of("shared"), of("padded")
    apart, slope = float((logps - expected).abs().mean()), max(map(relative_difference, gradients, slopes))
    most, relative = LIMITS[dtype]
    check(apart <= most, f"log-probabilities in packed rows are off by {apart:.2g} nats in {name}")
    check(slope <= relative, f"gradients of packed rows are off by {slope:.2g} in {name}")
    return f"{apart:.1g} nats, gradients {slope:.1g}"


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))


def zero_check(stage: int) -> Callable[[Path, torch.device], str]:
    def run(folder: Path, device: torch.device) -> str:
        """Two steps of a real run: the first loss is ln 2, and other stages compute the same."""
        world = ranks.world_size()
        run_dir = frozen(
            folder / f"zero{stage}",
            "train",
            *("+experiment=arithmetic", "+baseline=dpo", f"engine=zero{stage}", f"world_size={world}"),
            *("steps=2", f"batch_size={max(8, world)}", "data.limit=64", "data.eval_path=null"),
            *("optimizer.lr=1e-4", f"cache_dir={folder / 'cache'}", "tracking.sample_rows=0"),
        )
        train(run_dir)
        steps = steps_of(run_dir)
        check(abs(steps[0]["loss"] - math.log(2)) < 1e-3, f"the first loss is {steps[0]['loss']}, not ln 2")
        check(all(math.isfinite(step["grad_norm"]) for step in steps), "a gradient is not finite")
        others = [f"zero{other}" for other in range(stage) if (folder / f"zero{other}" / "final").exists()]
        for other in others[:1]:
            for mine, theirs in zip(steps, steps_of(folder / other), strict=True):
                apart = abs(mine["grad_norm"] / theirs["grad_norm"] - 1)
                check(apart < 0.02, f"its gradient norm differs from ZeRO {other[-1]}'s by {apart:.1%}")
        norm = f"gradient norm {steps[0]['grad_norm']:.4f}"
        return f"2 steps on {world} rank{'s' * (world > 1)}, loss ln 2 to {steps[1]['loss']:.4f}, {norm}"

    return run


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / METRICS_FILE).read_text().splitlines())
    return [line for line in lines if "loss" in line]


def generation_check(folder: Path, device: torch.device) -> str:
    """`sage eval` on problems of which the packaged model solves half."""
    run_dir = frozen(
        folder / "eval",
        "eval",
        *("model=arithmetic", "benchmark=arithmetic_validation", "benchmark_limit=64"),
        *("sampling.max_new_tokens=32", f"world_size={ranks.world_size()}", f"cache_dir={folder / 'cache'}"),
    )
    evaluate(run_dir)
    ranks.barrier()
    accuracy = json.loads((run_dir / config.SUMMARY_FILE).read_text())["mean_accuracy"]
    check(accuracy > ACCURACY, f"the packaged model solves {accuracy:.0%}, and should solve half")
    return f"64 problems answered, {accuracy:.0%} right"


CHECKS: dict[str, Callable[[Path, torch.device], str]] = {
    "device": device_check,
    "exchange": exchange_check,
    "head": head_check,
    "attention": attention_check,
    **{f"zero{stage}": zero_check(stage) for stage in range(4)},
    "generation": generation_check,
}


def check(passed: bool, otherwise: str) -> None:
    if not passed:
        raise Wrong(otherwise)


def base(folder: Path, device: torch.device, dtype: str) -> BaseModel:
    return open_model(ModelConfig(path=MODEL, dtype=dtype), device, 0, str(folder / "cache"))


def frozen(run_dir: Path, command: str, *overrides: str) -> Path:
    """The folder of a run with its frozen config, which rank 0 writes."""

    def freeze() -> None:
        with initialize_config_module("sage.conf", version_base="1.3"):
            config.freeze(config.load(compose(command, [*overrides])), run_dir)

    ranks.main_only(freeze)
    return run_dir


def main() -> None:
    folder, names, rank = Path(sys.argv[1]), sys.argv[2:], ranks.rank()
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    stopping.install(folder, rank)
    device = None
    for name in names:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        started, error = time.monotonic(), None
        print(f"== {name}", flush=True)
        try:
            device = device or init_distributed()
            detail = CHECKS[name](folder, device)
        except Exception as e:  # whatever fails here would fail in a run
            traceback.print_exc()
            detail = error = str(e) if isinstance(e, Wrong) else describe(e)
        seconds = time.monotonic() - started
        write_json(
            folder / f"{name}.{rank}.json", {"ok": error is None, "detail": detail, "seconds": seconds}
        )
        if error is not None:
            stopping.end(1)
    faulthandler.cancel_dump_traceback_later()
    ranks.leave()


if __name__ == "__main__":
    main()
