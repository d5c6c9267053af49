"""The fused layer's numbers: beside eager torch's in float64, row by row, and only those asked."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.profiler import profile

from blocksched import extension
from blocksched.mlp import EPS, FusedMLP, mlp, mlp_ref

pytestmark = pytest.mark.skipif(not extension.HAS_CPP, reason="the extension is missing")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GPU_PART = pytest.mark.skipif(not extension.HAS_CUDA, reason="built without CUDA")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, GPU_PART])
devices = pytest.mark.parametrize("device", ["cpu", CUDA])
dtypes = pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=["f32", "f64", "bf16", "f16"])
SUBSETS = list(itertools.product([False, True], repeat=3))
SHAPES = [
    ((7, 5, 9), 12), ((3, 5, 6), 24), ((1,), 4), ((40, 1), 8), ((40, 8), 1),
    ((511, 17), 65), ((512, 16), 64), ((513, 17), 65), ((1300, 16), 64),  # a span is 512 rows
    ((30, 1025), 33), ((30, 24), 1025),  # a tile is 1024 numbers
]  # fmt: skip
ids = [f"{'x'.join(map(str, shape))}-{hidden}" for shape, hidden in SHAPES]


@pytest.fixture(autouse=True)
def one_thread():
    """More of them wait for one another most of the time in what is this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(shape, hidden, seed=0):
    """x, w1, w2, norm_weight and dy in float64."""
    random = torch.Generator().manual_seed(seed)
    d = shape[-1]
    x, w1, w2, dy = (
        torch.randn(s, generator=random, dtype=F64)
        for s in (shape, (hidden, d), (d, hidden), shape)
    )
    x += 0.5 * x.sign()  # no row near 0, so that none outweighs all others in dx
    norm_weight = 0.5 + torch.rand(d, generator=random, dtype=F64)
    return [x, w1 / d**0.5, w2 / hidden**0.5, norm_weight, dy]


def cast(tensors, dtype, device=None):
    return [None if t is None else t.to(device, dtype) for t in tensors]


def outcome(function, given):
    """y without a gradient, y, dx, dw1, dw2 and, with a norm_weight, its. The last given is dy."""
    *given, dy = given
    leaves = [t if t is None else t.detach().requires_grad_() for t in given]
    with torch.no_grad():
        inferred = function(*leaves)
    y = function(*leaves)
    y.backward(dy)
    return [inferred, y.detach()] + [t.grad for t in leaves if t is not None]


def exactly(given, eps):
    """What `outcome` gives, in longdouble: more bits than float64 where the CPU has them."""
    x, w1, w2, norm_weight, dy = (
        None if t is None else t.numpy().astype(np.longdouble) for t in given
    )
    shape, d = x.shape, x.shape[-1]
    x, dy = x.reshape(-1, d), dy.reshape(-1, d)
    weight = np.ones(d, np.longdouble) if norm_weight is None else norm_weight
    scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.longdouble(eps))
    normed = x * scale
    z = (normed * weight) @ w1.T
    y = x + np.square(np.maximum(z, 0)) @ w2.T
    dz = 2 * np.maximum(z, 0) * (dy @ w2)
    dw1, dw2 = dz.T @ (normed * weight), dy.T @ np.square(np.maximum(z, 0))
    into = dz @ w1
    pull = into * weight
    dx = dy + scale * (pull - normed * (pull * normed).mean(-1, keepdims=True))
    y, dx = y.reshape(shape), dx.reshape(shape)
    return [y, y, dx, dw1, dw2] + [(into * normed).sum(0)] * (norm_weight is not None)


def cast_back(arrays):
    return [torch.from_numpy(np.asarray(a, np.float64)) for a in arrays]


def terms(given, want, eps):
    """Sizes that roundings go with: where a result is a sum that cancels, those of its terms."""
    x, w1, w2, norm_weight, dy = given
    _, y, _, dw1, dw2, *_ = want
    normed = functional.rms_norm(x, x.shape[-1:], None, eps).requires_grad_()
    weighted = normed if norm_weight is None else normed * norm_weight
    out = functional.linear(functional.relu(functional.linear(weighted, w1)).square(), w2)
    pull = torch.autograd.grad(out, normed, dy)[0] * (x.square().mean(-1, True) + eps).rsqrt()
    sizes = [*2 * [x.abs() + (y - x).abs()], dy.abs() + pull.abs(), dw1.abs(), dw2.abs()]
    return sizes if norm_weight is None else [*sizes, (dw1 * w1 / norm_weight).abs().sum(0)]


