"""The losses against the papers' formulas, written out pair by pair in plain Python floats."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import REPO
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sage import losses
from sage.losses import CDPO, DPO, DPOP, IPO, Hinge, NormalizedDPO, OmniDPO, RobustDPO, SimPO
from sage.model.logps import PairLogps
from sage.training.setup import build
from sage.util.errors import UserError

N = 32


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def u(beta, pc, pr, rc, rr):
    return beta * ((pc - rc) - (pr - rr))


def dpo(beta, pc, pr, rc, rr, nc, nr):
    return -log_sigmoid(u(beta, pc, pr, rc, rr))


def dpo_norm(beta, pc, pr, rc, rr, nc, nr):
    return -log_sigmoid(beta * ((pc - rc) / nc - (pr - rr) / nr))


def cdpo(beta, pc, pr, rc, rr, nc, nr, e=0.2):
    x = u(beta, pc, pr, rc, rr)
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def robust(beta, pc, pr, rc, rr, nc, nr, e=0.2):
    x = u(beta, pc, pr, rc, rr)
    return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


def ipo(beta, pc, pr, rc, rr, nc, nr):
    return ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)) ** 2


def hinge(beta, pc, pr, rc, rr, nc, nr):
    return max(0.0, 1 - u(beta, pc, pr, rc, rr))


def dpop(beta, pc, pr, rc, rr, nc, nr, penalty=5.0):
    return -log_sigmoid(u(beta, pc, pr, rc, rr) - beta * penalty * max(0.0, rc - pc))


def simpo(beta, pc, pr, rc, rr, nc, nr, gamma=0.7):
    return -log_sigmoid(beta * (pc / nc - pr / nr) - gamma)


def omni_dpo(beta, pc, pr, rc, rr, nc, nr):
    weight = (1 - 1 / (1 + math.exp(-(beta * (pc / nc - pr / nr) - 0.4)))) ** 1.5
    nll = -pc / nc if rc > pc else 0.0
    return weight * dpo_norm(beta, pc, pr, rc, rr, nc, nr) + 0.3 * nll


CASES = [
    (DPO(beta=0.3), dpo),
    (NormalizedDPO(beta=3.0), dpo_norm),
    (CDPO(beta=0.3, label_smoothing=0.2), cdpo),
    (RobustDPO(beta=0.3, label_smoothing=0.2), robust),
    (IPO(beta=0.3), ipo),
    (Hinge(beta=0.3), hinge),
    (DPOP(beta=0.3, penalty=5.0), dpop),
    (OmniDPO(beta=2.5, policy_margin=0.4, focus=1.5, calibrated_nll=0.3), omni_dpo),
    (SimPO(beta=2.5, target_margin=0.7), simpo),
]
each = pytest.mark.parametrize("loss, naive", CASES, ids=[type(c[0]).__name__ for c in CASES])


def random_logps() -> tuple[PairLogps, PairLogps]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 40, (2, N), generator=generator).double()
    values = -torch.rand(4, N, generator=generator, dtype=torch.float64) * 30
    return PairLogps(values[0], values[1], *tokens), PairLogps(values[2], values[3], *tokens)


def numbers(policy: PairLogps, reference: PairLogps, i: int) -> tuple[float, ...]:
    fields = (policy.chosen, policy.rejected, reference.chosen, reference.rejected, *policy[2:])
    return tuple(float(f[i].detach()) for f in fields)


def test_every_loss_is_covered():
    classes = [c for c in vars(losses).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    assert {type(loss) for loss, _ in CASES} == set(classes) - {losses.Loss}


@each
@pytest.mark.parametrize("nll_weight", [0.0, 0.4])
def test_value_and_gradient_against_the_formula(loss, naive, nll_weight):
    """Protects the formulas, the NLL term, and their gradients, by central differences of the naive forms."""
    loss = dataclasses.replace(loss, nll_weight=nll_weight)
    policy, reference = random_logps()
    leaves = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    value = loss(policy, reference)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)

    def formula(beta, pc, pr, rc, rr, nc, nr):
        return naive(beta, pc, pr, rc, rr, nc, nr) - nll_weight * pc / nc

    step = 1e-5
    for i in range(N):
        x = numbers(policy, reference, i)
        assert float(value[i].detach()) == pytest.approx(formula(loss.beta, *x), rel=1e-12, abs=1e-12)
        for which, gradient in enumerate(gradients):
            up, down = list(x), list(x)
            up[which] += step
            down[which] -= step
            slope = (formula(loss.beta, *up) - formula(loss.beta, *down)) / (2 * step)
            assert float(gradient[i]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@each
def test_extreme_margins_stay_finite(loss, naive):
    """Protects against overflow in float32 at margins a diverging run reaches."""
    tokens = torch.full((2,), 10.0)
    policy = PairLogps(torch.tensor([-5e3, -1.0]), torch.tensor([-1.0, -5e3]), tokens, tokens)
    reference = PairLogps(*torch.full((2, 2), -100.0), tokens, tokens)
    policy.chosen.requires_grad_()
    value = loss(policy, reference)
    (gradient,) = torch.autograd.grad(value.sum(), policy.chosen)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_at_the_reference_dpo_is_ln2_and_rewards_are_zero():
    policy, _ = random_logps()
    chosen, rejected = DPO().rewards(policy, policy)
    assert not chosen.any() and not rejected.any()
    assert (DPO()(policy, policy) - math.log(2)).abs().max() < 1e-15


def test_conservative_and_robust_differ():
    """One is a cross-entropy on soft labels, the other removes its bias. Without smoothing both are DPO."""
    policy, reference = random_logps()
    conservative, debiased = (c(label_smoothing=0.2)(policy, reference) for c in (CDPO, RobustDPO))
    assert (conservative - debiased).abs().min() > 1e-3
    for loss in (CDPO, RobustDPO):
        assert torch.equal(loss(label_smoothing=0.0)(policy, reference), DPO()(policy, reference))


def test_robust_is_unbiased_under_flipped_labels():
    """What makes it robust: (1-e) L(w, l) + e L(l, w) = the clean DPO loss."""
    policy, reference = random_logps()
    swapped = [
        PairLogps(x.rejected, x.chosen, x.rejected_tokens, x.chosen_tokens) for x in (policy, reference)
    ]
    e = 0.2
    loss = RobustDPO(label_smoothing=e)
    expected = (1 - e) * loss(policy, reference) + e * loss(*swapped)
    assert torch.allclose(expected, DPO()(policy, reference), rtol=1e-12, atol=1e-12)


def test_simpo_ignores_the_reference():
    policy, reference = random_logps()
    assert SimPO.reference_free
    assert torch.equal(SimPO()(policy, reference), SimPO()(policy, policy))


@pytest.mark.parametrize("file", sorted((REPO / "conf" / "loss").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_yaml_builds_and_states_every_field(file):
    """Protects from a loss name that is not wired, and from a field that its YAML hides."""
    node = OmegaConf.to_container(OmegaConf.load(file))
    loss = instantiate(node)
    assert {f.name for f in dataclasses.fields(loss)} == set(node) - {"_target_"}
    assert loss(*random_logps()).shape == (N,)


def test_every_loss_has_a_yaml():
    named = {OmegaConf.load(f)._target_ for f in (REPO / "conf" / "loss").glob("*.yaml")}
    assert named == {f"sage.losses.{type(loss).__name__}" for loss, _ in CASES}


@pytest.mark.parametrize(
    "loss, values, key",
    [
        (DPO, {"beta": 0.0}, "loss.beta"),
        (DPO, {"beta": -0.1}, "loss.beta"),
        (DPO, {"beta": math.nan}, "loss.beta"),
        (DPO, {"beta": math.inf}, "loss.beta"),
        (IPO, {"nll_weight": -1.0}, "loss.nll_weight"),
        (CDPO, {"label_smoothing": 0.5}, "loss.label_smoothing"),
        (RobustDPO, {"label_smoothing": -0.1}, "loss.label_smoothing"),
        (RobustDPO, {"beta": 0.0}, "loss.beta"),
        (DPOP, {"penalty": -1.0}, "loss.penalty"),
        (SimPO, {"beta": 0.0}, "loss.beta"),
        (SimPO, {"target_margin": -1.0}, "loss.target_margin"),
    ],
)
def test_bad_values_name_the_key(loss, values, key):
    with pytest.raises(ValueError, match=key):
        loss(**values)
    with pytest.raises(UserError, match=key):
        build("loss", {"_target_": f"sage.losses.{loss.__name__}", **values})


def test_the_base_class_is_no_loss():
    with pytest.raises(TypeError, match="preference"):
        losses.Loss()(*random_logps())
