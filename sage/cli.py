"""The `sage` command: pops the command word and hands the rest to that command's own Hydra entry.

Hydra then does what it does everywhere: overrides, `-m` sweeps, `--cfg job`, `--help`, `--info`, `-cd DIR`, completion.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sage import config
from sage.util.errors import UserError, report

USAGE = """\
sage: align reasoning models with preference pairs, and spend gradients only on the pairs that deserve them

usage: sage COMMAND [arguments]

commands
  train             align a policy: sage train +experiment=demo [key=value ...]; -m sweeps over comma-separated values
  build-pairs       sample responses to problems, verify them, make preference pairs
  score-dataset     what policy and reference make of every pair, forward only: scores, and the best rows
  eval              accuracy on math benchmarks; --compare RUN_DIR_A RUN_DIR_B: is B better than A?
  resume RUN_DIR    go on with an interrupted run, exactly
  report RUN...     what runs did, and how they compare: on the terminal, as one HTML page, as CSV

sage COMMAND --help             every config group and key
sage COMMAND --cfg job ...      the composed config, without running it
sage train --shell-completion install=bash      how to install completion: docs/cli.md
"""


def hydra_command(word: str) -> Callable[..., None]:
    """The Hydra program behind a command word."""

    @hydra.main(version_base="1.3", config_path="pkg://sage.conf", config_name=word.replace("-", "_"))
    def run(composed: DictConfig) -> None:
        from sage import launch

        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            launch.run(config.load(composed), run_dir)
        except UserError as e:
            with suppress(OSError):
                run_dir.rmdir()  # which Hydra made; a folder that holds anything stays
            fail(e)  # here, so that Hydra does not add its own line

    return run


def resume() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(
            "usage: sage resume RUN_DIR\n\nGo on with an interrupted run, exactly: from its newest complete checkpoint."
        )
        raise SystemExit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    from sage import launch

    run_dir = Path(sys.argv[1])
    cfg = config.load(run_dir)
    if (run_dir / config.SUMMARY_FILE).exists():
        raise UserError(f"{run_dir}: this run is finished; its summary.json says what came of it")
    launch.preflight(cfg)
    launch.start(cfg.world_size, run_dir)


def evaluate() -> None:
    if sys.argv[1:2] != ["--compare"]:
        return hydra_command("eval")()
    if len(sys.argv) != 4:
        raise UserError("usage: sage eval --compare RUN_DIR_A RUN_DIR_B: two finished evaluations")
    from sage.commands.evaluate import print_comparison

    print_comparison(Path(sys.argv[2]), Path(sys.argv[3]))


def report_runs() -> None:
    from sage.commands.report import report as write_report

    write_report(sys.argv[1:])


COMMANDS: dict[str, Callable[..., None]] = {
    **{word: hydra_command(word) for word in config.SCHEMAS},
    "eval": evaluate,
    "resume": resume,
    "report": report_runs,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "-sc":
        return complete()
    word = sys.argv.pop(1)
    if word not in COMMANDS:
        report(UserError(f"no command {word!r}{nearest(word, COMMANDS)}; commands: {', '.join(COMMANDS)}"))
        raise SystemExit(2)
    # Let exceptions through Hydra untouched, so that every error is told in one way, below.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        COMMANDS[word]()
    except UserError as e:
        fail(e)
    except (HydraException, OmegaConfBaseException) as e:
        fail(UserError(explain(e, word)), cause=e)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def complete() -> None:
    """Answer the shell's completion function, which Hydra wrote and which calls `sage -sc query=SHELL`.

    The line so far is in COMP_LINE. Hydra knows no command words, so they are completed here and hidden from it.
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


def explain(error: BaseException, word: str) -> str:
    """Hydra's message for a config that does not compose, with the nearest valid key or option where one is close."""
    causes = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        causes.append(str(error))
    text = "\n".join(causes)
    if match := re.search(r"[Kk]ey '([^']+)' (?:is not in struct|not in)", text) or re.search(
        r"Could not override '([^']+)'", text
    ):
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full else match[1]
        if key in config.RENAMED:
            return f"{key} was renamed: write {config.RENAMED[key]}=..."
        return (
            f"unknown config key {key!r}{nearest(key, known_keys(word))}; `sage {word} --help` lists all keys"
        )
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        listed = text.split("Available options in", 1)[-1].split("Config search path")[0]
        options = [line.strip() for line in listed.splitlines()[1:] if line.strip()]
        return f"no {group or 'option'} {option!r}{nearest(option, options)}; there are: {', '.join(options)}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    return "; ".join(dict.fromkeys(lines))


def nearest(word: str, known: object) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)  # pyright: ignore
    return f" (did you mean {close[0]!r}?)" if close else ""


def known_keys(word: str) -> list[str]:
    from sage import losses

    blank = config.SCHEMAS[word]()
    names = [*(name for name, *_ in config.walk(blank)), *(f.name for f in dataclasses.fields(blank))]
    if "loss" in names:
        objectives = [c for c in vars(losses).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
        names += [f"loss.{f.name}" for c in objectives for f in dataclasses.fields(c)]
    return names


if __name__ == "__main__":
    main()
