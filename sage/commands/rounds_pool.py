"""The pairs that a round trains on: new ones, and older ones that the policy still gets wrong."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from sage.answering.problems import read_problems
from sage.commands.build_pairs import PAIRS_FILE
from sage.commands.rounds_parts import Parts
from sage.commands.rounds_results import OLDER_FOLDER, POOL_FILE, whole
from sage.config import SUMMARY_FILE, ModelConfig, ScoreConfig
from sage.model.reference import SCORES_FOLDER
from sage.util import checksums
from sage.util.files import write_text
from sage.util.progress import console

SCORER = {"_target_": "sage.scorers.Sage"}  # any will do: only the margins are read


def pairs_file(parts: Parts, number: int) -> Path:
    """The file of the pairs that a round trains on."""
    folder = parts.folder(number)
    return folder / "pairs" / PAIRS_FILE if number == 1 or not parts.cfg.round.keep else folder / POOL_FILE


def training_pairs(parts: Parts, number: int, policy: ModelConfig) -> Path:
    """`pairs_file`, made if need be. `policy` is the one that the round starts from."""
    new, file = parts.folder(number) / "pairs" / PAIRS_FILE, pairs_file(parts, number)
    if file == new or checksums.intact(file):
        return file
    older = pairs_file(parts, number - 1)
    folder = parts.folder(number) / OLDER_FOLDER
    scoring = parts.command(
        ScoreConfig,
        "score-dataset",
        model=parts.merged(policy),
        data=replace(parts.cfg.pairs_of_a_round(str(older)), eval_path=None),
        scorer=SCORER,
        reference_model=None,
    )
    parts.do(scoring, folder, folder / SUMMARY_FILE)
    with whole(folder / SCORES_FOLDER):
        table = pq.read_table(folder / SCORES_FOLDER, columns=["pair_id", "policy_mean"])
    margins = dict(zip(*(table[name].to_pylist() for name in ("pair_id", "policy_mean")), strict=True))
    asked = {problem.problem_id for problem in read_problems(parts.asked(number))}
    with whole(older), older.open(encoding="utf-8") as opened:
        lines = list(opened)  # `splitlines` would also split at U+2028 in a response
    kept = stay(lines, margins, asked, parts.cfg.round.keep)
    write_text(file, new.read_text(encoding="utf-8") + "".join(kept))
    checksums.seal_file(file)
    console.print(f"round {number}: {len(kept)} of {len(lines)} older pairs stay")
    return file


def stay(
    lines: Sequence[str], margins: Mapping[str, float], asked: Collection[str], share: float
) -> list[str]:
    """The older pairs that stay, as lines of their file, in its order: at most `share` of them.

    A pair is stale if its problem was asked again, or if the policy now prefers the chosen response. Of the
    others, those with the lowest margins stay.

    Args:
        margins: pair_id -> the policy's length-normalised margin now; a pair without one is stale.
    """
    names = [json.loads(line)["pair_id"] for line in lines]
    fresh = [
        (margins[name], place)
        for place, name in enumerate(names)
        if margins.get(name, 0.0) < 0 and name.rpartition("-")[0] not in asked
    ]
    chosen = {place for _, place in sorted(fresh)[: int(share * len(lines))]}
    return [line for place, line in enumerate(lines) if place in chosen]
