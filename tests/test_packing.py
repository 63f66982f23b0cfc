"""Micro-batches: who computes what, and the padded tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.data.packing import LAYOUTS, collate, pair_tokens, plan
from sage.data.tokens import Pair

lengths = st.lists(st.tuples(*[st.integers(1, 60)] * 3), min_size=1, max_size=40).map(
    lambda rows: np.array(rows, dtype=np.int64)
)


@settings(max_examples=300, deadline=None)
@given(lengths, st.integers(240, 1200), st.integers(1, 9), st.sampled_from(LAYOUTS), st.integers(0, 30))
def test_plan(lengths, budget, world_size, layout, prefix):
    """Protects the mean over the batch (each pair once), memory (the budget) and ZeRO's collectives (equal
    counts)."""
    prefix = min(prefix, lengths[:, 0].min() - 1) if layout == "shared" else 0
    plans = plan(lengths, budget, world_size, layout, prefix)
    assert plans == plan(
        lengths.copy(), budget, world_size, layout, prefix
    )  # every rank computes the same plan
    assert len(plans) == world_size
    assert len({len(mine) for mine in plans}) == 1
    members = [i for mine in plans for micro_batch in mine for i in micro_batch]
    assert sorted(members) == list(range(len(lengths)))
    tokens = pair_tokens(lengths, layout, prefix)
    for micro_batch in (m for mine in plans for m in mine if m):
        size = (
            len(micro_batch) * tokens[micro_batch].max() if layout == "padded" else tokens[micro_batch].sum()
        )
        assert prefix + size <= budget
    busy = [sum(map(len, mine)) for mine in plans]
    assert min(busy) > 0 or max(busy) <= 1  # nobody idles while another has two pairs
    assert sum(not m for mine in plans for m in mine) < world_size  # no round in which nobody has work


def test_packed_ranks_get_equal_work():
    """Protects speed on many ranks: the slowest decides, and packed micro-batches
    differ by less than one pair."""
    lengths = np.random.default_rng(0).integers(20, 200, (500, 3))
    tokens = pair_tokens(lengths, "shared")
    work = [sum(tokens[m].sum() for m in mine) for mine in plan(lengths, 4096, 8, "shared")]
    assert max(work) - min(work) < 0.05 * max(work)
    rounds = len(plan(lengths, 4096, 8, "shared")[0])
    assert rounds <= -(-tokens.sum() // (4096 * 8)) + 1  # and the budget is used up


def pair(name: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(pair_id=name, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, pass_rate=None)


ids = st.lists(
    st.integers(0, 3), min_size=1, max_size=12
)  # few ids, so that pad == eos == ordinary tokens all over


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=6),
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(0, 3), max_size=5),
)
def test_collate_against_a_naive_reading(rows, layout, prefix):
    """Protects position bookkeeping: every label is a response token, and what predicts it has read that
    response's own prompt and past, whatever the ids are, even where pad == eos."""
    prefix = prefix if layout == "shared" else []
    rows = [(prefix + prompt, *responses) for prompt, *responses in rows]
    pairs = [pair(str(i), *row) for i, row in enumerate(rows)]
    batch = collate(pairs, layout, len(prefix))
    n, flat, places = len(rows), batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    texts = [(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows]
    past = visible(batch)
    scored = zip(batch.positions.tolist(), batch.labels.tolist(), batch.slots.tolist(), strict=True)
    found = {slot: (position, label) for position, label, slot in scored}
    assert len(found) == sum(len(response) for _, response in texts)  # every slot once
    for i, (prompt, response) in enumerate(texts):
        for t, token in enumerate(response):
            position, label = found[i * batch.longest + t]
            assert label == token
            assert [flat[j] for j in past[position]] == prompt + response[:t]
            assert [places[j] for j in past[position]] == list(range(len(prompt) + t))
    assert batch.response_tokens.tolist() == [len(r) for _, r in texts]
    assert batch.response_tokens.dtype == torch.float32
    if layout == "padded":
        assert batch.spans is None and len(batch.input_ids) == 2 * n
    else:
        assert batch.attention_mask is None
        lengths = np.array([[len(x) for x in row] for row in rows])
        assert len(flat) == len(prefix) + pair_tokens(lengths, layout, len(prefix)).sum()


def visible(batch) -> dict[int, list[int]]:
    """Flat position -> the flat positions it attends to, by the definition of each layout."""
    past = {}
    if batch.spans is None:
        length = batch.input_ids.shape[1]
        for row, mask in enumerate(batch.attention_mask.tolist()):
            for t in range(sum(mask)):
                past[row * length + t] = [row * length + j for j in range(t + 1)]
        return past
    prefix = list(range(batch.prefix))
    past.update({position: prefix[: position + 1] for position in prefix})
    for start, prompt, chosen, rejected in batch.spans:
        first = prefix + list(range(start, start + prompt + chosen))
        second = first[: len(prefix) + prompt] + list(
            range(start + prompt + chosen, start + prompt + chosen + rejected)
        )
        for text in (first, second):
            past.update({position: text[: t + 1] for t, position in enumerate(text)})
    return past
