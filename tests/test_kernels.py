"""Every backend against a naive float64 oracle, and what `tiled` promises about memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sage.kernels import BACKENDS, TokenStats, oracle, tiled, token_stats

ALL = TokenStats._fields
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}  # DESIGN.md, section 7


def naive(hidden, weight, labels, bias=None, softcap=None, scale=1.0):
    """Straight from the definitions, for float64 inputs."""
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    p = log_p.exp()
    logps = log_p[torch.arange(len(labels)), labels]
    return TokenStats(logps, (p * p).sum(1), -torch.xlogy(p, p).sum(1), z.argmax(1) == labels)


def case(n, h, v, *, dtype=torch.float32, bias=False, spread=1.0, seed=0):
    """Leaves (hidden, weight, labels, bias) with logits of standard deviation about 2 * spread."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=rng).to(dtype)
    weight = (torch.randn(v, h, generator=rng) * 2 * spread / h**0.5).to(dtype)
    labels = torch.randint(v, (n,), generator=rng)
    best = (hidden.double() @ weight.double().T).argmax(1)
    labels[::3] = best[::3]  # so that is_top1 is not all False
    b = torch.randn(v, generator=rng).to(dtype).requires_grad_() if bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), labels, b


def doubled(x):
    return None if x is None else x.detach().double().requires_grad_()


