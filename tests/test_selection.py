"""Which pairs are trained on: scores against closed forms, the choice, and curricula on hand-made cases."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st

from sage import config
from sage.baseline_scorers import (
    BetaDPO,
    Easiest,
    LargestGradient,
    LargestLoss,
    MarginGap,
    MediumInfluence,
    RandomFromPool,
    Rho,
    SmallestGap,
)
from sage.curriculum import Curriculum, SageCurriculum, Setting, allot
from sage.data.tokens import TokenizedPairs
from sage.losses import DPO, SimPO
from sage.model.logps import LogitStats, PairLogps
from sage.model.reference import METADATA_KEY
from sage.order import Shuffled, order_by_difficulty, strata_by_difficulty
from sage.scorers import PairStats, Sage, SageLogit, Uniform, curvature, select, signal
from sage.static_curricula import EasyToHard, StaticFilter
from sage.training.metrics import PER_PAIR
from sage.training.pair_log import PairLog
from sage.training.selection import Selection, margins_of, read_margins
from sage.training.setup import build, build_curriculum, check_reference
from sage.util.errors import UserError

U = torch.linspace(-10, 10, 201)


def stats_of(u: torch.Tensor, beta: float = 0.1, d=2.0, uncertainty=3.0, tokens=10.0) -> PairStats:
    """Pairs of given u: the policy moved the chosen response alone; the reference is at 0."""
    zeros, lengths = torch.zeros_like(u), torch.full_like(u, tokens)
    policy = PairLogps(u / beta, zeros, lengths, lengths)
    logit = LogitStats(torch.full_like(u, d), *[torch.full_like(u, uncertainty)] * 2)
    return PairStats.of(DPO(beta=beta), policy, PairLogps(zeros, zeros, lengths, lengths), logit)


# --- scores


def test_signal_and_curvature_are_the_derivatives_of_the_loss():
    """Protects g and h: against autograd of -log sigmoid(beta m), in float64."""
    m = torch.linspace(-80, 80, 41, dtype=torch.float64, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(0.1 * m).sum()
    (first,) = torch.autograd.grad(loss, m, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), m)
    assert torch.allclose(signal(0.1 * m, 0.1), -first) and torch.allclose(curvature(0.1 * m, 0.1), second)
    decrement = signal(0.1 * m, 0.1) ** 2 / curvature(0.1 * m, 0.1)
    assert torch.allclose(decrement, torch.exp(-0.1 * m))


def test_every_margin_level_ratio_falls_in_the_margin():
    """The warning of the method: at margin level no ratio is more than a monotone function of the margin."""
    for damping in (1e-6, 0.25, 10.0):
        scores = Sage(damping=damping, margin="implicit_reward")(stats_of(U.double()))
        assert (scores.diff() < 0).all()


@pytest.mark.parametrize("k", [1, 7, 32, 96])
def test_sage_without_gates_under_hard_top_k_is_loss(k):
    """Documents an identity, so that nobody claims a difference: the same pairs, whatever the damping."""
    u = torch.randn(96, generator=torch.Generator().manual_seed(k)).double() * 4
    by_loss = select(LargestLoss()(stats_of(u)), k, seed=3)
    for damping in (1e-3, 0.25, 5.0):
        assert torch.equal(
            select(Sage(damping=damping, margin="implicit_reward")(stats_of(u)), k, seed=3),
            by_loss,
        )


def test_the_logit_level_is_not_monotone():
    """Signal per curvature at the logits peaks at an error. It is low for easy pairs and uncertain tokens."""
    scorer = SageLogit(per_token=False, damping=1e-3)
    scores = scorer(stats_of(U, beta=1.0))
    peak = int(scores.argmax())
    assert U[peak] < 0 and (scores[:peak].diff() >= 0).all() and (scores[peak:].diff() <= 0).all()
    sure, unsure = (scorer(stats_of(U, beta=1.0, uncertainty=x)) for x in (1.0, 5.0))
    assert (sure > unsure).all()
    naive = [(s := 1 / (1 + math.exp(u))) ** 2 * 2 / (s * (1 - s) * 2 + s * 6 + 1e-3) for u in U.tolist()]
    assert torch.allclose(scores, torch.tensor(naive), rtol=1e-4)


def test_per_token_changes_only_the_damping():
    without = [
        SageLogit(per_token=p, damping=0.0)(stats_of(U, d=4.0, tokens=t))
        for p, t in ((True, 5.0), (False, 5.0))
    ]
    assert torch.allclose(*without)


def test_known_scores():
    """Each baseline on three pairs whose numbers are worked out by hand: u = -1, 0, 2 at beta 0.5."""
    stats = stats_of(torch.tensor([-1.0, 0.0, 2.0]), beta=0.5, d=4.0)
    sigmoid = torch.tensor([0.7310586, 0.5, 0.1192029])  # of -u
    assert torch.allclose(LargestLoss()(stats), torch.tensor([1.3132617, 0.6931472, 0.1269280]))
    assert torch.allclose(LargestGradient()(stats), 2 * sigmoid)
    assert torch.allclose(Easiest()(stats), torch.tensor([-1.0, 0.0, 2.0]))
    assert torch.equal(RandomFromPool()(stats), torch.zeros(3))
    assert torch.allclose(SmallestGap()(stats), torch.tensor([-1.0, 0.0, -2.0]))
    stats.other_margin = torch.tensor([0.0, 3.0, 2.0])
    assert torch.allclose(MarginGap()(stats), torch.tensor([0.0, -3.0, -2.0]))
    assert torch.allclose(Rho(margins_from="x")(stats), torch.tensor([0.6201145, 0.6445599, 0.0]), atol=1e-6)
    # policy_mean: u / beta / 10 tokens = -0.2, 0, 0.4 nats per token; mixed adds u
    assert torch.allclose(stats.margin("policy_mean"), torch.tensor([-0.2, 0.0, 0.4]))
    assert torch.allclose(stats.margin("mixed"), torch.tensor([-1.2, 0.0, 2.4]))


def test_beta_dpo():
    """Compares with the authors' formulas: running mean and deviation from 0, Gaussian weights, and beta."""
    m = torch.tensor([-3.0, 0.0, 1.0, 6.0])
    stats, scorer = stats_of(0.1 * m), BetaDPO(candidates_per_pair=1.25)
    mean, std = 0.1 * 1.0, 0.1 * m.std().item()
    assert torch.allclose(scorer(stats), -0.5 * ((m - mean) / std) ** 2, rtol=1e-4)
    adapted = scorer.objective(DPO(beta=0.1), stats, torch.tensor([1, 2]))
    assert adapted.beta == pytest.approx(0.1 * (1 + 0.6 * (0.5 - mean)), rel=1e-4)
    other = BetaDPO()
    other.load_state_dict(scorer.state_dict())
    assert torch.equal(other(stats), scorer(stats))


