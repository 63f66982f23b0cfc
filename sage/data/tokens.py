"""Preference pairs as token ids: encoded once, checked against the model's limits, and cached.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import tokenizers
import transformers

from sage.config import DataConfig
from sage.data import store, thoughts
from sage.data.chat import ChatFormat, Renderer
from sage.data.columns import IDS, lengths_of
from sage.data.encoding import Encoder
from sage.data.pairs import PairSet
from sage.data.picked import KEPT, ModelLimits, Picked, Prefix, encoded
from sage.data.source import first_five
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.files import source_digest

SHORTEST_PREFIX = 8  # tokens; the keys and values of a shorter common prefix are not worth copying


class Pair(NamedTuple):
    pair_id: str
    pass_rate: float | None
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclasses.dataclass(frozen=True)
class TokenizedPairs:
    """Pairs ready for training.

    data: a dataset with the columns of KEPT, mapped from a file of which only what is asked for is read.
    dropped: reason -> pair_ids.
    fingerprint: names the pairs, whatever they were read from and by which version of sage.
    notes: what the user should know about how the pairs were encoded, one sentence each.
    details: pair_id -> why it was dropped, for pairs whose reason alone does not say it.
    shared: how many tokens all prompts share at their start, if it is known.
    rendering: names the tokenizer and the chat template.
    """

    data: datasets.Dataset
    dropped: dict[str, list[str]]
    fingerprint: str
    notes: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, str] = dataclasses.field(default_factory=dict)
    shared: int | None = None
    rendering: str = ""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Pair:
        row = self.data[index]
        return Pair(*(row[name] for name in Pair._fields))

    @cached_property
    def _lengths(self) -> np.ndarray:
        return lengths_of(self.data.data.table)

    def lengths(self) -> np.ndarray:
        """int64 [pairs, 3]: tokens of prompt, chosen and rejected."""
        return self._lengths

    def pair_ids(self, indices: np.ndarray | None = None) -> np.ndarray:
        """str objects: of all pairs, or of those at `indices`."""
        column = self.data.data.table["pair_id"]
        names = column.to_pylist() if indices is None else [column[int(index)].as_py() for index in indices]
        return np.array(names, dtype=object)

    @cached_property
    def common_prefix(self) -> int:
        """How many tokens all prompts share at their start, at least one short of each; 0 if few."""
        prefix = Prefix()
        if self.shared is None:
            for chunk in self.data.data.table["prompt_ids"].chunks:
                prefix.see(chunk)
        shared = prefix.length or 0 if self.shared is None else self.shared
        return shared if shared >= SHORTEST_PREFIX else 0

    def prompts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The prompts of all pairs, some at a time: where each begins, and where the last one ends, in their
        ids, which follow one another."""
        return self._chunks[0]

    def also_in(self, other: TokenizedPairs) -> int:
        """How many of these pairs have the very ids of a pair of `other`."""
        known = {*self._pair_hashes()}
        known &= {*filter(known.__contains__, other._pair_hashes())}
        return sum(key in known for key in self._pair_hashes())

    def prompts_also_in(self, other: TokenizedPairs) -> int:
        """How many of these pairs have the very prompt of a pair of `other`."""
        known = other._hashes(np.arange(len(other)), 0)
        return int(np.isin(self._hashes(np.arange(len(self)), 0), known).sum())

    def repeated(self) -> tuple[int, int]:
        """How many pairs have the very ids of an earlier one, and how many have those of another one with
        chosen and rejected exchanged."""
        keys = [tuple(key) for key in self.keys(np.arange(len(self))).tolist()]
        known = {*keys}
        return len(keys) - len(known), sum((p, rejected, chosen) in known for p, chosen, rejected in keys)

    def keys(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n, 3]: a hash of the ids of prompt, chosen and rejected, the same in every process."""
        found = np.empty((len(indices), len(IDS)), dtype=np.int64)
        for column in range(len(IDS)):
            found[:, column] = self._hashes(indices, column)
        return found

    def by_prompt(self) -> np.ndarray:
        """All indices, with the pairs of one prompt side by side, by each prompt's first pair."""
        prompts = self._hashes(np.arange(len(self)), 0)
        _, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
        return np.argsort(first[inverse], kind="stable")

    def _hashes(self, indices: np.ndarray, column: int) -> np.ndarray:
        chunks = self._chunks[column]
        ends = np.cumsum([len(offsets) - 1 for offsets, _ in chunks])
        found = np.empty(len(indices), dtype=np.int64)
        places = zip(indices.tolist(), np.searchsorted(ends, indices, side="right").tolist(), strict=True)
        for n, (index, chunk) in enumerate(places):
            offsets, values = chunks[chunk]
            row = index - int(ends[chunk])  # counted from the chunk's end
            ids = values[offsets[row - 1] : offsets[row]]
            found[n] = int.from_bytes(blake2b(ids, digest_size=8).digest(), "little", signed=True)
        return found

    @cached_property
    def _chunks(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Offsets and ids of each chunk of the columns of ids, mapped like the file."""
        table = self.data.data.table
        return [[(c.offsets.to_numpy(), c.values.to_numpy()) for c in table[name].chunks] for name in IDS]

    def _pair_hashes(self) -> Iterator[int]:
        """A hash of each pair's ids."""
        for batch in self.data.data.table.to_batches():
            columns = [(batch[name].offsets.to_numpy(), batch[name].values.to_numpy()) for name in IDS]
            for row in range(len(batch)):
                yield hash(tuple(ids[starts[row] : starts[row + 1]].tobytes() for starts, ids in columns))

    def text_hashes(self) -> np.ndarray:
        """uint64 [pairs]: a hash of each pair's texts, the same for every tokenizer."""
        return self.data.data.table["text_hash"].to_numpy()

    def pass_rates(self) -> np.ndarray:
        """float64 [pairs], NaN where unknown."""
        return self.data.data.table["pass_rate"].to_numpy().astype(np.float64)


def tokenize_pairs(
    source: PairSet,
    tokenizer: Any,
    *,
    chat: ChatFormat,
    max_length: int,
    num_proc: int | None,
    cache_dir: str,
    max_bad: float = 0.0,
) -> TokenizedPairs:
    """Token ids of every pair that fits, from `cache_dir` if these pairs were tokenised this way before.

    Pairs are dropped, never cut: a cut takes the answer away. The reasons: "too_long" where the prompt and
    the longer response exceed `max_length`, "beyond_positions" where they exceed the model's positions,
    "same_tokens" where both responses have the same ids, and those of `sage.data.placement`.

    The first rank of a machine calls this before the others, and checks that the cache is intact.

    Args:
        num_proc: processes that tokenise; None = one per CPU core.
        max_bad: the largest share of pairs that may be impossible to encode.

    Raises:
        UserError: more pairs than `max_bad` allows cannot be encoded, none is left, a token has no embedding
            in the model that the tokenizer came with, or the tokenizer does not suit the chat format.
    """
    renderer = Renderer(tokenizer, chat)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token), so a response could not end")
    limits = model_limits(str(tokenizer.name_or_path or ""))
    key = _cache_key(source.content, renderer, max_length, limits)
    file = Path(cache_dir, f"pairs-{key}.arrow").expanduser()
    what = "the pairs are tokenised again"

    def make() -> None:
        picked = Picked(max_length, limits)
        batches = map(picked.pick, encoded(source.pairs, Encoder(renderer), num_proc))
        store.write_table(file, KEPT, batches, picked.notes)

    notes = store.made_once(file, make, what)
    if ranks.local_rank() == 0:
        data = store.open_intact(file, make, what)
    else:
        data = store.open_table(file)
    _check(data, notes, source, max_length, max_bad, limits, tokenizer)
    said = ("dropped", "fingerprint", "notes", "details", "shared")
    rendering = _digest(_state(renderer)).hexdigest()[:32]
    return TokenizedPairs(data, *(notes[name] for name in said), rendering=rendering)


