"""Checkpoints: written whole or not at all, restored exactly.

`checkpoints/step_N/` holds the engine's state (weights, master weights, optimizer), the best policy so far,
and `train_state.pt`, with everything else that decides the future of a run. It is written under a temporary
name, flushed to disk and then renamed, so a folder with the final name is complete. `checksums.json` says
whether it is still what it was.
"""

from __future__ import annotations

import itertools
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage.model.engine import Engine
from sage.util import ranks
from sage.util.checksums import damaged, seal
from sage.util.errors import UserError, describe, named
from sage.util.files import fsync, link_folder
from sage.util.progress import console
from sage.util.ranks import main_only

BEST_FOLDER = "best"  # of the run, and of each of its checkpoints
SIDECAR = "train_state.pt"


@dataclass
class TrainState:
    """What a run needs, besides the engine's state, to continue as if it had never stopped."""

    data_fingerprint: str
    world_size: int
    model: str  # fingerprint of the initial model's files
    optimizer: str  # class of the optimizer, whose state the engine keeps
    computation: str  # layout and head that the self-check chose
    inputs: dict[str, str]  # key -> fingerprint of the file that it names
    step: int = 0
    selection: dict[str, Any] = field(default_factory=dict)  # with the curriculum's and the scorer's
    costs: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)  # held-out metrics before the first step
    seconds: float = 0.0  # spent in steps
    evaluated: int = -1  # the step of the last evaluation, and its metrics
    latest: dict[str, float] = field(default_factory=dict)
    best: float | None = None  # the best value of the metric that `select` names, and its step
    best_step: int = -1
    stale: int = 0  # evaluations since then
    rng: list[dict[str, Tensor | None]] = field(default_factory=list)  # one entry per rank


def rng_state() -> dict[str, Tensor | None]:
    """The states of torch's generators on this rank, which an adapter's dropout draws from.

    Nothing else draws from a global generator: data order, selection and sampling have their own.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Tensor | None]) -> None:
    assert state["torch"] is not None
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def save(engine: Engine, state: TrainState, run_dir: Path, keep: int) -> None:
    """Write checkpoints/step_N atomically, on all ranks together, and delete all but the newest `keep`."""
    final = folder_of(run_dir, state.step)
    if main_only(final.exists):  # a signal came right after it was written
        return
    temporary = final.with_name(f".{final.name}.tmp")
    if ranks.rank() == 0:
        for left in final.parent.glob(".step_*"):  # by a kill
            shutil.rmtree(left)
    ranks.barrier()
    temporary.mkdir(parents=True, exist_ok=True)
    state.rng = ranks.gather(rng_state())
    engine.save(temporary)
    ranks.barrier()
    if ranks.rank() == 0:
        torch.save(asdict(state), temporary / SIDECAR)
        if state.best is not None:  # a later evaluation may replace it, and then be undone by a resume
            link_folder(run_dir / BEST_FOLDER, temporary / BEST_FOLDER)
    seal(temporary)
    if ranks.rank() == 0:
        for file in [*temporary.rglob("*"), temporary]:
            fsync(file)
        temporary.rename(final)
        fsync(final.parent)
        for old in list_checkpoints(run_dir)[:-keep]:
            doomed = old.with_name(f".{old.name}.old")
            old.rename(doomed)  # a kill must not leave half of it under its name
            shutil.rmtree(doomed)
    ranks.barrier()


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints, oldest first. Some may be damaged."""
    found = (run_dir / "checkpoints").glob("step_*")
    found = [folder for folder in found if re.fullmatch(r"step_[0-9]+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))


def newest_intact(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are what they were. A damaged one is set aside, with one line."""
    for folder in reversed(main_only(lambda: list_checkpoints(run_dir))):
        if not (files := damaged(folder)):
            return folder
        aside = main_only(lambda folder=folder: set_aside(folder))
        console.print(f"{folder} is damaged ({named(files)}): it is set aside as {aside.name}", markup=False)
    return None


def set_aside(folder: Path) -> Path:
    numbers = itertools.count(1)
    aside = folder.with_name(f"{folder.name}.damaged")
    while aside.exists():
        aside = folder.with_name(f"{folder.name}.damaged{next(numbers)}")
    return folder.rename(aside)


@contextmanager
def readable(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the errors of a state that is damaged, or of another version, into a UserError."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "PytorchStreamReader" not in str(e):
            raise
        raise UserError(
            f"{folder} was not written by sage, although its checksums are right: {remedy}"
        ) from e
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(
            f"{folder} was written by another version of sage, and this version cannot read it "
            f"({describe(e)}): {remedy}"
        ) from e


def restore(engine: Engine, state: TrainState, folder: Path) -> TrainState:
    """Load a checkpoint into the engine and the generators, and return its TrainState.

    Raises:
        UserError: the checkpoint belongs to other inputs, another initial model or another optimizer.
    """
    saved = TrainState(**torch.load(folder / SIDECAR, weights_only=True))
    if saved.data_fingerprint != state.data_fingerprint:
        raise UserError(
            f"{folder}: data.path or data.sources no longer holds the pairs that this run began with, or "
            "this version of sage reads them differently"
        )
    if saved.model != state.model:
        raise UserError(
            f"{folder}: the files of model.path, model.adapter_path or reference_model have changed since "
            "this run began, so its reference would change: put the old files back, or start a new run"
        )
    for key, fingerprint in saved.inputs.items():
        if state.inputs.get(key) != fingerprint:
            raise UserError(
                f"{folder} belongs to a run that began with different content of {key}, and its results "
                "would mix the two: put the old file back, or start a new run"
            )
    if saved.optimizer != state.optimizer:
        raise UserError(
            f"{folder} holds the state of {saved.optimizer}, and this run's optimizer is {state.optimizer}: "
            "resume on a machine where the same optimizer can be built, or start a new run"
        )
    if saved.computation != state.computation:
        raise UserError(
            f"{folder} was computed with {saved.computation}, and here the self-check chooses "
            f"{state.computation}, so the run would not go on as it began: resume it on a machine like the "
            "first one, or start a new run"
        )
    engine.load(folder, saved.world_size)
    set_rng_state(saved.rng[ranks.rank() % len(saved.rng)])
    ours = ("world_size", "model", "optimizer", "computation", "inputs")
    return replace(saved, **{name: getattr(state, name) for name in ours})


def restore_best(state: TrainState, run_dir: Path) -> None:
    """Make best/ what it was when `state` was saved: the run may have replaced it since."""
    best = run_dir / BEST_FOLDER
    if state.best is not None:
        link_folder(folder_of(run_dir, state.step) / BEST_FOLDER, best)
    elif best.exists():
        shutil.rmtree(best)
