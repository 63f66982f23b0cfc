"""Preference pairs as token ids: encoded once, the prompt apart from its responses, and cached.

Nothing here imports torch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sage.data.chat import ChatFormat, Renderer, encode_heads
from sage.data.pairs import SCHEMA, turns_of
from sage.util.errors import UserError
from sage.util.files import write_whole

CACHE_VERSION = 2
PARALLEL_FROM = 2000  # rows; below this, starting worker processes costs more than it saves
SHORTEST_PREFIX = 8  # tokens of a common prefix that are worth the copying of their keys and values
PREFIX_ROWS = 4096  # prompts compared at a time: all of a large set would take gigabytes
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
IDS_SCHEMA = pa.schema(
    [("pair_id", pa.string()), ("pass_rate", pa.float64())] + [(name, pa.list_(pa.int32())) for name in IDS]
)


class Pair(NamedTuple):
    pair_id: str
    pass_rate: float | None
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclasses.dataclass(frozen=True)
class TokenizedPairs:
    """`data` has Pair's columns; `dropped` is reason -> pair_ids; `fingerprint` names these very ids."""

    data: datasets.Dataset
    dropped: dict[str, list[str]]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Pair:
        return Pair(**self.data[index])

    def lengths(self) -> np.ndarray:
        """int64 [pairs, 3]: tokens of prompt, chosen and rejected."""
        return _lengths(self.data.data.table)

    def pair_ids(self) -> np.ndarray:
        """str objects [pairs]."""
        return np.array(self.data.data.table["pair_id"].to_pylist(), dtype=object)

    @cached_property
    def common_prefix(self) -> int:
        """Tokens that all prompts begin with, each of them going on for at least one more; 0 where they are few."""
        table = self.data.data.table
        common = int(self.lengths()[:, 0].min()) - 1
        first = np.array(table["prompt_ids"][0].as_py()[:common])
        for chunk in table["prompt_ids"].chunks:
            ids, starts = chunk.values.to_numpy(), chunk.offsets.to_numpy()[:-1]
            for row in range(0, len(starts), PREFIX_ROWS):
                heads = ids[starts[row : row + PREFIX_ROWS, None] + np.arange(common)]
                differs = np.flatnonzero((heads != first[:common]).any(0))
                common = int(differs[0]) if len(differs) else common
        return common if common >= SHORTEST_PREFIX else 0

    def pass_rates(self) -> np.ndarray:
        """float64 [pairs], NaN where unknown."""
        return self.data.data.table["pass_rate"].to_numpy().astype(np.float64)


def _lengths(table: pa.Table) -> np.ndarray:
    return np.stack([pc.list_value_length(table[name]).to_numpy() for name in IDS], axis=1).astype(np.int64)  # pyright: ignore


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer: Any,
    *,
    chat: ChatFormat,
    max_length: int,
    num_proc: int,
    cache_dir: str,
) -> TokenizedPairs:
    """Token ids of every pair that fits, from `cache_dir` if these pairs were tokenised this way before.

    A pair is dropped, never cut, when prompt and longer response exceed `max_length` ("too_long"): a cut takes
    the answer away. One whose responses have the same ids teaches nothing ("same_tokens"). UserError when no
    pair is left, or when pairs and tokenizer do not suit the chat format.
    """
    renderer = Renderer(tokenizer, chat)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token), so a response could not end")
    key = _cache_key(pairs, tokenizer, renderer, max_length)
    file = Path(cache_dir, f"pairs-{key}.arrow").expanduser()
    if not file.exists():
        table = _encode_all(pairs, partial(_encode, renderer=renderer), num_proc)
        _write(file, *_drop(table, max_length), key)
    with pa.memory_map(str(file)) as source:
        notes = json.loads(pa.ipc.open_stream(source).schema.metadata[b"sage"])
    return TokenizedPairs(datasets.Dataset.from_file(str(file)), **notes)


