"""What a rank of a run will hold: the estimate behind `sage plan` and `micro_batch_tokens=auto`.

The model's own code runs on the meta device (`sage.model.memory`), on a micro-batch of the run's own pairs.
What the engine takes follows from its design (`sage.model.footprint`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from sage import config
from sage.config import ScoreConfig, TrainConfig
from sage.data.packing import MicroBatch, collate, micro_tokens, pair_tokens, plan
from sage.data.tokens import Pair, TokenizedPairs
from sage.model.footprint import Footprint, footprint
from sage.model.memory import MicroBytes, micro_bytes, shell
from sage.order import Shuffled
from sage.training.base import BaseModel
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.processes import GB, free_memory
from sage.util.progress import activity, console

STEPS = 50  # steps' batches that are drawn to find the heaviest micro-batch
CUDA_CONTEXT = 0.8 * GB  # what the driver and NCCL take, beside torch's allocator
CHANGES = ", or set model.gradient_checkpointing=true; `sage plan` with the same options says what fits"
NAMES = {
    "step": "the optimizer's step",
    "buckets": "communication buffers",
    "spare": "left by loading, and kernels",
    "export": "copies for the export",
}
SPARE = 0.05  # share of the memory that fragments
MARGIN = 0.15  # share that micro_batch_tokens=auto leaves: estimates have been wrong by up to that


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

    def most_tokens(self, room: float | None = None) -> int:
        """Tokens of the largest micro-batch that fits into `room` bytes; 0 if not even the engine does."""
        room = self.machine.room * (1 - SPARE) if room is None else room
        left = room - self.peak(0.0) - self.line[0]
        return max(int(left / self.line[1]), 0)

    @property
    def fits(self) -> bool:
        return self.peak() <= self.machine.room * (1 - SPARE)


def this_machine(world_size: int, device: torch.device, starting: bool = False) -> Machine:
    """What is free here now, for each rank. `starting`: this process is one of them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Machine(True, float(free), CUDA_CONTEXT, torch.cuda.get_device_name(device))
    free = free_memory()
    own = psutil.Process().memory_info().rss  # this process has imported what a rank imports
    room = free / world_size + own * starting
    return Machine(False, room, own, "this machine's memory, shared by the ranks")


class PairSource(NamedTuple):
    """The pairs that micro-batches are made of.

    lengths: [n, 3] tokens of prompt, chosen and rejected.
    get: gives the pair at an index.
    keys: gives [m, 3] for m indices, equal for equal ids; None = no two pairs share tokens.
    """

    lengths: np.ndarray
    prefix: int
    layout: str
    get: Callable[[int], Pair]
    keys: Callable[[np.ndarray], np.ndarray] | None = None

    @classmethod
    def of(cls, pairs: TokenizedPairs, layout: str) -> PairSource:
        prefix = pairs.common_prefix if layout == "shared" else 0
        return cls(pairs.lengths(), prefix, layout, pairs.__getitem__, pairs.keys)


class HeaviestBatch(NamedTuple):
    """The heaviest micro-batch of some steps, and how many of them a rank computes in a step.

    With sequence parallelism a rank computes a part of it, and tokens are those of the part.
    """

    pairs: list[Pair]
    tokens: int
    prefix: int
    layout: str
    per_step: int
    longest: int  # tokens of the longest pair of all, by this layout

    def batch(self, pairs: Sequence[Pair]) -> MicroBatch:
        return collate(pairs, self.layout, self.prefix)


