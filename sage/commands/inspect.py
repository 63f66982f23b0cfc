"""Show pairs exactly as they will be trained, from the tokenizer alone, without a run directory."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.table import Table

from sage.answering.check import Finding, check_answers
from sage.config import DataConfig, InspectConfig, ModelConfig
from sage.data.chat import ChatFormat, Renderer, response_ends
from sage.data.columns import IDS, to_lists
from sage.data.display import COLOURS, MARKUP, WARNINGS, foreign_markup, shown, texts_of, warnings_of
from sage.data.pairs import Dropped, PairSet, load_data, source_of
from sage.data.source import resolve_path
from sage.data.tokens import Pair, TokenizedPairs, tokenize_data
from sage.model import loading
from sage.training.sources import by_source
from sage.util.errors import UserError
from sage.util.files import write_whole
from sage.util.hub import reach_hub
from sage.util.progress import console

SHOWN = 5  # rows or pairs that a line names
BATCH = 1000  # pairs decoded at a time
BINS, BAR_WIDTH = 12, 40  # of the histogram


def inspect(cfg: InspectConfig) -> None:
    """Print some pairs, what was dropped and why, lengths and warnings; write `cfg.json` if it is set.

    Raises:
        UserError: the same as `sage train` would, for its data and tokenizer.
    """
    source, wrong = with_answers_checked(load_data(cfg.data, cfg.cache_dir), cfg.data)
    tokenizer = loading.load_tokenizer(tokenizer_folder(cfg.model, cfg.cache_dir), cfg.model)
    chat = ChatFormat.of(cfg.data)
    pairs = tokenize_data(source, tokenizer, cfg.data, cfg.cache_dir)
    ends = response_ends(tokenizer, chat)
    for index in range(min(cfg.show, len(pairs))):
        console.print(shown(pairs[index], tokenizer, ends), end="\n\n")
    for note in source.notes + pairs.notes + by_source(pairs, cfg.data, held_out=False):
        console.print(note)
    found = examine(pairs, source, tokenizer, chat, ends, cfg.json)
    for finding in wrong:
        found[finding.reason].append(finding.pair_id)
    print_lengths(pairs)
    print_dropped(pairs, source, bool(cfg.data.sources))
    print_warnings(found)
    if cfg.json:
        console.print(f"all of it: {cfg.json}")


def with_answers_checked(source: PairSet, data: DataConfig) -> tuple[PairSet, list[Finding]]:
    """What `data.answers` leaves of a source, and the wrong labels that stay in it.

    Raises:
        UserError: no pair is left.
    """
    if data.answers is None:
        return source, []
    drop = data.answers == "drop"
    check = check_answers(source.pairs)
    source = replace(source, notes=[*source.notes, check.summary(drop)])
    if not drop:
        return source, check.findings
    first = {finding.pair_id: finding for finding in reversed(check.findings)}
    dropped = [
        Dropped(
            finding.row,
            f"{data.path or source_of(finding.pair_id)}, row {finding.row}",
            pair_id,
            finding.reason,
            f"the true answer is {finding.answer}, the response's is {finding.extracted}",
        )
        for pair_id, finding in first.items()
    ]
    left = source.without(first)
    if not left.count:
        raise UserError(f"{data.title()}: data.answers=drop leaves no pair; data.answers=check lists them")
    return replace(left, dropped=[*source.dropped, *dropped]), []


def tokenizer_folder(cfg: ModelConfig, cache_dir: str) -> str:
    """Where the tokenizer is: a folder need not hold a model, and a hub model is not downloaded."""
    path = resolve_path(cfg.path)
    if os.path.isdir(path):
        return path
    if path.count("/") == 1 and not path.startswith((".", "/")) and not os.path.exists(path):
        reach_hub()
        return path
    return loading.resolve_model(cfg, cache_dir)


def examine(
    pairs: TokenizedPairs, source: PairSet, tokenizer: Any, chat: ChatFormat, ends: set[int], file: str | None
) -> dict[str, list[str]]:
    """Warning -> pair_ids; writes every pair, then every dropped row, to `file`."""
    renderer = Renderer(tokenizer, chat)
    marks = set() if renderer.plain else {*renderer.end_tokens.values()} - {renderer.tokenizer.unk_token_id}
    foreign = foreign_markup(renderer.end_tokens)
    found: dict[str, list[str]] = {name: [] for name in WARNINGS}
    found["template_in_prompt"] = template_in_prompts(source, renderer)
    found |= repeated_pairs(source)

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(pairs), BATCH):
            table = pairs.data.data.table.slice(start, BATCH)
            columns = [
                to_lists(table[name]) if name in IDS else table[name].to_pylist() for name in Pair._fields
            ]
            batch = [Pair(*row) for row in zip(*columns, strict=True)]
            for pair, texts in zip(batch, texts_of(batch, tokenizer), strict=True):
                for name in warnings_of(pair, texts, ends, marks, foreign):
                    found[name].append(pair.pair_id)
                row = pair._asdict()
                del row["pass_rate"]
                yield row | dict(zip(("prompt_text", "chosen_text", "rejected_text"), texts, strict=True))
        yield from dropped_rows(pairs, source)

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows())

    if file:
        write_whole(Path(file).expanduser().absolute(), write)
    else:
        for _ in rows():
            pass
    return found


def template_in_prompts(source: PairSet, renderer: Renderer) -> list[str]:
    """The pairs whose prompt, as the source has it, holds the markup of a chat template."""
    marks = {*MARKUP, *renderer.end_tokens}
    table = source.table("pair_id", "prompt")
    where = pc.match_substring_regex(table["prompt"], "|".join(map(re.escape, sorted(marks))))  # pyright: ignore
    return table["pair_id"].filter(where).to_pylist()


def repeated_pairs(source: PairSet) -> dict[str, list[str]]:
    """The pairs that are there twice, and those that another pair contradicts."""
    table = source.table("pair_id", "prompt", "chosen", "rejected")
    ids, *texts = (column.to_pylist() for column in table.columns)
    count = Counter(map(hash, zip(*texts, strict=True)))
    found: dict[str, list[str]] = {"same_as_another": [], "contradicted": []}
    for pair_id, prompt, chosen, rejected in zip(ids, *texts, strict=True):
        if count[hash((prompt, chosen, rejected))] > 1:
            found["same_as_another"].append(pair_id)
        if hash((prompt, rejected, chosen)) in count:
            found["contradicted"].append(pair_id)
    return found


def dropped_rows(pairs: TokenizedPairs, source: PairSet) -> Iterator[dict[str, Any]]:
    """Every row that gives no pair: row, pair_id, reason, and a detail where the reason needs one."""
    for row in source.dropped:
        yield row._asdict()
    table = source.table("pair_id", "row")
    rows = dict(zip(table["pair_id"].to_pylist(), table["row"].to_pylist(), strict=True))
    for reason, ids in pairs.dropped.items():
        for pair_id in ids:
            yield {
                "row": rows[pair_id],
                "pair_id": pair_id,
                "reason": reason,
                "detail": pairs.details.get(pair_id),
            }


def print_lengths(pairs: TokenizedPairs) -> None:
    lengths = pairs.lengths()
    table = Table(title=f"{len(pairs)} pairs, lengths in tokens", title_justify="left")
    for column in ("", "shortest", "median", "95%", "longest", "all"):
        table.add_column(column, justify="left" if not column else "right")
    totals = lengths[:, 0] + lengths[:, 1:].max(1)
    for name, column in zip((*COLOURS, "prompt and longer response"), (*lengths.T, totals), strict=True):
        quantiles = np.quantile(column, (0, 0.5, 0.95, 1), method="lower")
        table.add_row(name, *(str(int(value)) for value in (*quantiles, column.sum())))
    console.print(table)
    counts, edges = np.histogram(totals, bins=min(BINS, int(totals.max() - totals.min()) + 1))
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "█" * -(-BAR_WIDTH * count // int(counts.max()))
        console.print(f"{int(np.ceil(low)):>7} to {int(high):<7} {bar} {count}")


def print_dropped(pairs: TokenizedPairs, source: PairSet, many: bool) -> None:
    """Count the dropped rows by reason, and name some; by source too if there are `many`."""

    def name(row: dict[str, Any]) -> str:
        return f"{source_of(row['pair_id'])}/{row['row']}" if many else str(row["row"])

    rows = list(dropped_rows(pairs, source))
    if rows:
        console.print(f"dropped: {len(rows)}")
    for reason, count in Counter(row["reason"] for row in rows).most_common():
        named = [row for row in rows if row["reason"] == reason][:SHOWN]
        console.print(f"  {count} {reason}: rows {', '.join(map(name, named))}{more(count)}")
        if named[0]["detail"]:
            console.print(f"    row {name(named[0])}: {named[0]['detail']}", markup=False)


def print_warnings(found: dict[str, list[str]]) -> None:
    for name, ids in found.items():
        if ids:
            listed = f"{', '.join(ids[:SHOWN])}{more(len(ids))}"
            console.print(f"warning: {len(ids)} pairs: {WARNINGS[name]}: {listed}", markup=False)


def more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""
