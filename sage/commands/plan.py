"""What will a run take? Bytes per rank, the largest micro-batch that fits, and seconds per step.

No weights are loaded for the bytes: see `sage.training.estimate`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from sage.commands.inspect import tokenizer_folder
from sage.config import LoraConfig, ModelConfig, PlanConfig
from sage.data.pairs import load_data
from sage.data.tokens import Pair, tokenize_data
from sage.model import loading
from sage.model.folder import check_adapter, lora_of
from sage.model.policy import Policy
from sage.model.tiles import TILE
from sage.training.estimate import (
    CUDA_CONTEXT,
    GB,
    Estimate,
    HeaviestBatch,
    Machine,
    PairSource,
    estimated,
    heaviest,
    largest_budget,
    this_machine,
)
from sage.util.errors import UserError
from sage.util.files import write_json
from sage.util.progress import activity, console


def plan_run(cfg: PlanConfig) -> None:
    """Print the plan of a run, and write it to `cfg.json` if that is set.

    Raises:
        UserError: the run's data, tokenizer or model would be refused, or its code cannot be planned.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = loading.compute_dtype(cfg.model, device)
    if cfg.model.adapter_path:
        cfg.model.lora = lora_of(check_adapter(cfg.model))  # its own settings, as a run takes them
    if cfg.gpu_gb and cfg.model.dtype == "auto":
        dtype = torch.bfloat16
    folder = tokenizer_folder(cfg.model, cfg.cache_dir)
    source, machine = source_of_pairs(cfg, folder), machine_of(cfg, device)
    with activity("running the model's code on the meta device"):
        if not isinstance(cfg.micro_batch_tokens, int):
            cfg.micro_batch_tokens, why = largest_budget(cfg, folder, dtype, source, machine)
            console.print(f"micro_batch_tokens=auto: {cfg.micro_batch_tokens}, {why}", markup=False)
        work = heaviest(cfg, source, cfg.micro_batch_tokens)
        estimate = estimated(cfg, machine, folder, dtype, work)
    advice = [] if estimate.fits else list(changes(cfg, estimate, folder, dtype, work))
    seconds = None
    alone = not cfg.gpu_gb and cfg.engine.sequence_parallel == 1
    if alone and estimate.fits and Path(folder).is_dir():
        with activity("timing a micro-batch of the model"):
            seconds = work.per_step * measured_seconds(cfg.model, folder, dtype, device, work)
    rows = rows_of(cfg, estimate, work, seconds)
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
    return this_machine(cfg.world_size, device)


def source_of_pairs(cfg: PlanConfig, folder: str) -> PairSource:
    """The run's own pairs; where they are not built yet, pairs of data.max_length tokens."""
    layout = cfg.data.packing if cfg.data.packing != "auto" else "shared"
    if not cfg.data.has_pairs:
        console.print("the pairs are not built yet: planned for pairs of data.max_length tokens")
        response = cfg.data.max_length * 3 // 4
        prompt = cfg.data.max_length - response
        lengths = np.array([[prompt, response, response]] * cfg.batch_size)

        def ids(number: int, length: int) -> list[int]:  # its binary digits: any vocabulary has two tokens
            return [number >> place & 1 for place in range(length)]

        def made(i: int) -> Pair:  # no two share a text
            return Pair("", None, ids(i, prompt), ids(2 * i, response), ids(2 * i + 1, response))

        return PairSource(lengths, 0, layout, made)
    source, tokenizer = load_data(cfg.data, cfg.cache_dir), loading.load_tokenizer(folder, cfg.model)
    return PairSource.of(tokenize_data(source, tokenizer, cfg.data, cfg.cache_dir), layout)


