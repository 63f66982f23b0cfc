"""The signal-to-noise ratio of updates: the estimator against closed forms, and no effect on training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pairs, write_jsonl
from many_runs import ERROR_FILE, column, execute, freeze, largest_difference

from sage.curriculum import Shuffled
from sage.data.chat import ChatFormat
from sage.data.pairs import read_pair_set
from sage.data.tokens import tokenize_pairs
from sage.scorers import PairStats, Scorer
from sage.training import snr
from sage.training.tracking import METRICS_FILE
from sage.util.errors import UserError

BATCH, BUDGET = 20, 520
slow = pytest.mark.slow


@dataclass
class Longest(Scorer):
    """A scorer that selects: the pairs whose chosen responses are longest."""

    candidates_per_pair: float = 2.0

    def __call__(self, stats: PairStats) -> torch.Tensor:
        return stats.policy.chosen_tokens


def test_estimate_of_a_linear_regression():
    """Protects unbiasedness with micro-batches of unequal size, on a linear regression.

    For y = x.w* + e, x ~ N(0, I) and the loss (x.w - y)^2 / 2, the gradient has mean w - w* =: d. Its
    covariance has the trace (n + 1)|d|^2 + n Var e. Every draw is one batch.
    """
    torch.manual_seed(0)
    n, sizes, draws, sigma = 5, (1, 2, 5, 12), 1500, 0.7
    true, model = torch.randn(n), torch.nn.Linear(n, 1, bias=False)
    d = model.weight.detach()[0] - true
    found = []
    for _ in range(draws):
        sum_of_squares, total = 0.0, torch.zeros(n)
        for size in sizes:
            x = torch.randn(size, n)
            y = x @ true + sigma * torch.randn(size)
            losses = (model(x)[:, 0] - y) ** 2 / 2
            gradients = torch.autograd.grad(losses.mean(), [*model.parameters()])
            sum_of_squares += size * float(snr.squared_norm(gradients))
            total += size * gradients[0][0]
        pairs = sum(sizes)
        found.append(
            snr.estimate(pairs, len(sizes), sum_of_squares, float(snr.squared_norm([total])) / pairs**2)
        )
    expected = float(d @ d), float((n + 1) * d @ d + n * sigma**2)
    for values, truth in zip(np.array(found).T, expected, strict=True):
        error = values.std(ddof=1) / draws**0.5
        assert abs(values.mean() - truth) < 3 * error and error < 0.1 * truth


def groups_estimate(gradients: np.ndarray, groups: list[np.ndarray]) -> snr.Moments:
    """The textbook form, from per-pair gradients [B, n]: both means of squares written out."""
    means = np.array([gradients[g].mean(0) for g in groups])
    sizes = np.array([len(g) for g in groups])
    mean = (sizes[:, None] * means).sum(0) / sizes.sum()
    noise = (sizes * ((means - mean) ** 2).sum(1)).sum() / (len(groups) - 1)
    return snr.Moments((mean**2).sum() - noise / sizes.sum(), noise)


def test_random_groups_tell_the_truth_where_groups_by_length_do_not():
    """Protects the reason for the second backward.

    If gradients follow length, micro-batches sorted by length overstate the noise several times. Random
    groups give the batch's own sample covariance on average.
    """
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(20, 200, 32))
    gradients = lengths[:, None] / 100 + 0.1 * rng.standard_normal((32, 3))
    truth = gradients.var(0, ddof=1).sum()
    found = [groups_estimate(gradients, snr.cut(np.arange(32), 4, rng)).noise for _ in range(2000)]
    error = np.std(found, ddof=1) / 2000**0.5
    assert abs(np.mean(found) - truth) < 3 * error and error < 0.02 * truth
    assert groups_estimate(gradients, np.array_split(np.arange(32), 8)).noise > 3 * truth


def test_groups_hold_every_pair_once_within_their_bound():
    indices = np.arange(100, 137)
    for most, groups in ((50, snr.MIN_GROUPS), (3, 13), (1, 37)):
        cut = snr.cut(indices, most, np.random.default_rng(0))
        assert len(cut) == groups and max(map(len, cut)) <= max(most, 5)
        assert sorted(np.concatenate(cut)) == indices.tolist()
    assert len(snr.cut(indices[:3], 50, np.random.default_rng(0))) == 3


def test_what_cannot_be_measured_is_refused(tmp_path, tiny_model, pair_file):
    """One group shows no noise, a stage holds no whole gradient: said before a model is loaded."""
    with pytest.raises(ValueError, match="single group"):
        snr.estimate(pairs=5, groups=1, sum_of_squares=1.0, squared_mean=1.0)
    common = [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={pair_file}",
        "data.max_length=130",
        "steps=1",
        "tracking.snr_every=1",
        "+baseline=dpo",
    ]
    for overrides, match in (
        (["batch_size=1"], "a batch of one pair has no noise"),
        (["engine=zero3"], "zero_stage=3"),
    ):
        with pytest.raises(UserError, match=match):
            freeze(tmp_path / "run", *common, *overrides)


def test_no_noise_gives_no_quotient():
    assert np.isnan(snr.Moments(signal=1.0, noise=0.0).snr(pairs=8))
    assert snr.Moments(signal=-0.5, noise=2.0).snr(pairs=8) == -2.0


@pytest.fixture(scope="session")
def common(tiny_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("snr")
    return [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', make_pairs(60))}",
        "data.max_length=130",
        f"micro_batch_tokens={BUDGET}",
        "steps=2",
        f"batch_size={BATCH}",
        "optimizer.lr=1e-3",
        f"cache_dir={folder / 'cache'}",
        "model.dtype=float32",
        "+baseline=dpo",
    ]


SETUPS = {
    "zero0": ["engine=zero0"],
    "zero1": ["engine=zero1"],
    "zero2": ["engine=zero2"],
    "bf16": ["engine=zero2", "model.dtype=bfloat16"],
    "dropout": ["+model/lora=default", "model.lora.dropout=0.2", "model.gradient_checkpointing=true"],
    "selecting": ["scorer._target_=test_snr.Longest"],
}
each_setup = pytest.mark.parametrize("name", SETUPS)


@pytest.fixture(scope="session")
def runs(common, tmp_path_factory) -> Path:
    """Every setup on one rank, and ZeRO 2 with selection on two, each with and without measurements."""
    root = tmp_path_factory.mktemp("runs")
    one = [
        freeze(root / f"{name}_{every}", *common, *overrides, f"tracking.snr_every={every}")
        for name, overrides in SETUPS.items()
        for every in (0, 1)
    ]
    both = [*SETUPS["zero2"], *SETUPS["selecting"], "world_size=2"]
    two = [freeze(root / f"two_{every}", *common, *both, f"tracking.snr_every={every}") for every in (0, 1)]
    execute(1, one)
    execute(2, two)
    failed = {p.parent.name: p.read_text() for p in root.glob(f"*/{ERROR_FILE}")}
    assert not failed
    return root


def measurements(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if "snr/selected_noise" in line]


@slow
@pytest.mark.parametrize("name", [*SETUPS, "two"])
def test_measuring_changes_no_bit_of_training(runs, name):
    """Protects training from the measurement: gradients, random numbers, hooks of DeepSpeed, costs."""
    off, on = runs / f"{name}_0", runs / f"{name}_1"
    for metric in ("loss", "grad_norm", "logps/chosen", "cost/forward_pairs", "cost/backward_pairs"):
        assert column(on, metric) == column(off, metric)
    assert [line["step"] for line in measurements(on)] == [1, 2] and not measurements(off)


@slow
def test_equals_per_pair_gradients(runs, common, tiny_model):
    """Protects the whole measurement: compares the first step with gradients of single pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    pairs = tokenize_pairs(
        read_pair_set(common[2].split("=")[1]),
        AutoTokenizer.from_pretrained(tiny_model),
        chat=ChatFormat(),
        max_length=130,
        num_proc=1,
        cache_dir=common[8].split("=")[1],
    )

    def gradient(i: int) -> np.ndarray:
        """Policy and reference are one, so u = 0 and the gradient is -beta/2 times that of the margin."""
        margin = torch.tensor(0.0)
        for response, sign in ((pairs[i].chosen_ids, 1), (pairs[i].rejected_ids, -1)):
            logits = model(torch.tensor([pairs[i].prompt_ids + response])).logits[
                0, len(pairs[i].prompt_ids) - 1 : -1
            ]
            margin = margin + sign * logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        gradients = torch.autograd.grad(-0.05 * margin, [*model.parameters()])
        return torch.cat([g.flatten() for g in gradients]).double().numpy()

    chosen = Shuffled(len(pairs), seed=0).draw(BATCH)
    gradients = np.zeros((len(pairs), sum(p.numel() for p in model.parameters())))
    gradients[chosen] = [gradient(i) for i in chosen]
    line = measurements(runs / "zero0_1")[0]
    groups = snr.cut(chosen, BATCH, np.random.default_rng((0, 0)))
    assert {len(g) for g in groups} == {2, 3}
    expected = groups_estimate(gradients, groups)
    assert line["snr/selected_noise"] == pytest.approx(expected.noise, rel=1e-4)
    assert line["snr/selected_signal"] == pytest.approx(expected.signal, rel=1e-4)
    assert line["snr/selected"] == pytest.approx(BATCH * expected.signal / expected.noise, rel=1e-4)
    assert line["snr/uniform"] == line["snr/selected"] and line["snr/ratio"] == 1.0
    assert line["cost/snr_pairs"] == BATCH


@slow
def test_selection_is_compared_with_chance(runs):
    """With selection the uniform batch is another one, drawn alike on one rank and on two, and paid for."""
    one, two = measurements(runs / "selecting_1"), measurements(runs / "two_1")
    assert [line["cost/snr_pairs"] for line in one] == [2 * BATCH, 4 * BATCH]
    for a, b in zip(one, two, strict=True):
        assert a["snr/selected_noise"] != a["snr/uniform_noise"]
        if "snr/ratio" in a:
            assert a["snr/ratio"] == pytest.approx(a["snr/selected"] / a["snr/uniform"])
        for name in ("snr/selected", "snr/uniform"):
            assert largest_difference([a[name]], [b[name]]) < 1e-3 * abs(a[name])
