"""What ranks agree on, and how they end."""

from __future__ import annotations

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
