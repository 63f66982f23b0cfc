"""From a composed config to running ranks: check what needs no model, freeze the config, start the ranks."""

from __future__ import annotations

import os
import shlex
import tempfile
from dataclasses import fields
from functools import partial, singledispatch
from pathlib import Path

from hydra.utils import get_class

from sage import config
from sage.answering.problems import read_problems
from sage.commands import more
from sage.config import (
    BuildPairsConfig,
    CommandConfig,
    DoctorConfig,
    EvalConfig,
    InspectConfig,
    ModelConfig,
    PlanConfig,
    RoundsConfig,
    RunConfig,
    TrainConfig,
    VerifyConfig,
)
from sage.data.pairs import load_data
from sage.data.source import resolve_path
from sage.model.folder import check_adapter, check_weights_files, lora_of
from sage.training.tracking import check_tracking
from sage.util import stopping
from sage.util.errors import UserError, named
from sage.util.locks import alive, locked, reserved
from sage.util.processes import rank_environment, run_ranks
from sage.util.progress import activity

# What a rank reads from its environment, from what Slurm sets.
SLURM_PLACE = "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"


@singledispatch
def read_inputs(cfg: RunConfig) -> None:
    """Read the inputs that the config names, so that bad rows are refused before a model is loaded."""
    raise TypeError(f"read_inputs has no function for {type(cfg).__name__}")


@read_inputs.register
def _(cfg: TrainConfig) -> None:
    load_data(cfg.data, cfg.cache_dir)
    if cfg.data.has_held_out:
        load_data(cfg.data, cfg.cache_dir, held_out=True)
    for benchmark in cfg.benchmark.values():
        read_problems(benchmark)
    if cfg.command == "train" and cfg.select:
        from sage.training.evaluation import check_select  # here, because it loads torch and transformers

        check_select(cfg, [get_class(hook["_target_"]) for hook in cfg.hooks.values()])


@read_inputs.register
def _(cfg: BuildPairsConfig) -> None:
    read_sources(cfg)


@read_inputs.register
def _(cfg: RoundsConfig) -> None:
    read_sources(cfg)
    if cfg.round.reference == "initial" and get_class(cfg.loss["_target_"]).reference_free:
        raise UserError("round.reference=initial has no effect: this loss needs no reference. Leave it out")
    if cfg.data.eval_path:
        load_data(cfg.pairs_of_a_round(None), cfg.cache_dir, held_out=True)
    for benchmark in cfg.benchmark.values():
        read_problems(benchmark)


def read_sources(cfg: BuildPairsConfig | RoundsConfig) -> None:
    """Read what pairs are built from."""
    assert cfg.data.problems.path is not None
    read_problems(cfg.data.problems)
    if cfg.pairing.rejected_from:
        from sage.commands.build_pairs import check_finished  # here, because it loads torch and transformers

        check_finished(cfg.pairing.rejected_from)


@read_inputs.register
def _(cfg: EvalConfig) -> None:
    for benchmark in cfg.benchmark.values():
        read_problems(benchmark)


def preflight(cfg: RunConfig, here: bool = True) -> None:
    """Refuse a run if its model file is missing, its inputs are bad, or this machine has too few GPUs.

    `here`: the ranks will start on this machine.
    """
    if here and cfg.world_size > 1:
        import torch  # here, because it takes seconds

        gpus = torch.cuda.device_count()
        if gpus and cfg.world_size > gpus:
            raise UserError(
                f"world_size={cfg.world_size}: this machine has {gpus} GPUs, one per rank: lower it"
                + ("" if isinstance(cfg, RoundsConfig) else ", or give start=false for several machines")
            )
    check_writable(Path(cfg.cache_dir).expanduser(), "cache_dir")
    check_model(cfg.model)
    if isinstance(cfg, TrainConfig) and cfg.reference_model:
        check_model(ModelConfig(path=cfg.reference_model), "reference_model")
    # The other commands have the keys of `sage train`, and log nothing.
    if isinstance(cfg, RoundsConfig) or type(cfg) is TrainConfig:
        check_tracking(cfg.tracking)
    with activity("checking the inputs"):
        read_inputs(cfg)


