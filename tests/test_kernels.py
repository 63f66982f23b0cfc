"""Compares every backend with a naive float64 version, and checks how much memory `tiled` takes.

The Triton kernels run on the GPU if there is one, else in Triton's interpreter. They need Triton.
"""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sage.model.kernels import TokenStats, choose_backend, has_triton, oracle, recompute, tiled, token_stats

# On CPU the kernels run in Triton's interpreter: see conftest.py.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed: pip install triton")
ALL = TokenStats._fields
ON_CPU = ["oracle", "tiled"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def naive(hidden, weight, labels, bias=None, softcap=None, scale=1.0):
    """Straight from the definitions, for float64 inputs."""
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    p = log_p.exp()
    return TokenStats(log_p[torch.arange(len(labels)), labels], (p * p).sum(1))


def case(n, h, v, *, dtype=torch.float32, bias=False, spread=1.0, seed=0):
    """Leaves (hidden, weight, labels, bias) with logits of standard deviation about 2 * spread."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=rng).to(dtype)
    weight = (torch.randn(v, h, generator=rng) * 2 * spread / h**0.5).to(dtype)
    labels = torch.randint(v, (n,), generator=rng)
    best = (hidden.double() @ weight.double().T).argmax(1)
    labels[::3] = best[::3]  # likely labels as well as unlikely ones
    b = torch.randn(v, generator=rng).to(dtype).requires_grad_() if bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), labels, b


def doubled(x):
    return None if x is None else x.detach().double().requires_grad_()


def largest(x):
    return x.abs().max().item() if x is not None and x.numel() else 0.0


def backends(tile):
    return {"oracle": oracle.token_stats, "tiled": lambda *a, **k: tiled.token_stats(*a, tile=tile, **k)}


def check(backend, shape, head, dtype, spread=1.0, device="cpu"):
    """Statistics and gradients of `backend` against `naive`."""
    head = dict(head)
    hidden, weight, labels, bias = case(*shape, dtype=dtype, bias=head.pop("bias", False), spread=spread)
    exact = [doubled(x) for x in (hidden, weight, bias)]
    want = naive(exact[0], exact[1], labels, exact[2], **head)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    (want.logps * upstream.double()).sum().backward()

    leaves = [None if x is None else x.detach().to(device).requires_grad_() for x in (hidden, weight, bias)]
    got = backend(leaves[0], leaves[1], labels.to(device), bias=leaves[2], stats=ALL, **head)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [wide, wide]
    assert [x.requires_grad for x in got] == [True, False]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    # A gradient crosses zero, and vanishes where the model is certain or the cap saturates. So the error is
    # measured against the largest gradient that an undecided model would have.
    unit = head.get("scale", 1.0) * largest(upstream)
    sizes = [unit * largest(weight), unit * largest(hidden), unit]
    grads = torch.autograd.grad(got.logps, [x for x in leaves if x is not None], upstream.to(device, wide))
    for grad, double, size in zip(grads, [x for x in exact if x is not None], sizes, strict=False):
        assert grad.dtype == dtype
        torch.testing.assert_close(
            grad.double().cpu(), double.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size
        )


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
    for backend in backends(tile).values():
        check(backend, shape, head, dtype)


@pytest.mark.parametrize("in_hardware", [True, False])
@pytest.mark.parametrize("head", HEADS[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_on_cpus_with_and_without_units_for_it(monkeypatch, shape, head, in_hardware):
    """Protects the path that this machine does not take."""
    monkeypatch.setattr(recompute, "bfloat16_in_hardware", lambda: in_hardware)
    check(backends((5, 16))["tiled"], shape, head, torch.bfloat16)


@pytest.mark.parametrize("in_hardware", [True, False])
def test_gradients_of_near_certain_labels_survive_bfloat16(monkeypatch, in_hardware):
    """Protects mastered tokens: their gradient p - 1 is lost if both numbers are rounded first."""
    monkeypatch.setattr(recompute, "bfloat16_in_hardware", lambda: in_hardware)
    hidden, weight, labels, _ = case(30, 64, 200, dtype=torch.bfloat16, spread=8)
    labels = (hidden.double() @ weight.double().T).argmax(1)
    exact = [doubled(x) for x in (hidden, weight)]
    want = naive(*exact, labels).logps
    certain = want > -1e-2
    assert certain.sum() > 5
    want[certain].sum().backward()
    tiled.token_stats(hidden, weight, labels).logps[certain].sum().backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() < 0.02 * theirs.grad.norm()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 50), st.integers(1, 300)),
    head=st.fixed_dictionaries(
        {"bias": st.booleans(), "scale": st.floats(0.05, 2), "softcap": st.none() | st.floats(3, 50)}
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.floats(0.1, 2),
    tile=st.tuples(st.integers(4, 50), st.integers(16, 320)),
)
def test_random_shapes_match_naive(shape, head, dtype, spread, tile):
    """Any shape, tile and head, so that no edge of a tile escapes the sizes somebody thought of."""
    for backend in backends(tile).values():
        check(backend, shape, head, dtype, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_float32_exact_even_for_half_inputs(dtype):
    """Large logits: rounding them to bfloat16 would move log-probabilities by 0.1 and more."""
    hidden, weight, labels, _ = case(40, 64, 300, dtype=dtype, spread=10)
    want = naive(hidden.double(), weight.double(), labels)
    for name in ON_CPU:
        got = token_stats(hidden, weight, labels, stats=ALL, backend=name)
        torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-5, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(token_stats(hidden, weight, labels, backend=name).logps, got.logps)


def test_gradcheck():
    hidden, weight, labels, bias = case(5, 4, 9, dtype=torch.float64, bias=True)

    def logps(hidden, weight, bias):
        return tiled.token_stats(hidden, weight, labels, bias=bias, softcap=2.0, scale=1.3, tile=(2, 4)).logps

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_stay_finite(backend, sign):
    """Logits in +-1e4, across several vocabulary tiles, with certain and impossible labels."""
    v = tiled.TILES["cpu"][1] * 2 + 3
    hidden = torch.full((4, 1), 1e4 * sign, requires_grad=True)
    weight = torch.linspace(-1, 1, v)[:, None].requires_grad_()
    labels = torch.tensor([0, v - 1, v // 2, 1])
    got = token_stats(hidden, weight, labels, stats=ALL, backend=backend)
    got.logps.sum().backward()
    assert all(x.isfinite().all() for x in (*got, hidden.grad, weight.grad))
    want = naive(hidden.detach().double(), weight.detach().double(), labels)
    torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tile_of_minus_infinity_counts_for_nothing(dtype):
    """A bias of -inf masks tokens, as for padded vocabularies: whole tiles of them, first and last."""
    hidden, weight, labels, bias = case(6, 8, 50, dtype=dtype, bias=True)
    allowed = torch.arange(50).ge(20) & torch.arange(50).lt(35)
    bias = bias.detach().masked_fill(~allowed, -torch.inf)
    labels = labels % 15 + 20
    want = naive(hidden.double(), weight.double()[20:35], labels - 20, bias[20:35].double()).logps
    want.sum().backward()
    expected = [leaf.grad.clone() for leaf in (hidden, weight)]
    hidden.grad = weight.grad = None
    got = tiled.token_stats(hidden, weight, labels, bias=bias, stats=("logps", "sum_sq_probs"), tile=(4, 10))
    got.logps.sum().backward()
    torch.testing.assert_close(got.logps.double(), want, rtol=1e-5, atol=1e-5)
    assert got.sum_sq_probs.isfinite().all()
    for leaf, grad in zip((hidden, weight), expected, strict=True):
        torch.testing.assert_close(
            leaf.grad, grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest(grad)
        )


@pytest.mark.parametrize("size", [3e3, 1e5])
@pytest.mark.parametrize("in_hardware", [True, False])
def test_bfloat16_gradients_survive_huge_logits(monkeypatch, in_hardware, size):
    """The nearest bfloat16 to a peak of 1e5 may be 256 away from it: no exponential survives that."""
    monkeypatch.setattr(recompute, "bfloat16_in_hardware", lambda: in_hardware)
    rng = torch.Generator().manual_seed(0)
    hidden = (1 + torch.rand(12, 16, generator=rng)).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(90, 16, generator=rng) * 0.01 + size / 16).to(torch.bfloat16).requires_grad_()
    weight.data[::2] = weight.data[0]  # logits of the same size, so that no token is certain
    labels = torch.randint(90, (12,), generator=rng)
    exact = [doubled(x) for x in (hidden, weight)]
    want = naive(*exact, labels).logps
    want.sum().backward()
    got = tiled.token_stats(hidden, weight, labels, tile=(5, 16))
    got.logps.sum().backward()
    torch.testing.assert_close(got.logps.double(), want, rtol=1e-5, atol=size * 1e-6)
    for ours, theirs, unit in zip((hidden, weight), exact, (largest(weight), largest(hidden)), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-2 * unit)


@pytest.mark.parametrize("backend", ON_CPU)
def test_statistics_not_asked_for_are_none(backend):
    inputs = case(5, 8, 20)[:3]
    full = token_stats(*inputs, stats=ALL, backend=backend)
    assert token_stats(*inputs, backend=backend)[1:] == (None,)
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
    for name in ON_CPU:
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
        "use bfloat16": {"hidden": hidden.half(), "weight": weight.half()},
    }.items():
        with pytest.raises(ValueError, match=message):
            token_stats(**{"hidden": hidden, "weight": weight, "labels": labels} | change)
    outside = tiled.token_stats(hidden, weight, torch.tensor([0, 1, -100, 20, 2]))
    assert outside.logps.isnan().tolist() == [False, False, True, True, False]


def test_auto_takes_triton_on_cuda_only(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr("sage.model.kernels.has_triton", lambda: True)
    assert choose_backend(cuda, torch.bfloat16) == "triton"
    assert choose_backend(cuda, torch.float32) == choose_backend(cpu, torch.bfloat16) == "tiled"
    monkeypatch.setattr("sage.model.kernels.has_triton", lambda: False)
    assert choose_backend(cuda, torch.bfloat16) == "tiled"


@pytest.fixture
def fused(monkeypatch):
    """The Triton backend with blocks of a size that several fit a small case."""
    fused = pytest.importorskip("sage.model.kernels.fused")
    monkeypatch.setattr(fused, "GROUP", 2)
    monkeypatch.setattr(fused, "blocks", lambda hidden: (16, 32, 16, 4, 2))
    if TRITON_DEVICE == "cpu":
        from triton.runtime import interpreter

        multiply = interpreter.InterpreterBuilder.create_dot

        def widened(self, a, b, *rest):
            """The interpreter multiplies bfloat16 as the uint16 that it keeps it in."""
            return multiply(self, *(bfloat16_as_float32(x) for x in (a, b)), *rest)

        def bfloat16_as_float32(x):
            if x.dtype.scalar != interpreter.tl.bfloat16:
                return x
            data = (x.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(data, interpreter.tl.float32)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
    return fused


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shape", [(0, 8, 11), (1, 1, 1), (7, 16, 37), (50, 40, 90)], ids=str)
def test_triton_matches_naive(fused, shape, head, dtype):
    """Ragged rows, columns and inner blocks; several tiles of the backward pass in both directions."""

    def backend(*args, **options):
        return fused.token_stats(*args, tile=(40, 50), **options)

    check(backend, shape, head, dtype, device=TRITON_DEVICE)


@needs_triton
def test_triton_through_the_front_door(fused):
    """It computes the statistics asked for and no others, repeats bit for bit, and refuses float64.

    A label outside the vocabulary gives NaN.
    """
    hidden, weight, labels, _ = (x if x is None else x.to(TRITON_DEVICE) for x in case(9, 8, 70))
    full = token_stats(hidden, weight, labels, stats=ALL, backend="triton")
    for name in ALL:
        got = token_stats(hidden, weight, labels, stats=(name,), backend="triton")
        assert [f for f in ALL if getattr(got, f) is not None] == [name]
        assert torch.equal(getattr(got, name), getattr(full, name))
    labels[2], labels[4] = -100, 70
    assert fused.token_stats(hidden, weight, labels).logps.isnan().nonzero().flatten().tolist() == [2, 4]
    with pytest.raises(ValueError, match="choose tiled"):
        token_stats(hidden.double(), weight.double(), labels.clamp(0, 69), backend="triton")


@needs_triton
@pytest.mark.parametrize("sign", [1, -1])
def test_triton_extreme_logits_stay_finite(fused, sign):
    """Logits in +-1e4, across several blocks, with certain and impossible labels, as above for the others."""
    hidden = torch.full((4, 1), 1e4 * sign, device=TRITON_DEVICE, requires_grad=True)
    weight = torch.linspace(-1, 1, 101, device=TRITON_DEVICE)[:, None].requires_grad_()
    labels = torch.tensor([0, 100, 50, 1], device=TRITON_DEVICE)
    got = fused.token_stats(hidden, weight, labels, stats=ALL, softcap=2e4)
    got.logps.sum().backward()
    assert all(x.isfinite().all() for x in (*got, hidden.grad, weight.grad))