def test_medium_influence_is_the_middle_of_two_rankings():
    """Against the rule of the paper, by sorting: neither the highest nor the lowest tenth of either."""
    rng = torch.Generator().manual_seed(0)
    u, other = torch.randn(200, generator=rng), torch.randn(200, generator=rng)
    stats = dataclasses.replace(stats_of(u), other_margin=other)
    scorer = MediumInfluence(margins_from="x")
    expected = set(range(200))
    for values in (u, np.log1p(np.exp(-u)) - np.log1p(np.exp(-other))):
        expected -= {*np.argsort(values)[:20].tolist(), *np.argsort(values)[-20:].tolist()}
    assert set(np.flatnonzero(scorer.admitted(stats)).tolist()) == expected
    assert 100 < len(expected) < 160 and not scorer(stats).any()
    tied = dataclasses.replace(stats_of(torch.zeros(9)), other_margin=torch.zeros(9))
    assert scorer.admitted(tied).all()
    tied.u[0], tied.other_margin[1] = torch.nan, torch.nan
    assert scorer(tied).isnan().tolist() == [True, True, *[False] * 7], "such a pair is not trained on"


# --- the choice


def test_ties_are_broken_by_the_seed_and_not_by_order():
    """Protects step 0, when all implicit rewards tie, from training on the first rows of the file."""
    picks = torch.cat([select(torch.zeros(100), 10, seed) for seed in range(200)])
    counts = torch.bincount(picks, minlength=100).float()
    assert counts.min() > 5 and abs(counts[:50].sum() / counts.sum() - 0.5) < 0.05
    assert torch.equal(select(torch.zeros(100), 10, 7), select(torch.zeros(100), 10, 7))


