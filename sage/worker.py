"""The entry point of a rank: `python -m sage.worker RUN_DIR`, also under torchrun, srun or deepspeed.

RUN_DIR/config.yaml names the command. A rank reads nothing but this folder.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from sage.util import ranks, stopping
from sage.util.errors import UserError, disk_full, first_line, refusal, report
from sage.util.locks import RANK_LOCK, lock
from sage.util.output import outlive_reader
from sage.util.progress import activity

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks fork; a warning about it helps nobody
warnings.filterwarnings("ignore", category=FutureWarning)

# Command -> the function that every rank calls with the run directory. A rank imports only its own.
JOBS = {
    "train": "sage.train.train",
    "build-pairs": "sage.commands.build_pairs.build_pairs",
    "score-dataset": "sage.commands.score_dataset.score_dataset",
    "eval": "sage.commands.evaluate.evaluate",
}
# What gloo and NCCL say in a rank whose counterpart has ended.
LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe")
PATIENCE = 5  # seconds; a launcher ends a rank within these, once another one has failed


def hold(run_dir: Path, rank: int) -> FileLock:
    """Lock this rank's place in a run. The system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    try:
        return lock(run_dir / RANK_LOCK.format(rank), timeout=0)
    except Timeout as e:
        raise UserError(
            f"rank {rank} of {run_dir} is still running, perhaps because only its launcher was killed: "
            "wait for it, or kill it"
        ) from e


def check_world(run_dir: Path, asked: int) -> None:
    """Refuse a launcher that starts another number of ranks than the run was frozen for."""
    if ranks.world_size() != asked:
        raise UserError(
            f"{run_dir} is a run of world_size={asked}, and {ranks.world_size()} ranks were started. A "
            "launcher must set RANK, WORLD_SIZE and LOCAL_RANK: see docs/clusters.md. To continue the run on "
            f"another number of ranks: sage resume {run_dir} world_size={ranks.world_size()} start=false"
        )


def main() -> None:
    outlive_reader()
    run_dir, rank = Path(sys.argv[1]), ranks.rank()
    stopping.install(run_dir, rank)
    try:
        ranks.check_place()
        held = hold(run_dir, rank)
        gc.disable()  # imports make half a million objects that stay: looking for garbage takes a second
        from hydra.utils import get_method
        from transformers.utils import logging

        from sage import config

        logging.disable_progress_bar()  # we show our own

        cfg = config.load(run_dir)
        assert isinstance(cfg, config.RunConfig)
        if cfg.command not in JOBS:
            raise UserError(
                f"{run_dir}: `sage {cfg.command}` starts the ranks of its parts itself: sage resume {run_dir}"
            )
        check_world(run_dir, cfg.world_size)
        with activity("loading PyTorch and DeepSpeed"):
            job = get_method(JOBS[cfg.command])
        gc.freeze()
        gc.enable()
        job(run_dir)
        held.release()
        if stopping.asked():  # too late to stop anything
            stopping.end(stopping.status())
        ranks.leave()
    except stopping.Stopped as e:
        stopping.leave(str(e))
    except Exception as e:
        if stopping.asked():  # the other ranks have ended already
            stopping.leave()
        fail(e, run_dir, rank)


def fail(error: Exception, run_dir: Path, rank: int) -> None:
    """Say what went wrong, and end this rank without joining the others, which may wait in a collective.

    One rank speaks: rank 0, or after a while another, if nobody has ended it meanwhile. A rank that only lost
    another one has the least to say.
    """
    if disk_full(error):
        file = getattr(error, "filename", None) or run_dir
        error = UserError(f"the disk of {file} is full: make room, then {stopping.go_on(run_dir)}")
    lost = ranks.world_size() > 1 and isinstance(error, RuntimeError) and LOST.search(str(error))
    if rank != 0 or lost:
        time.sleep(PATIENCE)
    if lost:
        error = UserError(
            f"rank {rank} lost another rank, which has failed or was killed ({first_line(error)})"
        )
    if refused := refusal(error):
        refused.__cause__ = error.__cause__ if refused is error else error
        report(refused)
    else:
        traceback.print_exception(error)
    stopping.end(2 if refused else 1)


if __name__ == "__main__":
    main()
