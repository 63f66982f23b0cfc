"""Preference pairs as token ids: encoded once, checked against the model's limits, and cached.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers

from sage.data import chat as chat_module
from sage.data import encoding, fields, placement
from sage.data.chat import ChatFormat, Renderer
from sage.data.columns import to_column
from sage.data.encoding import IDS, Encoder
from sage.data.source import first_five
from sage.util import thoughts
from sage.util.errors import UserError
from sage.util.files import write_whole
from sage.util.progress import console, track

PARALLEL_FROM = 2000  # rows; below this, starting worker processes costs more than it saves
BATCH = 1000  # rows encoded at a time
SHORTEST_PREFIX = 8  # tokens; the keys and values of a shorter common prefix are not worth copying
PREFIX_ROWS = 4096  # prompts compared at a time: all of a large set at once would take gigabytes
RULES = placement.RULES | {
    "other_tokenizer": "the sampled token ids belong to another tokenizer, so the texts are encoded instead"
}
ENCODED = pa.schema(
    [("pair_id", pa.string()), ("pass_rate", pa.float64())]
    + [(name, pa.list_(pa.int32())) for name in IDS]
    + [("rules", pa.list_(pa.string())), ("reason", pa.string()), ("detail", pa.string())]
)


class Pair(NamedTuple):
    pair_id: str
    pass_rate: float | None
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclasses.dataclass(frozen=True)
class TokenizedPairs:
    """Pairs ready for training.

    data: a dataset with Pair's columns.
    dropped: reason -> pair_ids.
    fingerprint: names these very ids.
    notes: what the user should know about how the pairs were encoded, one sentence each.
    details: pair_id -> why it was dropped, for pairs whose reason alone does not say it.
    """

    data: datasets.Dataset
    dropped: dict[str, list[str]]
    fingerprint: str
    notes: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, str] = dataclasses.field(default_factory=dict)

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
        """How many tokens all prompts share at their start, at least one short of each; 0 if few."""
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


class Limits(NamedTuple):
    """What a model can take: ids below `vocabulary`, texts of up to `positions` tokens; None = no limit."""

    vocabulary: int | None = None
    positions: int | None = None


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer: Any,
    *,
    chat: ChatFormat,
    max_length: int,
    num_proc: int,
    cache_dir: str,
    max_bad: float = 0.0,
) -> TokenizedPairs:
    """Token ids of every pair that fits, from `cache_dir` if these pairs were tokenised this way before.

    Pairs are dropped, never cut: a cut takes the answer away. The reasons: "too_long" where the prompt and
    the longer response exceed `max_length`, "beyond_positions" where they exceed the model's positions,
    "same_tokens" where both responses have the same ids, and those of `sage.data.placement`.

    Args:
        pairs: the columns that `sage.data.pairs` documents.
        max_bad: the largest share of pairs that may be impossible to encode.

    Raises:
        UserError: more pairs than `max_bad` allows cannot be encoded, none is left, a token has no embedding
            in the model that the tokenizer came with, or the tokenizer does not suit the chat format.
    """
    renderer = Renderer(tokenizer, chat)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token), so a response could not end")
    limits = model_limits(str(tokenizer.name_or_path or ""))
    key = _cache_key(pairs, renderer, max_length, limits)
    file = Path(cache_dir, f"pairs-{key}.arrow").expanduser()
    if not file.exists() or (found := _read(file, key)) is None:
        table = _encode_all(pairs, Encoder(renderer), num_proc)
        _write(file, *_select(table, max_length, limits), key)
        found = _read(file, key)
        assert found is not None
    data, notes = found
    _check(data, notes, pairs, max_length, max_bad, limits, tokenizer)
    return TokenizedPairs(data, notes["dropped"], notes["fingerprint"], notes["notes"], notes["details"])


def model_limits(folder: str) -> Limits:
    """The limits that a model folder's config.json states; none where there is no such file."""
    if not folder or not Path(folder, "config.json").is_file():
        return Limits()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception:  # a model that needs its own code
        return Limits()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions and isinstance(rope.get("factor"), int | float):
        # Some configs name the positions before scaling, some after.
        positions = max(
            positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions))
        )
    return Limits(getattr(config, "vocab_size", None), positions)