def test_gumbel_top_k_draws_by_weight():
    """The first of a draw has probability exp(score / temperature) / sum, here 1/2, 1/4, 1/4."""
    scores = torch.tensor([2.0, 1.0, 1.0]) * math.log(2) * 0.3
    drawn = torch.cat([select(scores, 1, seed, temperature=0.3) for seed in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.03)


def test_gates_come_before_scores_and_nan_never():
    """What is shut out is taken only to fill the batch; a NaN score is not taken at all."""
    scores = torch.tensor([5.0, 4.0, 3.0, float("nan"), 1.0])
    admitted = torch.tensor([False, True, True, True, True])
    assert select(scores, 3, 0, admitted=admitted).tolist() == [1, 2, 4]
    assert select(scores, 5, 0, admitted=admitted).tolist() == [0, 1, 2, 4]


def test_each_gate_shuts_out_what_its_name_says():
    stats = stats_of(torch.linspace(-5.03, 4.87, 100))
    assert stats.logit is not None
    stats.logit = stats.logit._replace(chosen_uncertainty=torch.arange(100.0))
    out = {
        gate: np.flatnonzero(~Sage(**{gate: value}).admitted(stats).numpy())
        for gate, value in {
            "mastered_above": 3.0,
            "drop_negative": 0.1,
            "drop_curvature": 0.2,
            "drop_uncertainty": 0.25,
        }.items()
    }
    assert out["mastered_above"].tolist() == list(range(81, 100))
    assert out["drop_negative"].tolist() == list(range(10))
    assert out["drop_curvature"].tolist() == list(range(41, 61))
    assert out["drop_uncertainty"].tolist() == list(range(75, 100))
    stats.policy = stats.policy._replace(
        chosen=-stats.policy.chosen
    )  # what the gate sees is the implicit reward
    still = Sage(drop_negative=0.1, margin="policy_mean").admitted(stats)
    assert np.flatnonzero(~still.numpy()).tolist() == list(range(10))
    assert Sage().admitted(stats).all() and not Sage().needs_logit and Sage(drop_uncertainty=0.1).needs_logit


# --- curricula


def setting(n=40, pass_rates=None, candidates=6, trained=2, steps=100, seed=0) -> Setting:
    rates = np.arange(n)[::-1] / n if pass_rates is None else np.asarray(pass_rates, float)
    return Setting(rates, np.arange(n) + 1, steps, candidates, trained, 1, seed)


class Policy:
    """Stands for the model: a margin in nats per token for each pair, and a record of what was asked."""

    def __init__(self, margins):
        self.margins, self.asked = np.asarray(margins, float), []

    def __call__(self, indices: np.ndarray) -> PairStats:
        self.asked.append(indices)
        m = torch.tensor(self.margins[indices], dtype=torch.float32)
        zeros, ones = torch.zeros_like(m), torch.ones_like(m)
        return PairStats.of(DPO(), PairLogps(m, zeros, ones, ones), PairLogps(m, zeros, ones, ones))


def test_allot_gives_what_one_stratum_lacks_to_the_others():
    assert allot(np.array([0.5, 0.3, 0.2]), np.array([100, 100, 100]), 10).tolist() == [5, 3, 2]
    assert allot(np.array([0.5, 0.3, 0.2]), np.array([1, 100, 100]), 11).tolist() == [1, 6, 4]
    assert allot(np.array([0.5, 0.5]), np.array([2, 3]), 50).tolist() == [2, 3]
    assert allot(np.array([1.0, 0.0]), np.array([1, 5]), 3).tolist() == [1, 2]


def test_difficulty_ranks():
    """Hardest last, by each source; equal difficulties are shuffled, not left in file order."""
    by_rate = StaticFilter(setting(), difficulty="pass_rate").ranks
    assert by_rate is not None and by_rate.tolist() == list(range(40))
    by_length = StaticFilter(setting(), difficulty="length").ranks
    assert by_length is not None and by_length.tolist() == list(range(40))
    by_margin = StaticFilter(setting(pass_rates=[math.nan] * 40))
    assert by_margin.ranks is None
    by_margin.refresh(0, Policy(np.arange(40)))
    assert by_margin.ranks is not None and by_margin.ranks.tolist() == list(range(40))[::-1]
    tied = StaticFilter(setting(pass_rates=[0.0] * 20 + [1.0] * 20)).ranks
    assert tied is not None and set(tied[20:]) == set(range(20)) and tied[20:].tolist() != sorted(tied[20:])


def test_static_filter_draws_the_hardest_third_and_nothing_else():
    curriculum = StaticFilter(setting(), low=0.75)
    assert set(curriculum.draw(30)) == set(range(30, 40))


def test_easy_to_hard_grows():
    """Share 0.2 of 40 pairs at first, 0.6 in the middle of the ramp, all from its end on."""
    curriculum, seen = EasyToHard(setting(candidates=4), start=0.2, ramp=0.5), {}
    for step in range(100):
        curriculum.refresh(step, Policy(np.zeros(40)))
        seen[step] = curriculum.draw(4)
        assert len(set(seen[step])) == 4
    assert np.concatenate([seen[s] for s in range(3)]).max() < 9
    assert np.concatenate([seen[s] for s in range(22, 26)]).max() < 26
    assert np.concatenate([seen[s] for s in range(50, 100)]).max() == 39


def test_easy_to_hard_names_all_pairs_if_asked_for_more():
    """Protects small sets: 57 candidates of 20 pairs, of which 19 are trained on."""
    for seed in range(50):
        curriculum = EasyToHard(setting(20, candidates=57, seed=seed), start=0.2)
        curriculum.refresh(0, Policy(np.zeros(20)))
        assert len(set(curriculum.draw(57))) == 20


def sage_curriculum(n=40, candidates=6, **options) -> SageCurriculum:
    options = {"strata": 4, "every": 5, "floor": 0.2} | options
    return SageCurriculum(setting(n, candidates=candidates), **options)


def test_pools_lean_to_what_is_wrong():
    """By hand: the first strata are right, half right, and wrong twice. The pool is cut by the margins."""
    margins = np.repeat([-2.0, 3.0, -1.0, 0.5], 10)
    margins[30:35] = -0.5
    curriculum, policy = sage_curriculum(), Policy(margins)
    curriculum.refresh(0, policy)
    assert [len(asked) for asked in policy.asked] == [40]  # once, and never again
    assert curriculum.competence.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert curriculum.stratum[:30].tolist() == [3] * 10 + [0] * 10 + [2] * 10
    # 20 places: 4 evenly, 16 by 1 - competence: 1, 1 + 3.2, 1 + 6.4, 1 + 6.4
    assert curriculum.quota.tolist() == [1, 4, 7, 8] or curriculum.quota.tolist() == [1, 4, 8, 7]
    assert (
        np.bincount(curriculum.stratum[curriculum.members], minlength=4).tolist() == curriculum.quota.tolist()
    )
    drawn = np.concatenate([curriculum.draw(10), curriculum.draw(10)])
    assert sorted(drawn) == sorted(curriculum.members) and len(set(drawn)) == 20


def test_competence_follows_what_is_seen():
    """Pairs seen since the refresh count as they are now, and the old competence as PRIOR pairs."""
    curriculum, policy = sage_curriculum(), Policy(np.repeat([1.0, 2.0, 3.0, 4.0], 10))
    curriculum.refresh(0, policy)
    assert curriculum.competence.tolist() == [1.0] * 4
    wrong, tied = np.arange(8), np.arange(8, 10)  # of the hardest stratum
    curriculum.observe(wrong, np.zeros(8), np.full(8, -1.0))
    curriculum.observe(tied, np.zeros(2), np.zeros(2))
    curriculum.refresh(4, policy)  # not due
    assert curriculum.competence[3] == 1.0
    curriculum.refresh(5, policy)
    assert curriculum.competence.tolist() == [
        1.0,
        1.0,
        1.0,
        (1.0 + curriculum.PRIOR) / (10 + curriculum.PRIOR),
    ]
    assert set(curriculum.stratum[:10]) == {3} and curriculum.quota.argmax() == 3
    assert len(policy.asked) == 1


def test_a_pool_lasts_until_the_next_refresh():
    """As many pairs as will be candidates until then, at most half of all, at least those of one draw."""
    options = {"every": 10, "strata": 4, "floor": 0.2}
    for interval, size in ((1, 60), (2, 30), (4, 18), (10, 6), (50, 6)):
        assert SageCurriculum(setting(400)._replace(interval=interval), **options).pool_size == size
    assert SageCurriculum(setting(40), **options).pool_size == 20
    assert SageCurriculum(setting(40, candidates=30), **options).pool_size == 30
    assert SageCurriculum(setting(40, candidates=90), **options).pool_size == 40


def test_a_pair_that_slips_is_drawn_more_often():
    """Protects the lean: easy pairs that scoring finds wrong move to the strata that fill the pool."""
    curriculum, policy = (
        sage_curriculum(n=400, candidates=40, floor=0.1, strata=8),
        Policy(np.linspace(-1, 1, 400)),
    )
    curriculum.refresh(0, policy)
    easy = np.arange(360, 400)
    assert np.isin(curriculum.members, easy).sum() < 10
    curriculum.observe(easy, np.zeros(40), np.full(40, -3.0))
    curriculum.refresh(5, policy)
    assert np.isin(curriculum.members, easy).sum() > 20


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.nan]) | st.floats(-2, 2), min_size=1),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_strata_are_cut_from_the_order_by_difficulty(difficulty, strata, seed):
    """Protects the choices of earlier runs, and equal difficulties on both sides of a cut."""
    difficulty = np.array(difficulty)
    expected = order_by_difficulty(difficulty, seed) * strata // len(difficulty)
    assert strata_by_difficulty(difficulty, strata, seed).tolist() == expected.tolist()