def check_model(cfg: ModelConfig, key: str = "model.path") -> None:
    """Refuse model and adapter folders that are not there or not whole. `key` is the one that names them."""
    path = resolve_path(cfg.path)
    if path.startswith((".", "/")) and not os.path.exists(path):
        raise UserError(f"{key}={cfg.path}: no such file or folder")
    if os.path.isdir(path):
        check_weights_files(path, f"{key}={cfg.path}")
    if cfg.adapter_path:
        cfg.lora = lora_of(check_adapter(cfg))  # its own settings, so that the frozen config tells the truth


def check_writable(folder: Path, key: str) -> None:
    """Make a folder if need be, and refuse one that no file can be written to."""
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{key}={str(folder)!a}: its path is not UTF-8, so Arrow cannot write there: choose another with "
            f"{key}=FOLDER"
        ) from e
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(
            f"{key}={folder} cannot be written: {e.strerror}: make it writable, or choose another with "
            f"{key}=FOLDER"
        ) from e


def run(cfg: CommandConfig, run_dir: Path) -> None:
    """Check, freeze and start one run, and wait for it. Exits with the ranks' status when they fail."""
    if isinstance(cfg, VerifyConfig):  # no model, no ranks
        from sage.commands.verify import verify

        return verify(cfg, run_dir)
    if isinstance(cfg, DoctorConfig):
        from sage.commands.doctor import doctor

        return doctor(cfg)
    if isinstance(cfg, PlanConfig):
        from sage.commands.plan import plan_run

        return plan_run(cfg)
    if isinstance(cfg, InspectConfig):
        from sage.commands.inspect import inspect  # here, because it loads torch and transformers

        return inspect(cfg)
    assert isinstance(cfg, RunConfig)
    here, cfg.start = cfg.start, True  # what starts the ranks is no part of the run
    builds_its_own = isinstance(cfg, BuildPairsConfig | RoundsConfig)
    if isinstance(cfg, TrainConfig) and not builds_its_own and not cfg.data.has_pairs:
        if not here:
            raise UserError(
                "start=false needs finished pairs, in a file that all machines see: build them with `sage "
                "build-pairs`, and give data.path=RUN_DIR/pairs.jsonl"
            )
        cfg.data.path = str(built_pairs(cfg))
    if cfg.resume == "auto" and (run_dir / config.CONFIG_FILE).exists():
        return requeued(cfg, run_dir, here)
    check_writable(run_dir, "hydra.run.dir")
    preflight(cfg, here)
    with reserved(run_dir, "hydra.run.dir"):
        config.freeze(cfg, run_dir)
        print(f"run directory: {run_dir}", flush=True)
        work(cfg, run_dir, here)


def requeued(cfg: RunConfig, run_dir: Path, here: bool) -> None:
    """Go on with the run in `run_dir`, which the same command line began, perhaps on other machines."""
    config.keep_budget(cfg, run_dir)
    check_model(cfg.model)  # which takes an adapter's own settings
    differing = config.differences(cfg, config.load(run_dir))
    if keys := [key for key in differing if key not in ("world_size", "resume")]:
        raise UserError(
            f"{run_dir} was begun with another {named(keys)}: choose another hydra.run.dir for other settings"
        )
    if (run_dir / config.SUMMARY_FILE).exists():
        print(f"{run_dir}: this run is finished", flush=True)
    else:
        resume(run_dir, world_size=cfg.world_size, here=here)