def tokenize_data(source: PairSet, tokenizer: Any, data: DataConfig, cache_dir: str) -> TokenizedPairs:
    """`tokenize_pairs` with the settings of a config."""
    return tokenize_pairs(
        source,
        tokenizer,
        chat=ChatFormat.of(data),
        max_length=data.max_length,
        num_proc=data.num_proc,
        cache_dir=cache_dir,
        max_bad=data.max_bad,
    )


def model_limits(folder: str) -> ModelLimits:
    """The limits that a model folder's config.json states; none where there is no such file."""
    if not folder or not Path(folder, "config.json").is_file():
        return ModelLimits()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception:  # a model that needs its own code
        return ModelLimits()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions and isinstance(rope.get("factor"), int | float):
        # Some configs name the positions before scaling, some after.
        positions = max(
            positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions))
        )
    return ModelLimits(getattr(config, "vocab_size", None), positions)


def _state(renderer: Renderer) -> list[Any]:
    """What the tokenizer and the chat template are. datasets' own hash of a function misses a part of it."""
    tokenizer = renderer.tokenizer
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # Padding and truncation are whatever the last call left behind.
        model = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        model = tokenizer.get_vocab()
    split = getattr(tokenizer, "split_special_tokens", None)
    return [model, tokenizer.special_tokens_map, split, renderer.templates]


def _digest(parts: list[Any]) -> Any:
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode())


def _cache_key(content: str, renderer: Renderer, max_length: int, limits: ModelLimits) -> str:
    """A hash of all that decides the ids."""
    parts = [*_state(renderer), max_length, limits, transformers.__version__, tokenizers.__version__]
    digest = _digest(parts)
    # Another version of sage may have other rules.
    digest.update(Path(str(thoughts.__file__)).read_bytes())
    digest.update(f"{source_digest('data')} {content}".encode())
    return digest.hexdigest()[:32]


def _check(
    data: datasets.Dataset,
    notes: dict[str, Any],
    source: PairSet,
    max_length: int,
    max_bad: float,
    limits: ModelLimits,
    tokenizer: Any,
) -> None:
    """Refuse pairs that could not be encoded, an empty set, and a token without an embedding."""
    refused = [
        f"row {notes['rows'][pair_id]} (pair {pair_id}): {why}" for pair_id, why in notes["details"].items()
    ]
    if len(refused) / source.count > max_bad:
        head = (
            f"{len(refused)} of {source.count} pairs cannot be trained on as they are; "
            f"a share of data.max_bad={max_bad} may be dropped"
        )
        raise UserError(first_five(head, refused))
    if not len(data):
        counts = {reason: len(ids) for reason, ids in notes["dropped"].items() if ids}
        limit = f"data.max_length={max_length} tokens"
        if limits.positions:
            limit += f" or the model's {limits.positions} positions"
        raise UserError(
            f"no pair is left of {source.count}: {counts}. The shortest pair has {notes['shortest']} tokens; "
            f"pairs longer than {limit} are dropped"
        )
    for largest, row, pair_id in notes["largest"].values():
        if limits.vocabulary and largest >= limits.vocabulary:
            raise UserError(
                f"row {row} (pair {pair_id}) has the token "
                f"{tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, but the model has "
                f"embeddings only for ids below {limits.vocabulary}: add embeddings to the model, or take "
                "the token out of the data"
            )