def test_passes_are_the_same_in_any_slices():
    """Protects resume: the permutation that is kept between draws is the one of the position."""
    whole, resumed = Shuffled(7, 3), Shuffled(7, 3)
    drawn = np.concatenate([whole.draw(n) for n in (3, 5, 9, 1, 10)])
    resumed.position = 8
    assert resumed.draw(20).tolist() == drawn[8:].tolist()
    assert all(sorted(drawn[i : i + 7]) == list(range(7)) for i in (0, 7, 14, 21))


def test_implicit_rewards_tie_at_first():
    """Before the first step all implicit rewards are 0: every stratum is half right, and the pool is even."""
    curriculum = sage_curriculum(margin="implicit_reward")
    curriculum.refresh(0, Policy(np.linspace(-1, 1, 40)))
    assert curriculum.competence.tolist() == [0.5] * 4 and curriculum.quota.tolist() == [5] * 4
    assert not np.array_equal(np.sort(curriculum.stratum), curriculum.stratum)  # shuffled, not in file order


def test_pairs_without_a_margin_do_not_poison_competence():
    margins = np.linspace(-1, 1, 40)
    margins[:3] = [math.nan, math.inf, -math.inf]
    curriculum = sage_curriculum()
    curriculum.refresh(0, Policy(margins))
    curriculum.observe(np.arange(3), np.full(3, math.nan), np.full(3, math.nan))
    curriculum.refresh(5, Policy(margins))
    assert np.isfinite(curriculum.competence).all() and (curriculum.stratum[:3] == 0).all()


