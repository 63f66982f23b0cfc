"""What ranks agree on, and how they end."""

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
    """Without `leave`, four of five such runs abort: a gloo thread needs the interpreter at shutdown."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for _ in range(2):
        done = subprocess.run(
            [*launcher, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("299") == 2


AGREE = """
import sys
from pathlib import Path
from sage.model.engine import init_distributed
from sage.util import ranks
from sage.util.errors import UserError
assert ranks.rank() in (0, 1) and ranks.world_size() == 2  # already before there is a group
init_distributed()
calls = []
def work():
    calls.append(ranks.rank())
    return f"rank {ranks.rank()}"
def fail():
    raise UserError(f"rank {ranks.rank()} refuses")
assert ranks.main_only(work) == "rank 0" and calls == ([0] if ranks.rank() == 0 else [])
assert ranks.machine_first(work) == f"rank {ranks.rank()}" and calls[-1] == ranks.rank()
for way in (ranks.main_only, ranks.machine_first):
    try:
        way(fail)
    except UserError as e:
        assert str(e) == "rank 0 refuses"
    else:
        raise AssertionError("not refused")
assert ranks.gather(ranks.rank()) == [0, 1]
Path(sys.argv[1], f"done{ranks.rank()}").touch()
ranks.leave()
"""


@pytest.mark.slow
def test_ranks_take_rank_0s_answer_and_its_refusal(tmp_path):
    """A rank that looks for a file by itself, or waits for a rank that gave up, would wait for ever."""
    script = tmp_path / "script.py"
    script.write_text(AGREE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, script, tmp_path], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
