"""A rank's entry: `python -m sage.worker RUN_DIR`, also under torchrun, srun or the deepspeed launcher.

Everything it does is decided by RUN_DIR/config.yaml, which names the command, and by what lies beside it.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks fork; a warning about it helps nobody
warnings.filterwarnings("ignore", category=FutureWarning)

# Command -> the function that every rank calls with the run directory. By name, so that a rank imports only its own.
JOBS = {
    "train": "sage.train.train",
    "build-pairs": "sage.build_pairs.build_pairs",
    "eval": "sage.evaluate.evaluate",
}


def main() -> None:
    from sage.errors import UserError, report

    try:
        from hydra.utils import get_method
        from transformers.utils import logging

        from sage import config

        logging.disable_progress_bar()  # we show our own

        run_dir = Path(sys.argv[1])
        get_method(JOBS[config.load(run_dir).command])(run_dir)
        leave_process_group()
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 most likely says the same; it ends first and the launcher ends this rank
        report(e)
        os._exit(2)  # the other ranks may wait in a collective: do not join them at exit


def leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():  # ZeRO-3 aborts at exit otherwise
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
