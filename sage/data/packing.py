"""How pairs become micro-batches: which rank computes which pairs, and the tensors.

A plan is a function of lengths and of which texts are the same, so every rank computes the whole plan and
takes its own row.

A micro-batch computes each text once, even if it stands in several of its pairs. A layout says how the texts
lie in memory:
  shared    one row [prefix | prompt | response | response | ... | prompt | ...]: no padding, each prompt
            once with all its responses, and the tokens with which all prompts begin (a system prompt,
            solved examples) once per row
  unshared  one row of spans [prompt | response]: no padding, a prompt once for each of its responses
  padded    one row per text, padded to the longest: for models whose attention cannot take a packed row
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage.data.tokens import Pair

LAYOUTS = ("shared", "unshared", "padded")
Text = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a prompt and of a response


class Span(NamedTuple):
    """Where a prompt and its responses lie in their row: they begin at `start`. The others count tokens: of
    the prompt after the prefix, and of each response."""

    start: int
    prompt: int
    responses: tuple[int, ...]


class MicroBatch(NamedTuple):
    """n pairs made of r different texts, and where the s scored tokens of the texts are.

    The hidden state one position before a response token, in its own text, predicts it. `positions` index
    these states in the flattened rows. The last state of a shared prompt predicts the first token of all its
    responses. No token is recognised by its id, because pad may equal eos.
    """

    input_ids: Tensor  # [rows, length] int64
    position_ids: Tensor  # [rows, length] int64: each token's position in its own text
    attention_mask: Tensor | None  # [rows, length] int64 of padded rows
    spans: list[Span] | None  # of a packed row, after its prefix
    positions: Tensor  # [s] int64
    prefix: int  # tokens that a packed row begins with, part of every prompt in it
    labels: Tensor  # [s] int64
    slots: Tensor  # [s] int64: text * longest + t, the token's cell in a [r, longest] table
    response_tokens: Tensor  # [r] float32
    sides: Tensor  # [2n] int64: the texts of the n chosen, then of the n rejected
    longest: int  # response, in tokens

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {
            k: x.to(device, non_blocking=True) for k, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**tensors)


def pair_tokens(lengths: np.ndarray, layout: str, prefix: int = 0) -> np.ndarray:
    """Tokens that each pair costs on its own, [n], for lengths [n, 3] of prompt, chosen and rejected.

    Padding among pairs and the prefix of a shared row are not included.
    """
    prompt, chosen, rejected = lengths.T
    if layout == "shared":
        return prompt - prefix + chosen + rejected
    return 2 * prompt + (chosen + rejected if layout == "unshared" else 2 * np.maximum(chosen, rejected))


class Unit(NamedTuple):
    """Pairs of one prompt that go into the same micro-batch."""

    pairs: list[int]
    rows: int  # different texts
    tokens: int  # of all texts together, without the prefix; in the padded layout with padding


def plan(
    lengths: np.ndarray,
    budget: int,
    world_size: int,
    layout: str,
    prefix: int = 0,
    keys: np.ndarray | None = None,
) -> list[list[list[int]]]:
    """Split n pairs into micro-batches under a token budget: plan[rank] is a list of lists of positions in
    0..n-1.

    Pairs that share tokens go into the same micro-batch, unless that gives the slowest rank more to do.

    Args:
        lengths: [n, 3] tokens of prompt, chosen and rejected. No single pair may cost more than the budget.
        budget: most tokens of a micro-batch, padding included.
        world_size: every rank gets the same number of micro-batches, because ZeRO's collectives must match.
            Some micro-batches may be empty; the caller runs a pair of weight zero for them.
        prefix: number of tokens with which all prompts begin. The shared layout has them once per row; 0 for
            others.
        keys: [n, 3], equal for equal ids. Without them, no two pairs share tokens.
    """
    if keys is None:
        keys = np.arange(lengths.size).reshape(lengths.shape)
    room, fill = budget - prefix, _chunk if layout == "padded" else _balance
    options = [units(lengths, keys, layout, prefix, 0)]
    if len(np.unique(keys[:, 0])) < len(keys):
        options.append(units(lengths, keys, layout, prefix, room))
        fair = sum(unit.tokens for unit in options[-1]) // world_size
        if fair < room:  # smaller units, so that every rank gets some
            options.append(units(lengths, keys, layout, prefix, fair))
    plans = []
    for option in options:
        micro_batches = [
            [i for unit in chosen for i in unit.pairs] for chosen in fill(option, room, world_size)
        ]
        micro_batches += [[] for _ in range(-len(micro_batches) % world_size)]
        plans.append([micro_batches[rank::world_size] for rank in range(world_size)])

    def work(plan: list[list[list[int]]]) -> int:
        """Tokens of the slowest rank, if the ranks wait for each other after every micro-batch."""
        sizes = [[micro_tokens(lengths[m], keys[m], layout, prefix)[1] for m in mine if m] for mine in plan]
        return sum(map(max, zip_longest(*sizes, fillvalue=0)))

    return min(plans, key=work) if len(plans) > 1 else plans[0]


def units(lengths: np.ndarray, keys: np.ndarray, layout: str, prefix: int, most: int) -> list[Unit]:
    """n pairs, put together where they share tokens and cost at most `most` together."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(keys[:, 0].tolist()):
        groups.setdefault(prompt, []).append(i)
    sizes, names, found = lengths.tolist(), keys.tolist(), list[Unit]()

    def unit(pairs: list[int], texts: dict[int, int]) -> Unit:
        prompt, count, total = sizes[pairs[0]][0], len(texts), sum(texts.values())
        if layout == "shared":
            return Unit(pairs, count, prompt - prefix + total)
        return Unit(
            pairs, count, count * prompt + (total if layout == "unshared" else count * max(texts.values()))
        )

    for members in groups.values():
        latest, texts = Unit([], 0, 0), dict[int, int]()  # response -> its tokens
        for i in members:
            own = dict(zip(names[i][1:], sizes[i][1:], strict=True))
            related = layout == "shared" or not texts.keys().isdisjoint(own)
            more = unit([*latest.pairs, i], texts | own) if related and latest.pairs else None
            if more is not None and more.tokens <= most:
                latest, texts = more, texts | own
                found[-1] = latest
            else:
                latest, texts = unit([i], own), own
                found.append(latest)
    return found


