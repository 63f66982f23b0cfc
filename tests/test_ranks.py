"""What ranks agree on, and how they end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from forks import ENVIRONMENT, on_ranks

from sage.util import ranks
from sage.util.errors import UserError
from sage.util.processes import run_ranks

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


PLACES = {
    "RANK=x WORLD_SIZE=1": "RANK=x:",
    "RANK= WORLD_SIZE= LOCAL_RANK=": "RANK=, WORLD_SIZE=:",  # srun's line outside of srun
    "RANK=1": "WORLD_SIZE=:",
    "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1": "RANK=2, WORLD_SIZE=2:",
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0": "MASTER_PORT=, MASTER_ADDR=:",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1": "LOCAL_RANK=:",
    "RANK=0 WORLD_SIZE=1": None,
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=1": None,
    "": None,
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_no_rank_can_have(place, monkeypatch):
    """A variable that a script leaves out is one message, not a traceback of torch's, or a wait."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (setting.split("=") for setting in place.split()):
        monkeypatch.setenv(name, value)
    if PLACES[place] is None:
        return ranks.check_place()
    with pytest.raises(UserError, match=f"cannot be a rank with {PLACES[place]}"):
        ranks.check_place()


@pytest.mark.parametrize("rank", ["3", "", "x"])
def test_a_platforms_rank_neither_silences_nor_ends_a_command(rank):
    """It may be set for every process of a job. What `sage` imports first has seen it."""
    code = "import sage.cli as c; c.forget_ranks(); c.console.print('said')"
    said = subprocess.check_output([sys.executable, "-c", code], env={**ENVIRONMENT, "RANK": rank}, text=True)
    assert said == "said\n"


@pytest.mark.slow
def test_ranks_whose_group_is_kept_alive_end_well(tmp_path, capfd):
    """Without `leave`, four of five such runs abort: a gloo thread needs the interpreter at shutdown."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert run_ranks(2, [str(script)], ENVIRONMENT, "") == 0
    assert capfd.readouterr().out.count("299") == 2


def agree() -> list[int]:
    from sage.model.engine import init_distributed

    assert ranks.rank() in (0, 1) and ranks.world_size() == 2  # already before there is a group
    init_distributed()
    calls = []

    def work() -> str:
        calls.append(ranks.rank())
        return f"rank {ranks.rank()}"

    def fail() -> None:
        raise UserError(f"rank {ranks.rank()} refuses")

    assert ranks.main_only(work) == "rank 0" and calls == ([0] if ranks.rank() == 0 else [])
    assert ranks.machine_first(work) == f"rank {ranks.rank()}" and calls[-1] == ranks.rank()
    for way in (ranks.main_only, ranks.machine_first):
        with pytest.raises(UserError, match="rank 0 refuses"):
            way(fail)
    return ranks.gather(ranks.rank())


@pytest.mark.slow
def test_ranks_take_rank_0s_answer_and_its_refusal():
    """A rank that looks for a file by itself, or waits for a rank that gave up, would wait for ever."""
    assert on_ranks(2, agree) == [[0, 1], [0, 1]]