@pytest.mark.parametrize("n, strata", [(1, 1), (2, 1), (3, 1), (5, 2), (7, 3), (8, 4)])
def test_few_pairs_have_fewer_strata(n, strata, capsys):
    """Protects small files: no refusal, one line, and a pool that holds the candidates there are."""
    curriculum = sage_curriculum(n=n)
    assert curriculum.strata == strata and ("with only" in capsys.readouterr().out) == (strata < 4)
    for step in range(12):
        curriculum.refresh(step, Policy(np.linspace(-1, 1, n)))
        drawn = curriculum.draw(6)
        assert len(set(drawn)) == min(6, n) or len(set(drawn) | set(curriculum.draw(6))) == min(6, n)
        curriculum.observe(drawn, np.zeros(6), np.full(6, 0.1))


def test_state_is_restored_exactly():
    """A resumed curriculum draws the same, in this interval and in the next."""
    policy = Policy(np.random.default_rng(0).normal(size=40))
    whole, other = sage_curriculum(), sage_curriculum()
    for step in range(8):
        whole.refresh(step, policy)
        whole.observe(whole.draw(6), np.zeros(6), np.full(6, step / 6))
    other.load_state_dict(
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in whole.state_dict().items()}
    )
    for step in range(8, 22):
        drawn = []
        for curriculum in (whole, other):
            curriculum.refresh(step, policy)
            drawn.append(curriculum.draw(6).tolist())
            curriculum.observe(np.array(drawn[-1]), np.zeros(6), np.full(6, -step / 6))
        assert drawn[0] == drawn[1]
    assert whole.metrics() == other.metrics()


# --- bad input


def setting_of(scorer, n: int) -> Setting:
    return Setting(np.zeros(n), np.ones(n), 10, *scorer.draws(2), scorer.score_every, 0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Sage(candidates_per_pair=0.5), "candidates_per_pair=0.5"),
        (lambda: Sage(score_every=3, reuse=2), "multiple of scorer.reuse"),
        (lambda: Sage(margin="rewards"), "must be one of implicit_reward"),
        (lambda: Sage(drop_negative=1.0), "drop_negative"),
        (lambda: Sage(temperature=-1.0), "temperature"),
        (lambda: Sage(damping=-1.0), "damping=-1.0"),
        (lambda: SageLogit(damping=math.nan), "damping=nan"),
        (lambda: BetaDPO(momentum=1.0), "momentum=1.0"),
        (lambda: BetaDPO(margin="policy_mean"), "margin=policy_mean has no effect"),
        (lambda: MarginGap(margin="mixed"), "margin=mixed has no effect"),
        (lambda: RandomFromPool(temperature=2.0), "temperature=2.0 has no effect"),
        (lambda: Rho(), "margins_from is not set"),
        (lambda: Rho(margins_from="x", margin="policy_mean"), "needs implicit_reward"),
        (lambda: Sage(margins_from="x"), "has no effect"),
        (lambda: BetaDPO(temperature=1.0), "temperature=0"),
        (
            lambda: StaticFilter(setting(), difficulty="reference_margin").rank(np.full(40, math.nan)),
            "40 of 40",
        ),
        (
            lambda: StaticFilter(setting(pass_rates=[0.5] * 39 + [math.nan]), difficulty="pass_rate"),
            "1 of 40 pairs",
        ),
        (lambda: StaticFilter(setting(pass_rates=[0.5] * 40)), "equally difficult"),
        (lambda: StaticFilter(setting(), low=0.9), "keep 4 of 40 pairs"),
        (lambda: StaticFilter(setting(), difficulty="colour"), "difficulty=colour"),
        (lambda: EasyToHard(setting(), start=0.0), "start=0.0"),
        (lambda: sage_curriculum(floor=-0.5), "curriculum.floor=-0.5"),
        (lambda: sage_curriculum(strata=0), "curriculum.strata=0"),
        (lambda: sage_curriculum(strata=1001), "curriculum.strata=1001"),
        (lambda: sage_curriculum(every=0), "curriculum.every=0"),
        (lambda: sage_curriculum(margin="rewards"), "curriculum.margin=rewards"),
    ],
)
def test_impossible_options_are_refused(make, words):
    """Each before a model is loaded, in words that name the key."""
    with pytest.raises((ValueError, UserError), match=words.replace("(", r"\(")):
        make()


