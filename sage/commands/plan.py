"""What will a run take? Bytes per rank, the largest micro-batch that fits, and seconds per step.

No weights are loaded for the bytes: the model's own code runs on the meta device (`sage.model.memory`), on a
micro-batch of the run's own pairs. What the engine takes follows from its design (`sage.model.footprint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from rich.table import Table

from sage.commands.inspect import tokenizer_folder
from sage.config import EngineConfig, LoraConfig, ModelConfig, PlanConfig
from sage.data.chat import ChatFormat
from sage.data.packing import MicroBatch, collate, micro_tokens, pair_tokens, plan
from sage.data.pairs import load_data
from sage.data.tokens import Pair, tokenize_pairs
from sage.model import loading
from sage.model.footprint import Footprint, footprint
from sage.model.memory import MicroBytes, micro_bytes, shell
from sage.model.policy import Policy
from sage.order import Shuffled
from sage.util.files import write_json
from sage.util.processes import machine_memory
from sage.util.progress import activity, console

GB = 1e9
STEPS = 50  # steps' batches that are drawn to find the heaviest micro-batch
CUDA_CONTEXT = 0.8 * GB  # what the driver and NCCL take, beside torch's allocator
NAMES = {
    "step": "the optimizer's step",
    "buckets": "buffers of the exchange",
    "spare": "left by loading, and kernels",
    "export": "copies for the export",
}
SPARE = 0.05  # share of the memory that fragments


class Machine(NamedTuple):
    """What a rank has: bytes of room, and bytes that it takes before anything of the run."""

    cuda: bool
    room: float
    base: float
    name: str


class Estimate(NamedTuple):
    """Bytes of one rank. A micro-batch of t tokens takes line[0] + line[1] * t of them."""

    machine: Machine
    engine: Footprint
    micro: MicroBytes
    line: tuple[float, float]

    def parts(self) -> dict[str, float]:
        engine = {
            NAMES.get(f.name, f.name): value
            for f in fields(self.engine)
            if f.name != "host" and (value := getattr(self.engine, f.name))
        }
        before = "CUDA context" if self.machine.cuda else "Python and its libraries"
        return {
            before: self.machine.base,
            **engine,
            "activations": self.micro.kept,
            "head, in the backward pass": self.micro.head,
        }

    def peak(self, micro: float | None = None) -> float:
        """The most that a rank holds, if a micro-batch takes `micro` bytes."""
        own = self.micro.peak if micro is None else micro
        engine = self.engine
        if self.machine.cuda:
            return self.machine.base + engine.kept() + max(own + engine.buckets, engine.step)
        # A CPU's allocator keeps the many small pieces that a micro-batch freed, so all else comes on top.
        return self.machine.base + engine.kept() + own + engine.buckets + engine.spare + engine.export

    def most_tokens(self) -> int:
        """Tokens of the largest micro-batch that fits; 0 if not even the engine does."""
        left = self.machine.room * (1 - SPARE) - self.peak(0.0) - self.line[0]
        return max(int(left / self.line[1]), 0)

    @property
    def fits(self) -> bool:
        return self.peak() <= self.machine.room * (1 - SPARE)


def plan_run(cfg: PlanConfig) -> None:
    """Print the plan of a run, and write it to `cfg.json` if that is set.

    Raises:
        UserError: the run's data, tokenizer or model would be refused, or its code cannot be planned.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = loading.compute_dtype(cfg.model, device)
    if cfg.gpu_gb and cfg.model.dtype == "auto":
        dtype = torch.bfloat16
    folder = tokenizer_folder(cfg.model, cfg.cache_dir)
    work = micro_batch(cfg, folder)
    machine = machine_of(cfg, device)
    with activity("running the model's code on the meta device"):
        estimate = estimated(cfg, cfg.model, machine, folder, dtype, work)
    advice = [] if estimate.fits else list(changes(cfg, estimate, folder, dtype, work))
    seconds = None
    if not cfg.gpu_gb and estimate.fits and Path(folder).is_dir():
        with activity("timing a micro-batch of the model"):
            seconds = work.per_step * measured_seconds(cfg.model, folder, dtype, device, work)
    rows = rows_of(estimate, work, seconds)
    print_rows(cfg, rows, advice, str(dtype).removeprefix("torch."))
    if cfg.json:
        numbers = {
            "fits": estimate.fits,
            "peak_gb": estimate.peak() / GB,
            "room_gb": machine.room / GB,
            "most_tokens": estimate.most_tokens(),
            "step_seconds": seconds,
        }
        parts = {name: value / GB for name, value in estimate.parts().items()}
        write_json(Path(cfg.json).expanduser(), {**numbers, "parts_gb": parts, "changes": advice})


