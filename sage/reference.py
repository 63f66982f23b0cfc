"""Reference log-probabilities: cached on disk, from a second model, or none.

The reference is the initial policy, also after a resume and with adapters. So the cached ones are computed by the
policy itself before its first step and before any checkpoint is restored, through the same forward: at step 0 the
loss is exactly ln 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sage.batches import PairForward
from sage.engine import main_first
from sage.losses import PairLogps
from sage.packing import MicroBatch
from sage.pairs import TokenizedPairs


class Reference(Protocol):
    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        """Log-probabilities under the reference of the n pairs `indices`, which `batch` holds in this order."""
        ...

    def lookup(self, indices: np.ndarray) -> PairLogps | None:
        """The same without a batch, where no model has to be asked."""
        ...


class Cached:
    """Reads from disk what the initial policy said of every pair; computes and writes it the first time."""

    def __init__(
        self, forward: PairForward, pairs: TokenizedPairs, key: dict[str, str], cache_dir: str, name: str
    ):
        digest = hashlib.sha256(
            json.dumps({**key, "pairs": pairs.fingerprint}, sort_keys=True).encode()
        ).hexdigest()
        file = Path(cache_dir).expanduser() / "reference" / f"{digest[:32]}.safetensors"
        if not main_first(file.is_file):
            logps = forward.all_logps(
                pairs, np.arange(len(pairs)), f"reference log-probabilities of the {name} pairs"
            )
            if forward.engine.rank == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(f".{id(logps)}.tmp")
                save_file({k: v.cpu().contiguous() for k, v in logps._asdict().items()}, temporary)
                temporary.rename(file)
            forward.engine.barrier()
        self.logps = PairLogps(**load_file(file))

    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return PairLogps(*(values.to(batch.input_ids.device) for values in self.lookup(indices)))

    def lookup(self, indices: np.ndarray) -> PairLogps:
        return PairLogps(*(values[torch.from_numpy(indices)] for values in self.logps))


class Online:
    """Asks a frozen model in every step: the policy without its fresh adapter, or a second copy of the initial one."""

    def __init__(self, model: Callable[..., PairLogps], adapters_off: bool):
        self.model, self.adapters_off = model, adapters_off

    @torch.no_grad()
    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return self.model(batch, reference=self.adapters_off)

    def lookup(self, indices: np.ndarray) -> None:
        return None


class Absent:
    """For reference-free losses: zeros, so that an implicit reward is beta times a log-probability."""

    def __init__(self, pairs: TokenizedPairs):
        self.tokens = torch.from_numpy(pairs.lengths()[:, 1:]).float()

    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return PairLogps(*(values.to(batch.input_ids.device) for values in self.lookup(indices)))

    def lookup(self, indices: np.ndarray) -> PairLogps:
        zeros = torch.zeros(len(indices))
        return PairLogps(zeros, zeros, *self.tokens[torch.from_numpy(indices)].unbind(1))
