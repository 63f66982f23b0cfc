"""The `sage` command: it reads the command word and passes the rest to that command's own Hydra program.

Hydra then works as usual: overrides, `-m` sweeps, `--cfg job`, `--help`, `--info`, `-cd DIR`, completion.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sage import config, sweeps
from sage.advice import BARE, WITH_VALUE, explain, unknown_to_hydra
from sage.config import nearest
from sage.config.keys import key_of
from sage.util import stopping
from sage.util.errors import UserError, refusal, report
from sage.util.output import outlive_reader
from sage.util.progress import console

RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)

PLUGINS = ("hydra.sweeper.", "hydra.launcher.")  # these classes check their options, which no schema lists

USAGE = """\
sage: align reasoning models with preference pairs, and spend gradients only on the pairs that deserve them

usage: sage COMMAND [arguments]

commands
  doctor            show what is on this machine, and test whether sage works here
  plan              estimate the memory that a run will take, and the largest micro-batch that fits
  train             align a policy: sage train +experiment=demo [key=value ...]; -m runs a sweep
  rounds            train, sample from the new policy, and train again: sage rounds +experiment=gsm8k
  build-pairs       sample responses to problems, verify them, make preference pairs
  score-dataset     score every pair with forward passes only, and write the best rows
  inspect           show pairs exactly as training will see them; needs only the tokenizer
  eval              measure accuracy on math benchmarks; --compare RUN_DIR_A RUN_DIR_B: is B better than A?
  verify FILE       verify responses that you already have; verify RUN_DIR: those of a finished eval
  resume RUN_DIR    continue an interrupted run exactly; steps=N, rounds=N extend it; world_size=N: on N ranks
  report RUN...     show what runs did, and compare them: on the terminal, as one HTML page, as CSV

sage COMMAND --help             every config group and key
sage COMMAND --cfg job ...      the composed config, without running it
sage train --shell-completion install=bash      how to install completion: docs/cli.md
sage --version                  the version of sage
"""


def hydra_command(word: str) -> Callable[[], None]:
    """The Hydra program behind a command word."""

    @hydra.main(version_base="1.3", config_path="pkg://sage.conf", config_name=word.replace("-", "_"))
    def run(composed: DictConfig) -> float | None:
        hydra_config: Any = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        if hydra_config.mode == RunMode.MULTIRUN:
            with sweeps.job_of(hydra_config, run_dir) as outcome:
                execute(word, composed, hydra_config, run_dir)
                outcome.metric, outcome.value = sweeps.result(run_dir)
            return outcome.value  # Hydra hands it to the sweeper
        try:
            execute(word, composed, hydra_config, run_dir)
        except Exception as e:
            if refused := refusal(e):
                fail(refused, cause=None if refused is e else e)  # here, so that Hydra adds no message
            raise

    def command() -> None:
        sys.argv[1:] = flags_first(sys.argv[1:])
        sweeps.run_sweep(run)

    return command


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags, with their values, before all overrides. It does not read one between overrides."""
    flags, overrides, left = list[str](), list[str](), iter(arguments)
    for argument in left:
        if argument.startswith("-"):
            flags += [argument, *(islice(left, 1) if argument in WITH_VALUE else ())]
        else:
            overrides.append(argument)
    return [*flags, *overrides]


