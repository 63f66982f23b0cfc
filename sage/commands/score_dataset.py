"""Score a whole preference set, forward only: every pair's log-probabilities and scores.

The forward pass writes its numbers to RUN_DIR/forward/, shard by shard. A killed run resumes with the shard
that it was working on. The pairs of one prompt lie side by side there, so that each text is computed once.
Strata and some scores need the whole set, so RUN_DIR/scores/ is written when all shards are there, in the
order of the source. The summary follows, and last forward/ is removed: a kill at that moment leaves some of
it, which nothing reads. A file gets its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

from sage.config import SUMMARY_FILE, ScoreConfig, build, load
from sage.data.pairs import load_data, source_of
from sage.data.source import write_rows
from sage.data.tokens import TokenizedPairs
from sage.losses import Loss
from sage.model.engine import init_distributed
from sage.model.forward import PairForward
from sage.model.logps import LogitStats, PairLogps
from sage.model.reference import MANIFEST_FILE, METADATA_KEY, SCORES_FOLDER, logit_of, logps_of
from sage.order import difficulty_of, strata_by_difficulty
from sage.scorers import PairStats, Scorer, curvature, mean_margin, select, signal
from sage.training.base import load_frozen, open_model, open_reference
from sage.training.estimate import settle_budget, this_machine
from sage.training.selection import margins_of
from sage.training.setup import read_pairs
from sage.util import ranks, stopping
from sage.util.checksums import claim, intact, seal_file
from sage.util.errors import UserError
from sage.util.files import write_json, write_whole
from sage.util.progress import console, track
from sage.util.ranks import main_only

FORWARD_FOLDER = "forward"
BINS, BAR_WIDTH = 16, 50  # of the histogram


def score_dataset(run_dir: Path) -> None:
    """Start or resume the scoring whose frozen config is in `run_dir`. Every rank calls this."""
    cfg = load(run_dir)
    assert isinstance(cfg, ScoreConfig)
    loss: Loss = build("loss", cfg.loss)
    alone = cfg.reference_model is None
    scorers = {"score": build_scorer("scorer", cfg.scorer, loss, alone)}
    for name, node in cfg.scorers.items():
        scorers[f"score_{name}"] = build_scorer(f"scorers.{name}", node, loss, alone)
    device = init_distributed()

    bases = {"policy": open_model(cfg.model, device, cfg.seed, cfg.cache_dir)}
    if reference := open_reference(cfg, bases["policy"], device):
        bases["reference"] = reference
    pairs, content = read_pairs(cfg, bases["policy"].tokenizer, run_dir)
    identities = {name: {"path": base.cfg.path, **base.identity()} for name, base in bases.items()}
    manifest = {
        "pairs": {"path": cfg.data.title(), "count": len(pairs), "fingerprint": pairs.fingerprint},
        "reference": identities["policy"],
        **identities,
        "loss": cfg.loss,
        "scorer": cfg.scorer,
        "scorers": cfg.scorers,
    }
    main_only(lambda: claim(run_dir / MANIFEST_FILE, manifest))

    forwards, machine = [], this_machine(cfg.world_size, device, starting=True)
    for base in bases.values():
        engine, layout = load_frozen(base, cfg, device, [pairs], cfg.data.packing)
        budget = settle_budget(cfg, run_dir, base, pairs, layout, machine)
        forwards.append(PairForward(engine, budget, layout))
    started = time.perf_counter()
    done = run_models(run_dir / FORWARD_FOLDER, pairs, cfg.shard_pairs, *forwards)
    if ranks.rank() == 0:
        speed = done / (time.perf_counter() - started)
        finish(cfg, run_dir, manifest, content, pairs, loss, scorers, speed)


def build_scorer(key: str, node: dict[str, Any], loss: Loss, alone: bool) -> Scorer:
    """The scorer of a config group.

    Args:
        alone: the policy is its own reference.

    Raises:
        UserError: it gives no scores, or the same one to every pair.
    """
    scorer: Scorer = build(key, node, "scorer")
    if not scorer.makes_scores:
        raise UserError(f"{key}._target_={node['_target_']} does not score pairs: choose another")
    if len({*build(key, node, "scorer")(any_pairs(loss, alone=False)).tolist()}) == 1:
        raise UserError(
            f"{key}._target_={node['_target_']} gives every pair the same score: it excludes candidates in "
            "training and does not rank them. Choose another"
        )
    if alone and len({*build(key, node, "scorer")(any_pairs(loss, alone=True)).tolist()}) == 1:
        raise UserError(
            f"{key}._target_={node['_target_']} gives every pair the same score while the policy is its own "
            f"reference, since all implicit rewards are 0: set {key}.margin=policy_mean, choose another, or "
            "give a reference_model"
        )
    return scorer


def any_pairs(loss: Loss, alone: bool) -> PairStats:
    """Three pairs that differ in all that a scorer may look at.

    Args:
        alone: the policy is its own reference.
    """
    logps = PairLogps(
        *torch.tensor([[-1.0, -5.0, -9.0], [-4.0, -4.5, -2.0], [2.0, 3.0, 7.0], [3.0, 9.0, 4.0]])
    )
    logit = LogitStats(*torch.tensor([[0.5, 1.0, 2.5], [0.1, 0.7, 1.5], [0.2, 2.0, 0.9]]))
    reference = logps if alone else PairLogps(-logps.rejected, logps.rejected, *logps[2:])
    return replace(PairStats.of(loss, logps, reference, logit), other_margin=torch.tensor([-1.0, 0.5, 2.0]))


def run_models(
    folder: Path,
    pairs: TokenizedPairs,
    shard_pairs: int,
    forward: PairForward,
    reference: PairForward | None = None,
) -> int:
    """Write the models' numbers of every pair to `folder`, `shard_pairs` pairs per file.

    Returns the number of pairs whose file was missing. Without a `reference` the policy is its own.
    """
    folder.mkdir(exist_ok=True)
    order = pairs.by_prompt()
    shards = [order[start : start + shard_pairs] for start in range(0, len(pairs), shard_pairs)]
    # Rank 0 writes the files, so it decides.
    missing = main_only(lambda: [n for n in range(len(shards)) if not intact(shard_file(folder, n))])
    counts = [len(shards[number]) for number in missing]
    pass_rates, lengths = pairs.pass_rates(), pairs.lengths().astype(np.int32)
    for number in track(missing, "pairs", sum(counts), lambda number: len(shards[number])):
        indices = shards[number]
        logps, logit = forward.all_stats(pairs, indices, logit=True)
        other = reference.all_logps(pairs, indices) if reference else logps
        assert logit
        if ranks.rank() == 0:
            prompt_tokens, chosen_tokens, rejected_tokens = lengths[indices].T
            columns = {
                "pair_id": pairs.pair_ids(indices),
                "pass_rate": pass_rates[indices],
                "prompt_tokens": prompt_tokens,
                "chosen_tokens": chosen_tokens,
                "rejected_tokens": rejected_tokens,
                "policy_chosen_logps": logps.chosen,
                "policy_rejected_logps": logps.rejected,
                "reference_chosen_logps": other.chosen,
                "reference_rejected_logps": other.rejected,
                **{f"logit_{name}": values for name, values in logit._asdict().items()},
            }
            write_whole(shard_file(folder, number), partial(pq.write_table, to_table(columns)))
            seal_file(shard_file(folder, number))
    return sum(counts)


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def to_table(columns: dict[str, Any]) -> pa.Table:
    """Columns of tensors or arrays. A missing pass rate becomes null."""
    return pa.table(
        {
            name: pa.array(
                values.numpy() if isinstance(values, Tensor) else values,
                from_pandas=name == "pass_rate",
            )
            for name, values in columns.items()
        }
    )


def finish(
    cfg: ScoreConfig,
    run_dir: Path,
    manifest: dict[str, Any],
    content: str,
    pairs: TokenizedPairs,
    loss: Loss,
    scorers: dict[str, Scorer],
    speed: float,
) -> None:
    """Write RUN_DIR/scores/, the best rows if `top` asks for them, and a summary.

    `content` names what the source held when its pairs were read.
    """
    parts = sorted((run_dir / FORWARD_FOLDER).glob("*.parquet"))
    forward = pa.concat_tables([pq.read_table(part) for part in parts]).take(np.argsort(pairs.by_prompt()))
    assert forward["pair_id"].to_pylist() == pairs.pair_ids().tolist()  # `claim` saw to that
    stats = PairStats.of(loss, logps_of(forward, "policy"), logps_of(forward, "reference"), logit_of(forward))
    forward = forward.append_column("text_hash", pa.array(pairs.text_hashes()))
    table = derive(forward, stats, pairs, scorers, loss, cfg.strata, cfg.seed)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(manifest)})
    (run_dir / SCORES_FOLDER).mkdir(exist_ok=True)
    for number in range(len(parts)):
        shard = table.slice(number * cfg.shard_pairs, cfg.shard_pairs)
        write_whole(shard_file(run_dir / SCORES_FOLDER, number), partial(pq.write_table, shard))

    summary = {
        "name": cfg.name,
        "pairs": len(table),
        "pairs_per_second": speed,
        "scores": str(run_dir / SCORES_FOLDER),
    }
    scores = table["score"].to_numpy()
    if cfg.top is not None:
        count = max(1, round(cfg.top * len(table)))
        best = select(
            torch.tensor(scores), count, cfg.seed, admitted=scorers["score"].admitted(stats)
        ).numpy()
        summary |= {
            "top": str(write_top(cfg, run_dir, content, table["pair_id"].take(best).to_pylist())),
            "top_pairs": len(best),
        }
    show(cfg, table, scores, summary)
    write_json(run_dir / SUMMARY_FILE, summary)
    shutil.rmtree(run_dir / FORWARD_FOLDER)


def derive(
    forward: pa.Table,
    stats: PairStats,
    pairs: TokenizedPairs,
    scorers: dict[str, Scorer],
    loss: Loss,
    strata: int,
    seed: int,
) -> pa.Table:
    """The columns of the forward pass, and those that follow from them.

    margin is u, signal g and curvature h. logit_signal is g^2 D, the squared norm of the loss's gradient with
    respect to the logits. logit_curvature is h D + g (U_w + U_l), a bound on the trace of its Hessian. Strata
    are quantiles of difficulty, see `sage.order.difficulty_of` with kind auto; 0 is the easiest.
    """
    assert stats.logit
    u = stats.u
    g, h = signal(u, stats.beta), curvature(u, stats.beta)
    squared_norm, chosen_uncertainty, rejected_uncertainty = stats.logit
    lengths = forward["chosen_tokens"].to_numpy() + forward["rejected_tokens"].to_numpy()
    pass_rates = forward["pass_rate"].to_numpy().astype(np.float64)
    difficulty = difficulty_of("auto", pass_rates, lengths, mean_margin(stats.reference).numpy())
    assert difficulty is not None
    columns = {
        "stratum": strata_by_difficulty(difficulty, strata, seed),
        "margin": u,
        "policy_mean": mean_margin(stats.policy),
        "signal": g,
        "curvature": h,
        "logit_signal": g**2 * squared_norm,
        "logit_curvature": h * squared_norm + g * (chosen_uncertainty + rejected_uncertainty),
    }
    for name, scorer in scorers.items():
        columns[name] = scorer(replace(stats, other_margin=margins_of(scorer, loss, pairs)))
    derived = to_table(columns)
    return pa.table(
        [*forward.columns, *derived.columns], names=[*forward.column_names, *derived.column_names]
    )


def write_top(cfg: ScoreConfig, run_dir: Path, content: str, pair_ids: list[str]) -> Path:
    """Write the rows of these pairs, unchanged, to RUN_DIR/top; those of several sources to top/NAME.

    Raises:
        UserError: the source no longer has the content that `content` names.
    """
    data, wanted = cfg.data, set(pair_ids)
    found = load_data(data, cfg.cache_dir)
    if found.content != content:
        raise UserError(
            f"{data.title()} was changed while its pairs were scored, so top={cfg.top} cannot take its rows. "
            f"The scores are complete, in {run_dir / SCORES_FOLDER}. Put the file back, "
            f"then {stopping.go_on(run_dir)}, which computes nothing twice"
        )
    table = found.table("row", "pair_id")
    rows: dict[str, list[int]] = {name: [] for name in data.sources}
    for row, pair_id in zip(table["row"].to_pylist(), table["pair_id"].to_pylist(), strict=True):
        if pair_id in wanted:
            rows.setdefault(source_of(pair_id) if data.sources else "", []).append(row)
    if data.path is not None:
        return write_rows(data.path, rows[""], run_dir / "top", split=data.split)
    (run_dir / "top").mkdir(exist_ok=True)
    for name, source in data.sources.items():
        write_rows(source.path, rows[name], run_dir / "top" / name, split=source.split)
    return run_dir / "top"


def show(cfg: ScoreConfig, table: pa.Table, scores: np.ndarray, summary: dict[str, Any]) -> None:
    """Print the summary: quantiles per stratum, a histogram, and `show` pairs of each extreme."""
    if not table["margin"].to_numpy().any():
        console.print(
            "policy and reference are the same model, so every margin (implicit reward) is 0. policy_mean "
            "and scores at the logit level still tell pairs apart"
        )
    finite = np.isfinite(scores)
    if broken := table["pair_id"].filter(pa.array(~finite)).to_pylist():
        console.print(f"{len(broken)} pairs have no finite score, for example {', '.join(broken[:5])}")
    quantiles = Table("stratum", "pairs", "lowest", "25%", "median", "75%", "highest", title="score")
    stratum = table["stratum"].to_numpy()
    for label, members in [*((str(k), stratum == k) for k in range(cfg.strata)), ("all", stratum >= 0)]:
        values = scores[members & finite]
        numbers = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]) if len(values) else []
        quantiles.add_row(label, str(members.sum()), *(f"{number:.4g}" for number in numbers))
    console.print(quantiles)
    counts, edges = np.histogram(scores[finite], BINS)
    for count, edge in zip(counts, edges, strict=False):
        console.print(f"{edge:>10.4g} {'█' * round(BAR_WIDTH * count / max(counts.max(), 1))} {count}")
    ranked = np.flatnonzero(finite)[np.argsort(-scores[finite], kind="stable")]
    for title, rows in (
        (("highest", ranked[: cfg.show]), ("lowest", ranked[::-1][: cfg.show])) if cfg.show else ()
    ):
        extremes = Table("pair_id", "stratum", "score", "policy_mean", "margin", title=title)
        for row in table.take(rows).to_pylist():
            numbers = (row[name] for name in ("score", "policy_mean", "margin"))
            extremes.add_row(row["pair_id"], str(row["stratum"]), *(f"{number:.4g}" for number in numbers))
        console.print(extremes)
    for name, value in summary.items():
        console.print(f"{name}: {value}")