def measured_seconds(
    model: ModelConfig, folder: str, dtype: torch.dtype, device: torch.device, work: HeaviestBatch
) -> float:
    """Seconds of forward and backward of the micro-batch, with the model itself and without an engine."""
    loaded = loading.load_model(folder, model, dtype, seed=0)
    coefficient = loading.router_coefficient(model, loaded)
    policy = Policy(loaded, model.head, coefficient, tiled_mlp=model.tiled_mlp).to(device)
    best = math.inf
    for _ in range(2):  # the first one is a warm-up
        started = time.perf_counter()
        logps = policy(work.batch(work.pairs).to(device))
        (logps.chosen.sum() - logps.rejected.sum()).backward()
        next(p for p in policy.parameters() if p.grad is not None).grad[0].sum().item()  # pyright: ignore
        best = min(best, time.perf_counter() - started)
        policy.zero_grad()
    return best


def changes(
    cfg: PlanConfig, now: Estimate, folder: str, dtype: torch.dtype, work: HeaviestBatch
) -> Iterator[str]:
    """Settings that would fit, each alone, the cheapest first."""
    machine = now.machine
    if now.most_tokens() >= max(work.longest, cfg.tokens_of_longest()):
        yield f"micro_batch_tokens={now.most_tokens()} fits"
    checkpointing = replace(cfg.model, gradient_checkpointing=True)
    tried = [("model.gradient_checkpointing=true", cfg.engine, checkpointing)]
    if work.tokens > TILE:  # fewer are computed at once
        tiled = replace(checkpointing, tiled_mlp=True)
        tried.append(("model.gradient_checkpointing=true model.tiled_mlp=true", cfg.engine, tiled))
        if machine.cuda:
            moved = replace(tiled, gradient_checkpointing="offload")
            tried.append(("model.gradient_checkpointing=offload model.tiled_mlp=true", cfg.engine, moved))
    if cfg.world_size > 1:
        two, three = (replace(cfg.engine, zero_stage=n, offload=False) for n in (2, 3))
        tried += [("engine=zero2", two, cfg.model), ("engine=zero3", three, cfg.model)]
        tried.append(("engine=zero3 model.gradient_checkpointing=true", three, checkpointing))
    if machine.cuda:
        offload = replace(cfg.engine, zero_stage=max(cfg.engine.zero_stage, 2), offload=True)
        name = f"engine=zero{offload.zero_stage}_offload model.gradient_checkpointing=true"
        tried.append((name, offload, checkpointing))
    adapter = replace(checkpointing, lora=LoraConfig())
    tried.append(("+model/lora=default model.gradient_checkpointing=true", cfg.engine, adapter))
    for name, engine, model in tried:
        try:
            other = estimated(replace(cfg, engine=engine, model=model), machine, folder, dtype, work)
        except UserError:  # this model cannot do that
            continue
        if other.fits:
            yield f"{name} fits, in {other.peak() / GB:.1f} GB"
        elif other.most_tokens() >= max(work.longest, cfg.tokens_of_longest()):
            yield f"{name} with micro_batch_tokens={other.most_tokens()} fits"


# --- what is printed


def rows_of(
    cfg: PlanConfig, estimate: Estimate, work: HeaviestBatch, seconds: float | None
) -> list[tuple[str, str]]:
    together = cfg.engine.sequence_parallel
    part = f"1/{together} of " if together > 1 else ""
    rows = [(name, f"{value / GB:.2f} GB") for name, value in estimate.parts().items()]
    rows.append(("peak", f"{estimate.peak() / GB:.2f} GB"))
    room = f"{estimate.machine.room / GB:.2f} GB, {estimate.machine.name}"
    rows.append((f"free; the plan {'fits' if estimate.fits else 'DOES NOT FIT'}", room))
    if estimate.engine.host:
        rows.append(("CPU memory, by offload", f"{estimate.engine.host / GB:.2f} GB"))
    rows.append(("heaviest micro-batch", f"{part}{len(work.pairs)} pairs, {work.tokens} tokens"))
    rows.append((f"{part}the longest pair" if part else "longest pair", f"{work.longest} tokens"))
    most = estimate.most_tokens()
    rows.append(("largest micro_batch_tokens that fits", str(most) if most >= work.longest else "none"))
    rows.append(("largest data.max_length that fits", str(most * together // 2) if most >= 2 else "none"))
    if seconds:
        note = f"{work.per_step} micro-batches per rank, without communication, the optimizer and scoring"
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
