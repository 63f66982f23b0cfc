"""Two ways to run a model token by token: our batch that is refilled, and transformers' own `generate`.

`RefilledBatch` is fast. `PlainGenerate` is slow, and with a batch of one it is the reference, since it is
what transformers itself does. `sage.answering.agreement` checks the first against it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from sage.answering.responses import Choose, ResponseRow

SPARE = 32  # unused columns that are tolerated, so that columns need not be moved at every step


class SlotLayer(DynamicLayer):
    """Keys and values of one layer: [batch, heads, columns, size], written in place.

    transformers' own DynamicLayer copies everything at each step to grow by one column.
    """

    def __init__(self, like: DynamicLayer, batch_size: int, columns: int):
        super().__init__()
        assert like.keys is not None and like.values is not None
        self.store = [
            x.new_zeros(batch_size, x.shape[1], columns, x.shape[3]) for x in (like.keys, like.values)
        ]
        self.device, self.dtype = like.keys.device, like.keys.dtype
        self.is_initialized = True

    def use(self, rows: int, end: int) -> None:
        self.keys, self.values = (x[:rows, :, :end] for x in self.store)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next column of every row in use, and return all columns up to it."""
        assert self.keys is not None
        rows, end = len(key_states), self.keys.shape[2]
        for store, new in zip(self.store, (key_states, value_states), strict=True):
            store[:rows, :, end : end + 1] = new
        self.use(rows, end + 1)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