def errors(functions, draws, dtype, device, eps):
    """Norm-wise and largest error of each result over all draws, in eps of the dtype."""
    offs, sizes = [[] for _ in functions], []
    for given in draws:
        rounded = cast(given, dtype, device)
        want = exactly(cast(rounded, F64, "cpu"), eps)
        sizes.append(terms(cast(rounded, F64, "cpu"), cast_back(want), eps))
        for function, off in zip(functions, offs, strict=True):
            got = outcome(functools.partial(function, eps=eps), rounded)
            assert [(t.shape, t.dtype) for t in got] == [(t.shape, dtype) for t in want]
            off.append(cast_back(g.double().cpu().numpy() - w
                                 for g, w in zip(got, want, strict=True)))  # fmt: skip
    return [summary(off, sizes) / torch.finfo(dtype).eps for off in offs]


def summary(off, sizes):
    pairs = zip(zip(*off, strict=True), zip(*sizes, strict=True), strict=True)
    pairs = [(torch.stack(o), torch.stack(s)) for o, s in pairs]
    return torch.tensor([[o.norm() / s.norm(), o.abs().max() / s.max()] for o, s in pairs])


def check(function, draws, dtype, device="cpu", eps=EPS):
    """At most twice eager torch's own error in this dtype, and an eps.

    In float64 that of the same sums in eager torch: on some CPUs MKL's addmm errs there up to twice
    as much as its product and a sum, and the largest error of a long sum depends on its layout.
    """
    eager = summed_ref if dtype == F64 else mlp_ref
    got, own = errors([function, eager], draws, dtype, device, eps)
    if dtype == F64:
        own[2] = torch.maximum(own[1], own[2])  # dx begins with dy as y does with x
    assert (got <= 2 * own + 1).all(), f"{got} where eager torch has {own}"


def summed_ref(x, w1, w2, norm_weight=None, eps=EPS):
    """mlp_ref as the extension sums: rows are normalised after the product, x is where y starts."""
    rows = x.reshape(-1, x.shape[-1])
    w1 = w1 if norm_weight is None else w1 * norm_weight
    z = functional.linear(rows, w1) * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    return torch.addmm(rows, functional.relu(z).square(), w2.T).reshape(x.shape)


def fused(x, w1, w2, norm_weight=None, eps=EPS):
    return mlp(x, w1, w2, norm_weight, eps, backend="fused")


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@devices
@dtypes
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=ids)
def test_like_eager_torch(shape, hidden, dtype, device):
    enough = 40_000 // (math.prod(shape) * hidden)  # that no single rounding decides
    draws = [draw(shape, hidden, seed) for seed in range(min(max(enough, 2), 40))]
    check(fused, draws, dtype, device)


@devices
@dtypes
@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_rows_of_any_norm(scale, dtype, device):
    draws = [draw((40, 16), 64, seed) for seed in range(4)]
    for given in draws:
        given[0] *= scale if dtype != F16 else scale**0.1
    check(fused, draws, dtype, device)


@devices
@dtypes
def test_eps(dtype, device):
    check(fused, [draw((40, 16), 64, seed) for seed in range(4)], dtype, device, eps=0.5)


@devices
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_eps_is_what_rms_norm_takes_by_itself(dtype, device):
    x, w1, w2, *_ = cast(draw((40, 16), 64), dtype, device)
    x = x * EPS**0.5
    hidden = functional.relu(functional.linear(functional.rms_norm(x, (16,)), w1)).square()
    assert torch.equal(mlp_ref(x, w1, w2), x + functional.linear(hidden, w2))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "part of rows": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@devices
@dtypes
@layouts
@pytest.mark.parametrize("which", ["x", "w1", "w2", "dy"])
def test_of_any_layout(which, layout, dtype, device):
    def function(x, w1, w2, norm_weight, eps):
        given = {"x": x, "w1": w1, "w2": w2}
        if which != "dy":
            given[which] = layout(given[which])
            assert given[which].storage_offset() or not given[which].is_contiguous()
        y = fused(**given, norm_weight=norm_weight, eps=eps)
        if which == "dy" and y.requires_grad:
            y.register_hook(layout)
        return y

    x, w1, w2, _, dy = draw((600, 16), 24)
    check(function, [[x, w1, w2, None, dy]], dtype, device)