class FakeRun:
    """A Selection over 12 pairs with given log-probabilities, and no model."""

    def __init__(self, scorer, tmp_path, chosen=None, curriculum=None, rows=0):
        ids = np.array([f"p{i}" for i in range(12)], dtype=object)
        ones = torch.ones(12)
        self.policy = PairLogps(torch.arange(12.0) if chosen is None else chosen, torch.zeros(12), ones, ones)
        reference = SimpleNamespace(
            lookup=lambda i: PairLogps(
                *(
                    t[torch.from_numpy(i)] * 0 + t.new_tensor([0, 0, 1, 1][k])
                    for k, t in enumerate(self.policy)
                )
            )
        )
        forward = SimpleNamespace(
            all_stats=lambda pairs, i, logit: (
                PairLogps(*(t[torch.from_numpy(i)] for t in self.policy)),
                None,
            )
        )
        self.scorer, self.tmp_path = scorer, tmp_path
        self.pairs = SimpleNamespace(pair_ids=lambda indices=slice(None): ids[indices])
        curriculum = curriculum or Curriculum(setting_of(scorer, 12))
        log = PairLog(tmp_path, expected=1, limit=rows, main=True)
        self.selection = Selection(scorer, curriculum, DPO(), self.pairs, forward, reference, log, 2, 0)  # pyright: ignore

    def steps(self, *steps: int) -> list[list[int]]:
        """Choose, and observe zeros, as the loop does."""
        batches = []
        for step in steps:
            choice = self.selection.choose(step)
            self.selection.observe(choice.indices, torch.zeros(len(PER_PAIR), len(choice.indices)))
            batches.append(choice.indices.tolist())
        return batches


def test_nan_scores_are_named_dropped_and_counted(tmp_path, capsys):
    chosen = torch.arange(12.0)
    chosen[3] = math.nan
    run = FakeRun(LargestLoss(candidates_per_pair=6.0), tmp_path, chosen)
    assert run.steps(1) == [[0, 1]]
    assert "p3" in capsys.readouterr().out and run.selection.metrics()["selection/dropped_nan"] == 1
    chosen[:4] = math.nan
    with pytest.raises(UserError, match="4 of 12 candidates have no finite score, for example p0"):
        run.steps(2)


def test_a_resume_inside_an_interval_keeps_metrics_rows_and_objective(tmp_path):
    """Protects selection/* and the per-pair log.

    Steps that reuse an older scoring keep its numbers, and do not log their pairs a second time.
    """

    @dataclasses.dataclass
    class Halving(LargestLoss):
        def objective(self, loss, stats, chosen):
            return dataclasses.replace(loss, beta=loss.beta / 2)

    scorer = Halving(candidates_per_pair=3.0, score_every=4, reuse=2)
    run, other = (FakeRun(scorer, tmp_path / name, rows=100) for name in ("run", "other"))
    run.steps(0, 1)
    assert sum(map(len, run.selection.log.rows)) == 12
    other.selection.load_state_dict(run.selection.state_dict())
    choice = other.selection.choose(2)
    assert choice.objective.beta == run.selection.choose(2).objective.beta == 0.05
    assert choice.candidates.tolist() == list(range(12))
    other.selection.observe(choice.indices, torch.zeros(len(PER_PAIR), 2))
    assert (
        other.selection.metrics() == run.selection.metrics()
        and "selection/mean_score" in other.selection.metrics()
    )
    assert not other.selection.log.rows


def test_the_curriculum_counts_a_scored_pair_once(tmp_path):
    """Protects competence: the chosen pairs are the errors, and counting them again would make it too low."""

    class Counting(Curriculum):
        seen: ClassVar[list[int]] = []

        def observe(self, indices, u, policy_mean):
            self.seen.extend(indices)

    scorer = Sage(candidates_per_pair=3.0, warmup_steps=1)
    run = FakeRun(scorer, tmp_path, curriculum=Counting(setting_of(scorer, 12)))
    run.steps(0)
    assert len(Counting.seen) == 2  # what is trained on unscored
    run.steps(1)
    assert len(Counting.seen) == 2 + 6


def test_the_log_writes_the_same_margin_whether_scored_or_not(tmp_path):
    """In every row margin, signal and curvature are of the implicit reward, beside policy_mean."""
    scorer = Sage(candidates_per_pair=3.0, warmup_steps=1)
    run = FakeRun(scorer, tmp_path, torch.arange(12.0) * 3, rows=100)
    run.steps(0, 1)
    warm, scored = (table.to_pydict() for table in run.selection.log.rows)
    assert warm["ranked_by"] == [None] * 2 and warm["score"] == [None] * 2 and warm["selected"] == [True] * 2
    assert len(scored["score"]) == 6 and scored["ranked_by"] == ["policy_mean"] * 6
    for pair_id, margin, mean, g, h in zip(
        *(scored[name] for name in ("pair_id", "margin", "policy_mean", "signal", "curvature")), strict=True
    ):
        i = int(pair_id[1:])
        sigmoid = 1 / (1 + math.exp(0.3 * i))  # of -u; the reference is 0, beta is 0.1
        assert (margin, mean) == (pytest.approx(0.3 * i), pytest.approx(3.0 * i))
        assert g == pytest.approx(0.1 * sigmoid) and h == pytest.approx(0.01 * sigmoid * (1 - sigmoid))


