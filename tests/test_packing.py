"""Micro-batches: who computes what, and the padded tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.packing import collate, plan
from sage.pairs import Pair

lengths = st.lists(st.tuples(*[st.integers(1, 60)] * 3), min_size=1, max_size=40).map(
    lambda rows: np.array(rows, dtype=np.int64)
)


@settings(max_examples=300, deadline=None)
@given(lengths, st.integers(2, 600), st.integers(1, 9))
def test_plan(lengths, budget, world_size):
    """Protects the mean over the batch (each pair once), memory (the budget) and ZeRO's collectives (equal counts)."""
    plans = plan(lengths, budget, world_size)
    assert plans == plan(lengths.copy(), budget, world_size)  # every rank computes the same plan
    assert len(plans) == world_size
    assert len({len(mine) for mine in plans}) == 1
    members = [i for mine in plans for micro_batch in mine for i in micro_batch]
    assert sorted(members) == list(range(len(lengths)))
    rows = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    for micro_batch in (m for mine in plans for m in mine if len(m) > 1):
        assert 2 * len(micro_batch) * rows[micro_batch].max() <= budget
    busy = [sum(map(len, mine)) for mine in plans]
    assert min(busy) > 0 or max(busy) <= 1  # nobody idles while another has two pairs
    assert sum(not m for mine in plans for m in mine) < world_size  # no round in which nobody has work


def pair(name: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(pair_id=name, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, pass_rate=None)


ids = st.lists(
    st.integers(0, 3), min_size=1, max_size=12
)  # few ids, so that pad == eos == ordinary tokens all over


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=6))
def test_collate_against_a_naive_reading(rows):
    """Protects position bookkeeping: labels are the response tokens, each predicted one column to its left, whatever
    the ids are (trap 3: pad == eos is told apart by position)."""
    pairs = [pair(str(i), *row) for i, row in enumerate(rows)]
    batch = collate(pairs)
    texts = [(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows]
    width = max(len(p) + len(r) for p, r in texts)
    assert batch.input_ids.shape == batch.attention_mask.shape == (2 * len(rows), width)
    positions, labels = [], []
    for i, (prompt, response) in enumerate(texts):
        full = prompt + response
        assert batch.input_ids[i, : len(full)].tolist() == full
        assert batch.attention_mask[i].tolist() == [1] * len(full) + [0] * (width - len(full))
        for t, token in enumerate(response):
            positions.append(i * width + len(prompt) + t - 1)
            labels.append(token)
    assert batch.positions.tolist() == positions
    assert batch.labels.tolist() == labels
    assert batch.response_tokens.tolist() == [len(r) for _, r in texts]
    assert batch.response_tokens.dtype == torch.float32
