"""score-dataset against plain transformers, after a kill and on two ranks, and training from its files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_pairs, refused, write_jsonl
from forks import Started, be_worker
from many_runs import ERROR_FILE, column, execute, freeze, largest_difference, metrics

from sage import config
from sage.commands.score_dataset import write_top
from sage.data.chat import ChatFormat
from sage.data.pairs import load_data, read_pair_set
from sage.data.source import write_rows
from sage.data.tokens import tokenize_pairs
from sage.training.selection import read_margins
from sage.util.checksums import claim
from sage.util.errors import UserError
from sage.util.progress import console

slow = pytest.mark.slow
BETA = 0.3
IN_SINGLES = ("shard_pairs=1", "top=0.3")


def rows_with_gaps() -> list[dict]:
    """60 pairs, the last of them without a pass rate."""
    rows = make_pairs(60)
    del rows[-1]["pass_rate"]
    return rows


@pytest.fixture(scope="session")
def other_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model, moved."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other") / "tiny"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def common(tiny_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("score")
    return [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', rows_with_gaps())}",
        "data.max_length=200",
        "micro_batch_tokens=600",
        f"cache_dir={folder / 'cache'}",
        "model.dtype=float32",
    ]


@pytest.fixture(scope="session")
def pairs(common, tiny_model):
    from transformers import AutoTokenizer

    return tokenize_pairs(
        read_pair_set(common[2].split("=")[1]),
        AutoTokenizer.from_pretrained(tiny_model),
        chat=ChatFormat(),
        max_length=200,
        num_proc=1,
        cache_dir=common[5].split("=")[1],
    )


def freeze_scoring(run_dir: Path, *overrides: str) -> Path:
    return freeze(run_dir, *overrides, "shard_pairs=7", command="score-dataset")


@pytest.fixture(scope="session")
def runs(common, other_model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    training = [*common, "+baseline=dpo", "steps=3", "batch_size=8", "optimizer.lr=1e-3"]
    fresh = f"cache_dir={root / 'cache'}"  # to see what is computed
    logit = ["scorer=sage_logit", "scorer.candidates_per_pair=2"]
    moved = [*training, f"reference_model={other_model}", f"loss.beta={BETA}", f"data.eval_{common[2][5:]}"]
    one = [
        freeze_scoring(root / "plain", *common, "top=0.3"),
        freeze(root / "undisturbed", *common, *IN_SINGLES, command="score-dataset"),
        freeze_scoring(
            root / "pair",
            *common,
            f"reference_model={other_model}",
            f"loss.beta={BETA}",
            "+scorer@scorers.loss=loss",
            "scorers.loss.margin=policy_mean",
        ),
        freeze(root / "trained", *training, f"data.scores={root / 'plain'}", fresh),
        freeze(root / "cached", *training),
        freeze(root / "selected", *training, *logit, f"data.scores={root / 'plain'}"),
        freeze(root / "selected_cached", *training, *logit),
        freeze(root / "on_top", *training, f"data.path={root / 'plain' / 'top.jsonl'}", "steps=1"),
        freeze(root / "other_model", *training, f"model.path={other_model}", f"data.scores={root / 'plain'}"),
        freeze(root / "other_pairs", *training, "data.limit=50", f"data.scores={root / 'plain'}"),
        freeze(root / "nothing_there", *training, f"data.scores={root / 'nowhere'}"),
        freeze(root / "no_reference", *training, "loss=simpo", f"data.scores={root / 'plain'}"),
        freeze_scoring(root / "uniform", *common, "scorer=uniform"),
        freeze_scoring(root / "constant", *common, "+scorer@scorers.easy=easy"),
        freeze_scoring(root / "gate", *common, "scorer=random_from_pool"),
        freeze(root / "moved", *moved),
        freeze(root / "moved_selected", *moved, *logit),
        freeze(root / "moved_online", *moved, "reference=online"),
        freeze(root / "moved_scored", *moved, f"data.scores={root / 'pair'}"),
        freeze(root / "moved_lora", *moved, "+model/lora=default", "reference=online"),
        freeze(root / "itself", *training, f"reference_model={common[1][11:]}"),
        freeze(root / "moved_free", *moved, "loss=simpo"),
    ]
    execute(1, one)
    two = [
        freeze_scoring(root / f"two{z}", *common, "world_size=2", f"engine=zero{z}", "top=0.3")
        for z in (0, 3)
    ]
    two += [freeze(root / "moved3", *moved, "world_size=2", "engine=zero3")]
    execute(2, two)
    return root


def table_of(run: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(run / "scores")
    return {name: table[name].to_numpy() for name in table.column_names}


@slow
def test_columns_equal_plain_transformers(runs, pairs, tiny_model, other_model):
    """Protects every number of a shard: compares with the logits of one unpadded row at a time."""
    from transformers import AutoModelForCausalLM

    @torch.no_grad()
    def ask(folder: Path) -> np.ndarray:
        """[pairs, 2, 3]: log-probability, D and U of chosen and rejected."""
        model, out = AutoModelForCausalLM.from_pretrained(folder), []
        for pair in pairs:
            for response in (pair.chosen_ids, pair.rejected_ids):
                logits = model(torch.tensor([pair.prompt_ids + response])).logits
                p = logits[0, len(pair.prompt_ids) - 1 : -1].softmax(-1)
                y = p.gather(1, torch.tensor(response)[:, None])[:, 0]
                s = (p**2).sum(-1)
                out.append([y.log().sum(), (1 - 2 * y + s).sum(), (1 - s).sum()])
        return np.array(out).reshape(len(pairs), 2, 3)

    found, policy, reference = table_of(runs / "pair"), ask(tiny_model), ask(other_model)
    tokens = np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    u = BETA * ((policy - reference)[:, 0, 0] - (policy - reference)[:, 1, 0])
    sigmoid = 1 / (1 + np.exp(u))  # of -u
    g, h = BETA * sigmoid, BETA**2 * sigmoid * (1 - sigmoid)
    d, uncertainty = policy[:, :, 1].sum(1), policy[:, :, 2]
    mean = policy[:, 0, 0] / tokens[:, 0] - policy[:, 1, 0] / tokens[:, 1]
    expected = {
        "policy_chosen_logps": policy[:, 0, 0],
        "policy_rejected_logps": policy[:, 1, 0],
        "reference_chosen_logps": reference[:, 0, 0],
        "reference_rejected_logps": reference[:, 1, 0],
        "chosen_tokens": tokens[:, 0],
        "rejected_tokens": tokens[:, 1],
        "logit_squared_norm": d,
        "logit_chosen_uncertainty": uncertainty[:, 0],
        "logit_rejected_uncertainty": uncertainty[:, 1],
        "margin": u,
        "policy_mean": mean,
        "signal": g,
        "curvature": h,
        "logit_signal": g**2 * d,
        "logit_curvature": h * d + g * uncertainty.sum(1),
        "score_loss": np.log1p(np.exp(-mean)),
    }
    assert np.abs(u).max() > 0.1
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
    assert found["pair_id"].tolist() == [p.pair_id for p in pairs]
    assert np.isnan(found["pass_rate"][-1]) and found["pass_rate"][1] == 0.25
    assert {"score", "score_sage_logit", "score_loss"} <= set(found)
    # One pair has no pass rate, so difficulty is minus the reference's mean margin.
    difficulty = -(reference[:, 0, 0] / tokens[:, 0] - reference[:, 1, 0] / tokens[:, 1])
    stratum = found["stratum"]
    assert np.bincount(stratum).tolist() == [15, 15, 15, 15]
    assert all(difficulty[stratum == k].max() <= difficulty[stratum == k + 1].min() for k in range(3))


@slow
def test_margins_of_a_file_in_another_order(runs, tiny_model, tmp_path):
    """Protects from other rows' margins: without a column of ids, a pair's id is its row's number."""
    from transformers import AutoTokenizer

    rows = [{k: v for k, v in row.items() if k != "pair_id"} for row in rows_with_gaps()][::-1]
    reversed_pairs = tokenize_pairs(
        read_pair_set(str(write_jsonl(tmp_path / "reversed.jsonl", rows[:40]))),
        AutoTokenizer.from_pretrained(tiny_model),
        chat=ChatFormat(),
        max_length=200,
        num_proc=1,
        cache_dir=str(tmp_path / "cache"),
    )
    expected = table_of(runs / "pair")["margin"][::-1][:40]
    found = read_margins(str(runs / "pair" / "scores"), reversed_pairs)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert len({*expected}) > 30


@slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_equal_one(runs, stage):
    """With whole and with sharded weights."""
    one, two = table_of(runs / "plain"), table_of(runs / f"two{stage}")
    for name, values in one.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            assert two[name].tolist() == values.tolist()


def files(run: Path) -> dict[str, bytes]:
    """Everything but the worker's lock."""
    found = (p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(run)): p.read_bytes() for p in found}


@slow
def test_a_killed_run_goes_on_and_leaves_the_same_files(runs, common, tmp_path):
    """Protects whole shards: a resume keeps what a kill -9 left, and ends with equal files, byte for byte."""
    run = freeze(tmp_path / "run", *common, *IN_SINGLES, command="score-dataset")
    worker = Started(be_worker, run)
    deadline = time.monotonic() + 120
    while not (run / "forward" / "00004.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.end()[0] == -signal.SIGKILL
    left = sorted((run / "forward").glob("*.parquet"))
    assert 5 <= len(left) < 60 and not (run / "scores").exists()
    damaged = left[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 1
    damaged.write_bytes(content)

    status, said = Started(be_worker, run).end()
    assert status == 0, said
    assert f"{damaged} is damaged, so it is made again" in said
    done = int(re.findall(r"pairs: (\d+)\n", said)[0])
    assert 61 - len(left) <= done <= 62 - len(left)  # the last file may have been without its checksum
    told = {"config.yaml", "summary.json"}  # they tell the time and the folder
    ours, theirs = files(run), files(runs / "undisturbed")
    assert set(ours) == set(theirs) and len(ours) == 64 and not (run / "forward").exists()
    assert all(ours[name] == theirs[name] for name in set(ours) - told)


def test_top_takes_no_rows_of_a_source_that_has_changed(common, tmp_path):
    """Protects from rows that were never scored: a pair_id may be no more than a row's number."""
    file = write_jsonl(tmp_path / "pairs.jsonl", rows_with_gaps())
    cfg = config.load(freeze_scoring(tmp_path / "run", *common, f"data.path={file}", "top=0.3"))
    assert isinstance(cfg, config.ScoreConfig)
    source = load_data(cfg.data, cfg.cache_dir)
    ids = source.pairs["pair_id"][:2]
    assert len(write_top(cfg, tmp_path, source.content, ids).read_text().splitlines()) == 2
    write_jsonl(file, rows_with_gaps()[::-1])
    with pytest.raises(UserError, match=r"pairs\.jsonl was changed while its pairs were scored.* top=0\.3"):
        write_top(cfg, tmp_path, source.content, ids)


@slow
def test_top_holds_the_highest_rows_as_they_were(runs, common):
    """Protects the filter: the 30% of lines with the highest scores, unchanged and in order. They train."""
    lines = Path(common[2].split("=")[1]).read_text().splitlines()
    top = (runs / "plain" / "top.jsonl").read_text().splitlines()
    assert len(top) == 18 and top == [line for line in lines if line in set(top)]
    found = table_of(runs / "plain")
    best = set(found["pair_id"][np.argsort(-found["score"])[:18]])
    assert {json.loads(line)["pair_id"] for line in top} == best
    assert len(metrics(runs / "on_top")) == 1


@slow
def test_training_takes_the_reference_from_the_scores(runs):
    """Protects data.scores: step 0 is ln 2, losses equal those of the cache, and no reference pass runs."""
    losses = column(runs / "trained", "loss")
    assert abs(losses[0] - math.log(2)) < 1e-6
    assert largest_difference(losses, column(runs / "cached", "loss")) < 1e-6
    assert not (runs / "cache" / "reference").exists()


@slow
def test_the_first_choice_by_scores_costs_nothing(runs):
    """A scorer at the logits ranks the first candidates from the file, without a forward pass."""
    scored, cached = metrics(runs / "selected"), metrics(runs / "selected_cached")
    assert [line["cost/forward_pairs"] for line in scored] == [0, 16, 32]
    assert [line["cost/forward_pairs"] for line in cached] == [16, 32, 48]
    assert largest_difference(*(column(runs / n, "loss") for n in ("selected", "selected_cached"))) < 1e-5


@slow
@pytest.mark.parametrize(
    "name, parts",
    [
        ("other_model", ("data.scores", "another model", "weights")),
        ("other_pairs", ("data.scores", "other pairs", "60", "50")),
        ("nothing_there", ("data.scores", "nowhere", "score-dataset")),
        ("no_reference", ("data.scores", "needs no reference")),
        ("uniform", ("scorer._target_=sage.scorers.Uniform", "does not score pairs")),
        (
            "gate",
            (
                "scorer._target_",
                "RandomFromPool",
                "it excludes candidates in training and does not rank them",
            ),
        ),
        (
            "constant",
            ("scorers.easy._target_", "gives every pair the same score", "scorers.easy.margin=policy_mean"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(runs, name, parts):
    message = (runs / name / ERROR_FILE).read_text()
    assert all(part in message for part in parts), message


def test_a_folder_begun_with_something_else_is_refused(tmp_path):
    """Protects a resumed run from a model, pairs or settings that changed under it."""
    manifest = {"pairs": {"count": 60}, "policy": {"weights": "a"}}
    file = tmp_path / "manifest.json"
    claim(file, manifest)
    claim(file, manifest)
    with pytest.raises(UserError, match=r"another policy.*hydra\.run\.dir"):
        claim(file, {**manifest, "policy": {"weights": "b"}})
    file.write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        claim(file, manifest)


@slow
def test_shards_of_two_runs_are_not_mixed(runs, pairs, tmp_path):
    """Protects training from a folder with files of another run, or with one missing."""
    from sage.model.reference import Scored

    key = json.loads((runs / "plain" / "manifest.json").read_text())["reference"]
    key.pop("path")
    assert Scored(str(runs / "plain"), pairs, key).logps.chosen.shape == (60,)
    mixed = shutil.copytree(runs / "plain", tmp_path / "mixed")
    shutil.copy(runs / "pair" / "scores" / "00000.parquet", mixed / "scores")
    short = shutil.copytree(runs / "plain", tmp_path / "short")
    (short / "scores" / "00000.parquet").unlink()
    for run in (mixed, short):
        with pytest.raises(UserError, match="not those of one"):
            Scored(str(run), pairs, key)
    renamed = shutil.copytree(runs / "plain", tmp_path / "renamed")
    (renamed / "scores" / "00000.parquet").rename(renamed / "scores" / "99999.parquet")
    with pytest.raises(UserError, match="another order"):
        Scored(str(renamed), pairs, key)


def test_keys_that_do_not_fit_are_refused(common, tmp_path):
    for overrides, match in ((["data.scores=x"], "leave it out"), (["top=1.5"], "top=1.5")):
        with pytest.raises(UserError, match=match):
            freeze_scoring(tmp_path, *common, *overrides)
    with pytest.raises(UserError, match="reference=cached"):
        freeze(tmp_path, *common, "steps=1", "data.scores=x", "reference=online")


@pytest.mark.parametrize("form", ["lines.jsonl", "array.json", "table.parquet", "folder"])
def test_write_rows_keeps_format_and_columns(tmp_path, form):
    """Rows 2 and 5 of any source, unchanged: extra columns too, and the last line without its end."""
    rows = [{**row, "extra": {"n": i}} for i, row in enumerate(make_pairs(5))]
    source = tmp_path / form
    if form == "lines.jsonl":
        source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    elif form == "array.json":
        source.write_text(json.dumps(rows))
    elif form == "table.parquet":
        datasets.Dataset.from_list(rows).to_parquet(source)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(source))
    target = write_rows(str(source), [5, 2], tmp_path / "top")
    assert target.name == "top" + source.suffix
    assert write_rows(str(source), [5, 2], tmp_path / "top") == target  # again, over the first
    kept = [rows[1], rows[4]]
    if form == "lines.jsonl":
        assert target.read_text() == "\n".join(map(json.dumps, kept))
    elif form == "array.json":
        assert json.loads(target.read_text()) == kept
    elif form == "table.parquet":
        assert pq.read_table(target).to_pylist() == kept
    else:
        assert datasets.load_from_disk(str(target)).to_list() == kept  # pyright: ignore
    assert read_pair_set(str(target)).pairs["pair_id"] == ["p1", "p4"]


@slow
def test_the_summary_shows_quantiles_a_histogram_and_extremes(runs):
    """Protects the summary: a row per stratum and one for all, bars that count all pairs, and extremes."""
    from sage.commands.score_dataset import show
    from sage.config import ScoreConfig

    table = pq.read_table(runs / "plain" / "scores")
    scores = table["score"].to_numpy().copy()
    scores[0] = np.nan
    with console.capture() as capture:
        show(ScoreConfig(show=2), table, scores, {"pairs": 60})
    out = capture.get()
    assert (
        "policy and reference are the same model" in out
        and "1 pairs have no finite score, for example p0" in out
    )
    assert (
        sum(
            int(line.split()[-1])
            for line in out.splitlines()
            if line[:10].strip().replace(".", "").replace("-", "").isdigit()
        )
        == 59
    )
    order = table["pair_id"].take(np.argsort(-scores)[:59]).to_pylist()
    assert all(name in out for name in (*order[:2], *order[-2:]))


# --- training with another model as the reference


@slow
def test_another_model_is_the_reference_of_training(runs):
    """Before the first step the loss is that of score-dataset's margins, and every way to the reference gives
    the same run."""
    u = table_of(runs / "pair")["margin"].astype(np.float64)
    expected = np.log1p(np.exp(-u)).mean()
    assert abs(expected - math.log(2)) > 1e-3
    for name in ("moved", "moved_selected", "moved_online", "moved_scored", "moved_lora", "moved3"):
        first = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[0])
        assert abs(first["eval/loss"] - expected) < 1e-5, name
    for name in ("moved_online", "moved_scored", "moved3"):
        assert largest_difference(column(runs / name, "loss"), column(runs / "moved", "loss")) < 1e-5, name
    assert abs(column(runs / "moved", "loss")[0] - math.log(2)) > 1e-4


@slow
def test_the_policy_may_be_named_as_its_own_reference(runs):
    assert column(runs / "itself", "loss") == column(runs / "cached", "loss")


@slow
def test_a_loss_without_reference_takes_none(runs):
    assert "needs no reference" in (runs / "moved_free" / ERROR_FILE).read_text()


def test_a_reference_that_is_not_there_is_refused(train, tmp_path):
    refused(train(f"reference_model={tmp_path / 'nowhere'}"), "reference_model=", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(train(f"reference_model={tmp_path / 'empty'}"), "reference_model=", "has no weights")
