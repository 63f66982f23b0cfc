"""What all generators share: requests, responses, stop rules, and how a token is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sage.data.chat import decode


class Request(NamedTuple):
    prompt_ids: list[int]
    seed: int
    max_new_tokens: int


class Response(NamedTuple):
    """A generated response.

    text: without the end token, cut before the first stop text. Other special tokens, such as `<think>`,
        stay.
    ids: every sampled token. The end token is the last one if it was sampled; a response that was cut off has
        none.
    finish: "end" (an end token), "stop" (a stop text), "length" (cut off) or "no_room" (the prompt fills the
        context).
    """

    text: str
    ids: list[int]
    finish: str


NO_ROOM = Response("", [], "no_room")


class Generator(Protocol):
    def prepare(self, prompts: Sequence[list[int]]) -> None:
        """Get ready to answer these prompts. Called before the first request about them."""
        ...

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """Yield (index into requests, response) as responses finish, in any order."""
        ...


def seed_of(seed: int, problem_id: str, sample: int) -> int:
    """A seed for each request, so that a response does not depend on the requests around it."""
    return int.from_bytes(sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()[:7], "big")


class ResponseRow:
    """A response in the making. It may get at most `room` tokens. `finish` is empty until it has ended."""

    def __init__(self, index: int, prompt_ids: list[int], room: int):
        self.index, self.prompt_ids, self.room = index, prompt_ids, room
        self.tokens: list[int] = []
        self.finish = ""

    def __len__(self) -> int:
        """Tokens of the prompt and of the response so far."""
        return len(self.prompt_ids) + len(self.tokens)


# Gives each row its next token from logits [rows, vocabulary], and sets `finish` where a row has ended.
Choose = Callable[[Tensor, Sequence[ResponseRow]], None]


class Decoder(Protocol):
    def decode(self, rows: Sequence[ResponseRow], choose: Choose) -> Iterator[ResponseRow]:
        """Run the model until every row has ended. Yields rows as they end, in any order."""
        ...


class Sampling:
    """A Choose that samples tokens, and the stop rules: an end token, a stop text, or no room left."""

    def __init__(self, tokenizer: Any, ends: set[int], temperature: float, top_p: float, stop: Sequence[str]):
        self.tokenizer, self.ends, self.stop = tokenizer, ends, stop
        self.temperature, self.top_p = temperature, top_p
        # A character has at most four byte-level tokens, so these last tokens always hold a whole stop text.
        self.stop_window = 4 * max(map(len, stop), default=0) + 4
        self.uniforms: dict[int, np.ndarray] = {}

    def row(self, index: int, request: Request, room: int) -> ResponseRow:
        self.uniforms[index] = np.random.default_rng(request.seed).random(room)
        return ResponseRow(index, request.prompt_ids, room)

    def __call__(self, logits: Tensor, rows: Sequence[ResponseRow]) -> None:
        uniforms = torch.tensor(
            [self.uniforms[row.index][len(row.tokens)] for row in rows], device=logits.device
        )
        tokens = sample(logits.float(), uniforms, self.temperature, self.top_p).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            row.finish = self.finish(row)

    def finish(self, row: ResponseRow) -> str:
        if row.tokens[-1] in self.ends:
            return "end"
        if self.stop:
            tail = decode(self.tokenizer, row.tokens[-self.stop_window :])
            if any(text in tail for text in self.stop):
                return "stop"
        return "length" if len(row.tokens) == row.room else ""

    def response(self, row: ResponseRow) -> Response:
        del self.uniforms[row.index]
        return response_of(self.tokenizer, row.tokens, row.finish, self.ends, self.stop)


def response_of(tokenizer: Any, ids: list[int], finish: str, ends: set[int], stop: Sequence[str]) -> Response:
    text = decode(tokenizer, ids[:-1] if ids[-1:] and ids[-1] in ends else ids)
    return Response(cut(text, stop), ids, finish)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits [n, vocabulary], by inverting the cumulative distribution at uniforms [n].

    Temperature 0 takes the likeliest token. `top_p` keeps the fewest likeliest tokens whose mass reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        # The nucleus is nearly always among the first few. Sorting the vocabulary costs as much as a layer.
        kept = probabilities.topk(min(256, logits.shape[-1])).values
        if kept.sum(-1).min() < top_p:
            kept = probabilities.sort(-1, descending=True).values
        size = (kept.cumsum(-1) - kept < top_p).sum(-1, keepdim=True)
        probabilities = probabilities * (probabilities >= kept.gather(-1, size - 1))
    # Tokens keep the vocabulary's order. In order of probability, two of nearly equal mass could swap places
    # over a rounding error.
    cumulative = probabilities.double().cumsum(-1)
    picked = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    return picked.clamp(max=logits.shape[-1] - 1).squeeze(-1)
