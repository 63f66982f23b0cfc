"""Sweeps (`-m`), with every launcher and sweeper of Hydra.

All jobs of a grid are checked before the first one starts. A failed job does not stop the others. At the end,
a table shows what came of each. Jobs may run in other processes or on other machines, so each leaves its
outcome in a file in the sweep's folder.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table

from sage import config
from sage.util import stopping
from sage.util.errors import UserError, describe, first_line, refusal, report
from sage.util.files import write_json
from sage.util.locks import reserved
from sage.util.progress import console

JOBS_FOLDER = ".jobs"  # in the sweep's folder: the outcomes of its jobs, while it runs
SWEEP_FILE = "sweep.json"  # in the sweep's folder: all outcomes
# Exit statuses: whoever sent the signal means the sweep.
STOPPED = [128 + signum for signum in stopping.SIGNALS]


class JobFailed(Exception):
    """A job of a sweep failed, and has said why. Hydra goes on with the other jobs."""

    def __init__(self, message: str, status: int):
        super().__init__(message, status)
        self.status = status


@dataclass
class JobOutcome:
    """What came of a job. `value` is its result in `metric`; `error` says why it failed."""

    job: int
    overrides: list[str]
    folder: str
    metric: str | None = None
    value: float | None = None
    error: str | None = None


class Sweep(Callback):
    """Hydra calls this once, in the process that started the sweep, before any job."""

    folder: Path | None = None
    held = ExitStack()  # the folder, until the sweep ends

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            check_jobs(config)
            if (folder / SWEEP_FILE).exists() and config.get("resume") != "auto":
                raise UserError(
                    f"{folder} already holds a sweep: choose another hydra.sweep.dir, or give resume=auto to "
                    "go on with its jobs"
                )
            Sweep.held.enter_context(reserved(folder, "hydra.sweep.dir"))
        except UserError as e:  # Hydra turns exceptions of callbacks into warnings
            report(e)
            raise SystemExit(2) from e
        Sweep.folder = folder
        shutil.rmtree(Sweep.folder / JOBS_FOLDER, ignore_errors=True)


def check_jobs(composed: DictConfig) -> None:
    """Compose and check the config of every job of a grid.

    Other sweepers choose later jobs by the results of earlier ones, so there is nothing to check yet.

    Raises:
        UserError: a job's config is refused.
    """
    if not composed.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return
    given = [f"{key}={value}" for key, value in (composed.hydra.sweeper.params or {}).items()]
    given += composed.hydra.overrides.task
    values = []
    for override in OverridesParser.create().parse_overrides(given):
        if not override.is_discrete_sweep():
            values.append([override.input_line])
        else:
            values.append(
                [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            )
    for number, overrides in enumerate(itertools.product(*values)):
        try:
            job = compose(composed.hydra.job.config_name, overrides=list(overrides))
            config.load(job, overrides)
        except UserError as e:
            raise UserError(f"job {number} of this sweep: {e}") from e


@contextmanager
def job_of(hydra: Any, run_dir: Path) -> Iterator[JobOutcome]:
    """Run one job of a sweep, and note what came of it.

    Raises:
        JobFailed: it failed.
        SystemExit: a signal ended it, and so the sweep.
    """
    outcome = JobOutcome(hydra.job.num, list(hydra.overrides.task), str(run_dir))
    status = 0
    if Sweep.folder is None:  # a launcher such as joblib runs jobs in processes of its own
        stopping.stay_with_parent()
    try:
        yield outcome
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
        outcome.error = f"exit status {status}"  # its ranks have said why
        if status in STOPPED:
            raise
    except Exception as e:
        if refused := refusal(e):
            status, outcome.error = 2, str(refused)
            report(UserError(f"job {outcome.job}: {refused}"))
        else:
            status, outcome.error = 1, describe(e)
            traceback.print_exception(e)
    finally:
        write_json(Path(hydra.sweep.dir) / JOBS_FOLDER / f"{outcome.job}.json", asdict(outcome))
        if stopping.abandoned():
            stopping.end(status)  # or the launcher's process would take the next job
    if status:
        raise JobFailed(f"job {outcome.job}: {outcome.error}", status)


def result(run_dir: Path) -> tuple[str | None, float | None]:
    """The metric that a finished run is judged by, and its value.

    It is the best value of `select`, else the final held-out accuracy, else the final accuracy on the first
    benchmark.
    """
    file = run_dir / config.SUMMARY_FILE
    if not file.is_file():
        return None, None
    summary = json.loads(file.read_text())
    if best := summary.get("best"):
        return best["metric"], best["value"]
    after = summary.get("after") or {}
    accuracies = ["eval/policy_accuracies", *(name for name in after if name.endswith("/accuracy"))]
    return next(((name, after[name]) for name in accuracies if name in after), (None, None))


def run_sweep(run: Callable[[], None]) -> None:
    """Run a Hydra program. If it is a sweep, print what came of its jobs, also after an interruption.

    Raises:
        SystemExit: a job failed; its status is that of the first one that did.
    """
    Sweep.folder = None
    try:
        run()
    except JobFailed as e:
        raise SystemExit(e.status) from e
    except BrokenExecutor as e:
        raise UserError(
            "a process that ran jobs of this sweep was killed, probably because memory ran out, and its jobs "
            "ended. Continue each with `sage resume FOLDER`, and run fewer jobs at a time"
        ) from e
    except Exception as e:
        if Sweep.folder is None or not any(outcome.error for outcome in outcomes_in(Sweep.folder)):
            raise
        raise UserError(f"the sweeper ended after jobs had failed: {first_line(e)}") from e
    finally:
        if Sweep.folder is not None and (Sweep.folder / JOBS_FOLDER).is_dir():
            finish(Sweep.folder)
        Sweep.held.close()


def outcomes_in(folder: Path) -> list[JobOutcome]:
    """What the jobs of a sweep have left so far, in their order."""
    outcomes = [JobOutcome(**json.loads(file.read_text())) for file in (folder / JOBS_FOLDER).glob("*.json")]
    return sorted(outcomes, key=lambda outcome: outcome.job)


def finish(folder: Path) -> None:
    """Write the sweep's file, and print its table."""
    outcomes = outcomes_in(folder)
    write_json(folder / SWEEP_FILE, {"jobs": [asdict(outcome) for outcome in outcomes]})
    shutil.rmtree(folder / JOBS_FOLDER)
    failed = sum(outcome.error is not None for outcome in outcomes)
    table = Table(title=f"{len(outcomes)} jobs, {failed} failed, in {folder}", title_justify="left")
    table.add_column("job", justify="right")
    for column in ("overrides", "result", "folder"):
        table.add_column(column, overflow="fold")
    for outcome, overrides in zip(outcomes, varying(outcomes), strict=True):
        value = "" if outcome.value is None else f"{outcome.metric} {outcome.value:.4f}"
        came = "failed: " + first_line(ValueError(outcome.error))[:80] if outcome.error else value
        table.add_row(str(outcome.job), " ".join(overrides), came, os.path.relpath(outcome.folder, folder))
    console.print(table, markup=False)


def varying(outcomes: Sequence[JobOutcome]) -> list[list[str]]:
    """The overrides of each job that not all jobs have."""
    every = [set(outcome.overrides) for outcome in outcomes]
    common = set.intersection(*every) if len(every) > 1 else set()
    return [[text for text in outcome.overrides if text not in common] for outcome in outcomes]
