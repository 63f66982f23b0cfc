"""Reference log-probabilities: cached on disk, from a second model, or none.

Unless `reference_model` names another model, the reference is the initial policy, also after a resume and
with adapters. So the policy itself computes the cached ones, before its first step and before any checkpoint
is restored, with the same forward pass. At step 0 the loss is therefore ln 2, up to rounding.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sage.data.packing import MicroBatch
from sage.data.tokens import TokenizedPairs
from sage.model.forward import PairForward
from sage.model.logps import LogitStats, PairLogps
from sage.util import ranks
from sage.util.errors import UserError, named
from sage.util.files import source_digest, write_whole
from sage.util.progress import activity, console

MANIFEST_FILE, METADATA_KEY, SCORES_FOLDER = "manifest.json", "sage", "scores"  # of score-dataset


# Micro-batches that each rank computes between two writes of a pass over all pairs.
PART = 32


class Reference(Protocol):
    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        """Log-probabilities under the reference of n pairs, which `batch` holds in the order of `indices`."""
        ...

    def lookup(self, indices: np.ndarray) -> PairLogps | None:
        """The same without a batch; None if a model has to compute them."""
        ...


def reference_logps(
    reference: Reference, forward: PairForward, pairs: TokenizedPairs, indices: np.ndarray
) -> PairLogps:
    """Log-probabilities of n pairs under the reference, from memory or else by a forward pass.

    The pass is no cost of training: a cache would save it, and no method does without it.
    """
    if (known := reference.lookup(indices)) is not None:
        return known
    costs = dict(forward.costs)
    found = forward.all_logps(pairs, indices, model=reference)
    forward.costs.update(costs)
    return found


class Cached:
    """Log-probabilities of every pair under the model of `forward`: read from disk, or computed and kept.

    `of_policy` says whether that model is the policy before its first step.
    """

    logit: LogitStats | None = None  # statistics of the same policy, [pairs] each, if they are known too

    def __init__(
        self,
        forward: PairForward,
        pairs: TokenizedPairs,
        key: dict[str, str],
        cache_dir: str,
        name: str,
        of_policy: bool = True,
    ):
        self.of_policy = of_policy
        software = {p: importlib.metadata.version(p) for p in ("sage-align", "torch", "transformers")}
        software |= {"code": source_digest("model", "data"), "device": device_name(forward.engine.device)}
        digest = hashlib.sha256(
            json.dumps({**key, **software, "pairs": pairs.fingerprint}, sort_keys=True).encode()
        ).hexdigest()
        file = Path(cache_dir).expanduser() / "reference" / f"{digest[:32]}.safetensors"
        known = cached = ranks.main_only(lambda: read_logps(file, len(pairs)))
        parts = file.with_suffix(".parts")
        if known is None:
            known = compute(forward, pairs, parts, f"reference log-probabilities of the {name} pairs")
            check_finite(known, pairs)
        # On each machine, because the run may be restarted with rank 0 on another one.
        if ranks.local_rank() == 0 and (cached is None or not file.exists()):
            write_logps(file, known)
        if ranks.rank() == 0:
            shutil.rmtree(parts, ignore_errors=True)
        self.logps = known

    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return PairLogps(*(values.to(batch.input_ids.device) for values in self.lookup(indices)))

    def lookup(self, indices: np.ndarray) -> PairLogps:
        return PairLogps(*(values[torch.from_numpy(indices)] for values in self.logps))


def device_name(device: torch.device) -> str:
    """What kind of device it is. Kinds of GPU round differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def known_policy(reference: Reference, step: int) -> Cached | None:
    """The reference, if it holds the log-probabilities that the policy has at this step."""
    return reference if step == 0 and isinstance(reference, Cached) and reference.of_policy else None


def compute(forward: PairForward, pairs: TokenizedPairs, folder: Path, title: str) -> PairLogps:
    """Log-probabilities of all pairs under the policy, on the CPU. Every rank calls this.

    A large set is computed part by part, with the pairs of one prompt side by side. Rank 0 writes each part
    to `folder`. If the run is killed, the next one continues after the last part.
    """
    order = pairs.by_prompt()
    parts = ranks.main_only(lambda: read_parts(folder))
    done = sum(len(part.chosen) for part in parts)
    tokens = float(pairs.lengths().sum()) / len(pairs)
    size = max(int(PART * forward.budget * ranks.world_size() / tokens), 1)  # pairs of a part
    with activity(title, len(pairs), done) as shown:
        for start in range(done, len(pairs), size):
            end = min(start + size, len(pairs))
            part = forward.all_logps(pairs, order[start:end])
            parts.append(PairLogps(*(values.contiguous() for values in part)))
            if ranks.rank() == 0 and end < len(pairs):
                with suppress(FileNotFoundError):  # a run with the same pass has ended, and removed `folder`
                    write_logps(folder / f"{start:010}-{end:010}.safetensors", parts[-1])
            shown.advance(end - start)
    places = torch.from_numpy(np.argsort(order))
    return PairLogps(*(torch.cat(values)[places] for values in zip(*parts, strict=True)))


def read_parts(folder: Path) -> list[PairLogps]:
    """The parts that follow each other from the first pair of the pass on, and are intact."""
    parts, done = [], 0
    for file in sorted(folder.glob("*.safetensors")):
        start, end = map(int, file.stem.split("-"))
        part = read_logps(file, end - start) if start == done else None
        if part is None:
            break
        parts.append(part)
        done = end
    return parts