def test_a_pool_that_names_too_few_pairs_ends_with_a_message(tmp_path):
    """Protects from drawing forever: a curriculum that repeats itself can never fill the batch."""

    class Stuck(Curriculum):
        def draw(self, n):
            return np.array([3] * n)

    scorer = LargestLoss(candidates_per_pair=2.0)
    stuck = Stuck(setting_of(scorer, 12))
    with pytest.raises(UserError, match="only 1 different pairs, and 2 are chosen"):
        FakeRun(scorer, tmp_path, curriculum=stuck).steps(0)


def test_two_draws_always_suffice(tmp_path):
    """Protects the bound on draws: as many pairs as are wanted, from passes that begin anywhere."""
    scorer = LargestLoss(candidates_per_pair=1.0, score_every=6)
    run = FakeRun(scorer, tmp_path)
    for position in range(12):
        run.selection.curriculum.order.position = position
        assert sorted(np.concatenate([run.selection.choose(1).indices for _ in range(6)])) == list(range(12))


def test_all_scores_nan_is_said_and_no_crash(tmp_path):
    """Protects every gate and beta_dpo from an empty quantile or mean: the message names the pairs."""
    gates = {"drop_curvature": 0.2, "drop_negative": 0.2}
    for scorer in (Sage(candidates_per_pair=3.0, **gates), BetaDPO(candidates_per_pair=3.0)):
        with pytest.raises(UserError, match="6 of 6 candidates have no finite score"):
            FakeRun(scorer, tmp_path, torch.full((12,), math.nan)).steps(1)
    assert scorer.mean == scorer.std == 0.0
    assert not Sage(drop_uncertainty=0.2, **gates).admitted(stats_of(torch.full((4,), math.nan))).any()


@pytest.mark.parametrize("scorer", [BetaDPO(), Sage(temperature=0.5)], ids=["beta_dpo", "temperature"])
def test_one_candidate_has_no_deviation(scorer):
    """Protects later scores from the standard deviation of one value, which is NaN."""
    one = stats_of(torch.tensor([0.3]))
    scores = scorer(one)
    assert select(scores, 1, 0, scorer.noise(scores)).tolist() == [0]
    later = scorer(stats_of(torch.linspace(-1, 1, 5)))
    assert later.isfinite().all() and math.isfinite(scorer.noise(later))


def test_scores_are_reused_for_an_interval(tmp_path):
    """score_every=4 and reuse=2: one scoring gives the best 4 of 12, twice each, also after a resume."""
    scorer = LargestLoss(candidates_per_pair=3.0, score_every=4, reuse=2)
    run, other = FakeRun(scorer, tmp_path), FakeRun(scorer, tmp_path)
    batches = run.steps(0, 1)
    other.selection.load_state_dict(run.selection.state_dict())
    rest = run.steps(2, 3)
    assert rest == other.steps(2, 3)
    assert sorted(batches[0] + batches[1]) == sorted(rest[0] + rest[1]) == [0, 1, 2, 3]


def pairs_named(*ids: str, hashes: Sequence[int] = ()) -> TokenizedPairs:
    columns = {"pair_id": list(ids), "text_hash": pa.array(hashes or range(len(ids)), pa.uint64())}
    return TokenizedPairs(datasets.Dataset(pa.table(columns)), {}, "")


def test_a_static_order_is_that_of_the_reference():
    """Protects reference_margin where `reference_model` makes the reference another model than the policy."""
    policy = Policy(np.linspace(-1, 1, 40))
    for reference, hardest in (
        (np.linspace(1, -1, 40), range(30, 40)),
        (np.zeros(40), range(10)),  # a loss without a reference: the policy decides
    ):
        other = Policy(reference)
        curriculum = StaticFilter(setting(pass_rates=[math.nan] * 40), low=0.75)
        curriculum.refresh(
            0, lambda i, other=other: dataclasses.replace(policy(i), reference=other(i).policy)
        )
        assert sorted(curriculum.draw(10)) == list(hardest)