# --- what is planned for


def machine_of(cfg: PlanConfig, device: torch.device) -> Machine:
    if cfg.gpu_gb:
        return Machine(True, cfg.gpu_gb * GB, CUDA_CONTEXT, f"a GPU of {cfg.gpu_gb:g} GB")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Machine(True, float(free), CUDA_CONTEXT, torch.cuda.get_device_name(device))
    free = min(psutil.virtual_memory().available, machine_memory())
    own = psutil.Process().memory_info().rss  # this process has imported what a rank imports
    return Machine(False, free / cfg.world_size, own, "this machine's memory, shared by the ranks")


class Work(NamedTuple):
    """The heaviest micro-batch of some steps, and how many of them a rank computes in a step."""

    pairs: list[Pair]
    tokens: int
    prefix: int
    layout: str
    per_step: int
    longest: int  # tokens of the longest pair of all, by this layout

    def batch(self, pairs: Sequence[Pair]) -> MicroBatch:
        return collate(pairs, self.layout, self.prefix)


def micro_batch(cfg: PlanConfig, folder: str) -> Work:
    """The heaviest micro-batch of the run's own pairs; where they are not built yet, of the longest pairs."""
    layout = cfg.data.packing if cfg.data.packing != "auto" else "shared"
    if not cfg.data.has_pairs:
        console.print("the pairs are not built yet: planned for pairs of data.max_length tokens")
        response = cfg.data.max_length * 3 // 4
        prompt = cfg.data.max_length - response
        made = [  # no text twice
            Pair("", None, [i >> bit & 1 for bit in range(prompt)], [0] * response, [1] * response)
            for i in range(cfg.batch_size)
        ]
        lengths, prefix = np.array([[prompt, response, response]] * cfg.batch_size), 0
        get, keys = made.__getitem__, np.arange(lengths.size).reshape(lengths.shape).__getitem__
    else:
        data = tokenize_pairs(
            load_data(cfg.data, cfg.cache_dir),
            loading.load_tokenizer(folder, cfg.model),
            chat=ChatFormat.of(cfg.data),
            max_length=cfg.data.max_length,
            num_proc=cfg.data.num_proc,
            cache_dir=cfg.cache_dir,
            max_bad=cfg.data.max_bad,
        )
        lengths, prefix = data.lengths(), data.common_prefix if layout == "shared" else 0
        get, keys = data.__getitem__, data.keys
    tokens = pair_tokens(lengths, layout, prefix)
    order, heaviest, most, rounds = Shuffled(len(lengths), cfg.seed), np.array([0]), 0, 1
    for _ in range(min(cfg.steps or STEPS, STEPS)):
        drawn = order.draw(cfg.batch_size)
        plans = plan(lengths[drawn], cfg.micro_batch_tokens, cfg.world_size, layout, prefix, keys(drawn))
        rounds = max(rounds, len(plans[0]))
        for members in (drawn[members] for rank in plans for members in rank if members):
            _, total = micro_tokens(lengths[members], keys(members), layout, prefix)
            if total > most:
                heaviest, most = members, total
    return Work([get(int(i)) for i in heaviest], most, prefix, layout, rounds, int(tokens.max()))


# --- the estimate


def estimated(
    cfg: PlanConfig, model: ModelConfig, machine: Machine, folder: str, dtype: torch.dtype, work: Work
) -> Estimate:
    policy = shell(folder, model, dtype)
    micro = micro_bytes(policy, work.batch(work.pairs), machine.cuda)
    # A second point of the line, with all pairs twice. Most of a small one may not depend on its tokens. The
    # second time their prompts are others, since a micro-batch computes the same text once.
    others = [p._replace(prompt_ids=[*p.prompt_ids[:-1], -1 - p.prompt_ids[-1]]) for p in work.pairs]
    more = work.batch([*work.pairs, *others])
    rise = micro_bytes(policy, more, machine.cuda).peak - micro.peak
    slope = max(rise / (more.input_ids.numel() - work.tokens), micro.kept / work.tokens)
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    engine = footprint(trainable, frozen, dtype.itemsize, cfg.engine, cfg.world_size, machine.cuda)
    own_base = cfg.model.lora and not cfg.model.adapter_path and not cfg.reference_model
    if cfg.reference == "online" and not own_base:
        sharded = cfg.world_size if cfg.engine.zero_stage == 3 else 1
        engine.reference = (trainable + frozen) * dtype.itemsize / sharded
    return Estimate(machine, engine, micro, (micro.peak - slope * work.tokens, slope))


