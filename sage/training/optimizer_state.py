"""The optimizer's state beside an exported policy, with which another run can go on.

FOLDER/optimizer holds the engine's state, as a checkpoint does, so the trained weights are in it, too. With
an adapter that is FOLDER/adapter/optimizer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from sage.config import OptimizerConfig
from sage.data.source import resolve_path
from sage.model.engine import Engine, gathered
from sage.model.masters import trained
from sage.training.checkpoint import readable
from sage.util import checksums, ranks
from sage.util.errors import UserError, named
from sage.util.files import write_json
from sage.util.progress import console

OPTIMIZER_FOLDER = "optimizer"
ABOUT_FILE = "optimizer.json"


def write_optimizer(engine: Engine, cfg: OptimizerConfig, folder: Path) -> None:
    """Write the optimizer's state beside the trained weights in `folder`. Every rank calls this."""
    temporary = folder / f".{OPTIMIZER_FOLDER}.tmp"
    ranks.main_only(temporary.mkdir)
    engine.save(temporary)
    if ranks.rank() == 0:
        for script in temporary.glob("*.py"):  # DeepSpeed's. They would count as code of the model.
            script.unlink()
        write_json(temporary / ABOUT_FILE, {**kind(engine, cfg), "world_size": ranks.world_size()})
    ranks.barrier()
    checksums.seal(temporary)
    if ranks.rank() == 0:
        temporary.rename(folder / OPTIMIZER_FOLDER)
    ranks.barrier()


def kind(engine: Engine, cfg: OptimizerConfig) -> dict[str, Any]:
    """What must be the same where the state is read. It holds these options of the optimizer, too."""
    shapes = {name: [*getattr(p, "ds_shape", p.shape)] for name, p in trained(engine).items()}
    return {
        "optimizer": engine.optimizer_class,
        "ZeRO stage": engine.deepspeed.zero_optimization_stage(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "weights": f"{len(shapes)} weights, {checksums.digest(shapes)[:12]}",
        "optimizer.betas": [*cfg.betas],
        "optimizer.eps": cfg.eps,
        "optimizer.weight_decay": cfg.weight_decay,
        "optimizer.max_grad_norm": cfg.max_grad_norm,
    }


def check_optimizer(cfg: OptimizerConfig) -> None:
    """Refuse a folder to go on from that `write_optimizer` has not written. Every rank calls this."""
    folder = cfg.continue_from
    if folder is not None and not ranks.main_only(Path(resolve_path(folder), ABOUT_FILE).is_file):
        raise UserError(
            f"optimizer.continue_from={folder}: there is no optimizer's state. A run with "
            f"export_optimizer=true writes one to final/{OPTIMIZER_FOLDER}. null means a fresh optimizer"
        )


def read_optimizer(engine: Engine, cfg: OptimizerConfig) -> None:
    """Let a run begin with the optimizer's state of another one, if it is to. Every rank calls this.

    Raises:
        UserError: it is damaged, does not fit this run, or belongs to other weights than it begins with.
    """
    if cfg.continue_from is None:
        return
    check_optimizer(cfg)
    given, folder = f"optimizer.continue_from={cfg.continue_from}", Path(resolve_path(cfg.continue_from))
    remedy = "begin with another one, or with a fresh optimizer (null)"
    if damaged := checksums.damaged(folder):
        raise UserError(f"{given} is damaged ({named(damaged)}): put it back, or {remedy}")
    with readable(folder, remedy):
        about = ranks.main_only(lambda: json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8")))
        for name, value in kind(engine, cfg).items():
            if about[name] != value:
                raise UserError(
                    f"{given} is the state of a run with another {name}: {about[name]}, and this run has "
                    f"{value}: {remedy}"
                )
        before = weights_digest(engine)
        engine.load(folder, about["world_size"])
    if weights_digest(engine) != before:
        raise UserError(f"{given} belongs to other weights than those that this run begins with: {remedy}")
    console.print(f"the optimizer goes on from {folder}", markup=False)


def weights_digest(engine: Engine) -> str:
    """Hash of the weights that are trained, as the forward pass uses them. Every rank calls this."""
    found = hashlib.sha256()
    for weight in trained(engine).values():
        with gathered([weight]):
            found.update(weight.detach().flatten().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()
