"""Micro-batches: who computes what, and the padded tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.data.packing import LAYOUTS, collate, micro_tokens, pair_tokens, plan
from sage.data.tokens import Pair


@st.composite
def sets(draw) -> tuple[np.ndarray, np.ndarray]:
    """lengths and keys of up to 40 pairs, some of which share a prompt or responses."""
    prompts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    responses = draw(st.lists(st.integers(1, 60), min_size=2, max_size=8, unique=True))
    names = [st.integers(0, len(sizes) - 1) for sizes in (prompts, responses, responses)]
    pairs = st.tuples(*names).filter(lambda pair: pair[1] != pair[2])
    keys = np.array(draw(st.lists(pairs, min_size=1, max_size=40)))
    return np.stack([np.array(prompts)[keys[:, 0]], *np.array(responses)[keys[:, 1:]].T], 1), keys


@settings(max_examples=300, deadline=None)
@given(
    sets(),
    st.booleans(),
    st.integers(240, 1200),
    st.integers(1, 9),
    st.sampled_from(LAYOUTS),
    st.integers(0, 30),
)
def test_plan(pairs, together, budget, world_size, layout, prefix):
    """Protects the mean over the batch (each pair once), memory (the budget) and ZeRO's collectives (equal
    counts). Putting pairs together that share tokens never costs the slowest rank more."""
    lengths, keys = pairs[0], pairs[1] if together else np.arange(pairs[1].size).reshape(-1, 3)
    prefix = min(prefix, int(lengths[:, 0].min()) - 1) if layout == "shared" else 0
    plans = plan(lengths, budget, world_size, layout, prefix, keys)
    # Every rank computes the same plan.
    assert plans == plan(lengths.copy(), budget, world_size, layout, prefix, keys.copy())
    assert len(plans) == world_size
    assert len({len(mine) for mine in plans}) == 1
    members = [i for mine in plans for micro_batch in mine for i in micro_batch]
    assert sorted(members) == list(range(len(lengths)))

    def size(micro_batch: list[int]) -> int:
        return micro_tokens(lengths[micro_batch], keys[micro_batch], layout, prefix)[1] if micro_batch else 0

    assert all(size(m) <= budget for mine in plans for m in mine)
    assert sum(not m for mine in plans for m in mine) < world_size  # no round in which nobody has work
    if together:
        alone = plan(lengths, budget, world_size, layout, prefix)
        ours, theirs = (sum(max(map(size, turn)) for turn in zip(*p, strict=True)) for p in (plans, alone))
        assert ours <= theirs
    else:
        busy = [sum(map(len, mine)) for mine in plans]
        assert min(busy) > 0 or max(busy) <= 1  # nobody idles while another has two pairs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_pairs_that_share_tokens_lie_together(layout, world_size):
    """Protects what a whole-set pass saves: no text twice, wherever its pairs stand in the set. Equal
    responses to different prompts are different texts."""
    keys = np.array([[p, 10 + c, 20 + r] for c, r in [(0, 0), (0, 1), (1, 0), (1, 1)] for p in range(20)])
    lengths = np.stack([30 + keys[:, 0], keys[:, 1], 2 * keys[:, 2]], 1)
    plans = plan(lengths, 1000, world_size, layout, 0, keys)
    tokens = sum(micro_tokens(lengths[m], keys[m], layout)[0] for mine in plans for m in mine if m)
    prompts = sum(range(30, 50)) * (1 if layout == "shared" else 4)
    assert tokens == prompts + 20 * (10 + 11 + 40 + 42)


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
    st.lists(ids, min_size=1, max_size=4).flatmap(
        lambda texts: st.lists(st.tuples(*[st.sampled_from(texts) | ids] * 3), min_size=1, max_size=6)
    ),
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(0, 3), max_size=5),
)
def test_collate_against_a_naive_reading(rows, layout, prefix):
    """Protects position bookkeeping: every label is a response token, and what predicts it has read that
    response's own prompt and past, whatever the ids are, even where pad == eos. A text that stands in
    several pairs lies there once."""
    prefix = prefix if layout == "shared" else []
    rows = [(prefix + prompt, *responses) for prompt, *responses in rows]
    pairs = [pair(str(i), *row) for i, row in enumerate(rows)]
    batch = collate(pairs, layout, len(prefix))
    flat, places = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    texts = [(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows]
    past = visible(batch)
    scored = zip(batch.positions.tolist(), batch.labels.tolist(), batch.slots.tolist(), strict=True)
    found = {slot: (position, label) for position, label, slot in scored}
    different = {(tuple(prompt), tuple(response)) for prompt, response in texts}
    assert len(found) == sum(len(response) for _, response in different)  # every slot once
    for i, (prompt, response) in zip(batch.sides.tolist(), texts, strict=True):
        for t, token in enumerate(response):
            position, label = found[i * batch.longest + t]
            assert label == token
            assert [flat[j] for j in past[position]] == prompt + response[:t]
            assert [places[j] for j in past[position]] == list(range(len(prompt) + t))
    assert batch.response_tokens[batch.sides].tolist() == [len(r) for _, r in texts]
    assert batch.response_tokens.dtype == torch.float32
    lengths = np.array([[len(x) for x in row] for row in rows])
    names = {text: n for n, text in enumerate({tuple(text) for row in rows for text in row})}
    keys = np.array([[names[tuple(text)] for text in row] for row in rows])
    assert len(flat) == micro_tokens(lengths, keys, layout, len(prefix))[1]
    if layout == "padded":
        assert batch.spans is None and len(batch.input_ids) == len(different)
    else:
        assert batch.attention_mask is None


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
    for start, prompt, responses in batch.spans:
        begin = start + prompt
        for response in responses:
            text = [*prefix, *range(start, start + prompt), *range(begin, begin + response)]
            begin += response
            past.update({position: text[: t + 1] for t, position in enumerate(text)})
    return past
