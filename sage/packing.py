"""How pairs become micro-batches: who computes what, and the padded tensors.

Plans are functions of lengths alone, so every rank computes the whole plan and takes its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage.pairs import Pair


class MicroBatch(NamedTuple):
    """n pairs as 2n right-padded rows (n chosen, then n rejected), and where the scored tokens are.

    A response token at column t is predicted by the hidden state at column t - 1, so `positions` index the flattened
    [2n * length] hidden states one column to the left of their s `labels`. Padding is known by position, never by
    token id: pad may equal eos.
    """

    input_ids: Tensor  # [2n, length] int64
    attention_mask: Tensor  # [2n, length] int64
    positions: Tensor  # [s] int64
    labels: Tensor  # [s] int64
    response_tokens: Tensor  # [2n] float32

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(t.to(device, non_blocking=True) for t in self))


def plan(lengths: np.ndarray, budget: int, world_size: int) -> list[list[list[int]]]:
    """Split n pairs into micro-batches under a token budget: plan[rank] is a list of lists of positions in 0..n-1.

    Args:
        lengths: [n, 3] tokens of prompt, chosen and rejected.
        budget: padded tokens of a micro-batch, counting both rows of every pair.
        world_size: every rank gets the same number of micro-batches, since ZeRO's collectives must match; the ranks
            that have nothing left run an empty list, which the caller turns into a pair of weight zero.

    Pairs are sorted by length, so that rows of a micro-batch pad little, and micro-batches are dealt out in turn, so
    that ranks get equal work.
    """
    rows = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    micro_batches: list[list[int]] = []
    for i in np.argsort(-rows, kind="stable").tolist():
        # Sorted by falling length: the first pair of a micro-batch sets its padded length.
        if micro_batches and 2 * (len(micro_batches[-1]) + 1) * int(rows[micro_batches[-1][0]]) <= budget:
            micro_batches[-1].append(i)
        else:
            micro_batches.append([i])
    while len(micro_batches) < min(world_size, len(lengths)):  # no rank idles while another has two pairs
        widest = max(micro_batches, key=len)
        half = len(widest) // 2
        micro_batches.append(widest[half:])
        del widest[half:]
    rounds = -(-len(micro_batches) // world_size)
    micro_batches += [[] for _ in range(rounds * world_size - len(micro_batches))]
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def collate(pairs: Sequence[Pair]) -> MicroBatch:
    """Pad n >= 1 pairs into one micro-batch, on the CPU."""
    responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    prompts = [p.prompt_ids for p in pairs] * 2
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    positions, labels = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        attention_mask[row, :end] = 1
        start = row * length + len(prompt) - 1
        positions.append(torch.arange(start, start + len(response)))
        labels.append(input_ids[row, len(prompt) : end])
    response_tokens = torch.tensor([float(len(r)) for r in responses])
    return MicroBatch(input_ids, attention_mask, torch.cat(positions), torch.cat(labels), response_tokens)
