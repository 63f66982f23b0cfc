"""Generation engines: token ids of prompts in, responses out. Each class is one option of the `generation=` group.

Both engines take the same requests (prompt ids and a seed) and follow the same stop rules: an end token of the model, a
stop text, or `max_new_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from sage.config import ModelConfig, SamplingConfig
from sage.model import loading
from sage.util.errors import UserError


class Request(NamedTuple):
    prompt_ids: list[int]
    seed: int
    max_new_tokens: int


class Response(NamedTuple):
    """`finish` is "end" (an end token), "stop" (a stop text), "length" (cut off) or "no_room" (the prompt fills the
    context). `tokens` counts what was sampled, with the end token."""

    text: str
    tokens: int
    finish: str


class Generator(Protocol):
    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Yield (index into requests, response) as responses finish, in any order."""
        ...


class Source(NamedTuple):
    """The policy to sample from: a Hugging Face folder, and how to load it."""

    folder: str
    model: ModelConfig
    device: torch.device


def seed_of(seed: int, problem_id: str, sample: int) -> int:
    """A request's own seed, so that what is sampled does not depend on which requests surround it."""
    return int.from_bytes(sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()[:7], "big")


def end_tokens(folder: str, tokenizer: Any) -> set[int]:
    """The tokenizer's end token and those of generation_config.json (chat models often end a turn with another)."""
    ends = {tokenizer.eos_token_id}
    file = Path(folder) / "generation_config.json"
    if file.is_file():
        more = json.loads(file.read_text()).get("eos_token_id") or []
        ends.update([more] if isinstance(more, int) else more)
    return ends


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


# --- transformers


@dataclass
class HF:
    """transformers on this process's device, with a batch that is refilled as responses finish.

    batch_size: responses that are generated side by side.
    prefill_tokens: most tokens, padding included, of one forward over prompts.
    chunk: responses between two saves of a command's progress; each chunk starts with an empty batch, so that
        a resumed run meets the same batches as an undisturbed one and gets the same numbers, bit for bit.
    """

    batch_size: int = 16
    prefill_tokens: int = 8192
    chunk: int = 64

    @contextmanager
    def open(self, source: Source, sampling: SamplingConfig) -> Iterator[Generator]:
        dtype = loading.compute_dtype(source.model, source.device)
        model = loading.load_model(source.folder, source.model, dtype, seed=0)
        tokenizer = loading.load_tokenizer(source.folder, source.model)
        ends = end_tokens(source.folder, tokenizer)
        yield RefilledBatch(
            model.to(source.device).eval(), tokenizer, ends, sampling, self.batch_size, self.prefill_tokens
        )


class Row:
    """A response in the making: what was sampled so far, and where its uniform numbers come from."""

    def __init__(self, index: int, request: Request, room: int):
        self.index, self.request, self.room = index, request, room
        self.tokens: list[int] = []
        self.uniforms = np.random.default_rng(request.seed).random(room)