def resume(
    run_dir: Path,
    steps: int | None = None,
    rounds: int | None = None,
    world_size: int | None = None,
    here: bool = True,
) -> None:
    """Go on with a run from its newest checkpoint, or print the commands that do so, if not `here`.

    `steps` and `rounds` give it another number of them, and `world_size` another number of ranks.

    Raises:
        UserError: there is no such run, it is finished, or more steps would change those that it has done.
    """
    run_dir = run_dir.absolute()
    cfg = config.load(run_dir)
    if not isinstance(cfg, RunConfig):
        raise UserError(f"{run_dir}: `sage {cfg.command}` has no state to continue from: start it again")
    before = cfg.world_size
    cfg.world_size = world_size or before
    longer = steps is not None or rounds is not None
    if not longer and (run_dir / config.SUMMARY_FILE).exists():
        hint = "; rounds=N gives it more" if isinstance(cfg, RoundsConfig) else ""
        if any(run_dir.glob("checkpoints/step_*")):  # the last one, from which it could go on
            hint = "; steps=N gives it more"
        raise UserError(f"{run_dir}: this run is finished; its summary.json holds the results{hint}")
    if steps is not None:
        more.give_steps(cfg, run_dir, steps)
    if rounds is not None:
        more.give_rounds(cfg, run_dir, rounds)
    cfg.start = here
    config.check(cfg)
    cfg.start = True
    check_writable(run_dir, "hydra.run.dir")
    preflight(cfg, here)
    with reserved(run_dir, "hydra.run.dir"):
        if longer or cfg.world_size != before:
            if alive(run_dir):
                raise UserError(f"a rank of {run_dir} is still running: wait for it, or kill it")
            if isinstance(cfg, RoundsConfig):
                from sage.commands.rounds_inputs import claim_inputs  # here, because it loads torch

                claim_inputs(cfg, run_dir)
            config.write(cfg, run_dir)
            if (summary := run_dir / config.SUMMARY_FILE).exists():  # the run may not come to another
                summary.replace(summary.with_name("summary.superseded.json"))
        work(cfg, run_dir, here)


def work(cfg: RunConfig, run_dir: Path, here: bool) -> None:
    """Do the frozen run in `run_dir`, or go on with it, or print the commands that do so, if not `here`.

    Rounds are several runs, one after the other.
    """
    if not here:
        return print(start_lines(cfg.world_size, run_dir))
    if isinstance(cfg, RoundsConfig):
        from sage.commands.rounds import rounds  # here, because it loads torch and transformers

        return rounds(run_dir, partial(start, go_on=stopping.go_on(run_dir)))
    start(cfg.world_size, run_dir)
    if isinstance(cfg, BuildPairsConfig):
        from sage.commands.build_pairs import check_built  # here, for the same reason

        check_built(cfg, run_dir)


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
                    f"{plan.data.problems.path} with these settings: run without it, or build them with "
                    "`sage build-pairs` and give data.path=FILE"
                )
            print(f"building the pairs of this run first: {folder}", flush=True)
            config.write(plan, folder)  # over one that was interrupted, perhaps with other ranks
            start(
                cfg.world_size, folder, "run the same command again, which keeps the responses that are done"
            )
    check_built(cfg, folder)
    return folder / PAIRS_FILE


def start_lines(world_size: int, run_dir: Path) -> str:
    """The commands that start a frozen run with another launcher, on one machine and on several."""
    folder = shlex.quote(str(run_dir.resolve()))

    def commands(machines: int) -> str:
        each, meet, hosts = world_size // machines, "--standalone", ""
        if machines > 1:
            meet = f"--nnodes={machines} --rdzv-backend=c10d --rdzv-id=ID --rdzv-endpoint=HOST:PORT"
            hosts = f" --hostfile=HOSTFILE --num_nodes={machines}"
        return (
            f"  torchrun {meet} --nproc-per-node={each} -m sage.worker {folder}\n"
            f"  srun --nodes={machines} --ntasks-per-node={each} --kill-on-bad-exit=1 bash -c "
            f"'{SLURM_PLACE} exec python -m sage.worker \"$0\"' {folder}\n"
            f"  deepspeed{hosts} --num_gpus={each} --no_local_rank --module sage.worker {folder}\n"
        )

    lines = (
        "nothing is started yet. Each of these starts the run, or continues it\n"
        f"on one machine:\n  sage resume {folder}\n{commands(1)}"
    )
    if world_size > 1:
        machines = 2 if world_size % 2 == 0 else world_size
        lines += f"on {machines} machines; torchrun on each of them:\n{commands(machines)}"
    return (
        f"{lines}srun needs MASTER_ADDR and MASTER_PORT; docs/clusters.md has a script for it, and says what "
        "the machines must share"
    )


def start(world_size: int, run_dir: Path, go_on: str | None = None) -> None:
    """Run `sage.worker` once per rank, and wait for all of them.

    `go_on` says how to continue if the ranks are interrupted; by default with `sage resume`.

    Raises:
        SystemExit: a rank failed, and has said why; or a signal ended the run.
    """
    go_on = go_on or stopping.go_on(run_dir)
    environment = {**rank_environment(world_size), stopping.GO_ON: go_on}
    if status := run_ranks(world_size, ["-m", "sage.worker", str(run_dir)], environment, go_on):
        raise SystemExit(status)
