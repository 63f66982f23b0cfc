"""The float32 weights behind an exported policy, from which another run goes on without rounding.

A run in bfloat16 trains float32 weights, and its export is their rounding. A weight of 0.05 moves in steps of
2.4e-4 there, so what a short run or a small learning rate has changed by less than half of that is lost.
FOLDER/float32 keeps it, under the names of the Policy module.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sage.model.engine import Engine, gathered, master_weight, set_master_weight
from sage.util import checksums, ranks
from sage.util.errors import UserError, named
from sage.util.progress import console

MASTERS_FOLDER = "float32"
PART = 2**30  # bytes of a file; rank 0 holds one file's weights at a time


def write_masters(engine: Engine, folder: Path) -> None:
    """Write the float32 weights of a policy that was exported to `folder`. Every rank calls this.

    A float32 run writes none, since its export is exact.
    """
    if engine.dtype == torch.float32:
        return
    final, main = folder / MASTERS_FOLDER, ranks.rank() == 0
    temporary = final.with_name(f".{MASTERS_FOLDER}.tmp")
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    pending: dict[str, Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if pending:
            save_file(pending, temporary / f"{files:05d}.safetensors", {"dtype": str(engine.dtype)})
            pending.clear()
            files += 1

    for name, weight in trained(engine).items():
        value = master_weight(weight)
        if value is None:
            raise UserError(
                "export_float32=true: DeepSpeed shows no float32 weights with this engine and "
                "model.dtype: set engine=zero1 or export_float32=false"
            )
        if main:
            if sum(held.nbytes for held in pending.values()) + value.nbytes > PART:
                flush()
            pending[name] = value.cpu()
    if main:
        flush()
    ranks.barrier()
    checksums.seal(temporary)
    if main:
        temporary.rename(final)
    ranks.barrier()


def read_masters(engine: Engine, folder: Path, name: str) -> None:
    """Let a run begin with the float32 weights that are kept beside its model, if they are.

    Args:
        folder: the model's.
        name: of the model, for messages.

    Raises:
        UserError: they are damaged, or are not those of this model.
    """
    kept = folder / MASTERS_FOLDER
    files = ranks.main_only(lambda: sorted(kept.glob("*.safetensors")))
    if not files:
        return
    remedy = f"put it back, or delete {kept} to begin with the rounded weights of model.path={name}"
    if damaged := checksums.damaged(kept):
        raise UserError(f"{kept} is damaged ({named(damaged)}): {remedy}")
    left = trained(engine)
    for file in files:
        with safe_open(file, "pt") as content:
            if (dtype := content.metadata()["dtype"]) != str(engine.dtype):
                console.print(
                    f"{kept} is not used: it belongs to weights in {dtype}, and this run has {engine.dtype}",
                    markup=False,
                )
                return
            for key in content.keys():  # noqa: SIM118, it is no dict
                weight, value = left.pop(key, None), content.get_tensor(key)
                if weight is None or not is_rounding(weight, value):
                    raise UserError(f"{kept} holds other weights than the model ({key}): {remedy}")
                set_master_weight(weight, value)
    if left:
        raise UserError(f"{kept} lacks weights of the model ({named(list(left))}): {remedy}")
    console.print(f"float32 weights go on from {kept}", markup=False)


def trained(engine: Engine) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in engine.policy.named_parameters() if weight.requires_grad}


def is_rounding(weight: nn.Parameter, value: Tensor) -> bool:
    """Whether a 16-bit weight is this float32 one, rounded. Every rank calls this."""
    with gathered([weight]):
        return torch.equal(weight.data.cpu(), value.to(weight.dtype))