def _cache_key(pairs: datasets.Dataset, tokenizer: Any, renderer: Renderer, max_length: int) -> str:
    """Explicit, because datasets' own hash of a function is blind to, or thrown off by, a tokenizer's state."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # Padding and truncation are whatever the last call left behind.
        model = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        model = tokenizer.get_vocab()
    parts = [
        CACHE_VERSION,
        model,
        tokenizer.special_tokens_map,
        renderer.template,
        renderer.arguments,
        max_length,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for pair in pairs:
        digest.update(json.dumps([pair[name] for name in SCHEMA.names if name != "row"]).encode())  # pyright: ignore
    return digest.hexdigest()[:32]


def _encode_all(pairs: datasets.Dataset, encode: Callable[[dict], dict], num_proc: int) -> pa.Table:
    if len(pairs) <= PARALLEL_FROM:
        return pa.table(encode(pairs[:]), schema=IDS_SCHEMA)
    mapped = pairs.map(
        encode,
        batched=True,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=pairs.column_names,
        features=datasets.Features.from_arrow_schema(IDS_SCHEMA),
        new_fingerprint="tokenised",  # unused: our own cache is keyed by content
        keep_in_memory=True,
        desc="Tokenising pairs",
    )
    return mapped.data.table.cast(IDS_SCHEMA)


def _drop(table: pa.Table, max_length: int) -> tuple[pa.Table, dict[str, list[str]]]:
    """The pairs to keep, and reason -> pair_ids of the others."""
    lengths = _lengths(table)
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    too_long = totals > max_length
    same = np.zeros(len(table), dtype=bool)
    for index in np.flatnonzero((lengths[:, 1] == lengths[:, 2]) & ~too_long).tolist():
        same[index] = table["chosen_ids"][index].equals(table["rejected_ids"][index])
    if np.all(too_long | same):
        raise UserError(
            f"no pair is left of {len(table)}: {too_long.sum()} are longer than data.max_length={max_length} (the "
            f"shortest has {totals.min()} tokens), {same.sum()} have the same tokens in both responses"
        )
    reasons = {"too_long": too_long, "same_tokens": same}
    dropped = {
        reason: table["pair_id"].filter(pa.array(where)).to_pylist() for reason, where in reasons.items()
    }
    return table.filter(pa.array(~(too_long | same))), dropped


def _write(file: Path, table: pa.Table, dropped: dict[str, list[str]], key: str) -> None:
    digest = hashlib.sha256(key.encode() + _lengths(table).tobytes())
    for name in IDS:
        digest.update(pc.list_flatten(table[name]).to_numpy().tobytes())  # pyright: ignore
    notes = {"dropped": dropped, "fingerprint": digest.hexdigest()[:32]}
    table = table.replace_schema_metadata({"sage": json.dumps(notes)})

    def write(path: Path) -> None:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)

    write_whole(file, write)


def _encode(batch: dict[str, list], renderer: Renderer) -> dict[str, list]:
    """Ids of a batch. A prompt's are made once, and a response's apart from it, so no token straddles them."""
    tokenizer, chat_template = renderer.tokenizer, renderer.template is not None
    render = partial(_render, renderer) if chat_template else _plain
    rows = zip(*(batch[name] for name in ("pair_id", "prompt", "chosen", "rejected")), strict=True)
    prompts, *responses = (list(texts) for texts in zip(*(render(*row) for row in rows), strict=True))
    eos = tokenizer.eos_token_id
    ends = {eos}
    if chat_template:
        # By flag, not by name: <|end|> and its like are often special without being the eos or any named token.
        ends |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    prompt_ids = encode_heads(tokenizer, prompts, plain=not chat_template)
    response_ids = [
        [_end_once(ids, ends, tokenizer) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for texts in responses
    ]
    columns = (batch["pair_id"], batch["pass_rate"], prompt_ids, *response_ids)
    return dict(zip(IDS_SCHEMA.names, columns, strict=True))


def _plain(pair_id: str, *turns: str) -> tuple[str, ...]:
    texts = tuple(map(turns_of, turns))
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"pair {pair_id} is a conversation: set data.chat_template=true")
    return texts  # pyright: ignore


def _render(
    renderer: Renderer, pair_id: str, prompt: str, chosen: str, rejected: str
) -> tuple[str, str, str]:
    """The prompt up to where the assistant writes, and what the template writes there for each response."""
    messages = _messages("user", prompt)
    answers = [_messages("assistant", side) for side in (chosen, rejected)]
    try:
        head = renderer.prompt(messages)
        full = [renderer.render([*messages, *answer]) for answer in answers]
    except UserError as error:
        raise UserError(f"pair {pair_id}: {error}") from error
    if all(text.startswith(head) for text in full):
        return head, full[0][len(head) :], full[1][len(head) :]
    # Some templates open with a thought that they then omit from a finished turn.
    return head, answers[0][0]["content"], answers[1][0]["content"]


def _messages(role: str, turns: str) -> list[dict[str, Any]]:
    """A record's text or messages, as messages."""
    value = turns_of(turns)
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _end_once(ids: list[int], ends: set[int], tokenizer: Any) -> list[int]:
    """The response up to its first closing end token, or with eos added where there is none.

    Templates close with a newline after <|im_end|>, or even with <|end|>, a newline and <|endoftext|>; generation
    stops at the first. A special token inside the text closes nothing.
    """
    length = len(ids)
    while length and (ids[length - 1] in ends or not tokenizer.decode([ids[length - 1]]).strip()):
        length -= 1
    closing = (index for index in range(length, len(ids)) if ids[index] in ends)
    if (end := next(closing, None)) is None:
        return [*ids, tokenizer.eos_token_id]
    return ids[: end + 1]