def measured_seconds(
    model: ModelConfig, folder: str, dtype: torch.dtype, device: torch.device, work: Work
) -> float:
    """Seconds of forward and backward of the micro-batch, with the model itself and without an engine."""
    loaded = loading.load_model(folder, model, dtype, seed=0)
    policy = Policy(loaded, model.head, loading.router_coefficient(model, loaded)).to(device)
    best = math.inf
    for _ in range(2):  # the first one is a warm-up
        started = time.perf_counter()
        logps = policy(work.batch(work.pairs).to(device))
        (logps.chosen.sum() - logps.rejected.sum()).backward()
        next(p for p in policy.parameters() if p.grad is not None).grad[0].sum().item()  # pyright: ignore
        best = min(best, time.perf_counter() - started)
        policy.zero_grad()
    return best


def changes(cfg: PlanConfig, now: Estimate, folder: str, dtype: torch.dtype, work: Work) -> Iterator[str]:
    """Settings that would fit, each alone, the cheapest first."""
    machine = now.machine
    if now.most_tokens() >= max(work.longest, 2 * cfg.data.max_length):
        yield f"micro_batch_tokens={now.most_tokens()} fits"
    checkpointing = replace(cfg.model, gradient_checkpointing=True)
    tried = [("model.gradient_checkpointing=true", cfg.engine, checkpointing)]
    if cfg.world_size > 1:
        tried += [(f"engine=zero{n}", EngineConfig(n), cfg.model) for n in (2, 3)]
        tried.append(("engine=zero3 model.gradient_checkpointing=true", EngineConfig(3), checkpointing))
    if machine.cuda:
        offload = EngineConfig(max(cfg.engine.zero_stage, 2), offload=True)
        name = f"engine=zero{offload.zero_stage}_offload model.gradient_checkpointing=true"
        tried.append((name, offload, checkpointing))
    adapter = replace(checkpointing, lora=LoraConfig())
    tried.append(("+model/lora=default model.gradient_checkpointing=true", cfg.engine, adapter))
    for name, engine, model in tried:
        other = estimated(replace(cfg, engine=engine), model, machine, folder, dtype, work)
        if other.fits:
            yield f"{name} fits, in {other.peak() / GB:.1f} GB"
        elif other.most_tokens() >= max(work.longest, 2 * cfg.data.max_length):
            yield f"{name} with micro_batch_tokens={other.most_tokens()} fits"


# --- what is printed


def rows_of(estimate: Estimate, work: Work, seconds: float | None) -> list[tuple[str, str]]:
    rows = [(name, f"{value / GB:.2f} GB") for name, value in estimate.parts().items()]
    rows.append(("peak", f"{estimate.peak() / GB:.2f} GB"))
    room = f"{estimate.machine.room / GB:.2f} GB, {estimate.machine.name}"
    rows.append((f"free; the plan {'fits' if estimate.fits else 'DOES NOT FIT'}", room))
    if estimate.engine.host:
        rows.append(("CPU memory, by offload", f"{estimate.engine.host / GB:.2f} GB"))
    rows.append(("heaviest micro-batch", f"{len(work.pairs)} pairs, {work.tokens} tokens"))
    rows.append(("longest pair", f"{work.longest} tokens"))
    most = estimate.most_tokens()
    rows.append(("largest micro_batch_tokens that fits", str(most) if most >= work.longest else "none"))
    rows.append(("largest data.max_length that fits", str(most // 2) if most >= 2 else "none"))
    if seconds:
        note = f"{work.per_step} micro-batches per rank, without the exchange, the optimizer and scoring"
        rows.append(("seconds of a step", f"{seconds:.1f}: {note}"))
    return rows


def print_rows(cfg: PlanConfig, rows: list[tuple[str, str]], advice: list[str], dtype: str) -> None:
    how = f"ZeRO {cfg.engine.zero_stage}, {cfg.world_size} rank{'s' * (cfg.world_size > 1)}, {dtype}"
    table = Table(title=f"one rank of {cfg.name}: {how}", title_justify="left", show_header=False)
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)
    for line in advice:
        console.print(line, markup=False)