def _cache_key(pairs: datasets.Dataset, renderer: Renderer, max_length: int, limits: Limits) -> str:
    """A hash of all that decides the ids. datasets' own hash of a function misses a tokenizer's state."""
    tokenizer = renderer.tokenizer
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # Padding and truncation are whatever the last call left behind.
        model = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        model = tokenizer.get_vocab()
    parts = [
        model,
        tokenizer.special_tokens_map,
        renderer.templates,
        max_length,
        limits,
        transformers.__version__,
        tokenizers.__version__,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for module in (chat_module, encoding, fields, placement, thoughts):
        # An earlier version of sage may have had other rules.
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    for start in range(0, len(pairs), BATCH):
        digest.update(json.dumps(pairs[start : start + BATCH]).encode())
    return digest.hexdigest()[:32]


def _encode_all(pairs: datasets.Dataset, encode: Encoder, num_proc: int) -> pa.Table:
    many = len(pairs) > PARALLEL_FROM
    if num_proc == 1 or not many:
        starts = range(0, max(len(pairs), 1), BATCH)
        title = "tokenising pairs" if many else None
        tracked = track(starts, title, len(pairs), lambda start: min(BATCH, len(pairs) - start))
        return pa.concat_tables([_as_table(pairs[start : start + BATCH], encode) for start in tracked])
    mapped = pairs.map(
        _as_table,
        fn_kwargs={"encode": encode},
        batched=True,
        batch_size=BATCH,
        num_proc=num_proc,
        remove_columns=pairs.column_names,
        features=datasets.Features.from_arrow_schema(ENCODED),
        new_fingerprint="tokenised",  # unused: our own cache is keyed by content
        keep_in_memory=True,
        desc="Tokenising pairs",
    )
    return mapped.data.table.cast(ENCODED)


def _as_table(batch: dict[str, list], encode: Encoder) -> pa.Table:
    columns = encode(batch)
    arrays = [
        to_column(columns[name]) if name in IDS else pa.array(columns[name], ENCODED.field(name).type)
        for name in ENCODED.names
    ]
    return pa.table(arrays, schema=ENCODED)


def _select(table: pa.Table, max_length: int, limits: Limits) -> tuple[pa.Table, dict[str, Any]]:
    """The pairs to keep, and what the user should know about all of them."""
    lengths = _lengths(table)
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    reasons = np.array(table["reason"].to_pylist(), dtype=object)
    encoded = ~table["reason"].is_valid().to_numpy()
    for index in np.flatnonzero((lengths[:, 1] == lengths[:, 2]) & encoded).tolist():
        if table["chosen_ids"][index].equals(table["rejected_ids"][index]):
            reasons[index] = "same_tokens"
    if limits.positions:
        reasons[encoded & (totals > limits.positions)] = "beyond_positions"
    reasons[encoded & (totals > max_length)] = "too_long"
    kept = np.array([reason is None for reason in reasons], dtype=bool)
    rules = Counter(pc.list_flatten(table["rules"].filter(pa.array(kept))).to_pylist())  # pyright: ignore
    ids, details = table["pair_id"].to_pylist(), table["detail"].to_pylist()
    dropped: dict[str, list[str]] = {"too_long": [], "same_tokens": []}
    for index in np.flatnonzero(~kept).tolist():
        dropped.setdefault(str(reasons[index]), []).append(ids[index])
    notes = {
        "dropped": dropped,
        "notes": [f"{rules[rule]} pairs: {sentence}" for rule, sentence in RULES.items() if rules[rule]],
        "details": {pair_id: detail for pair_id, detail in zip(ids, details, strict=True) if detail},
        "shortest": int(totals[encoded].min(initial=np.iinfo(np.int64).max)),
    }
    return table.filter(pa.array(kept)).select(list(Pair._fields)), notes


def _write(file: Path, table: pa.Table, notes: dict[str, Any], key: str) -> None:
    notes["fingerprint"] = _fingerprint(table, key)
    table = table.replace_schema_metadata({"sage": json.dumps(notes)})

    def write(path: Path) -> None:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)

    write_whole(file, write)


def _read(file: Path, key: str) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """The cached pairs and their notes; None, and one line, where the file is damaged."""
    try:
        with pa.memory_map(str(file)) as source:
            notes = json.loads(pa.ipc.open_stream(source).schema.metadata[b"sage"])
        data = datasets.Dataset.from_file(str(file))
        if notes["fingerprint"] != _fingerprint(data.data.table, key):
            raise ValueError("its content has changed")
    except Exception as error:  # each layer that reads it has errors of its own
        console.print(f"{file} is damaged, so the pairs are tokenised again: {error}")
        return None
    return data, notes


def _check(
    data: datasets.Dataset,
    notes: dict[str, Any],
    pairs: datasets.Dataset,
    max_length: int,
    max_bad: float,
    limits: Limits,
    tokenizer: Any,
) -> None:
    """Refuse pairs that could not be encoded, an empty set, and a token without an embedding."""
    rows = dict(zip(*(pairs.data.table[name].to_pylist() for name in ("pair_id", "row")), strict=True))
    refused = [f"row {rows[pair_id]} (pair {pair_id}): {why}" for pair_id, why in notes["details"].items()]
    if len(refused) / len(pairs) > max_bad:
        head = (
            f"{len(refused)} of {len(pairs)} pairs cannot be trained on as they are; "
            f"a share of data.max_bad={max_bad} may be dropped"
        )
        raise UserError(first_five(head, refused))
    if not len(data):
        counts = {reason: len(ids) for reason, ids in notes["dropped"].items() if ids}
        limit = f"data.max_length={max_length} tokens"
        if limits.positions:
            limit += f" or the model's {limits.positions} positions"
        raise UserError(
            f"no pair is left of {len(pairs)}: {counts}. The shortest pair has {notes['shortest']} tokens; "
            f"pairs longer than {limit} are dropped"
        )
    for name in IDS if limits.vocabulary else ():
        largest = pc.max(pc.list_flatten(data.data.table[name])).as_py()  # pyright: ignore
        if largest >= limits.vocabulary:
            row = next(row for row, ids in enumerate(data.data.table[name]) if largest in ids.as_py())
            pair_id = data.data.table["pair_id"][row].as_py()
            raise UserError(
                f"row {rows[pair_id]} (pair {pair_id}) has the token "
                f"{tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, but the model has "
                f"embeddings only for ids below {limits.vocabulary}: add embeddings to the model, or take "
                "the token out of the data"
            )


def _fingerprint(table: pa.Table, key: str) -> str:
    digest = hashlib.sha256(key.encode() + _lengths(table).tobytes())
    for name in IDS:
        digest.update(pc.list_flatten(table[name]).to_numpy().tobytes())  # pyright: ignore
    return digest.hexdigest()[:32]


def _lengths(table: pa.Table) -> np.ndarray:
    columns = [pc.list_value_length(table[name]).fill_null(0).to_numpy() for name in IDS]  # pyright: ignore
    return np.stack(columns, axis=1).astype(np.int64)
