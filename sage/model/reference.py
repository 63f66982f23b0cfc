"""Reference log-probabilities: cached on disk, from a second model, or none.

The reference is the initial policy, also after a resume and with adapters. So the cached ones are computed by the
policy itself before its first step and before any checkpoint is restored, through the same forward: at step 0 the
loss is ln 2 but for rounding.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from sage.config import ModelConfig
from sage.data.packing import MicroBatch
from sage.data.tokens import TokenizedPairs
from sage.model import loading
from sage.model.forward import PairForward
from sage.model.logps import LogitStats, PairLogps
from sage.util.errors import UserError, named
from sage.util.files import write_whole
from sage.util.ranks import main_first

MANIFEST_FILE, METADATA_KEY, SCORES_FOLDER = "manifest.json", "sage", "scores"  # of score-dataset


class Reference(Protocol):
    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        """Log-probabilities under the reference of the n pairs `indices`, which `batch` holds in this order."""
        ...

    def lookup(self, indices: np.ndarray) -> PairLogps | None:
        """The same without a batch, where no model has to be asked."""
        ...


def ask(reference: Reference, forward: PairForward, pairs: TokenizedPairs, indices: np.ndarray) -> PairLogps:
    """Log-probabilities of n pairs under the reference, from memory where it holds them, else by a forward of each."""
    known = reference.lookup(indices)
    return forward.all_logps(pairs, indices, model=reference) if known is None else known


def identity(folder: str, model: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    """What the log-probabilities of a model in `folder` depend on, besides the pairs."""
    weights = loading.fingerprint(folder, model.adapter_path)
    return {"weights": weights, "dtype": str(dtype), "attention": model.attention, "head": model.head}


class Cached:
    """Reads from disk what the initial policy said of every pair; computes and writes it the first time."""

    logit: LogitStats | None = None  # where it is known too: of the initial policy, [pairs] each

    def __init__(
        self, forward: PairForward, pairs: TokenizedPairs, key: dict[str, str], cache_dir: str, name: str
    ):
        software = {p: importlib.metadata.version(p) for p in ("sage-align", "torch", "transformers")}
        digest = hashlib.sha256(
            json.dumps({**key, **software, "pairs": pairs.fingerprint}, sort_keys=True).encode()
        ).hexdigest()
        file = Path(cache_dir).expanduser() / "reference" / f"{digest[:32]}.safetensors"
        if not main_first(file.is_file):
            logps = forward.all_logps(
                pairs, np.arange(len(pairs)), f"reference log-probabilities of the {name} pairs"
            )
            check_finite(logps, pairs)
            if forward.engine.rank == 0:
                tensors = {k: v.cpu().contiguous() for k, v in logps._asdict().items()}
                write_whole(file, partial(save_file, tensors))
            forward.engine.barrier()
        self.logps = PairLogps(**load_file(file))

    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return PairLogps(*(values.to(batch.input_ids.device) for values in self.lookup(indices)))

    def lookup(self, indices: np.ndarray) -> PairLogps:
        return PairLogps(*(values[torch.from_numpy(indices)] for values in self.logps))


def check_finite(logps: PairLogps, pairs: TokenizedPairs) -> None:
    """Refuse an initial policy whose forward pass is broken.

    Raises:
        UserError: a log-probability is NaN or infinite.
    """
    broken = ~(logps.chosen + logps.rejected).isfinite()
    if broken.any():
        examples = named(pairs.pair_ids()[broken.cpu().numpy()].tolist())
        raise UserError(
            f"the model itself gives log-probabilities that are not finite for {int(broken.sum())} of {len(pairs)} "
            f"pairs, before any training: {examples}. Use model.dtype=float32 or another model, or look at these pairs"
        )


class Scored(Cached):
    """Reads what `sage score-dataset` wrote; `logit` too, where the policy that it asked was its own reference.

    Raises:
        UserError: the scores are not whole, or of another model, dtype or dataset.
    """

    def __init__(self, run_dir: str, pairs: TokenizedPairs, key: dict[str, str]):
        files = sorted(Path(run_dir, SCORES_FOLDER).expanduser().glob("*.parquet"))
        if not files:
            raise UserError(
                f"data.scores={run_dir}: no {SCORES_FOLDER}/*.parquet there, as a finished `sage score-dataset` leaves"
            )
        shards = [pq.read_table(file) for file in files]
        manifests = {(shard.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}") for shard in shards}
        manifest = json.loads(manifests.pop())
        if manifests or sum(map(len, shards)) != manifest.get("pairs", {}).get("count"):
            raise UserError(f"data.scores={run_dir}: its files are not all of one `sage score-dataset`")
        reference, dataset = manifest["reference"], manifest["pairs"]
        for name, value in key.items():
            if reference[name] != value:
                raise UserError(
                    f"data.scores={run_dir}: scores of another model: {name} is {reference[name]} there ({reference['path']}) "
                    f"and {value} here; score this model, or leave data.scores out"
                )
        if dataset["fingerprint"] != pairs.fingerprint:
            raise UserError(
                f"data.scores={run_dir}: scores of other pairs: {dataset['count']} of {dataset['path']} there, {len(pairs)} "
                "here; model, data and limits must be those of the scored set, in the same order"
            )
        table = pa.concat_tables(shards)
        self.logps = logps_of(table, "reference")
        self.logit = logit_of(table) if manifest["policy"] == reference else None


def logps_of(table: pa.Table, model: str) -> PairLogps:
    """What `model` (policy or reference) said, from the columns of score-dataset."""
    names = (f"{model}_chosen_logps", f"{model}_rejected_logps", "chosen_tokens", "rejected_tokens")
    return PairLogps(*(torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in names))


def logit_of(table: pa.Table) -> LogitStats:
    return LogitStats(*(torch.tensor(table[f"logit_{name}"].to_numpy()) for name in LogitStats._fields))


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
