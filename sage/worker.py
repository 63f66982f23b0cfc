"""The entry point of a rank: `python -m sage.worker RUN_DIR`, also under torchrun, srun or deepspeed.

RUN_DIR/config.yaml names the command. A rank reads nothing but this folder.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from sage.util import ranks
from sage.util.errors import UserError, disk_full, refusal, report
from sage.util.locks import lock
from sage.util.output import outlive_reader

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks fork; a warning about it helps nobody
warnings.filterwarnings("ignore", category=FutureWarning)

# Command -> the function that every rank calls with the run directory. A rank imports only its own.
JOBS = {
    "train": "sage.train.train",
    "build-pairs": "sage.commands.build_pairs.build_pairs",
    "score-dataset": "sage.commands.score_dataset.score_dataset",
    "eval": "sage.commands.evaluate.evaluate",
}


def hold(run_dir: Path, rank: int) -> FileLock:
    """Lock this rank's place in a run. The system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    try:
        return lock(run_dir / f".rank{rank}.lock", timeout=0)
    except Timeout as e:
        raise UserError(
            f"rank {rank} of {run_dir} still runs, perhaps because only its launcher was killed: wait "
            "for it, or kill it"
        ) from e


def main() -> None:
    outlive_reader()
    run_dir, rank = Path(sys.argv[1]), ranks.rank()
    try:
        held = hold(run_dir, rank)
        from hydra.utils import get_method
        from transformers.utils import logging

        from sage import config

        logging.disable_progress_bar()  # we show our own

        get_method(JOBS[config.load(run_dir).command])(run_dir)
        held.release()
        ranks.leave()
    except Exception as e:
        if disk_full(e):
            e = UserError(
                f"the disk of {run_dir} is full: make room, then go on with `sage resume {run_dir}`"
            )
        if (refused := refusal(e)) is None:
            raise
        refused.__cause__ = e.__cause__ if refused is e else e
        if rank != 0:
            time.sleep(5)  # rank 0 most likely says the same; it ends first and the launcher ends this rank
        report(refused)
        os._exit(2)  # the other ranks may wait in a collective: do not join them at exit


if __name__ == "__main__":
    main()
