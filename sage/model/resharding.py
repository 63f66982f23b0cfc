"""The optimizer's state of a checkpoint, which ZeRO split over some ranks, split for another number of ranks.

Stages 1 and 2 lay the parameters of each optimizer group end to end and give every rank an equal share of
that. Stage 3 gives every rank an equal share of each parameter, and lays its shares end to end, in sub-groups
of limited size. Shares are padded at the end. Values are moved and not computed with, so nothing is rounded.

A shard is what `state_dict` of DeepSpeed's optimizer returned on one rank. It holds the float32 weights and,
in the state dict of the optimizer inside, Adam's moments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# DeepSpeed's names for what is inside a shard: the weights and the state dict of the optimizer inside.
WEIGHTS_12, INNER_12 = "single_partition_of_fp32_groups", "base_optimizer_state"
WEIGHTS_3, INNER_3 = "fp32_flat_groups", "optimizer_state_dict"


def reshard_groups(
    shards: Sequence[dict[str, Any]], totals: Sequence[int], sizes: Sequence[int], rank: int
) -> dict[str, Any]:
    """The shard of `rank` under stage 1 or 2, from those of all ranks that wrote the checkpoint.

    Args:
        totals: elements of each optimizer group.
        sizes: elements of each group that a rank has now, with padding.
    """

    def cut(held: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        groups = zip(*held, strict=True)
        return [share(*args, rank) for args in zip(groups, totals, sizes, strict=True)]

    groups = shards[0][INNER_12]["param_groups"]
    return _reshard(shards, WEIGHTS_12, INNER_12, cut, groups)


def reshard_parameters(
    shards: Sequence[dict[str, Any]], numels: Sequence[int], now: dict[str, Any], rank: int, world_size: int
) -> dict[str, Any]:
    """The shard of `rank` of `world_size` under stage 3, from those of all ranks that wrote the checkpoint.

    Args:
        numels: elements of each parameter, in the optimizer's order.
        now: the shard that this rank has before it loads anything. It says what the sub-groups are.
    """
    sizes = [len(flat) for flat in now[WEIGHTS_3]]
    old, new = ([-(-n // ranks) for n in numels] for ranks in (len(shards), world_size))

    def cut(held: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        parameters = zip(*(pieces(flats, old) for flats in held), strict=True)
        shares = [share(*args, rank) for args in zip(parameters, numels, new, strict=True)]
        return list(torch.cat(shares).split(sizes))

    groups = [
        {**saved, "params": group["params"]}
        for saved, group in zip(shards[0][INNER_3]["param_groups"], now[INNER_3]["param_groups"], strict=True)
    ]
    return _reshard(shards, WEIGHTS_3, INNER_3, cut, groups)


def _reshard(
    shards: Sequence[dict[str, Any]],
    weights_key: str,
    inner_key: str,
    cut: Callable[[Sequence[Sequence[Tensor]]], list[Tensor]],
    groups: list[dict[str, Any]],
) -> dict[str, Any]:
    """`cut` takes the flat tensors that each old rank held of something, and returns those of this rank."""
    weights = cut([shard[weights_key] for shard in shards])
    inner = [shard[inner_key]["state"] for shard in shards]
    if not inner[0]:  # before the first step
        return {**shards[0], weights_key: weights, inner_key: {"state": {}, "param_groups": groups}}
    first = inner[0][0]
    moments = {
        name: cut([[states[i][name] for i in sorted(states)] for states in inner])
        for name, value in first.items()
        if torch.is_tensor(value) and value.ndim
    }
    state = {}
    for i in range(len(weights)):
        # The rest is the number of steps. It may be a tensor that counts up in place, so each gets its own.
        rest = {name: copy.deepcopy(value) for name, value in first.items() if name not in moments}
        state[i] = {**rest, **{name: values[i] for name, values in moments.items()}}
    return {**shards[0], weights_key: weights, inner_key: {"state": state, "param_groups": groups}}


@torch.no_grad()
def share(parts: Sequence[Tensor], total: int, size: int, rank: int) -> Tensor:
    """Elements rank * size to (rank + 1) * size of a vector: [size], with zeros after its end.

    Args:
        parts: the vector in pieces, [n_i] each. They may hold padding after its end.
        total: elements of the vector.
    """
    start, out = rank * size, parts[0].new_zeros(size)
    at = 0
    for part in parts:
        first, last = max(start, at), min(start + size, at + len(part), total)
        if first < last:
            out[first - start : last - start] = part[first - at : last - at]
        at += len(part)
    if at < total:
        raise ValueError(f"it holds {at} values where the model has {total}")
    return out


def pieces(flats: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Views of these sizes, back to back, of flat tensors that end where one of them does."""
    found, flats = [], list(flats)
    at = 0
    for size in sizes:
        if at == len(flats[0]) and len(flats) > 1:
            flats.pop(0)
            at = 0
        found.append(flats[0][at : at + size])
        if len(found[-1]) != size:
            raise ValueError("its parameters are not those of the model")
        at += size
    return found
