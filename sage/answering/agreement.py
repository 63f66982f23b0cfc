"""Before the work, decoders are checked: do they give the model's own log-probabilities?

The reference is transformers' `generate`, greedy and one prompt at a time, on a few of the run's prompts. A
decoder under test is fed the tokens that the reference chose, so near ties cannot make the two diverge. It
must agree on the likeliest tokens of every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sage.answering.decoders import PlainGenerate, RefilledBatch
from sage.answering.responses import Decoder, ResponseRow
from sage.model.float32 import free_memory, in_float32
from sage.util.errors import UserError, describe

STEPS = 8  # tokens compared of each prompt
LIKELIEST = 10  # tokens compared at each step
# Largest difference of a step, in nats, averaged over its likeliest tokens. A wrong mask or position moves
# whole nats. Rounding to 16 bits moves tenths, so the check runs in float32 where memory allows it.
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 1.0
# A change of the last token moves the predictions after it by this much more than rounding moves the others.
AHEAD, AHEAD_16_BIT = 1e-3, 0.1
BATCH = 3  # fewer places than prompts, so that some rows enter late

# Whole numbers of a config that are not lengths of text. An unknown one costs a longer check, nothing else.
NOT_LENGTHS = re.compile(
    "vocab|hidden|intermediate|inner|ffn|mlp|embd|embedding_size|dim|head|layer|token|expert|rank|kernel|conv"
    "|d_model|d_ff|state|group|width|depth"
)


def find_decoder(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, prefill_tokens: int
) -> tuple[Decoder, list[str]]:
    """The fastest decoder that agrees with the model on these prompts, and the faults of the faster ones.

    Args:
        model: in eval mode, with the device and dtype that it will have.
        prompts: ids of what will be answered, at least one token each.
        max_new_tokens: the longest response.

    Raises:
        UserError: transformers' own `generate` fails on this model, or it is no causal language model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors if t.dtype == torch.bfloat16)
    copied = model.device.type != "cuda" or free_memory(model.device) > 2.5 * size  # a part for the pass
    with in_float32(model) if copied else nullcontext():
        return first_that_agrees(model, prompts, max_new_tokens, batch_size, prefill_tokens)


def first_that_agrees(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, prefill_tokens: int
) -> tuple[Decoder, list[str]]:
    """`find_decoder` in the dtype that the model has now."""
    steps = min(STEPS, max_new_tokens)
    probes = probe_prompts(model.config, [ids for ids in prompts if ids], max_new_tokens, steps)
    try:
        expected = Expected(PlainGenerate(model, 1), probes, steps)
    except Exception as error:
        raise UserError(
            f"generation=hf cannot run this {model.config.model_type}: transformers' own generate fails "
            f"({describe(error)}); try generation=vllm"
        ) from error
    if looks_ahead(model, next((ids for ids in reversed(probes) if len(ids) > 1), probes[0])):
        raise UserError(
            f"this {model.config.model_type} is not a causal language model: changing the last token of a "
            "prompt changes its earlier predictions. An encoder such as BERT cannot answer problems"
        )
    candidates = (
        ("one refilled batch", RefilledBatch(model, min(batch_size, BATCH), prefill_tokens)),
        ("a batch of equally long prompts", PlainGenerate(model, batch_size)),
    )
    faults = []
    for name, decoder in candidates:
        if (fault := expected.compare(decoder)) is None:
            decoder.batch_size = batch_size
            return decoder, faults
        faults.append(f"in {name}, {fault}")
    return PlainGenerate(model, 1), faults