def assert_near(actual, expected, tol):
    """Relative to the largest element: gradients cross zero."""
    bound = tol * max(1e-30, expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(actual.double(), expected, rtol=tol, atol=bound)


def backends(tile):
    return {"oracle": oracle.token_stats, "tiled": lambda *a, **k: tiled.token_stats(*a, tile=tile, **k)}


SHAPES = [(0, 8, 11), (1, 1, 1), (1, 5, 40), (7, 16, 37), (13, 9, 64), (33, 24, 101)]
HEADS = [
    {},
    {"softcap": 3.0},
    {"scale": 0.0625},
    {"scale": 1.7, "bias": True},
    {"softcap": 5.0, "scale": 2.0, "bias": True},
]


@pytest.mark.parametrize("tile", [(4, 16), (5, 1000), (1000, 7), (1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_naive(shape, head, dtype, tile):
    head = dict(head)
    hidden, weight, labels, bias = case(*shape, dtype=dtype, bias=head.pop("bias", False))
    exact = [doubled(x) for x in (hidden, weight, bias)]
    want = naive(exact[0], exact[1], labels, exact[2], **head)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    (want.logps * upstream.double()).sum().backward()

    for name, backend in backends(tile).items():
        got = backend(hidden, weight, labels, bias=bias, stats=ALL, **head)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert [x.dtype for x in got] == [wide, wide, wide, torch.bool], name
        assert [x.requires_grad for x in got] == [True, False, False, False], name
        for x, y in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(x.double(), y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(got.is_top1, want.is_top1), name

        leaves = [x for x in (hidden, weight, bias) if x is not None]
        grads = torch.autograd.grad(got.logps, leaves, upstream.to(wide))
        for leaf, grad, double in zip(leaves, grads, [x for x in exact if x is not None], strict=True):
            assert grad.dtype == leaf.dtype
            assert_near(grad, double.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_float32_exact_even_for_half_inputs(dtype):
    """Large logits: rounding them to bfloat16 would move log-probabilities by 0.1 and more."""
    hidden, weight, labels, _ = case(40, 64, 300, dtype=dtype, spread=10)
    want = naive(hidden.double(), weight.double(), labels)
    for name in BACKENDS:
        got = token_stats(hidden, weight, labels, stats=ALL, backend=name)
        torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-5, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(token_stats(hidden, weight, labels, backend=name).logps, got.logps)


def test_gradcheck():
    hidden, weight, labels, bias = case(5, 4, 9, dtype=torch.float64, bias=True)

    def logps(hidden, weight, bias):
        return tiled.token_stats(hidden, weight, labels, bias=bias, softcap=2.0, scale=1.3, tile=(2, 4)).logps

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_stay_finite(backend, sign):
    """Logits in +-1e4, across several vocabulary tiles, with certain and impossible labels."""
    v = tiled.TILES["cpu"][1] * 2 + 3
    hidden = torch.full((4, 1), 1e4 * sign, requires_grad=True)
    weight = torch.linspace(-1, 1, v)[:, None].requires_grad_()
    labels = torch.tensor([0, v - 1, v // 2, 1])
    got = token_stats(hidden, weight, labels, stats=ALL, backend=backend)
    got.logps.sum().backward()
    assert all(x.isfinite().all() for x in (*got[:3], hidden.grad, weight.grad))
    want = naive(hidden.detach().double(), weight.detach().double(), labels)
    torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-5, atol=1e-2)
    assert torch.equal(got.is_top1, want.is_top1)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_statistics_not_asked_for_are_none(backend):
    inputs = case(5, 8, 20)[:3]
    full = token_stats(*inputs, stats=ALL, backend=backend)
    assert token_stats(*inputs, backend=backend)[1:] == (None, None, None)
    for name in ALL:
        got = token_stats(*inputs, stats=(name,), backend=backend)
        assert [f for f in ALL if getattr(got, f) is not None] == [name]
        torch.testing.assert_close(getattr(got, name), getattr(full, name))


def test_no_grad_forward_keeps_nothing():
    kept = []
    hidden, weight, labels, _ = case(6, 8, 50)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        got = token_stats(hidden, weight, labels, stats=ALL)
    assert not kept and all(x.grad_fn is None for x in got)
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None


class Sizes(TorchDispatchMode):
    """Records the number of elements of everything an operator returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max(
            [self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_allocates_all_logits(dtype):
    n, h, v = 60, 6, 500
    largest = {}
    for name, backend in backends((16, 64)).items():
        hidden, weight, labels, bias = case(n, h, v, dtype=dtype, bias=True)
        with Sizes() as sizes:
            backend(hidden, weight, labels, bias=bias, softcap=9.0, stats=ALL).logps.sum().backward()
        largest[name] = sizes.largest
    assert largest["oracle"] >= n * v
    assert largest["tiled"] <= v * h  # the weight's own gradient


def test_half_precision_makes_no_float32_copy_of_the_weight():
    class Float32Sizes(Sizes):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [
                x.numel()
                for x in tree_leaves(out)
                if isinstance(x, torch.Tensor) and x.dtype == torch.float32
            ]
            self.largest = max([self.largest, *sizes])
            return out

    hidden, weight, labels, _ = case(20, 32, 400, dtype=torch.bfloat16)
    with Float32Sizes() as sizes:
        tiled.token_stats(hidden, weight, labels, stats=ALL, tile=(10, 64)).logps.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert sizes.largest <= 64 * 32


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_the_gradients_asked_for(wanted):
    hidden, weight, labels, bias = case(9, 8, 30, bias=True)
    full = torch.autograd.grad(
        token_stats(hidden, weight, labels, bias=bias).logps.sum(), (hidden, weight, bias)
    )
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    token_stats(hidden, weight, labels, bias=bias).logps.sum().backward()
    for (name, leaf), grad in zip(leaves.items(), full, strict=True):
        assert torch.equal(leaf.grad, grad) if name == wanted else leaf.grad is None


def test_weight_regathered_between_forward_and_backward():
    """What ZeRO-3 does: `.data` is emptied after the forward and filled anew before the backward."""
    hidden, weight, labels, _ = case(9, 8, 30)
    weight = torch.nn.Parameter(weight.detach())
    expected = torch.autograd.grad(token_stats(hidden, weight, labels).logps.sum(), (hidden, weight))
    loss = token_stats(hidden, weight, labels).logps.sum()
    gathered, again = weight.data, weight.data.clone()
    weight.data = torch.empty(0)
    gathered.fill_(torch.nan)  # the old buffer now holds some other layer
    weight.data = again
    loss.backward()
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_tied_weight_and_non_leaf_weight():
    """The head's gradient adds to the embedding's; a weight with adapters merged in is not a leaf."""
    grads = {}
    for name in BACKENDS:
        _, weight, labels, _ = case(9, 8, 30)
        merged = weight * 1.5
        token_stats(merged[labels].tanh(), merged, labels.flip(0), backend=name).logps.sum().backward()
        grads[name] = weight.grad
    torch.testing.assert_close(grads["tiled"], grads["oracle"])


def test_mistakes_are_named():
    hidden, weight, labels, _ = case(5, 8, 20)
    for message, change in {
        "backend='triton2'": {"backend": "triton2"},
        "unknown \\['logp'\\]": {"stats": ("logp",)},
        "softcap=0": {"softcap": 0.0},
        "cast one": {"weight": weight.bfloat16()},
        "shapes": {"weight": weight[:, :4]},
        r"\[0, 20\)": {"labels": torch.full((5,), -100)},
    }.items():
        with pytest.raises(ValueError, match=message):
            token_stats(**{"hidden": hidden, "weight": weight, "labels": labels} | change)
    outside = tiled.token_stats(hidden, weight, torch.tensor([0, 1, -100, 20, 2]))
    assert outside.logps.isnan().tolist() == [False, False, True, True, False]