@devices
def test_of_one_number_for_many(device):
    """As `sum` makes them for dy."""
    x, w1, w2, _, dy = cast(draw((6, 5, 8), 24), F32, device)
    one = x[:1, :1].expand_as(x)
    got, want = (outcome(fused, [t, w1, w2, dy]) for t in (one, one.contiguous()))
    assert same(got, want)
    want = outcome(fused, [x, w1, w2, torch.ones_like(dy)])
    assert same(outcome(fused, [x, w1, w2, dy[0, 0, 0].fill_(1).expand_as(dy)]), want)


@devices
@dtypes
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, dtype, device):
    given = cast(draw(shape, 24), dtype, device)
    got = outcome(fused, given)
    assert same(got, [torch.zeros_like(t) for t in [given[0], given[0], *given[:4]]])


@devices
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 4], ids=["x", "dy"])
@pytest.mark.parametrize("row", [3, 600])
def test_what_is_no_number_stays_in_its_row(row, which, bad, dtype, device):
    given = cast(draw((700, 16), 24), dtype, device)
    given[3] = None
    clean = outcome(fused, given)
    given[which][row, 5] = bad
    got, own = outcome(fused, given), outcome(mlp_ref, given)
    others = torch.arange(700) != row
    assert same([t[others] for t in got[:3]], [t[others] for t in clean[:3]])
    assert same([t[row].isfinite() for t in got[:3]], [t[row].isfinite() for t in own[:3]])
    assert not got[2][row].isfinite().all()


@devices
@dtypes
def test_rows_without_a_hidden_unit_on_pass_as_they_are(dtype, device):
    """Even where the gradient of a unit that is off overflows."""
    x, w1, w2, _, dy = cast(draw((9, 16), 24), dtype, device)
    x, w1, w2 = -x.abs(), w1.abs(), torch.full_like(w2, torch.finfo(dtype).max)
    x[4] = 0
    inferred, y, dx, dw1, dw2 = outcome(fused, [x, w1, w2, 8 * dy])
    assert same([inferred, y, dx], [x, x, 8 * dy])
    assert not dw1.any()
    assert not dw2.any()


@devices
@dtypes
def test_a_row_of_zeros_among_others(dtype, device):
    x, *given, dy = cast(draw((9, 16), 24), dtype, device)
    x[4] = 0
    inferred, y, dx, *_ = outcome(fused, [x, *given, dy])
    assert same([inferred[4], y[4], dx[4]], [x[4], x[4], dy[4]])
    assert (y != x).any(-1).sum() == 8


def exact(device, rows=1300, d=1025):
    """Weights with one power of 2 in each row and column, so that a product of x is exact, and what
    is not is what the passes do."""
    random = torch.Generator().manual_seed(1)
    x, _, _, _, dy = cast(draw((rows, d), 1), F32, device)
    w1, w2 = torch.zeros(2, d, d)
    w1[torch.arange(d), torch.randperm(d, generator=random)] = 2.0
    w2[torch.arange(d), torch.randperm(d, generator=random)] = -0.5
    return x, w1.to(device), w2.to(device), dy


def ops_outcome(x, w1, w2, dy):
    """y, h, the scale and dx: a row of each from the same row."""
    forward = torch.ops.blocksched.mlp_forward(x, w1, w2, EPS, True)
    backward = torch.ops.blocksched.mlp_backward(
        dy, x, w1, w2, *forward[1:], True, True, False, False
    )
    return [*forward, backward[0]]


@pytest.mark.parametrize("threads", [2, 3])
def test_the_passes_give_the_same_bits_for_any_threads(threads):
    given = exact("cpu")
    want = ops_outcome(*given)
    torch.set_num_threads(threads)
    assert same(ops_outcome(*given), want)


@devices
def test_a_row_has_the_same_bits_in_any_batch(device):
    x, w1, w2, dy = exact(device)
    want = ops_outcome(x, w1, w2, dy)
    for rows in (slice(0, 1), slice(511, 514), slice(1299, None)):
        assert same(ops_outcome(x[rows], w1, w2, dy[rows]), [t[rows] for t in want])
    assert torch.equal(torch.ops.blocksched.mlp_inference(x, w1, w2, EPS, True), want[0])


