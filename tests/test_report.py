"""`sage report`: its numbers are those of the runs, its page opens anywhere, and no run is too odd for it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_pairs, write_jsonl
from many_runs import freeze
from scipy import stats

from sage.commands import report
from sage.config import load
from sage.data.pairs import read_pair_set
from sage.reporting.choices import ranking_margin
from sage.reporting.compare import comparison, value_at_end
from sage.reporting.groups import Group, best, group, interval, mean_curve, reach, thin
from sage.reporting.page import strata
from sage.reporting.runs import Run, Series, find, read_metrics
from sage.training.hooks import Hook
from sage.training.pair_log import CONTENT_KEY
from sage.util.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STEPS, BATCH = 20, 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_pairs(30))


def write_run(folder: Path, pairs: Path, *overrides: str, steps: int = STEPS, finished: bool = True) -> Path:
    """A run directory with the files that a real run leaves; its numbers are drawn from its seed."""
    base = ["+baseline=dpo", "model=hf", "model.path=nowhere", f"data.path={pairs}", "steps=20"]
    base += [f"batch_size={BATCH}"]
    freeze(folder, *base, *overrides)
    seed = int(next((o.split("=")[1] for o in overrides if o.startswith("seed=")), 0))
    scored = "scorer=sage" in overrides
    rng = np.random.default_rng((seed, scored))
    lines: list[dict] = [{"step": 0, "eval/loss": 0.7, "eval/policy_accuracies": 0.5}]
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": 0.7 - 0.01 * step + 0.02 * rng.random(),
                "rewards/margins": 0.1 * step * rng.random(),
                "cost/forward_pairs": 3.0 * BATCH * step if scored else 0.0,
                "cost/backward_pairs": float(BATCH * step),
                "time/seconds": 0.5 * step,
                "time/step_seconds": 0.5,
            }
        )
        if step % 5 == 0:
            accuracy = 0.5 + 0.01 * step + 0.05 * rng.random() + 0.1 * scored
            lines.append({"step": step, "eval/loss": 0.6, "eval/policy_accuracies": accuracy})
            lines.append(
                {
                    "step": step,
                    "benchmark/sums/accuracy": accuracy / 2,
                    "benchmark/sums/low": accuracy / 2 - 0.1,
                    "benchmark/sums/high": accuracy / 2 + 0.1,
                }
            )
    write_jsonl(folder / "metrics.jsonl", lines)
    if scored:
        write_samples(folder / "samples", rng, steps, read_pair_set(str(pairs)).content)
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def write_samples(folder: Path, rng: np.random.Generator, steps: int, content: str) -> None:
    rows = []
    for step in range(1, steps + 1):
        margins = rng.normal(size=12)
        best = np.argsort(margins)[:BATCH]
        for i, pair in enumerate(rng.permutation(30)[:12].tolist()):
            rows.append(
                {
                    "step": step,
                    "pair_id": f"p{pair}",
                    "stratum": pair % 4,
                    "margin": margins[i],
                    "policy_mean": margins[i],
                    "signal": 0.1,
                    "curvature": 0.1,
                    "score": -margins[i],
                    "ranked_by": "policy_mean",
                    "selected": bool(i in best),
                }
            )
    folder.mkdir()
    table = pa.Table.from_pylist(rows).replace_schema_metadata({CONTENT_KEY: content})
    pq.write_table(table, folder / "00000001.parquet")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, pairs) -> Path:
    """Two settings on three seeds, as `-m` lays them out."""
    folder = tmp_path_factory.mktemp("sweep")
    for number in range(6):
        setting = ["scorer=sage"] if number % 2 else []
        write_run(folder / str(number), pairs, f"seed={number // 2}", *setting)
    return folder


@pytest.fixture(scope="module")
def made(sweep) -> Path:
    report.report([str(sweep)])
    return sweep


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def logged(run: Path, metric: str) -> dict[int, float]:
    """Independent of the product's reader."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[metric] for row in rows if metric in row}