class Slots(Cache):
    """The cache of a RefilledBatch. Rows differ in length and end at the same column, as under left padding.

    Distances between columns are then those between tokens, so a model's own masks (sliding windows, chunks)
    and ALiBi hold for every row.
    """

    def __init__(self, like: Sequence[Any], batch_size: int, columns: int):
        super().__init__(layers=[SlotLayer(layer, batch_size, columns) for layer in like])
        self.columns, self.rows, self.end = columns, 0, 0

    def stores(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from layer.store  # pyright: ignore

    def align(self, end: int) -> None:
        """Move the contents of all rows so that they end before column `end`."""
        kept = min(end, self.end)
        if end != self.end:
            for store in self.stores():
                rows = store[: self.rows]
                rows[:, :, end - kept : end] = rows[:, :, self.end - kept : self.end].clone()
        self.end = end

    def enter(self, states: Sequence[Tensor], length: int) -> None:
        """A new row with `states`, a [heads, at least `length`, size] of each store."""
        for store, new in zip(self.stores(), states, strict=True):
            store[self.rows, :, self.end - length : self.end] = new[:, :length]
        self.rows += 1

    def states(self, place: int, start: int) -> list[Tensor]:
        """What row `place` holds from column `start` on."""
        return [store[place, :, start : self.end] for store in self.stores()]

    def leave(self, place: int) -> None:
        """Remove a row. The last one takes its place."""
        self.rows -= 1
        for store in self.stores():
            store[place] = store[self.rows]

    def begin_step(self) -> None:
        for layer in self.layers:
            layer.use(self.rows, self.end)  # pyright: ignore


class RefilledBatch:
    """Decodes `batch_size` rows at a time and gives a finished row's place to the next prompt.

    A batch that waits for its longest response spends most of its rows on responses that have ended. Prompts
    enter from the longest to the shortest, several at once if several places are free, so that there is
    little padding. If a row already holds the same prompt (another sample of the same problem), its states
    are copied.
    """

    def __init__(self, model: Any, batch_size: int, prefill_tokens: int):
        self.model, self.batch_size, self.prefill_tokens = model, batch_size, prefill_tokens
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.cache_name, self.base_cache_name = cache_name(model), cache_name(model.base_model)

    @torch.inference_mode()
    def decode(self, rows: Sequence[ResponseRow], choose: Choose) -> Iterator[ResponseRow]:
        waiting = sorted(rows, key=lambda row: (len(row.prompt_ids), row.prompt_ids, -row.index))
        columns = max(len(row.prompt_ids) + row.room for row in rows) + SPARE
        active: list[ResponseRow] = []
        slots: Slots | None = None
        # Filling places one by one would run a forward over one prompt every few steps.
        patience = max(self.batch_size // 8, 1)
        while active or waiting:
            free = self.batch_size - len(active)
            if waiting and (free >= min(patience, len(waiting)) or not active):
                entering = [waiting.pop() for _ in range(min(free, len(waiting)))]
                slots = self.fill(slots, active, entering, columns)
            assert slots is not None
            longest = max(map(len, active)) - 1
            if slots.end == slots.columns or slots.end - longest > SPARE:
                slots.align(longest)
            choose(self.step(slots, active), active)
            for place in reversed(range(len(active))):
                if active[place].finish:
                    yield active[place]
                    active[place] = active[-1]
                    active.pop()
                    slots.leave(place)

    def fill(
        self, slots: Slots | None, active: list[ResponseRow], entering: list[ResponseRow], columns: int
    ) -> Slots:
        """Give each entering row a place that holds the states of its prompt but for the last token.

        The last token is the input of the next step.
        """
        holders = {tuple(row.prompt_ids): place for place, row in enumerate(active)}
        new = [key for key in dict.fromkeys(tuple(row.prompt_ids) for row in entering) if key not in holders]
        longest = max(max(map(len, [*entering, *active])) - 1, 1)
        if slots is not None and slots.end < longest:
            slots.align(longest)
        while new:
            width = max(len(new[0]) - 1, 1)  # the longest comes first
            size = max(self.prefill_tokens // width, 1)
            wave, new = new[:size], new[size:]
            ids = torch.zeros(len(wave), width, dtype=torch.long)
            for row, prompt in zip(ids, wave, strict=True):
                row[: len(prompt) - 1] = torch.tensor(prompt[:-1])
            # Padding is on the right, where causal attention keeps it out of the prompts.
            cache = DynamicCache()
            self.model.base_model(
                input_ids=ids.to(self.model.device), use_cache=True, **{self.base_cache_name: cache}
            )
            if kinds := {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}:
                raise TypeError(f"its cache has layers of {', '.join(sorted(kinds))}")
            if slots is None:  # `not slots` would be wrong: an empty Cache is false
                slots = Slots(cache.layers, self.batch_size, columns)
                slots.align(longest)
            for i, prompt in enumerate(wave):
                states = [x[i] for layer in cache.layers for x in (layer.keys, layer.values)]  # pyright: ignore
                holders[prompt] = slots.rows
                slots.enter(states, len(prompt) - 1)
                first = next(row for row in entering if tuple(row.prompt_ids) == prompt)
                entering.remove(first)
                active.append(first)
        assert slots is not None
        for row in entering:
            place = holders[tuple(row.prompt_ids)]
            start = slots.end - (len(active[place]) - 1)
            slots.enter(slots.states(place, start), len(row) - 1)
            active.append(row)
        return slots

    def step(self, slots: Slots, rows: Sequence[ResponseRow]) -> Tensor:
        """Logits [rows, vocabulary] of every row's next token."""
        device = self.model.device
        lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
        last = [row.tokens[-1] if row.tokens else row.prompt_ids[-1] for row in rows]
        columns = torch.arange(slots.end + 1, device=device)
        positions = {"position_ids": lengths[:, None]} if self.takes_positions else {}
        slots.begin_step()
        logits = self.model(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=(columns >= slots.end - lengths[:, None]).long(),
            use_cache=True,
            **{self.cache_name: slots},
            **positions,
        ).logits[:, -1]
        slots.end += 1
        return logits


def cache_name(module: Any) -> str:
    """What a forward calls its cache, which transformers renamed."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


class PlainGenerate:
    """transformers' own `generate`, on batches of prompts of equal length, so that nothing is padded."""

    def __init__(self, model: Any, batch_size: int):
        self.model, self.batch_size = model, batch_size

    @torch.inference_mode()
    def decode(self, rows: Sequence[ResponseRow], choose: Choose) -> Iterator[ResponseRow]:
        ordered = sorted(rows, key=lambda row: (-len(row.prompt_ids), row.index))
        for _, group in groupby(ordered, key=lambda row: len(row.prompt_ids)):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                batch = alike[start : start + self.batch_size]
                self.generate(batch, choose)
                yield from batch

    def generate(self, rows: Sequence[ResponseRow], choose: Choose) -> None:
        def processor(_: Tensor, scores: Tensor) -> Tensor:
            """Lets `choose` decide: only its token keeps a finite score, so the greedy search takes it."""
            alive = [place for place, row in enumerate(rows) if not row.finish]
            choose(scores[alive], [rows[place] for place in alive])
            tokens = torch.tensor([[row.tokens[-1]] for row in rows], device=scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

        def stopped(ids: Tensor, _: Tensor, **__: Any) -> Tensor:
            return torch.tensor([bool(row.finish) for row in rows], device=ids.device)

        ids = torch.tensor([row.prompt_ids for row in rows], device=self.model.device)
        # RoPE with dynamic NTK keeps the frequencies of the longest sequence so far; a short forward resets
        # them.
        self.model(ids[:1, :1], use_cache=False)
        own, self.model.generation_config = self.model.generation_config, transformers.GenerationConfig()
        try:  # without the checkpoint's own settings, such as a repetition penalty
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=transformers.GenerationConfig(
                    do_sample=False, max_new_tokens=max(row.room for row in rows), use_cache=True
                ),
                logits_processor=transformers.LogitsProcessorList([processor]),  # pyright: ignore
                stopping_criteria=transformers.StoppingCriteriaList([stopped]),  # pyright: ignore
            )
        finally:
            self.model.generation_config = own
        assert all(row.finish for row in rows)
