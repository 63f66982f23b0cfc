"""The float32 weights behind an exported policy, from which another run goes on without rounding.

A run in bfloat16 trains float32 weights, and its export is their rounding. A weight of 0.05 moves in steps of
2.4e-4 there, so what a short run or a small learning rate has changed by less than half of that is lost.
FOLDER/float32 keeps it, under the names of the Policy module. With an adapter that is FOLDER/adapter/float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sage.config import ModelConfig
from sage.data.source import resolve_path
from sage.model.engine import Engine, gathered, master_weight, set_master_weight
from sage.util import checksums, ranks
from sage.util.errors import UserError, named
from sage.util.progress import console

MASTERS_FOLDER = "float32"
PARTS = "[0-9]*.safetensors"  # the names of its files
PART = 2**30  # bytes of a file; rank 0 holds one file's weights at a time


def write_masters(engine: Engine, folder: Path) -> None:
    """Write the float32 weights behind the trained ones in `folder`. Every rank calls this.

    A float32 run writes none, since its export is exact.
    """
    if engine.dtype == torch.float32:
        return
    main, temporary = ranks.rank() == 0, folder / f".{MASTERS_FOLDER}.tmp"
    if main:
        temporary.mkdir()
    for number, part in enumerate(parts(engine)):
        if main:
            save_file(part, temporary / f"{number:05d}.safetensors")
    ranks.barrier()
    checksums.seal(temporary)
    if main:
        temporary.rename(folder / MASTERS_FOLDER)
    ranks.barrier()


def parts(engine: Engine) -> Iterator[dict[str, Tensor]]:
    """The float32 weights in the order of the model, a file's at a time; nothing on other ranks than 0."""
    part: dict[str, Tensor] = {}
    for name, weight in trained(engine).items():
        value = master_weight(weight)
        if ranks.rank() != 0:
            continue
        if part and sum(held.nbytes for held in part.values()) + value.nbytes > PART:
            yield part
            part = {}
        part[name] = value.cpu()
    yield part


def read_masters(engine: Engine, cfg: ModelConfig, folder: str) -> None:
    """Let a run begin with the float32 weights that are kept beside those it trains, if they are.

    Args:
        folder: the model's.

    Raises:
        UserError: they are damaged, or are not those of this model.
    """
    given = f"{key_of(cfg)}={cfg.adapter_path or cfg.path}"
    kept = trained_folder(cfg, folder) / MASTERS_FOLDER
    if not ranks.agreed(lambda: sealed(kept), f"the float32 weights beside {given}"):
        return
    fresh = has_fresh_adapter(cfg)
    if fresh or engine.dtype == torch.float32:
        reason = "trains a fresh adapter" if fresh else "computes in float32"
        console.print(f"{kept} is not used: this run {reason}", markup=False)
        return
    remedy = f"put it back, or begin with the rounded weights, from a copy of {given} without it"
    if damaged := checksums.damaged(kept):
        raise UserError(f"{kept} is damaged ({named(damaged)}): {remedy}")
    left = trained(engine)
    for file in sorted(kept.glob(PARTS)):
        with safe_open(file, "pt") as content:
            for key in content.keys():  # noqa: SIM118, it is no dict
                weight, value = left.pop(key, None), content.get_tensor(key)
                if weight is None or not is_rounding(weight, value):
                    raise UserError(f"{kept} holds other weights than the model ({key}): {remedy}")
                set_master_weight(weight, value)
    if left:
        raise UserError(f"{kept} lacks weights of the model ({named(list(left))}): {remedy}")
    console.print(f"float32 weights go on from {kept}", markup=False)


def has_fresh_adapter(cfg: ModelConfig) -> bool:
    """Whether a run trains weights that no folder holds yet."""
    return cfg.lora is not None and cfg.adapter_path is None


def key_of(cfg: ModelConfig) -> str:
    """The key that names the weights which a run goes on training."""
    return "model.path" if cfg.adapter_path is None else "model.adapter_path"


def trained_folder(cfg: ModelConfig, folder: str) -> Path:
    """The folder of those weights, given that of the model."""
    return Path(folder if cfg.adapter_path is None else resolve_path(cfg.adapter_path))


def sealed(kept: Path) -> str:
    """The checksums of a folder of float32 weights, in which they may be missing; empty if there is none."""
    file = kept / checksums.CHECKSUMS_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace") or "missing"
    return "missing" if any(kept.glob(PARTS)) else ""


def trained(engine: Engine) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in engine.policy.named_parameters() if weight.requires_grad}


def is_rounding(weight: nn.Parameter, value: Tensor) -> bool:
    """Whether a bfloat16 weight is this float32 one, rounded. Every rank calls this."""
    with gathered([weight]):
        return torch.equal(weight.data.cpu(), value.to(weight.dtype))
