"""How ranks end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from many_runs import ENVIRONMENT

SCRIPT = """
import torch, torch.distributed as dist
from sage.util import ranks
dist.init_process_group("gloo")
kept_alive = dist.group.WORLD  # as DeepSpeed keeps it
for i in range(300):
    tensor = torch.ones(1000)
    tensor.note = i  # so that the gloo thread needs the interpreter to let go of it
    dist.all_reduce(tensor)
del tensor
print(i)
ranks.leave()
"""


@pytest.mark.slow
def test_ranks_whose_group_is_kept_alive_end_well(tmp_path):
    """Through the interpreter's own end, four of five such runs abort: a gloo thread asks a Python that shuts down."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for _ in range(2):
        done = subprocess.run(
            [*launcher, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("299") == 2