def test_losses_are_compared_with_those_of_the_same_objective(tmp_path, capsys):
    """Protects rho from the implicit rewards of another loss, which have another scale."""
    file = tmp_path / "scores.parquet"
    table = pa.table({"pair_id": ["b", "a"], "margin": [2.0, 1.0]})
    manifest = {"loss": {"_target_": "sage.losses.SimPO", "beta": 2.0}}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(manifest)}), file)
    pairs = pairs_named("a", "b")
    with pytest.raises(UserError, match=r"those of sage\.losses\.SimPO, and .* is sage\.losses\.DPO"):
        margins_of(Rho(margins_from=str(file)), DPO(), pairs)
    margins = margins_of(MarginGap(margins_from=str(file)), DPO(), pairs)  # only their order counts
    assert margins is not None and margins.tolist() == [1.0, 2.0]
    margins_of(Rho(margins_from=str(file)), SimPO(beta=2.0), pairs)
    assert not capsys.readouterr().out
    margins_of(Rho(margins_from=str(file)), SimPO(beta=1.0), pairs)
    assert "loss.beta=2.0, and this run has loss.beta=1.0" in capsys.readouterr().out.replace("\n", " ")


def test_a_scorer_by_the_reference_needs_one():
    """Protects `scorer=margin_gap` from a random choice with a loss that has no reference."""
    cfg = config.TrainConfig(scorer={"_target_": "sage.baseline_scorers.MarginGap"})
    check_reference(cfg, DPO(), MarginGap())
    check_reference(cfg, SimPO(), MarginGap(margins_from="x"))
    with pytest.raises(UserError, match=r"this loss needs no reference: give scorer\.margins_from"):
        check_reference(cfg, SimPO(), MarginGap())


def test_margins_from_another_model(tmp_path):
    file = tmp_path / "margins.parquet"
    pq.write_table(pa.table({"pair_id": ["b", "a"], "margin": [2.0, 1.0]}), file)
    assert read_margins(str(file), pairs_named("a", "b")).tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match="1 of 2 training pairs are not in it, for example 'c'"):
        read_margins(str(file), pairs_named("a", "c"))
    with pytest.raises(UserError, match="not Parquet"):
        read_margins(str(tmp_path / "none.parquet"), pairs_named("a"))
    pq.write_table(pa.table({"pair_id": ["a", "b"], "margin": [0.0, 0.0]}), file)
    with pytest.raises(UserError, match="all margins are 0, so they rank nothing"):
        read_margins(str(file), pairs_named("a", "b"))
    for ids, margins, message in (
        (["a", "b", "a"], [1.0, 2.0, 9.0], "pair 'a' occurs twice"),
        (["a", "b"], [1.0, None], "the margin of pair 'b' is None"),
        (["a", "b"], ["1", "2"], "the margin of pair 'a' is '1'"),
    ):
        pq.write_table(pa.table({"pair_id": ids, "margin": margins}), file)
        with pytest.raises(UserError, match=message):
            read_margins(str(file), pairs_named("a", "b"))


def test_margins_follow_the_texts_not_the_ids(tmp_path):
    """Protects from other rows' margins: an id may be a row's number."""
    file, large = tmp_path / "margins.parquet", 2**63 + 5
    hashes = pa.array([large, 7, 7], pa.uint64())
    pq.write_table(
        pa.table({"pair_id": ["1", "2", "3"], "text_hash": hashes, "margin": [1.0, 2.0, 2.0]}), file
    )
    assert read_margins(str(file), pairs_named("1", "2", hashes=[7, large])).tolist() == [2.0, 1.0]
    with pytest.raises(UserError, match="1 of 2 training pairs are not in it, for example '1'"):
        read_margins(str(file), pairs_named("1", "2", hashes=[8, large]))


@pytest.mark.parametrize("group", ["scorer", "curriculum"])
def test_every_yaml_composes_and_builds(group):
    from conftest import REPO

    names = sorted(p.stem for p in (REPO / "conf" / group).glob("*.yaml"))
    assert len(names) >= 4
    for name in names:
        with initialize_config_module("sage.conf", version_base="1.3"):
            extra = ["scorer.margins_from=x"] if name in ("rho", "medium_influence") else []
            node = compose("train", [f"{group}={name}", "data.path=x", *extra])[group]
        built = build(group, node, **({"setting": setting(n=400)} if group == "curriculum" else {}))
        if group == "scorer":
            ranked = torch.linspace(-1, 1, 8)
            assert built(dataclasses.replace(stats_of(ranked), other_margin=ranked)).shape == (8,)


def test_a_batch_with_more_pairs_than_there_are_is_said(capsys):
    """The same pair would count several times in one step, without a word."""
    pairs = SimpleNamespace(lengths=lambda: np.ones((3, 3), int), pass_rates=lambda: np.full(3, np.nan))
    plain = {"_target_": "sage.curriculum.Curriculum"}
    for size, said in ((3, False), (4, True)):
        cfg = SimpleNamespace(batch_size=size, seed=0, curriculum=plain)
        build_curriculum(cfg, Uniform(), SimpleNamespace(pairs=pairs, steps=2))  # pyright: ignore
        assert ("several times in each batch" in capsys.readouterr().out) == said