def heaviest(cfg: TrainConfig, source: PairSource, budget: int) -> HeaviestBatch:
    """The heaviest micro-batch of the first steps, if a rank computes at most `budget` tokens of each."""
    lengths, prefix, layout = source.lengths, source.prefix, source.layout
    together = cfg.engine.sequence_parallel  # ranks that compute each micro-batch
    order, chosen, most, rounds = Shuffled(len(lengths), cfg.seed), np.array([0]), 0, 1
    for _ in range(min(cfg.steps or STEPS, STEPS)):
        drawn = order.draw(cfg.batch_size)
        keys = np.arange(3 * len(drawn)).reshape(-1, 3) if source.keys is None else source.keys(drawn)
        plans = plan(lengths[drawn], budget * together, cfg.world_size // together, layout, prefix, keys)
        rounds = max(rounds, len(plans[0]))
        for members in (members for rank in plans for members in rank if members):
            total = micro_tokens(lengths[drawn[members]], keys[members], layout, prefix)[1]
            if total > most:
                chosen, most = drawn[members], total
    most, longest = (-(-n // together) for n in (most, int(pair_tokens(lengths, layout, prefix).max())))
    return HeaviestBatch([source.get(int(i)) for i in chosen], most, prefix, layout, rounds, longest)


def with_other_texts(pairs: Sequence[Pair], prefix: int) -> list[Pair]:
    """Pairs of the same lengths that share no text with these but the prefix. No model can read their ids."""

    def other(ids: list[int], kept: int = 0) -> list[int]:
        return [*ids[:kept], *(-1 - i for i in ids[kept:])]

    return [
        pair._replace(
            prompt_ids=other(pair.prompt_ids, prefix),
            chosen_ids=other(pair.chosen_ids),
            rejected_ids=other(pair.rejected_ids),
        )
        for pair in pairs
    ]


def estimated(
    cfg: TrainConfig, machine: Machine, folder: str, dtype: torch.dtype, work: HeaviestBatch
) -> Estimate:
    trains = not isinstance(cfg, ScoreConfig)  # `sage score-dataset` has no backward pass
    policy = shell(folder, cfg.model, dtype, cfg.engine.sequence_parallel)
    micro = micro_bytes(policy, work.batch(work.pairs), machine.cuda, trains)
    # A second point of the line, with twice the pairs. Most of a small one may not depend on its tokens.
    more = work.batch([*work.pairs, *with_other_texts(work.pairs, work.prefix)])
    rise = micro_bytes(policy, more, machine.cuda, trains).peak - micro.peak
    tokens = more.input_ids.numel() / cfg.engine.sequence_parallel
    slope = max(rise / (tokens - work.tokens), micro.kept / work.tokens)
    every = sum(p.numel() for p in policy.parameters())
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad) if trains else 0
    engine = footprint(trainable, every - trainable, dtype.itemsize, cfg.engine, cfg.world_size, machine.cuda)
    engine.host += micro.moved
    if not trains:
        engine.export = 0
    own_base = cfg.model.lora and not cfg.model.adapter_path and not cfg.reference_model
    if (cfg.reference == "online" and not own_base) if trains else cfg.reference_model:
        sharded = cfg.world_size if cfg.engine.zero_stage == 3 else 1
        engine.reference = every * dtype.itemsize / sharded
    return Estimate(machine, engine, micro, (micro.peak - slope * work.tokens, slope))


# --- micro_batch_tokens=auto


def settle_budget(
    cfg: TrainConfig, run_dir: Path, base: BaseModel, pairs: TokenizedPairs, layout: str, machine: Machine
) -> int:
    """`cfg.micro_batch_tokens` as a number. Where it is `auto`, the number goes into the frozen config too.

    Rank 0 decides, for the rank with the least memory. Every rank calls this, with its own `machine`.

    Raises:
        UserError: two rows of data.max_length do not fit, or the model's code cannot be planned.
    """
    if isinstance(cfg.micro_batch_tokens, int):
        return cfg.micro_batch_tokens
    everyone = ranks.gather(machine)
    least = machine._replace(room=min(m.room for m in everyone), base=max(m.base for m in everyone))

    def decide() -> int:
        with activity("choosing micro_batch_tokens"):
            source = PairSource.of(pairs, layout)
            tokens, why = largest_budget(cfg, base.folder, base.dtype, source, least)
        console.print(f"micro_batch_tokens=auto: {tokens}, {why}", markup=False)
        cfg.micro_batch_tokens = tokens
        config.write(cfg, run_dir)  # all ranks have read it; a resume takes the number from it
        return tokens

    cfg.micro_batch_tokens = tokens = ranks.main_only(decide)
    return tokens


def largest_budget(
    cfg: TrainConfig, folder: str, dtype: torch.dtype, source: PairSource, machine: Machine
) -> tuple[int, str]:
    """The largest micro_batch_tokens whose estimate leaves MARGIN of the memory, and why it is that one."""
    smallest, room = cfg.tokens_of_longest(), machine.room * (1 - MARGIN)
    # More than a rank's share of the heaviest step is never used.
    whole = max(heaviest(cfg, source, sys.maxsize).tokens, smallest)

    def at(budget: int) -> Estimate:
        return estimated(cfg, machine, folder, dtype, heaviest(cfg, source, budget))

    estimate, tokens = at(smallest), smallest
    most = min(estimate.most_tokens(room), whole)
    if most < smallest:
        raise UserError(
            f"micro_batch_tokens=auto: two rows of data.max_length={cfg.data.max_length} tokens, the longest "
            f"pair that the data may hold, do not fit into {room / GB:.1f} of {machine.room / GB:.1f} GB "
            f"({machine.name}). Lower data.max_length" + ("" if isinstance(cfg, ScoreConfig) else CHANGES)
        )
    while most > smallest:  # the line through a small micro-batch is not exact far away from it
        larger = at(most)
        if larger.peak() <= room:
            estimate, tokens = larger, most
            break
        most = min(larger.most_tokens(room), most * 9 // 10)
    limit = "all of a rank's pairs of a step" if tokens == whole else "the largest that fits"
    return tokens, (
        f"{limit}: about {estimate.peak() / GB:.1f} of {machine.room / GB:.1f} GB, {machine.name}"
    )
