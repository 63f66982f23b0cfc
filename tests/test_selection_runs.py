"""Selection in real runs: every option trains, ranks and resumes agree, and the log shows what was chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, make_pairs, write_jsonl
from many_runs import ERROR_FILE, column, execute, freeze, interrupted, metrics, weights

from sage.reporting.choices import texts_of
from sage.reporting.runs import find

pytestmark = pytest.mark.slow
BATCH = 4
SCORERS = sorted(p.stem for p in (REPO / "conf" / "scorer").glob("*.yaml"))
CURRICULA = sorted(p.stem for p in (REPO / "conf" / "curriculum").glob("*.yaml"))
WHOLE_METHOD = [
    "scorer=sage",
    "scorer.warmup_steps=2",
    "scorer.margin=mixed",
    "curriculum=sage",
    "curriculum.every=5",
    "curriculum.strata=3",
]
FEW = (1, 3, 4, 5, 9)  # pairs: too few to choose four of, and hardly enough
INTERVALS = [*WHOLE_METHOD, "scorer.score_every=4", "scorer.reuse=2", "steps=12", "save_every=6"]


@pytest.fixture(scope="session")
def common(tiny_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("selection")
    rows = make_pairs(60)
    margins = pa.table({"pair_id": [r["pair_id"] for r in rows], "margin": [0.1 * i for i in range(60)]})
    pq.write_table(margins, folder / "margins.parquet")
    return [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', rows)}",
        "data.max_length=130",
        "micro_batch_tokens=520",
        "steps=4",
        f"batch_size={BATCH}",
        "optimizer.lr=1e-3",
        f"cache_dir={folder / 'cache'}",
        "model.dtype=float32",
        "+baseline=dpo",
        f"+scorer.margins_from={folder / 'margins.parquet'}",
    ]


@pytest.fixture(scope="session")
def one_rank(common, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("selection_one")
    plain, other = common[:-1], common[-1]
    given = {name: [other] for name in ("rho", "medium_influence", "margin_gap")}
    runs = {
        **{f"scorer_{s}": [f"scorer={s}", *[g.lstrip("+") for g in given.get(s, [])]] for s in SCORERS},
        **{f"curriculum_{c}": [f"curriculum={c}"] for c in CURRICULA},
        "thirty": [*WHOLE_METHOD, "steps=30"],
        **{f"intervals{z}": [*INTERVALS, f"engine=zero{z}"] for z in (0, 3)},
        "online": ["scorer=sage", "reference=online"],
        "simpo": ["scorer=sage", "loss=simpo"],
        "bounded": ["scorer=loss", "steps=8", "tracking.sample_rows=48"],
        "unlogged": ["scorer=loss", "tracking.sample_rows=0"],
        **{f"few_{n}": ["scorer=sage", "curriculum=sage", f"data.limit={n}"] for n in FEW},
        "no_pass_rate": [
            "curriculum=static_filter",
            "curriculum.difficulty=pass_rate",
            "data.columns.pass_rate=none",
        ],
    }
    runs["no_pass_rate"][-1] = f"data.path={strip_pass_rates(root, common)}"
    execute(1, [freeze(root / name, *plain, *overrides) for name, overrides in runs.items()])
    failed = {p.parent.name: p.read_text() for p in root.glob(f"*/{ERROR_FILE}")}
    assert set(failed) == {"no_pass_rate"}, failed
    halves = [interrupted(root / f"intervals{z}", 6, root / f"resumed{z}") for z in (0, 3)]
    (halves[0] / "samples" / "00000099.tmp").write_bytes(
        b"half"
    )  # a kill in the middle of writing leaves this
    execute(1, halves)
    return root


def strip_pass_rates(folder: Path, common: list[str]) -> Path:
    rows = [json.loads(line) for line in Path(common[2].split("=")[1]).read_text().splitlines()]
    return write_jsonl(
        folder / "pairs.jsonl", [{k: v for k, v in r.items() if k != "pass_rate"} for r in rows]
    )


@pytest.fixture(scope="session")
def two_ranks(common, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("selection_two")
    execute(2, [freeze(root / "thirty", *common[:-1], *WHOLE_METHOD, "steps=30", "world_size=2")])
    assert not list(root.glob(f"*/{ERROR_FILE}"))
    return root


def samples(run_dir: Path) -> list[dict]:
    return [
        row
        for file in sorted((run_dir / "samples").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def chosen(run_dir: Path) -> dict[int, list[str]]:
    """step -> the pairs that were chosen in it."""
    picked: dict[int, list[str]] = {}
    for row in samples(run_dir):
        if row["selected"]:
            picked.setdefault(row["step"], []).append(row["pair_id"])
    return picked


@pytest.mark.parametrize(
    "name", [*[f"scorer_{s}" for s in SCORERS], *[f"curriculum_{c}" for c in CURRICULA], "online", "simpo"]
)
def test_every_option_trains(one_rank, name):
    """From its YAML to a finished run: batches full, loss finite, costs counted."""
    run = one_rank / name
    assert len(metrics(run)) == 4 and all(math.isfinite(x) for x in column(run, "loss"))
    assert column(run, "cost/backward_pairs") == [BATCH * (i + 1) for i in range(4)]
    assert all(len(set(pairs)) == BATCH for pairs in chosen(run).values())


def test_uniform_scores_nothing_and_the_first_scoring_is_free(one_rank):
    """Protects the cost: only the policy's scoring passes count, and the first of them reads the cached
    reference.
    """
    assert column(one_rank / "scorer_uniform", "cost/forward_pairs") == [0] * 4
    assert column(one_rank / "scorer_loss", "cost/forward_pairs") == [0, 12, 24, 36]
    assert column(one_rank / "online", "cost/forward_pairs") == [8, 16, 24, 32]  # not the reference's passes


def test_two_ranks_choose_what_one_chooses(one_rank, two_ranks):
    """The whole method for 30 steps: curriculum, gates, sampling, on 1 and 2 ranks."""
    ours, theirs = chosen(one_rank / "thirty"), chosen(two_ranks / "thirty")
    assert len(ours) == 30 and ours == theirs
    assert len({tuple(pairs) for pairs in ours.values()}) > 25  # the choice moves on
    assert column(one_rank / "thirty", "curriculum/pool_size") == column(
        two_ranks / "thirty", "curriculum/pool_size"
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_chooses_the_same(one_rank, stage):
    """Protects a resume inside a scoring interval and a curriculum interval, and the log's rows."""
    whole, resumed = one_rank / f"intervals{stage}", one_rank / f"resumed{stage}"
    assert samples(whole) == samples(resumed) and len(samples(whole)) > 24
    for name in ("loss", "cost/forward_pairs", "curriculum/competence_0", "selection/mean_score"):
        assert [m.get(name) for m in metrics(whole)] == [m.get(name) for m in metrics(resumed)]
    ours, theirs = weights(whole / "final"), weights(resumed / "final")
    assert all((ours[k] == theirs[k]).all() for k in ours)