@devices
@dtypes
def test_the_same_bits_in_every_run(dtype, device):
    given = cast(draw((1300, 16), 64), dtype, device)
    want = outcome(fused, given)
    assert all(same(outcome(fused, given), want) for _ in range(3))


@devices
@dtypes
@pytest.mark.parametrize("residual", [True, False])
def test_only_what_is_asked_for_is_returned(residual, dtype, device):
    x, w1, w2, _, dy = cast(draw((600, 16), 24), dtype, device)
    _, h, scale = torch.ops.blocksched.mlp_forward(x, w1, w2, EPS, residual)
    given = dy, x, w1, w2, h, scale, residual
    want = torch.ops.blocksched.mlp_backward(*given, True, True, True)
    for needs in SUBSETS:
        got = torch.ops.blocksched.mlp_backward(*given, *needs)
        assert same(got, [w if n else w.new_empty(0) for w, n in zip(want, needs, strict=True)])


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="counts MKL's products")
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_only_what_is_asked_for_is_computed(needs, capfd):
    x, w1, w2, _, dy = cast(draw((40, 16), 24), F32)
    leaves = [t.requires_grad_(n) for t, n in zip((x, w1, w2), needs, strict=True)]
    with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
        y = fused(*leaves)
        if any(needs):
            y.backward(dy)
    needs_dx, needs_dw1, needs_dw2 = needs
    products = 2 + (needs_dx or needs_dw1) + needs_dx + needs_dw1 + needs_dw2
    assert capfd.readouterr().out.count("GEMM(") == products


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # of torch 2.11
@dtypes
@pytest.mark.parametrize("grad", ["off", "of nothing"])
def test_without_a_gradient_the_hidden_units_are_those_of_512_rows(grad, dtype):
    x, w1, w2, _, _ = cast(draw((5000, 16), 64), dtype)
    w1.requires_grad_(grad == "off")
    with profile(profile_memory=True) as allocations, torch.set_grad_enabled(grad != "off"):
        y = fused(x, w1, w2)
    taken = sum(e.cpu_memory_usage for e in allocations.events() if e.name == "aten::empty")
    wide = max(dtype.itemsize, 4)  # what the products are done in
    span = 512 * (w1.shape[0] + 2 * x.shape[1] + 1) * wide
    assert 0 < taken <= y.nbytes + span + 2 * w1.numel() * wide


@pytest.mark.parametrize(
    ("x", "w1", "norm"),
    [
        ((2, 4), (0, 4), None),
        ((2, 0), (3, 0), None),
        ((2, 4), (3, 4), (1,)),
        ((2, 4), (3, 4), (3,)),
    ],
)
def test_shapes_that_broadcast_or_hold_nothing_are_refused(x, w1, norm):
    weights = torch.ones(w1), torch.ones(w1[::-1]), None if norm is None else torch.ones(norm)
    with pytest.raises(ValueError, match="must"):
        mlp(torch.ones(x), *weights, backend="fused")


def test_backward_refuses_what_forward_did_not_give():
    x, w1, w2 = torch.randn(5, 4), torch.randn(6, 4), torch.randn(4, 6)
    y, h, scale = torch.ops.blocksched.mlp_forward(x, w1, w2, 1e-6, True)
    asked = True, True, True, True
    torch.ops.blocksched.mlp_backward(y, x, w1, w2, h, scale, *asked)
    for dy, hidden, scales in [
        (y[:1], h, scale), (y, h[:1], scale), (y, h.t().contiguous().t(), scale),
        (y, h, scale[:1]), (y, h.double(), scale), (y, h, scale.double()),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match="as mlp_forward gave them"):
            torch.ops.blocksched.mlp_backward(dy, x, w1, w2, hidden, scales, *asked)


def test_a_forward_of_its_own_is_honoured():
    """As accelerate puts one on a module."""
    layer = FusedMLP(4)
    x, plain = torch.randn(3, 4), layer.fc1.forward
    before = layer(x)
    layer.fc1.forward = lambda z: 2 * plain(z)
    torch.testing.assert_close(layer(x) - x, 4 * (before - x))
