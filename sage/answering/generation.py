"""Responses from transformers: the `generation=hf` option.

Both options, this one and `sage.answering.vllm`, take the same requests (prompt ids and a seed) and follow
the same stop rules: an end token, a stop text, or `max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sage.answering.agreement import context_of, find_decoder
from sage.answering.decoders import PlainGenerate
from sage.answering.responses import NO_ROOM, Decoder, Generator, Request, Response, Sampling
from sage.config import ModelConfig, SamplingConfig, key
from sage.model import loading
from sage.model.adapters import inside_adapter
from sage.util.progress import console


class Source(NamedTuple):
    """The policy to sample from: a Hugging Face folder, how to load it, and which tokens end a response."""

    folder: str
    model: ModelConfig
    device: torch.device
    ends: set[int]


class Backend:
    """What samples responses. Subclass it as a dataclass, whose fields are the options of `generation`."""

    chunk: int  # responses between two saves of a command's progress

    def open(self, source: Source, sampling: SamplingConfig) -> AbstractContextManager[Generator]:
        """The policy, ready to answer."""
        raise NotImplementedError


@dataclass
class HF(Backend):
    """transformers on this process's device, with a batch that is refilled as responses finish.

    Each chunk starts with an empty batch, so a resumed run meets the same batches as an undisturbed one and
    gets the same numbers, bit for bit.
    """

    batch_size: int = key(16, "responses that are generated side by side", low=1)
    prefill_tokens: int = key(8192, "tokens, with padding, in one forward pass over prompts", low=1)
    chunk: int = key(64, "responses between two saves of a command's progress", low=1)

    @contextmanager
    def open(self, source: Source, sampling: SamplingConfig) -> Iterator[HFGenerator]:
        dtype = loading.compute_dtype(source.model, source.device)
        model = loading.load_model(source.folder, source.model, dtype, seed=0)
        tokenizer = loading.load_tokenizer(source.folder, source.model)
        yield HFGenerator(model.to(source.device).eval(), tokenizer, source.ends, sampling, self)


class HFGenerator:
    """A Generator on a transformers model. `prepare` checks it against the model's own `generate`."""

    def __init__(self, model: Any, tokenizer: Any, ends: set[int], sampling: SamplingConfig, options: HF):
        # Only transformers' own forward names what it takes, such as positions.
        self.model, self.tokenizer = inside_adapter(model), tokenizer
        self.ends, self.options = ends, options
        self.max_new_tokens = sampling.max_new_tokens
        self.choose = Sampling(tokenizer, ends, sampling.temperature, sampling.top_p, sampling.stop)
        self.context = context_of(model.config)
        self.decoder: Decoder | None = None

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        """Find the fastest decoder that agrees with the model on these prompts. Print a line if it is a slow
        one.

        Raises:
            UserError: the model cannot generate.
        """
        options = self.options
        self.decoder, faults = find_decoder(
            self.model, prompts, self.max_new_tokens, options.batch_size, options.prefill_tokens
        )
        if faults:
            assert isinstance(self.decoder, PlainGenerate)
            side = "equally long prompts together" if self.decoder.batch_size > 1 else "one prompt at a time"
            console.print(
                f"generation=hf runs model.generate, {side}, which is slower: {'; '.join(faults)}",
                soft_wrap=True,
            )

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        assert self.decoder is not None, "prepare comes first"
        rows = []
        for index, request in enumerate(requests):
            room = request.max_new_tokens
            if self.context is not None:
                room = min(room, self.context - len(request.prompt_ids))
            if room > 0:
                rows.append(self.choose.row(index, request, room))
            else:
                yield index, NO_ROOM
        if rows:
            for row in self.decoder.decode(rows, self.choose):
                yield row.index, self.choose.response(row)