def test_numbers_equal_those_of_metrics_jsonl(made):
    """Protects the reader from numbers that no run wrote: ends, bests, intervals, differences, costs."""
    metric = "benchmark/sums/accuracy"
    finals = {n: logged(made / str(n), metric)[STEPS] for n in range(6)}
    bests = {n: max(logged(made / str(n), metric).values()) for n in range(6)}
    runs = rows_of(made / "report_tables" / "runs.csv")
    assert len(runs) == 6
    for row in runs:
        n = int(row["run"])
        assert (int(row["seed"]), row["setting"]) == (n // 2, "B" if n % 2 else "A")
        assert float(row[metric]) == finals[n] and float(row[f"best {metric}"]) == bests[n]
        assert float(row["trained pairs"]) == BATCH * STEPS and float(row["seconds"]) == 0.5 * STEPS
        assert float(row["cost"]) == 3 * BATCH * STEPS + (3 * BATCH * STEPS if n % 2 else 0)
    uniform, sage = rows_of(made / "report_tables" / "comparison.csv")
    values = np.array([finals[1], finals[3], finals[5]])
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3)
    assert float(sage["final"]) == pytest.approx(values.mean())
    assert float(sage["final low"]) == pytest.approx(values.mean() - half)
    differences = values - np.array([finals[0], finals[2], finals[4]])
    assert float(sage["final - first setting's"]) == pytest.approx(differences.mean())
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert float(sage["final - first setting's high"]) == pytest.approx(differences.mean() + half)
    target = np.mean([bests[0], bests[2], bests[4]])
    column = next(name for name in sage if name.startswith("cost to") and len(name.split()) == 4)
    assert f"{target:.4g}" in column
    reached = [
        min(s for s, v in logged(made / str(n), metric).items() if v >= target) * BATCH * 6 for n in (1, 3, 5)
    ]
    assert float(sage[column]) == pytest.approx(np.mean(reached))
    assert uniform["final - first setting's"] == "baseline"


def test_every_logged_value_is_in_the_csv(made):
    rows = rows_of(made / "report_tables" / "metrics.csv")
    run = str(made / "3")
    found = {
        int(float(r["step"])): float(r["value"]) for r in rows if r["run"] == run and r["metric"] == "loss"
    }
    assert found == logged(made / "3", "loss")