def test_the_log_says_what_was_scored(one_rank):
    """Rows of one scoring step: 12 candidates with u, g, h and the score. The 4 best are selected."""
    rows = [row for row in samples(one_rank / "scorer_loss") if row["step"] == 3]
    assert len(rows) == 12 and len({row["pair_id"] for row in rows}) == 12
    for row in rows:
        s = 1 / (1 + math.exp(row["margin"]))
        assert row["signal"] == pytest.approx(0.1 * s, rel=1e-5)
        assert row["curvature"] == pytest.approx(0.01 * s * (1 - s), rel=1e-5)
        assert row["ranked_by"] == "implicit_reward"
        assert row["score"] == pytest.approx(math.log1p(math.exp(-row["margin"])), rel=1e-5)
    best = sorted(rows, key=lambda row: -row["score"])[:4]
    assert {row["pair_id"] for row in best} == {row["pair_id"] for row in rows if row["selected"]}


def test_the_log_is_bounded_and_can_be_switched_off(one_rank):
    """96 rows where 48 are allowed: every second step is kept, from the first on."""
    assert sorted({row["step"] for row in samples(one_rank / "bounded")}) == [1, 3, 5, 7]
    assert len(samples(one_rank / "bounded")) == 48
    assert not (one_rank / "unlogged" / "samples").exists()


def test_a_report_finds_the_texts_of_the_logged_pairs(one_rank):
    (run,), *_ = find([str(one_rank / "bounded")])
    ids = {row["pair_id"] for row in samples(run.path)}
    assert texts_of(run, [*ids]).keys() == ids


@pytest.mark.parametrize("pairs", FEW)
def test_the_method_trains_on_few_pairs(one_rank, pairs):
    """Protects SAGE as the default: a small file trains. With nothing to choose it is plain DPO."""
    run = one_rank / f"few_{pairs}"
    assert column(run, "cost/backward_pairs") == [BATCH * (i + 1) for i in range(4)]
    assert ("curriculum/pool_size" in metrics(run)[0]) == (pairs > BATCH)
    assert (column(run, "cost/forward_pairs")[-1] > 0) == (pairs > BATCH)


def test_missing_pass_rates_are_refused_before_the_model(one_rank):
    message = (one_rank / "no_pass_rate" / ERROR_FILE).read_text()
    assert "60 of 60 pairs have no pass rate" in message and "reference_margin" in message