def execute(word: str, composed: DictConfig, hydra_config: Any, run_dir: Path) -> None:
    """Load the config, and run the command."""
    from sage import launch

    try:
        typed = {key_of(override) for override in hydra_config.overrides.hydra}
        typed = {key for key in typed if not key.startswith(PLUGINS)}
        for key in typed.intersection(config.unknown_keys(hydra_config, "hydra.")):
            raise UserError(unknown_to_hydra(key, word))
        own = [Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file"]
        config.refuse_hidden(own)
        cfg = config.load(composed, hydra_config.overrides.task, own)
        folder, other = "hydra.run.dir", "hydra.sweep.dir"
        if hydra_config.mode == RunMode.MULTIRUN:
            folder, other = other, folder
            if other in typed and folder not in typed:
                raise UserError(f"{other} has no effect on a sweep: write {folder}=FOLDER")
        if isinstance(cfg, config.RunConfig) and cfg.resume == "auto" and folder not in typed:
            raise UserError(f"resume=auto needs a folder that stays the same: add {folder}=FOLDER")
        launch.run(cfg, run_dir)
    except UserError:
        if run_dir.resolve() != Path.cwd():
            with suppress(OSError):
                run_dir.rmdir()  # Hydra made it; a folder that holds anything stays
        raise


def resume() -> None:
    folder, *given = sys.argv[1:] or ["--help"]
    form = "(steps|rounds|world_size)=[1-9][0-9]*|start=(true|false)"
    if folder.startswith("-") or not all(re.fullmatch(form, option) for option in given):
        print(
            "usage: sage resume RUN_DIR [steps=N] [rounds=N] [world_size=N] [start=false]\n\n"
            "Continue an interrupted run exactly, from its newest intact checkpoint.\n"
            "steps=N       more steps, also for a finished training run, if its learning rate is constant\n"
            "rounds=N      more rounds, also for finished `sage rounds`\n"
            "world_size=N  on another number of ranks\n"
            "start=false   start nothing, but print the commands for torchrun, srun and deepspeed"
        )
        raise SystemExit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    from sage import launch

    options = dict(option.split("=") for option in given)
    numbers = {key: int(value) for key, value in options.items() if key != "start"}
    launch.resume(Path(folder), **numbers, here=options.get("start") != "false")


def evaluate() -> None:
    if sys.argv[1:2] != ["--compare"]:
        return hydra_command("eval")()
    if len(sys.argv) != 4:
        raise UserError("usage: sage eval --compare RUN_DIR_A RUN_DIR_B: two finished evaluations")
    from sage.commands.evaluate import print_comparison

    print_comparison(Path(sys.argv[2]), Path(sys.argv[3]))


def verify() -> None:
    """`sage verify FILE` is `sage verify path=FILE`, whatever the file is called."""
    first = sys.argv[1] if sys.argv[1:] else "-"
    if not first.startswith("-") and ("=" not in first or Path(first).exists()):
        escaped = first.replace("\\", "\\\\").replace("'", "\\'")
        sys.argv[1] = f"path='{escaped}'"
        if other := next((word for word in sys.argv[2:] if word.startswith("path=")), None):
            raise UserError(f"{other}: `sage verify FILE` has its file already: leave one of them out")
    hydra_command("verify")()


def report_runs() -> None:
    from sage.commands.report import report as write_report

    write_report(sys.argv[1:])


COMMANDS: dict[str, Callable[[], None]] = {
    **{word: hydra_command(word) for word in config.SCHEMAS},
    "eval": evaluate,
    "verify": verify,
    "resume": resume,
    "report": report_runs,
}


def main() -> None:
    outlive_reader()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "--version":
        return print(version("sage-align"))
    if sys.argv[1] == "-sc":
        return complete()
    word = sys.argv.pop(1)
    if word not in COMMANDS:
        report(UserError(f"no command {word!r}{nearest(word, COMMANDS)}; commands: {', '.join(COMMANDS)}"))
        raise SystemExit(2)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions on, and all errors are reported here
    try:
        forget_ranks()
        with stopping.handled(lambda signum, _: stopping.end(128 + signum)):
            COMMANDS[word]()
    except UserError as e:
        fail(e)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as e:
        if not isinstance(e, (HydraException, OmegaConfBaseException)) and not re.search(BARE, str(e)):
            raise
        fail(UserError(explain(e, word, sys.argv[1:])), cause=e)
    except (OSError, MemoryError, RuntimeError) as e:
        if (refused := refusal(e)) is None:
            raise
        fail(refused, cause=e)


def forget_ranks() -> None:
    """Remove what a platform has set for ranks from the environment: `sage` is none, and starts its own.

    Raises:
        UserError: torchrun started this process, so there are as many of it as there should be ranks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "torchrun started this command, but `sage` starts its own ranks: leave torchrun out and give "
            "world_size=N. For several machines, give start=false: see docs/clusters.md"
        )
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    console.quiet = False  # it saw them when it was imported


def complete() -> None:
    """Answer the shell's completion function, which Hydra wrote and which calls `sage -sc query=SHELL`.

    The line so far is in COMP_LINE. Hydra knows no command words, so they are completed here and hidden from
    it.
    """
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    word, space, arguments = rest.lstrip().partition(" ")
    if not space:
        print("\n".join(c for c in COMMANDS if c.startswith(word)))
    elif word in config.SCHEMAS:
        os.environ.update(COMP_LINE=f"{program} {arguments.lstrip()}", HYDRA_FULL_ERROR="1")
        with suppress(HydraException, OmegaConfBaseException):  # a line that does not compose yet
            COMMANDS[word]()


def fail(error: UserError, cause: BaseException | None = None) -> None:
    error.__cause__ = cause or error.__cause__
    report(error)
    raise SystemExit(2)
