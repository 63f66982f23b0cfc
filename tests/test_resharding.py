"""Shards of a checkpoint for another number of ranks equal those that this number would have written."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sage.model.resharding import pieces, reshard_groups, reshard_parameters, share

WORLDS = list(itertools.product((1, 2, 3, 4, 7), repeat=2))
GROUPS = [[5, 12, 1], [7, 3]]  # elements of each parameter; most shares need padding
PARAMETERS = [n for group in GROUPS for n in group]


def padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, torch.zeros(size - len(values))])


def vectors(first: float, sizes: list[int]) -> list[Tensor]:
    """Vectors of these sizes whose values are all different, and none 0."""
    values = torch.arange(sum(sizes)) + first
    return list(values.split(sizes))


def whole(sizes: list[int]) -> dict[str, list[Tensor]]:
    return {
        name: vectors(1000.0 * i + 1, sizes) for i, name in enumerate(("weights", "exp_avg", "exp_avg_sq"))
    }


def stage_2(world_size: int, trimmed: bool) -> list[dict]:
    """What each rank writes under stages 1 and 2. bfloat16 is not `trimmed`."""
    totals = [sum(group) for group in GROUPS]
    sizes = [-(-total // (2 * world_size)) * 2 for total in totals]
    shards = []
    for rank in range(world_size):
        cut = {
            name: [
                padded(v, world_size * n)[rank * n : rank * n + n] for v, n in zip(values, sizes, strict=True)
            ]
            for name, values in whole(totals).items()
        }
        weights = cut["weights"]
        if trimmed:
            weights = [w[w != 0] for w in weights]
        state = {
            i: {"step": torch.tensor(3.0), **{n: cut[n][i] for n in ("exp_avg", "exp_avg_sq")}}
            for i in range(len(GROUPS))
        }
        inner = {"state": state, "param_groups": [{"lr": 0.1, "params": [i]} for i in range(len(GROUPS))]}
        shards.append(
            {"single_partition_of_fp32_groups": weights, "base_optimizer_state": inner, "overflow": False}
        )
    return shards


def stage_3(world_size: int, sub_groups: list[list[int]]) -> list[dict]:
    """What each rank writes under stage 3; `sub_groups` are parameters by number, and the last is a group."""
    shards = []
    for rank in range(world_size):
        flats = {}
        for name, values in whole(PARAMETERS).items():
            shares = [
                padded(v, -(-len(v) // world_size) * world_size).chunk(world_size)[rank] for v in values
            ]
            flats[name] = [torch.cat([shares[i] for i in members]) for members in sub_groups]
        state = {
            i: {"step": torch.tensor(3.0), **{n: flats[n][i] for n in ("exp_avg", "exp_avg_sq")}}
            for i in range(len(sub_groups))
        }
        last = len(sub_groups) - 1
        groups = [{"lr": 0.1, "params": list(range(last))}, {"lr": 0.2, "params": [last]}]
        shards.append(
            {
                "fp32_flat_groups": flats["weights"],
                "optimizer_state_dict": {"state": state, "param_groups": groups},
            }
        )
    return shards


def assert_equal(got, want) -> None:
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_equal(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_equal(a, b)
    else:
        assert got == want


@pytest.mark.parametrize("trimmed", [True, False])
def test_stages_1_and_2(trimmed):
    for old, new in WORLDS:
        shards = stage_2(old, trimmed)
        for rank, want in enumerate(stage_2(new, trimmed=False)):
            sizes = [len(weights) for weights in want["single_partition_of_fp32_groups"]]
            assert_equal(reshard_groups(shards, [sum(group) for group in GROUPS], sizes, rank), want)


@pytest.mark.parametrize("before", [[[0, 1, 2], [3, 4]], [[0], [1, 2], [3, 4]]])
def test_stage_3(before):
    """The sub-groups may have been others: their size is limited per rank."""
    for old, new in WORLDS:
        shards = stage_3(old, before)
        for rank, want in enumerate(stage_3(new, [[0, 1], [2], [3, 4]])):
            got = reshard_parameters(shards, PARAMETERS, want, rank, new)
            assert_equal(got, want)
            steps = [state["step"] for state in got["optimizer_state_dict"]["state"].values()]
            steps[0] += 1  # as the optimizer does
            assert [float(step) for step in steps] == [4, 3, 3]


def test_shards_of_another_model_are_refused():
    with pytest.raises(ValueError, match="3 values where the model has 4"):
        share([torch.ones(3)], total=4, size=4, rank=0)
    with pytest.raises(ValueError, match="not those of the model"):
        pieces([torch.ones(3)], [2, 2])