def micro_tokens(lengths: np.ndarray, keys: np.ndarray, layout: str, prefix: int = 0) -> tuple[int, int]:
    """Tokens of one micro-batch of these pairs: without padding, and with it."""
    prompts: dict[int, int] = {}
    texts: dict[tuple[int, int], tuple[int, int]] = {}
    for (prompt, *responses), (tokens, *own) in zip(keys.tolist(), lengths.tolist(), strict=True):
        prompts[prompt] = tokens - prefix
        texts |= {(prompt, key): (tokens, size) for key, size in zip(responses, own, strict=True)}
    if layout == "shared":
        real = prefix + sum(prompts.values()) + sum(size for _, size in texts.values())
        return real, real
    rows = [sum(text) for text in texts.values()]
    return sum(rows), len(rows) * max(rows) if layout == "padded" else sum(rows)


def _balance(units: list[Unit], budget: int, world_size: int) -> list[list[Unit]]:
    """The fewest micro-batches per rank that the budget allows, of nearly equal size.

    The longest unit goes first, and each unit goes to the emptiest micro-batch (Graham 1969), so that ranks
    get equal work.
    """
    total = sum(unit.tokens for unit in units)
    rounds = min(-(-total // (budget * world_size)), -(-len(units) // world_size))
    order = sorted(units, key=lambda unit: -unit.tokens)
    while True:
        emptiest = [(0, i) for i in range(rounds * world_size)]
        micro_batches: list[list[Unit]] = [[] for _ in emptiest]
        for unit in order:
            size, i = emptiest[0]
            if size and size + unit.tokens > budget:
                break
            micro_batches[i].append(unit)
            heapq.heapreplace(emptiest, (size + unit.tokens, i))
        else:
            return micro_batches
        rounds += max(rounds // 50, 1)


def _chunk(units: list[Unit], budget: int, world_size: int) -> list[list[Unit]]:
    """Units sorted by length, for little padding, and split where padded rows fill the budget."""
    micro_batches: list[list[Unit]] = []
    rows = longest = 0
    for unit in sorted(units, key=lambda unit: -(unit.tokens // unit.rows)):
        # Sorted by falling length: the first unit of a micro-batch sets its padded length.
        if micro_batches and (rows + unit.rows) * longest <= budget:
            micro_batches[-1].append(unit)
            rows += unit.rows
        else:
            micro_batches.append([unit])
            rows, longest = unit.rows, unit.tokens // unit.rows
    while len(micro_batches) < min(world_size, len(units)):  # no rank idles while another has two units
        widest = max(micro_batches, key=len)
        half = len(widest) // 2
        micro_batches.append(widest[half:])
        del widest[half:]
    return micro_batches


def collate(pairs: Sequence[Pair], layout: str, prefix: int = 0) -> MicroBatch:
    """n >= 1 pairs as one micro-batch, on the CPU.

    In the shared layout, all prompts begin with the same `prefix` tokens and have at least one more, which
    predicts the responses.
    """
    n = len(pairs)
    numbers: dict[Text, int] = {}
    both = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    sides = [numbers.setdefault((tuple(prompt), tuple(response)), len(numbers)) for prompt, response in both]
    texts = list(numbers)
    rows: Any
    if layout == "padded":
        prefix, rows = 0, _padded(texts)
    else:  # the texts of a pair lie side by side
        together: dict[Any, list[int]] = {}
        for text in dict.fromkeys(sides[side * n + i] for i in range(n) for side in (0, 1)):
            together.setdefault(texts[text][0] if layout == "shared" else text, []).append(text)
        rows = _packed(texts, list(together.values()), prefix)
    longest = max(len(response) for _, response in texts)
    return MicroBatch(
        *rows,
        prefix=prefix,
        labels=torch.tensor([token for _, response in texts for token in response]),
        slots=torch.cat([i * longest + torch.arange(len(response)) for i, (_, response) in enumerate(texts)]),
        response_tokens=torch.tensor([float(len(response)) for _, response in texts]),
        sides=torch.tensor(sides),
        longest=longest,
    )


def _packed(
    texts: list[Text], together: list[list[int]], prefix: int
) -> tuple[Tensor, Tensor, None, list[Span], Tensor]:
    """The first five fields of a MicroBatch in one row. Texts that lie `together` have the same prompt."""
    ids = list(texts[0][0][:prefix])
    places = [torch.arange(prefix)]
    spans: list[Span] = []
    before: dict[int, Tensor] = {}  # text -> the positions that predict its response
    for members in together:
        prompt, responses = texts[members[0]][0], [texts[text][1] for text in members]
        spans.append(Span(len(ids), len(prompt) - prefix, tuple(map(len, responses))))
        ids += prompt[prefix:]
        places.append(torch.arange(prefix, len(prompt)))
        last = torch.tensor([len(ids) - 1])
        for text, response in zip(members, responses, strict=True):
            before[text] = torch.cat([last, torch.arange(len(ids), len(ids) + len(response) - 1)])
            ids += response
            places.append(len(prompt) + torch.arange(len(response)))
    positions = torch.cat([before[text] for text in range(len(texts))])
    return torch.tensor([ids]), torch.cat(places)[None], None, spans, positions


def _padded(texts: list[Text]) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
    """The first five fields of a MicroBatch with one row per text."""
    length = max(len(prompt) + len(response) for prompt, response in texts)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    positions = []
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        attention_mask[row, :end] = 1
        start = row * length + len(prompt) - 1
        positions.append(torch.arange(start, start + len(response)))
    place = torch.arange(length).expand_as(input_ids).contiguous()
    return input_ids, place, attention_mask, None, torch.cat(positions)
