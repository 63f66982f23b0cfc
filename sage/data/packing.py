"""How pairs become micro-batches: which rank computes which pairs, and the tensors.

A plan is a function of lengths alone, so every rank computes the whole plan and takes its own row.

A layout says how the pairs of a micro-batch lie in memory:
  shared    one row [prefix | prompt | chosen | rejected | prompt | ...]: no padding, each prompt once, and
            the tokens with which all prompts begin (a system prompt, solved examples) once per row
  unshared  one row of spans [prompt | chosen] and [prompt | rejected]: no padding, each prompt twice
  padded    two rows per pair, padded to the longest: for models whose attention cannot take a packed row
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage.data.tokens import Pair

LAYOUTS = ("shared", "unshared", "padded")


class Span(NamedTuple):
    """Where a pair lies in its row: it begins at `start`. The others count tokens: of the prompt after the
    prefix, of chosen, and of rejected, which may be 0."""

    start: int
    prompt: int
    chosen: int
    rejected: int


class MicroBatch(NamedTuple):
    """n pairs, and where their s scored tokens are.

    The hidden state one position before a response token, in its own text, predicts it. `positions` index
    these states in the flattened rows. The last state of a shared prompt predicts the first token of both
    responses. No token is recognised by its id, because pad may equal eos.
    """

    input_ids: Tensor  # [rows, length] int64
    position_ids: Tensor  # [rows, length] int64: each token's position in its own text
    attention_mask: Tensor | None  # [rows, length] int64 of padded rows
    prefix: int  # tokens that a packed row begins with, part of every prompt in it
    spans: list[Span] | None  # of a packed row, after its prefix
    positions: Tensor  # [s] int64
    labels: Tensor  # [s] int64
    slots: Tensor  # [s] int64: response * longest + t, the token's cell in a [2n, longest] table
    response_tokens: Tensor  # [2n] float32: n chosen, then n rejected
    longest: int  # response, in tokens

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {
            k: x.to(device, non_blocking=True) for k, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**tensors)


def pair_tokens(lengths: np.ndarray, layout: str, prefix: int = 0) -> np.ndarray:
    """Tokens that each pair costs, [n], for lengths [n, 3] of prompt, chosen and rejected.

    Padding among pairs and the prefix of a shared row are not included.
    """
    prompt, chosen, rejected = lengths.T
    if layout == "shared":
        return prompt - prefix + chosen + rejected
    return 2 * prompt + (chosen + rejected if layout == "unshared" else 2 * np.maximum(chosen, rejected))


def plan(
    lengths: np.ndarray, budget: int, world_size: int, layout: str, prefix: int = 0
) -> list[list[list[int]]]:
    """Split n pairs into micro-batches under a token budget: plan[rank] is a list of lists of positions in
    0..n-1.

    Args:
        lengths: [n, 3] tokens of prompt, chosen and rejected. No single pair may cost more than the budget.
        budget: most tokens of a micro-batch, padding included.
        world_size: every rank gets the same number of micro-batches, because ZeRO's collectives must match.
            Some micro-batches may be empty; the caller runs a pair of weight zero for them.
        prefix: number of tokens with which all prompts begin. The shared layout has them once per row; 0 for
            others.
    """
    tokens = pair_tokens(lengths, layout, prefix)
    micro_batches = (_chunk if layout == "padded" else _balance)(tokens, budget - prefix, world_size)
    rounds = -(-len(micro_batches) // world_size)
    micro_batches += [[] for _ in range(rounds * world_size - len(micro_batches))]
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def _balance(tokens: np.ndarray, budget: int, world_size: int) -> list[list[int]]:
    """The fewest micro-batches per rank that the budget allows, of nearly equal size.

    The longest pair goes first, and each pair goes to the emptiest micro-batch (Graham 1969), so that ranks
    get equal work.
    """
    rounds = min(-(-int(tokens.sum()) // (budget * world_size)), -(-len(tokens) // world_size))
    order = np.argsort(-tokens, kind="stable").tolist()
    while True:
        emptiest = [(0, i) for i in range(rounds * world_size)]
        micro_batches: list[list[int]] = [[] for _ in emptiest]
        for pair in order:
            size, i = emptiest[0]
            if size and size + tokens[pair] > budget:
                break
            micro_batches[i].append(pair)
            heapq.heapreplace(emptiest, (size + int(tokens[pair]), i))
        else:
            return micro_batches
        rounds += max(rounds // 50, 1)


def _chunk(tokens: np.ndarray, budget: int, world_size: int) -> list[list[int]]:
    """Pairs sorted by length, for little padding, and split where padded rows fill the budget."""
    micro_batches: list[list[int]] = []
    for i in np.argsort(-tokens, kind="stable").tolist():
        # Sorted by falling length: the first pair of a micro-batch sets its padded length.
        if micro_batches and (len(micro_batches[-1]) + 1) * int(tokens[micro_batches[-1][0]]) <= budget:
            micro_batches[-1].append(i)
        else:
            micro_batches.append([i])
    while len(micro_batches) < min(world_size, len(tokens)):  # no rank idles while another has two pairs
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
    return _padded(pairs) if layout == "padded" else _packed(pairs, layout == "shared", prefix)


def _packed(pairs: Sequence[Pair], shared: bool, prefix: int) -> MicroBatch:
    ids: list[int] = pairs[0].prompt_ids[:prefix]
    places = [torch.arange(prefix)]
    spans: list[Span] = []
    before: dict[tuple[int, int], Tensor] = {}  # (side, pair) -> the positions that predict its tokens

    def add(pair: int, prompt: list[int], first: list[int], second: list[int], side: int) -> None:
        """Append a span. Its first response is of this side (0 = chosen), the second is the rejected one."""
        start, fork = len(ids), len(ids) + len(prompt)
        end = fork + len(first)
        spans.append(Span(start, len(prompt), len(first), len(second)))
        ids.extend([*prompt, *first, *second])
        text, after_prompt = prefix + len(prompt) + len(first), prefix + len(prompt)
        places.append(torch.arange(prefix, text))
        places.append(torch.arange(after_prompt, after_prompt + len(second)))
        before[side, pair] = torch.arange(fork - 1, end - 1)
        if second:
            before[1, pair] = torch.cat([torch.tensor([fork - 1]), torch.arange(end, end + len(second) - 1)])

    for i, pair in enumerate(pairs):
        if shared:
            add(i, pair.prompt_ids[prefix:], pair.chosen_ids, pair.rejected_ids, 0)
        else:
            add(i, pair.prompt_ids, pair.chosen_ids, [], 0)
            add(i, pair.prompt_ids, pair.rejected_ids, [], 1)
    positions = [before[side, i] for side in (0, 1) for i in range(len(pairs))]
    return MicroBatch(
        torch.tensor([ids]),
        torch.cat(places)[None],
        None,
        prefix,
        spans,
        torch.cat(positions),
        *_scored(pairs),
    )


def _padded(pairs: Sequence[Pair]) -> MicroBatch:
    texts = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
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
    return MicroBatch(input_ids, place, attention_mask, 0, None, torch.cat(positions), *_scored(pairs))


def _scored(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, int]:
    """labels, slots, response_tokens and longest of a MicroBatch."""
    responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    longest = max(map(len, responses))
    labels = torch.tensor([token for response in responses for token in response])
    slots = torch.cat([i * longest + torch.arange(len(response)) for i, response in enumerate(responses)])
    return labels, slots, torch.tensor([float(len(response)) for response in responses]), longest
