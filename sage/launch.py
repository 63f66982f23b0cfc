"""From a composed config to running ranks: check what needs no model, freeze the config, start the ranks."""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields
from functools import singledispatch
from pathlib import Path

from hydra.utils import get_class

from sage import config
from sage.answering.problems import read_problems
from sage.config import (
    BuildPairsConfig,
    CommandConfig,
    EvalConfig,
    InspectConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    VerifyConfig,
)
from sage.data.pairs import load_data
from sage.data.source import resolve_path
from sage.model.folder import check_adapter, check_weights_files, lora_of
from sage.training.tracking import check_tracking
from sage.util.errors import UserError
from sage.util.locks import locked
from sage.util.processes import run_ranks
from sage.util.progress import activity
from sage.util.stopping import go_on

# Environment variables of the ranks, unless the user has set them.
ENVIRONMENT = {
    # Otherwise glibc returns freed activations to the kernel and fetches the pages again: 1/7 of a CPU step.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    # One heap, so that the backward pass, which has its own thread, reuses the pages of the forward pass.
    "MALLOC_ARENA_MAX": "1",
    # oneDNN keeps a kernel of 0.6 MB for every text length. 256 are more than one micro-batch uses.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    # A rank imports nothing from the folder that it is started in, which may be a foreign one.
    "PYTHONSAFEPATH": "1",
}


@singledispatch
def read_inputs(cfg: RunConfig) -> None:
    """Read the inputs that the config names, so that bad rows are refused before a model is loaded."""
    raise TypeError(f"read_inputs has no function for {type(cfg).__name__}")


@read_inputs.register
def _(cfg: TrainConfig) -> None:
    load_data(cfg.data)
    if cfg.data.eval_path:
        load_data(cfg.data, held_out=True)
    for benchmark in cfg.benchmark.values():
        read_problems(benchmark)
    if cfg.command == "train":
        from sage.training.evaluation import check_select  # here, because it loads torch and transformers

        check_select(cfg, [get_class(hook["_target_"]) for hook in cfg.hooks.values()])


@read_inputs.register
def _(cfg: BuildPairsConfig) -> None:
    assert cfg.data.problems.path is not None
    read_problems(cfg.data.problems)


@read_inputs.register
def _(cfg: EvalConfig) -> None:
    for benchmark in cfg.benchmark.values():
        read_problems(benchmark)


def preflight(cfg: RunConfig) -> None:
    """Refuse a run if its model file is missing, its inputs are bad, or it needs more GPUs than there are."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and cfg.world_size > gpus:
        raise UserError(f"world_size={cfg.world_size}: this machine has {gpus} GPUs, one per rank: lower it")
    check_writable(Path(cfg.cache_dir).expanduser(), "cache_dir")
    check_model(cfg.model)
    if type(cfg) is TrainConfig:  # the other commands have its keys, and log nothing
        check_tracking(cfg.tracking)
    with activity("checking the inputs"):
        read_inputs(cfg)


def check_model(cfg: ModelConfig) -> None:
    """Refuse model and adapter folders that are not there or not whole."""
    path = resolve_path(cfg.path)
    if path.startswith((".", "/")) and not os.path.exists(path):
        raise UserError(f"model.path={cfg.path}: no such file or folder")
    if os.path.isdir(path):
        check_weights_files(path, cfg)
    if cfg.adapter_path:
        cfg.lora = lora_of(check_adapter(cfg))  # its own settings, so that the frozen config tells the truth


def check_writable(folder: Path, key: str) -> None:
    """Make a folder if need be, and refuse one that no file can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(
            f"{key}={folder} cannot be written: {e.strerror}; choose another with {key}=FOLDER"
        ) from e


def run(cfg: CommandConfig, run_dir: Path) -> None:
    """Check, freeze and start one run, and wait for it. Exits with the ranks' status when they fail."""
    if isinstance(cfg, VerifyConfig):  # no model, no ranks
        from sage.commands.verify import verify

        return verify(cfg, run_dir)
    if isinstance(cfg, InspectConfig):
        from sage.commands.inspect import inspect  # here, because it loads torch and transformers

        return inspect(cfg)
    assert isinstance(cfg, RunConfig)
    if isinstance(cfg, TrainConfig) and not isinstance(cfg, BuildPairsConfig) and cfg.data.path is None:
        cfg.data.path = str(built_pairs(cfg))
    preflight(cfg)
    config.freeze(cfg, run_dir)
    print(f"run directory: {run_dir}", flush=True)
    start(cfg.world_size, run_dir)


def built_pairs(cfg: TrainConfig) -> Path:
    """The pairs of `data.problems`, from the cache or built now. An interrupted build is continued."""
    # Here, because it loads torch and transformers.
    from sage.commands.build_pairs import MANIFEST_FILE, PAIRS_FILE, check_built, intact, recipe_key

    keys = {f.name: getattr(cfg, f.name) for f in fields(BuildPairsConfig)}
    plan = BuildPairsConfig(**{**keys, "command": "build-pairs"})
    try:
        preflight(plan)
    except UserError as e:
        raise UserError(
            f"{e}\nThe pairs of this run are built from data.problems: give problems of your own with "
            "data.problems.path=FILE, or finished pairs with data.path=FILE"
        ) from e
    folder = Path(cfg.cache_dir).expanduser() / "built" / recipe_key(plan)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not intact(folder):
            if (folder / MANIFEST_FILE).exists():
                print(f"the pairs in {folder} are damaged: they are built again", flush=True)
                (folder / MANIFEST_FILE).unlink()
            if cfg.data.build == "never":
                raise UserError(
                    f"data.build=never, and no pairs were built yet by {cfg.model.path} from "
                    f"{plan.data.problems.path} with "
                    "these settings: run without it, or build them with `sage build-pairs` and give "
                    "data.path=FILE"
                )
            print(f"building the pairs of this run first: {folder}", flush=True)
            if not (folder / config.CONFIG_FILE).exists():
                config.freeze(plan, folder)
            start(cfg.world_size, folder)
    check_built(cfg, folder)
    return folder / PAIRS_FILE


def start(world_size: int, run_dir: Path) -> None:
    """Run `sage.worker` once per rank, and wait for all of them.

    Raises:
        SystemExit: a rank failed, and has said why; or a signal ended the run.
    """
    environment = {**ENVIRONMENT, **os.environ}
    if world_size > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world_size, 1)))
    if status := run_ranks(world_size, ["-m", "sage.worker", str(run_dir)], environment, go_on(run_dir)):
        raise SystemExit(status)