def test_page_stands_alone_and_shows_the_extremes(made):
    """Protects a page that is mailed around: nothing in it is fetched, and it names the pairs it talks of."""
    html = (made / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", html) and "@import" not in html
    assert "Confident errors" in html and "pairs selected most often" in html
    assert ">Ann has" in html and "texts are left out" not in html  # the text of a pair, as it is
    assert html.count("<svg") > 30
    assert r"\begin{tabular}" in html and "| setting |" in html


def test_the_margin_that_the_scorer_ranked_by():
    """Protects the kinds of pairs from the margin of another quantity, such as one that is 0 at first."""
    ranked_by = ["implicit_reward", "policy_mean", "mixed", "reference_mean", "margins_from", None]
    numbers = {"margin": [1.0] * 6, "policy_mean": [10.0] * 6, "score": [-5.0] * 6}
    table = pa.table({"ranked_by": ranked_by, **numbers})
    assert ranking_margin(table).tolist() == [1, 10, 11, 5, 5, 1]


def test_texts_of_a_source_that_changed_are_left_out(tmp_path):
    """Protects from texts of other rows: a row number names another pair in the changed file."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in make_pairs(30)]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    write_run(tmp_path / "run", source, "scorer=sage")
    write_jsonl(source, rows[::-1])
    report.report([str(tmp_path / "run")])
    html = (tmp_path / "run" / "report.html").read_text()
    assert "Ann has" not in html and "their texts are left out" in html


def test_less_is_better_where_the_run_selects_by_less(tmp_path):
    """Protects a hook's metric whose name does not say it, such as a perplexity."""
    series = Series(np.array([0, 1, 2]), np.array([9.0, 4.0, 7.0]))
    for select, value, step, reached in (("-ood/perplexity", 4.0, 1, 1), (None, 9.0, 0, 0)):
        metrics = {"ood/perplexity": series, "loss": Series(np.array([1, 2]), np.ones(2))}
        config = {"seed": 0, "select": select}
        run = Run(tmp_path, config, metrics, None, "finished")
        assert best(run, "ood/perplexity") == (value, step)
        assert reach(run, "ood/perplexity", 8.0, "step") == reached
        title = comparison([Group("A", "", [run])], "ood/perplexity", 8.0).header[5]
        assert ("<=" in title) == (select is not None)


def test_groups_are_named_by_what_differs(sweep):
    runs, *_ = find([str(sweep)])
    labels = [g.label for g in group(runs)]
    assert labels == ["scorer=Uniform", "scorer=Sage"]
    assert [sorted(r.seed for r in g.runs) for g in group(runs)] == [[0, 1, 2], [0, 1, 2]]


def test_odd_runs_give_a_report(tmp_path, pairs):
    """Interrupted, one step, no evaluation, NaN, a torn last line, no metrics at all."""
    one = write_run(tmp_path / "one", pairs, "seed=0", steps=1, finished=False)
    torn = write_run(tmp_path / "torn", pairs, "seed=1")
    with (torn / "metrics.jsonl").open("a") as f:
        f.write('{"step": 21, "loss": NaN}\n{"step": 22, "lo')
    bare = freeze(tmp_path / "bare", "model=hf", "model.path=x", f"data.path={pairs}", "steps=3", "seed=2")
    nans = write_run(tmp_path / "nans", pairs, "seed=3", "loss.beta=0.5")
    lines = [json.loads(line) for line in (nans / "metrics.jsonl").read_text().splitlines()]
    write_jsonl(nans / "metrics.jsonl", [{**line, "loss": math.nan} for line in lines])
    for folder in (one, torn, bare, nans, tmp_path):
        report.report([str(folder), "--output", str(tmp_path / "out")])
    html = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 4 runs have no values yet: " in html and "1 of 4 runs: interrupted" in html
    assert "1 lines of metrics could not be read" in html
    assert "not finite in places" in html


def test_a_run_that_died_before_its_first_evaluation_has_no_end(tmp_path, pairs):
    """The evaluation of the untrained policy is not what its steps came to."""
    run = write_run(tmp_path / "died", pairs, "seed=0", finished=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metric = "eval/policy_accuracies"
    kept = [line for line in lines if metric not in line or line["step"] == 0]
    write_jsonl(run / "metrics.jsonl", kept)
    (found,) = find([str(run)])[0]
    assert found.metrics[metric].steps.tolist() == [0] and found.steps > 0
    assert math.isnan(value_at_end(found, metric))


def test_hooks_and_warnings_are_on_the_page(tmp_path, monkeypatch, pairs):
    """A hook's own numbers and tables are shown, and what makes a number less than a test is said."""
    overrides = ["+benchmark=gsm8k", "eval_every=5", "select=benchmark/gsm8k/accuracy", "patience=1"]
    folder = write_run(tmp_path / "run", pairs, "seed=0", *overrides, steps=15)
    with (folder / "metrics.jsonl").open("a") as f:
        ours = '"rewards/chosen": 1, "sources/a/share": 1'
        f.writelines(f'{{"step": {step}, "mine/heads": {step}, {ours}}}\n' for step in range(15))
    run = SimpleNamespace(run_dir=folder)
    Hook().write_table(run, "heads", ["layer", "share"], [[0, 0.25], ["<b>, last", 0.5]])  # pyright: ignore
    monkeypatch.setenv("RANK", "1")
    Hook().write_table(run, "others", ["layer"], [])  # pyright: ignore
    report.report([str(folder)])
    html = (folder / "report.html").read_text()
    before, of_hooks = html.split("Metrics of hooks")
    assert "mine/heads" in of_hooks and "rewards/chosen" not in of_hooks and "sources/a" not in of_hooks
    assert "rewards/chosen" in before and "sources/a/share" in before
    assert "<td>&lt;b&gt;, last</td><td>0.5</td>" in html and "others" not in html
    assert "selected by test problems (benchmark/gsm8k/accuracy)" in html
    assert "1 of 1 runs ended early: run after step 15" in html


def test_what_makes_a_mean_too_good_is_said(tmp_path, pairs, capsys):
    """Protects against a copied run that counts as a seed, and a diverged seed that a mean leaves out."""
    run = write_run(tmp_path / "runs" / "a", pairs, "seed=3")
    shutil.copytree(run, tmp_path / "runs" / "copy")
    diverged = write_run(tmp_path / "runs" / "b", pairs, "seed=4")
    with (diverged / "metrics.jsonl").open("a") as f:
        f.write('{"step": 20, "benchmark/sums/accuracy": NaN}\n')
    report.report([str(tmp_path / "runs")])
    page, shown = (tmp_path / "runs" / "report.html").read_text(), " ".join(capsys.readouterr().out.split())
    for text in ("setting A has more than one run with seed 3", "is not finite at the end of 1 of 3 runs"):
        assert text in page and text in shown


def test_many_strata_are_drawn_in_their_order(tmp_path, pairs, monkeypatch):
    run = write_run(tmp_path / "run", pairs)
    row = {f"curriculum/competence_{k}": k / 12 for k in range(12)}
    write_jsonl(run / "metrics.jsonl", [{"step": step, **row} for step in (1, 2)])
    monkeypatch.setattr("sage.reporting.pictures.lines", lambda _title, curves, _axis: curves)
    curves: Any = strata(find([str(run)])[0][0], "competence")
    assert [curve.y[0] for curve in curves] == [k / 12 for k in range(12)]


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_summary_is_refused_by_name(tmp_path, pairs, content):
    run = write_run(tmp_path / "run", pairs)
    (run / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json is .*; delete it"):
        report.report([str(run)])


def test_what_is_no_run_is_refused(tmp_path, made):
    with pytest.raises(UserError, match="no run here"):
        report.report([str(tmp_path)])
    with pytest.raises(UserError, match=r"no run logged it; there are: .*eval/loss"):
        report.report([str(made), "--metric", "eval/accuracy"])
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is not a config that sage wrote"):
        report.report([str(tmp_path)])


def test_runs_of_another_version_are_reported_and_not_resumed(tmp_path, pairs):
    """Protects results from an upgrade that renames or removes keys."""
    run = write_run(tmp_path / "run", pairs)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "gone: 1\n")
    report.report([str(run)])
    assert (run / "report.html").is_file()
    with pytest.raises(UserError, match=r"does not have the keys of this version of sage: .*gone"):
        load(run)


def test_a_folder_of_another_command_is_passed_over_with_a_note(tmp_path, pairs, made, capsys):
    """Protects `sage report outputs/*`, where the folder of a `sage inspect` may lie among the runs."""
    other = write_run(tmp_path / "inspect", pairs)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("command: train", "command: build-pairs"))
    with pytest.raises(UserError, match="inspect: no training run"):
        report.report([str(other)])
    report.report([str(made), str(other), "--output", str(tmp_path / "out")])
    assert f"note: {other} holds no training run" in capsys.readouterr().out.replace("\n", "")


def test_intervals_and_curves_by_hand():
    assert interval([1.0, math.nan, 3.0])[:1] == (2.0,) and interval([math.nan]).n == 0
    assert interval([1.0, 3.0]).high == pytest.approx(2 + 12.706204736 * math.sqrt(2) / math.sqrt(2))
    x, y = thin(np.arange(1001.0), np.arange(1001.0) * 2, 100)
    assert len(x) == 100 and (x[0], x[-1]) == (0, 1000) and np.allclose(y, 2 * x)


def test_a_curve_covers_only_what_all_seeds_cover(tmp_path, pairs):
    """Protects a mean from jumping where one seed's run ends."""
    write_run(tmp_path / "a", pairs, "seed=0", steps=20)
    write_run(tmp_path / "b", pairs, "seed=1", steps=10)
    runs, *_ = find([str(tmp_path)])
    curve = mean_curve(runs, "loss", "step", 100)
    assert curve is not None and curve[0].max() == 10


def test_large_files_are_read_quickly_enough_to_be_usable(tmp_path):
    """100,000 logged steps become a report's worth of numbers without losing the last one."""
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as f:
        f.writelines(f'{{"step": {i}, "loss": {i / 7}}}\n' for i in range(100_000))
    series, damaged = read_metrics(file)
    assert not damaged and len(series["loss"].steps) == 100_000
    assert series["loss"].values[-1] == 99_999 / 7


PROBE = """<script>
const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('pre')
  && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1).length;
const shown = [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 50).length;
document.documentElement.innerHTML = 'PROBE ' + JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth, wide, shown});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("size", ["1400,900", "500,900"])
def test_page_renders_without_overflow(made, tmp_path, size):
    """A real browser lays the page out: pictures have a size, and nothing sticks out at the side."""
    page = tmp_path / "probe.html"
    html = (made / "report.html").read_text().replace("sums", "a_benchmark_with_a_long_name")
    page.write_text(html.replace("</body>", PROBE + "</body>"))
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}/profile", f"--window-size={size}"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(re.search(r"PROBE (\{.*?\})", done.stdout)[1])  # pyright: ignore
    assert found["shown"] > 10
    assert found["wide"] == 0 and found["page"] <= found["window"]


@pytest.mark.slow
def test_from_the_command_line(made):
    sage = Path(sys.executable).with_name("sage")
    done = subprocess.run([sage, "report", str(made)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Comparison by benchmark/sums/accuracy" in done.stdout and "report.html" in done.stdout
