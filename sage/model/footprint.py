"""Bytes per rank of what DeepSpeed keeps and uses for a step, from its design (version 0.19).

All figures are per rank. P trainable and F frozen elements have b bytes each in the run's dtype, and N ranks
share what is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage.config import EngineConfig
from sage.model.zero import BUCKET

FLOAT32 = 4
KERNELS = 150_000_000  # bytes; see ONEDNN_PRIMITIVE_CACHE_CAPACITY in sage.util.processes
LIVE = 1_000_000_000  # elements of weights that stage 3 gathers at most


@dataclass
class Footprint:
    """Bytes on the device, and `host` bytes in CPU memory under offload.

    What follows `optimizer` comes and goes, except `reference`.
    """

    weights: float
    gradients: float
    masters: float
    optimizer: float
    buckets: float
    step: float = 0.0
    spare: float = 0.0  # on a CPU: pages that loading left to the allocator, and oneDNN's kernels
    export: float = 0.0  # on a CPU: copies of the weights while they are written
    reference: float = 0.0  # a second model, for reference=online
    host: float = 0.0

    def kept(self) -> float:
        """Bytes that are there all the time."""
        return self.weights + self.gradients + self.masters + self.optimizer + self.reference


def footprint(
    trainable: int, frozen: int, dtype_bytes: int, engine: EngineConfig, ranks: int, cuda: bool
) -> Footprint:
    """What an engine takes for a model of these many elements."""
    half = dtype_bytes < FLOAT32
    stage = max(engine.zero_stage, 1) if half else engine.zero_stage  # as `deepspeed_config` does
    every, share = trainable + frozen, trainable / ranks
    # CUDA allocates the bucket. A CPU maps only the pages that are written.
    bucket = min(trainable, BUCKET) if cuda or ranks > 1 else 0
    if stage == 0:
        found = Footprint(
            weights=every * dtype_bytes,
            gradients=trainable * FLOAT32,
            masters=0,
            optimizer=2 * trainable * FLOAT32,
            buckets=min(trainable, BUCKET) * FLOAT32 if ranks > 1 else 0,
        )
    else:
        found = Footprint(
            weights=every * dtype_bytes / (ranks if stage == 3 else 1),
            gradients=share * FLOAT32 if stage > 1 else trainable * FLOAT32,
            masters=share * FLOAT32 if half or stage < 3 else 0,
            optimizer=2 * share * FLOAT32,
            buckets=bucket * (FLOAT32 if stage == 1 else dtype_bytes),
        )
    if stage == 3:
        found.buckets += min(every, LIVE) * dtype_bytes * (1 - 1 / ranks)  # weights gathered from other ranks
    elif stage > 0:
        found.step = share * FLOAT32 if cuda else 0  # the gradients again, in one piece
    if not cuda:
        found.spare = every * dtype_bytes + KERNELS
        found.export = 2 * every * dtype_bytes
    if engine.offload:
        found.host = found.masters + found.optimizer + share * FLOAT32
        found.masters = found.optimizer = found.step = 0
        if stage == 3:
            found.gradients = 0
            found.host += found.weights
            found.weights = 0
    return found