@torch.no_grad()
def looks_ahead(model: Any, prompt: list[int]) -> bool:
    """Whether predictions inside a prompt depend on its last token, by more than rounding."""
    other = next((token for token in prompt if token != prompt[-1]), int(prompt[-1] == 0))
    prompt = prompt if len(prompt) > 1 else [other, *prompt]
    ids = torch.tensor([prompt, [*prompt[:-1], other]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    own, changed = logits.float().log_softmax(-1)
    moved = (own - changed).abs().mean(-1)  # at each token, over the vocabulary
    rounding = AHEAD if logits.dtype in (torch.float32, torch.float64) else AHEAD_16_BIT
    return bool((moved[:-1] > rounding * moved[-1]).any())


def context_of(config: Any) -> int | None:
    """The most tokens that a model can hold; None if its config names no limit (ALiBi, Mamba)."""
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")
    return next((n for name in names if (n := getattr(config, name, None)) and n > 0), None)


def probe_prompts(
    config: Any, prompts: Sequence[list[int]], max_new_tokens: int, steps: int
) -> list[list[int]]:
    """Prompts of several lengths from `prompts`, and longer ones that reach past what changes with length.

    Windows, chunks and RoPE's original length are numbers in the config. Any number that a prompt and its
    response could cross is taken for one. Only the largest is tried, because crossing it crosses the others
    too.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if (context := context_of(config)) is not None:
        longest = min(longest, context)
    fitting = sorted((ids for ids in prompts if len(ids) + steps <= longest), key=len)
    if not fitting:
        fitting = [min(prompts, key=len)[: max(longest - steps, 1)]]
    short, long = fitting[0], fitting[-1]
    rows = [long, fitting[len(fitting) // 2], short]
    rows.append(tiled(long[::-1], len(short)))  # as long as another, with other ids
    limits = [n for n in numbers(config.get_text_config(decoder=True).to_dict()) if len(short) < n < longest]
    if limits:
        crossing = max(limits)
        rows.append(tiled(long, max(crossing - steps // 2, 1)))  # crosses it while it decodes
        rows.append(tiled(long, max(min(2 * crossing, longest) - steps, 1)))  # is far beyond it
    return rows


def numbers(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool) and not NOT_LENGTHS.search(str(name)):
            yield value


def tiled(ids: list[int], length: int) -> list[int]:
    return (ids * (length // len(ids) + 1))[:length]


class Expected:
    """The reference's tokens for some prompts, and the log-probabilities of the likeliest ones."""

    def __init__(self, reference: Decoder, prompts: Sequence[list[int]], steps: int):
        self.prompts, self.most = prompts, steps
        self.steps: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompts]  # per token: indices, logps
        for _ in reference.decode(self.rows(), self.record):
            pass

    def rows(self) -> list[ResponseRow]:
        """Responses of different lengths, so that they end, and others enter, at different times."""
        rooms = [max(self.most - 2 * (index % 3), 1) for index in range(len(self.prompts))]
        return [ResponseRow(index, ids, rooms[index]) for index, ids in enumerate(self.prompts)]

    def record(self, logits: Tensor, rows: Sequence[ResponseRow]) -> None:
        top = logits.float().log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        for row, indices, logps in zip(rows, top.indices, top.values, strict=True):
            self.steps[row.index].append((indices, logps))
            self.follow(row)

    def follow(self, row: ResponseRow) -> None:
        row.tokens.append(int(self.steps[row.index][len(row.tokens)][0][0]))
        row.finish = "length" if len(row.tokens) == row.room else ""

    def compare(self, decoder: Decoder) -> str | None:
        """None if `decoder` agrees with the reference, else what is wrong."""
        differences: list[Tensor] = []
        dtypes: set[torch.dtype] = set()

        def check(logits: Tensor, rows: Sequence[ResponseRow]) -> None:
            dtypes.add(logits.dtype)
            logps = logits.float().log_softmax(-1)
            for row, mine in zip(rows, logps, strict=True):
                indices, theirs = self.steps[row.index][len(row.tokens)]
                differences.append((mine[indices] - theirs).abs().mean())
                self.follow(row)

        try:
            for _ in decoder.decode(self.rows(), check):
                pass
        except Exception as error:
            return f"it fails ({describe(error)})"
        largest = float(torch.stack(differences).max())
        # `not <=` rather than `>`, so that NaN is a fault.
        if not largest <= (TOLERANCE if dtypes <= {torch.float32, torch.float64} else TOLERANCE_16_BIT):
            return f"its log-probabilities differ from those of model.generate by up to {largest:.2g} nats"
        return None