def write_logps(file: Path, logps: PairLogps) -> None:
    """Keep log-probabilities on disk, with a checksum."""
    tensors = logps._asdict()
    write_whole(file, partial(save_file, tensors, metadata={"checksum": checksum(tensors)}))


def read_logps(file: Path, pairs: int) -> PairLogps | None:
    """What `write_logps` wrote for this many pairs; None, with a line, if the file is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in PairLogps._fields}
            intact = (content.metadata() or {}).get("checksum") == checksum(tensors)
    except (SafetensorError, OSError):
        intact, tensors = False, {}
    if not intact or any(values.shape != (pairs,) for values in tensors.values()):
        console.print(f"{file} is damaged: the reference log-probabilities are computed again")
        return None
    return PairLogps(**tensors)


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def check_finite(logps: PairLogps, pairs: TokenizedPairs) -> None:
    """Refuse an initial policy whose forward pass is broken.

    Raises:
        UserError: a log-probability is NaN or infinite.
    """
    broken = ~(logps.chosen + logps.rejected).isfinite()
    if broken.any():
        examples = named(pairs.pair_ids(broken.numpy().nonzero()[0]).tolist())
        raise UserError(
            f"the model itself gives log-probabilities that are not finite for {int(broken.sum())} of "
            f"{len(pairs)} pairs, before any training: {examples}. Use model.dtype=float32 or another model, "
            "or look at these pairs"
        )


class Scored(Cached):
    """The output of `sage score-dataset`. If its policy was its own reference, that includes `logit`."""

    def __init__(self, run_dir: str, pairs: TokenizedPairs, key: dict[str, str], of_policy: bool = True):
        self.of_policy = of_policy
        self.logps, self.logit = ranks.main_only(lambda: read_scores(run_dir, pairs, key))


def read_scores(
    run_dir: str, pairs: TokenizedPairs, key: dict[str, str]
) -> tuple[PairLogps, LogitStats | None]:
    """What `sage score-dataset` wrote about these pairs.

    Raises:
        UserError: the scores are incomplete, or belong to another model, dtype or dataset.
    """
    files = sorted(Path(run_dir, SCORES_FOLDER).expanduser().glob("*.parquet"))
    if not files:
        raise UserError(
            f"data.scores={run_dir}: there is no {SCORES_FOLDER}/*.parquet. Give the folder of a "
            "finished `sage score-dataset`"
        )
    shards = [pq.read_table(file) for file in files]
    manifests = {(shard.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}") for shard in shards}
    manifest = json.loads(manifests.pop())
    if manifests or sum(map(len, shards)) != manifest.get("pairs", {}).get("count"):
        raise UserError(f"data.scores={run_dir}: its files are not those of one `sage score-dataset` run")
    reference, dataset = manifest["reference"], manifest["pairs"]
    for name, value in key.items():
        if reference[name] != value:
            raise UserError(
                f"data.scores={run_dir} holds scores of another model: {name} is {reference[name]} there "
                f"({reference['path']}) and {value} here. Score this model, or leave data.scores out"
            )
    if dataset["fingerprint"] != pairs.fingerprint:
        raise UserError(
            f"data.scores={run_dir} holds scores of other pairs: {dataset['count']} of {dataset['path']} "
            f"there, {len(pairs)} here. Tokenizer, data and limits must be those of the scored set, in "
            "the same order"
        )
    table = pa.concat_tables(shards)
    if table["pair_id"].to_pylist() != pairs.pair_ids().tolist():
        raise UserError(
            f"data.scores={run_dir}: its pairs have another order or other ids than data.path's: were the "
            "files of scores renamed, or the pair_ids changed? Score the pairs again"
        )
    return logps_of(table, "reference"), logit_of(table) if manifest["policy"] == reference else None


def logps_of(table: pa.Table, model: str) -> PairLogps:
    """Log-probabilities under `model` (policy or reference), from the columns of score-dataset."""
    names = (f"{model}_chosen_logps", f"{model}_rejected_logps", "chosen_tokens", "rejected_tokens")
    return PairLogps(*(torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in names))


def logit_of(table: pa.Table) -> LogitStats:
    return LogitStats(*(torch.tensor(table[f"logit_{name}"].to_numpy()) for name in LogitStats._fields))


class Online:
    """Runs a frozen model in every step: the policy without its adapter, or a copy of the first policy."""

    def __init__(self, model: Callable[..., PairLogps], adapters_off: bool):
        self.model, self.adapters_off = model, adapters_off

    @torch.no_grad()
    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return self.model(batch, reference=self.adapters_off)

    def lookup(self, indices: np.ndarray) -> None:
        return None


class Absent:
    """Zeros, for reference-free losses: an implicit reward is then beta times a log-probability."""

    def __init__(self, pairs: TokenizedPairs):
        self.tokens = torch.from_numpy(pairs.lengths()[:, 1:]).float()

    def __call__(self, indices: np.ndarray, batch: MicroBatch) -> PairLogps:
        return PairLogps(*(values.to(batch.input_ids.device) for values in self.lookup(indices)))

    def lookup(self, indices: np.ndarray) -> PairLogps:
        zeros = torch.zeros(len(indices))
        return PairLogps(zeros, zeros, *self.tokens[torch.from_numpy(indices)].unbind(1))