class Slots(Cache):
    """Keys and values of rows that differ in length: [batch, heads, capacity, size] per layer, written in place.

    The rows in use come first. transformers' own caches hold rows of one length, and grow by copying all of it.
    """

    def __init__(self, batch_size: int, capacity: int, like: list[DynamicLayer]):
        super().__init__(layers=[])
        self.store = [
            [x.new_zeros(batch_size, x.shape[1], capacity, x.shape[3]) for x in (layer.keys, layer.values)]  # pyright: ignore
            for layer in like
        ]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like[0].keys.device)  # pyright: ignore
        self.longest = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one new position of each row in use, and return what these rows hold up to the longest."""
        n = len(key_states)
        rows = torch.arange(n, device=key_states.device)
        keys, values = self.store[layer_idx]
        keys[rows, :, self.lengths[:n]] = key_states[:, :, 0]
        values[rows, :, self.lengths[:n]] = value_states[:, :, 0]
        return keys[:n, :, : self.longest + 1], values[:n, :, : self.longest + 1]

    def copy(self, source: int, target: int, length: int) -> None:
        for keys, values in self.store:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        self.lengths[target] = length


class RefilledBatch:
    """A Generator that decodes `batch_size` rows at a time and gives a finished row's place to the next request.

    A batch that waits for its longest response spends most of its rows on responses that have ended. Prompts enter from
    the longest to the shortest, several at once where several places are free, so that little is padding; a prompt that
    a row already holds (another sample of the same problem) is copied, not computed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ends: set[int],
        sampling: SamplingConfig,
        batch_size: int,
        prefill_tokens: int,
    ):
        self.model, self.tokenizer, self.ends, self.sampling = model, tokenizer, ends, sampling
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.context: int = model.config.max_position_embeddings
        self.window = getattr(model.config, "sliding_window", None) or self.context
        # A character takes at most four byte-level tokens, so no stop text hides from this many last tokens.
        self.stop_window = 4 * max(map(len, sampling.stop), default=0) + 4

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        waiting = []
        for index, request in enumerate(requests):
            room = min(request.max_new_tokens, self.context - len(request.prompt_ids))
            if room > 0:
                waiting.append(Row(index, request, room))
            else:
                yield index, Response("", 0, "no_room")
        if not waiting:
            return
        waiting.sort(key=lambda row: (len(row.request.prompt_ids), row.request.prompt_ids, -row.index))
        capacity = max(len(row.request.prompt_ids) + row.room for row in waiting)
        if capacity > self.window:
            raise UserError(
                f"{capacity} tokens of prompt and response exceed the model's attention window of {self.window}: lower "
                "sampling.max_new_tokens, or use generation=vllm"
            )
        rows: list[Row] = []
        slots: Slots | None = None
        # Filling places one by one would run a forward over one prompt for every few steps.
        patience = max(self.batch_size // 8, 1)
        while rows or waiting:
            free = self.batch_size - len(rows)
            if waiting and (free >= min(patience, len(waiting)) or not rows):
                entering = [waiting.pop() for _ in range(min(free, len(waiting)))]
                slots = self.fill(slots, rows, entering, capacity)
            assert slots is not None
            tokens = self.step(slots, rows)
            for place in reversed(range(len(rows))):
                row = rows[place]
                row.tokens.append(tokens[place])
                if finish := self.finish(row):
                    yield row.index, self.response(row, finish)
                    rows[place] = rows[-1]
                    rows.pop()
                    if place < len(rows):
                        slots.copy(len(rows), place, int(slots.lengths[len(rows)]))

    def fill(self, slots: Slots | None, rows: list[Row], entering: list[Row], capacity: int) -> Slots:
        """Give each entering row a place, with keys and values of its prompt but for the last token, whose turn is
        the next step."""
        holders = {tuple(row.request.prompt_ids): place for place, row in enumerate(rows)}
        new = list(
            dict.fromkeys(key for row in entering if (key := tuple(row.request.prompt_ids)) not in holders)
        )
        while new:
            width = max(len(new[0]) - 1, 1)  # the longest comes first
            wave, new = (
                new[: max(self.prefill_tokens // width, 1)],
                new[max(self.prefill_tokens // width, 1) :],
            )
            ids = torch.zeros(len(wave), width, dtype=torch.long)
            for row, prompt in zip(ids, wave, strict=True):
                row[: len(prompt) - 1] = torch.tensor(prompt[:-1])
            # Padding is on the right, where causal attention keeps it out of the prompts.
            cache = DynamicCache()
            self.model.base_model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True)
            if any(type(layer) is not DynamicLayer for layer in cache.layers):
                raise UserError(
                    f"generation=hf cannot run a {self.model.config.model_type}: use generation=vllm"
                )
            if slots is None:  # not by truth: a Cache without layers of its own is false
                slots = Slots(self.batch_size, capacity, cache.layers)  # pyright: ignore
            for i, prompt in enumerate(wave):
                place = len(rows)
                for (keys, values), layer in zip(slots.store, cache.layers, strict=True):
                    keys[place, :, :width], values[place, :, :width] = layer.keys[i], layer.values[i]  # pyright: ignore
                slots.lengths[place] = len(prompt) - 1
                holders[prompt] = place
                first = next(row for row in entering if tuple(row.request.prompt_ids) == prompt)
                entering.remove(first)
                rows.append(first)
        assert slots is not None
        for row in entering:
            slots.copy(holders[tuple(row.request.prompt_ids)], len(rows), len(row.request.prompt_ids) - 1)
            rows.append(row)
        return slots

    def step(self, slots: Slots, rows: list[Row]) -> list[int]:
        """One more token for every row."""
        n = len(rows)
        lengths = slots.lengths[:n]
        slots.longest = max(len(row.request.prompt_ids) + len(row.tokens) for row in rows) - 1
        last = [row.tokens[-1] if row.tokens else row.request.prompt_ids[-1] for row in rows]
        visible = torch.arange(slots.longest + 1, device=lengths.device) <= lengths[:, None]
        dtype = self.model.dtype
        # Additive, since eager attention takes a boolean mask for numbers.
        mask = torch.zeros(visible.shape, dtype=dtype, device=lengths.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )
        logits = self.model(
            input_ids=torch.tensor(last, device=lengths.device)[:, None],
            position_ids=lengths[:, None],
            attention_mask=mask[:, None, None],
            past_key_values=slots,
            use_cache=True,
        ).logits[:, -1]
        slots.lengths[:n] += 1
        uniforms = torch.tensor([row.uniforms[len(row.tokens)] for row in rows], device=logits.device)
        return sample(logits.float(), uniforms, self.sampling.temperature, self.sampling.top_p).tolist()

    def finish(self, row: Row) -> str:
        if row.tokens[-1] in self.ends:
            return "end"
        if self.sampling.stop:
            tail = self.tokenizer.decode(row.tokens[-self.stop_window :], skip_special_tokens=True)
            if any(stop in tail for stop in self.sampling.stop):
                return "stop"
        return "length" if len(row.tokens) == row.room else ""

    def response(self, row: Row, finish: str) -> Response:
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Response(cut(text, self.sampling.stop), len(row.tokens), finish)


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits [n, vocabulary], by inverting the cumulative distribution at uniforms [n].

    Temperature 0 takes the likeliest. `top_p` keeps the fewest likeliest tokens whose mass reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        # The nucleus is nearly always among the first few; sorting a whole vocabulary costs as much as a layer.
        kept = probabilities.topk(min(256, logits.shape[-1])).values
        if kept.sum(-1).min() < top_p:
            kept = probabilities.sort(-1, descending=True).values
        size = (kept.cumsum(-1) - kept < top_p).sum(-1, keepdim=True)
        probabilities = probabilities * (probabilities >= kept.gather(-1, size - 1))
    # In the vocabulary's order: by rank, two tokens of nearly equal mass would trade places over a rounding error.
    cumulative = probabilities.double().cumsum(-1)
    picked = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    return picked.clamp(max=logits.shape[-1] - 1).squeeze(-1)
