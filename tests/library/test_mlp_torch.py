"""The fused layer in what torch offers: autograd, autocast, compile, checkpoint, hooks, copies."""

import contextlib
import copy
import importlib
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from blocksched import extension
from blocksched.mlp import EPS, FusedMLP, mlp, mlp_ref

needs_cpp = pytest.mark.skipif(not extension.HAS_CPP, reason="the extension is missing")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GPU_PART = pytest.mark.skipif(not extension.HAS_CUDA, reason="built without CUDA")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, GPU_PART])
devices = pytest.mark.parametrize("device", ["cpu", CUDA])
SUBSETS = list(itertools.product([False, True], repeat=4))


def tensors(rows=24, d=8, hidden=12, dtype=F32, device="cpu"):
    """x, w1, w2, norm_weight and dy."""
    random = torch.Generator().manual_seed(0)
    shapes = (rows, d), (hidden, d), (d, hidden), (d,), (rows, d)
    return [torch.randn(s, generator=random).to(device, dtype) for s in shapes]


def layer(d=8, hidden=12, backend="fused", **options):
    torch.manual_seed(0)
    made = FusedMLP(d, hidden, backend=backend, **options)
    if made.norm_weight is not None:
        nn.init.uniform_(made.norm_weight, 0.5, 1.5)
    return made


def outcome(function, x, dy, parameters=()):
    """y, dx and the gradients of the parameters."""
    x = x.detach().requires_grad_()
    parameters = list(parameters)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


def same(got, want):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


def saved(function, *parameters):
    """Bytes kept for backward but for those of the parameters; and the result."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function()
    return sum(size for at, size in storages.items() if at not in own), y


@needs_cpp
@devices
@pytest.mark.parametrize("needs", SUBSETS[1:], ids=str)
def test_gradients_of_any_of_its_inputs(needs, device):
    *given, _ = tensors(5, 4, 6, F64, device)
    given = [t.requires_grad_(n) for t, n in zip(given, needs, strict=True)]
    torch.autograd.gradcheck(mlp, (*given, EPS, "fused"))
    y = mlp(*given, backend="fused")
    y.sum().backward()
    assert [t.grad is not None for t in given] == list(needs)


@needs_cpp
@devices
def test_no_second_derivative(device):
    x, w1, w2, _, _ = tensors(device=device)
    y = mlp(x.requires_grad_(), w1.requires_grad_(), w2, backend="fused")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    said = "the fused layer has no second derivative: use backend='eager' where it is needed"
    with pytest.raises(RuntimeError, match=said):
        dx.sum().backward()


@needs_cpp
@devices
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8), (8,)], ids=str)
def test_ops_as_torch_wants_them(shape, dtype, device):
    _, w1, w2, _, _ = tensors(dtype=dtype, device=device)
    x = w1.new_ones(shape[::-1]).permute(*range(len(shape))[::-1])
    ops = torch.ops.blocksched
    torch.library.opcheck(ops.mlp_inference, (x, w1, w2, EPS, False))
    _, h, scale = ops.mlp_forward(x, w1, w2, EPS, True)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(ops.mlp_backward, (x, x, w1, w2, h, scale, True, *needs))
    torch.library.opcheck(ops.mlp_forward, (x, w1, w2.requires_grad_(), EPS, False))


@needs_cpp
@devices
def test_what_is_kept_has_no_gradient(device):
    x, w1, w2, _, _ = tensors(device=device)
    kept = torch.ops.blocksched.mlp_forward(x.requires_grad_(), w1, w2, EPS, True)
    assert [t.requires_grad for t in kept] == [True, False, False]


@needs_cpp
@devices
@pytest.mark.parametrize("changed", ["x", "w1", "w2"])
def test_autograd_notices_what_was_changed(changed, device):
    given = dict(zip(("x", "w1", "w2"), tensors(device=device), strict=False))
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    y = mlp(**leaves, backend="fused")
    with torch.no_grad():
        leaves[changed] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_cpp
@devices
def test_y_may_be_changed(device):
    x, w1, w2, _, dy = tensors(device=device)
    w1.requires_grad_()
    want = outcome(lambda x: mlp(x, w1, w2, backend="fused"), x, dy, [w1])
    got = outcome(lambda x: mlp(x, w1, w2, backend="fused").add_(1), x, dy, [w1])
    assert same(got[1:], want[1:])


@needs_cpp
@devices
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_it_keeps_at_most_six_tenths_of_eager_torch(dtype, autocast, device):
    x, w1, w2, _, _ = tensors(2048, 32, 128, dtype, device)
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    with torch.autocast(device, BF16, enabled=autocast):
        fused, auto, eager = (
            saved(lambda b=b: mlp(*leaves, backend=b), w1, w2)[0]
            for b in ("fused", "auto", "eager")
        )
    assert 0 < fused <= 0.6 * eager
    assert auto == fused


@needs_cpp
@devices
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "no leaf"])
def test_without_a_graph_nothing_is_kept(mode, device):
    made = layer(norm_weight=True, device=device)
    x, dy = tensors(device=device)[::4]
    want = outcome(made, x, dy)[0]
    if mode == "no leaf":
        made.requires_grad_(False)
    with contextlib.nullcontext() if mode == "no leaf" else getattr(torch, mode)():
        size, y = saved(lambda: made(x), *made.parameters())
    assert size == 0
    assert not y.requires_grad
    assert y.is_inference() == (mode == "inference_mode")
    torch.testing.assert_close(y.clone(), want)


@needs_cpp
@devices
@pytest.mark.parametrize("cast", [BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_autocast_gives_what_eager_torch_gives(dtype, cast, device):
    x, _, _, _, dy = tensors(200, 16, 64, dtype, device)
    made, plain = (layer(16, 64, b, device=device) for b in ("fused", "eager"))
    with torch.autocast(device, cast):
        dy = dy.to(torch.promote_types(dtype, cast))
        got, want = (outcome(m, x, dy, m.parameters()) for m in (made, plain))
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert [t.shape for t in got] == [t.shape for t in want]


@needs_cpp
@devices
def test_autocast_leaves_float64_alone(device):
    x, _, _, _, dy = tensors(dtype=F64, device=device)
    made = layer(norm_weight=True, dtype=F64, device=device)
    want = outcome(made, x, dy, made.parameters())
    with torch.autocast(device, BF16):
        assert same(outcome(made, x, dy, made.parameters()), want)


@needs_cpp
@devices
@pytest.mark.parametrize("cast", [BF16, F16], ids=str)
def test_autocast_adds_x_at_its_own_precision(cast, device):
    """What is added to x and to dy is at most twice as far off as eager torch's, and an eps."""
    x, _, _, _, dy = tensors(200, 16, 64, F32, device)
    x = x + 1000
    x[0] = 1000
    made, plain = (layer(16, 64, b, norm_weight=True, device=device) for b in ("fused", "eager"))
    exact = copy.deepcopy(plain).double()
    with torch.autocast(device, cast):
        got, own = (outcome(m, x, dy, m.parameters()) for m in (made, plain))
    want = outcome(exact, x.double(), dy.double(), exact.parameters())
    for i, (g, o, w) in enumerate(zip(got, own, want, strict=True)):
        base = (x, dy, 0)[min(i, 2)]
        off = [((t.double() - w).norm() / (w - base).norm()).item() for t in (g, o)]
        assert off[0] <= 2 * off[1] + torch.finfo(cast).eps, (i, off)
        assert g.dtype == F32


@pytest.fixture
def inductor():
    """Its import warns, and what is compiled is forgotten."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")
    yield
    torch.compiler.reset()


@needs_cpp
@pytest.mark.usefixtures("inductor")
@devices
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, device):
    """Any number of rows in one graph. The gradient of norm_weight is a sum of torch's own."""
    made = layer(norm_weight=True, device=device)
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    parameters = list(made.parameters())
    for rows, stance in ((24, "default"), (7, "fail_on_recompile"), (600, "fail_on_recompile")):
        x, _, _, _, dy = tensors(rows, device=device)
        want = outcome(made, x, dy, parameters)
        x = x.requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance(stance):
            y = compiled(x)
            got = [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]
        if backend == "inductor":
            torch.testing.assert_close(got.pop(2), want.pop(2))
        assert same(got, want)


@needs_cpp
@pytest.mark.usefixtures("inductor")
@devices
@pytest.mark.parametrize("needs", [False, True])
def test_compiled_for_batches_as_they_come(needs, device):
    """The second size makes the graph dynamic; no graph of none or one row is asked for."""
    made = layer(device=device).requires_grad_(needs)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for rows in (24, 7, 600, 513):
        x, _, _, _, dy = tensors(rows, device=device)
        with torch.compiler.set_stance("default" if rows in (24, 7) else "fail_on_recompile"):
            if needs:
                assert same(outcome(compiled, x, dy), outcome(made, x, dy))
            else:
                assert torch.equal(compiled(x), made(x))


@needs_cpp
@pytest.mark.usefixtures("inductor")
@devices
def test_compiled_under_autocast(device):
    made = layer(norm_weight=True, device=device)
    x, _, _, _, dy = tensors(device=device)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, BF16):
        got, want = (outcome(m, x, dy, made.parameters()) for m in (compiled, made))
    assert same(got, want)


@needs_cpp
@devices
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, device):
    made = layer(norm_weight=True, device=device)
    x, _, _, _, dy = tensors(device=device)

    def run(x):
        return checkpoint(made, x, use_reentrant=use_reentrant)

    runs = []
    for function in (made, run):
        made.zero_grad()
        x = x.detach().requires_grad_()
        size, y = saved(lambda f=function, x=x: f(x), x, *made.parameters())
        y.backward(dy)
        runs.append((size, [y.detach(), x.grad, *(p.grad for p in made.parameters())]))
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] > runs[1][0] == 0


class Plain(nn.Module):
    def __init__(self, d=8, hidden=12):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d, bias=False)


def test_the_weights_of_a_plain_module_are_its_own():
    made, plain = FusedMLP(8, 12), Plain()
    assert list(made.state_dict()) == list(plain.state_dict())
    made.load_state_dict(plain.state_dict())
    assert torch.equal(made.fc1.weight, plain.fc1.weight)
    Plain().load_state_dict(made.state_dict())
    named = FusedMLP(8, norm_weight=True, dtype=BF16)
    assert {name: (*t.shape,) for name, t in named.state_dict().items()} == {
        "norm_weight": (8,), "fc1.weight": (32, 8), "fc2.weight": (8, 32)
    }  # fmt: skip
    assert {t.dtype for t in named.parameters()} == {BF16}
    assert torch.equal(named.norm_weight, torch.ones(8, dtype=BF16))


@needs_cpp
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(twin):
    made = layer(norm_weight=True, eps=0.5)
    x, _, _, _, dy = tensors()
    other = twin(made)
    want = outcome(made, x, dy, made.parameters())
    assert same(outcome(other, x, dy, other.parameters()), want)
    with torch.no_grad():
        other.fc1.weight.zero_()
    assert torch.equal(other(x), x)
    assert torch.equal(made(x), want[0])


@needs_cpp
@devices
@pytest.mark.parametrize("norm_weight", [False, True])
def test_the_module_is_the_function(norm_weight, device):
    x, _, _, _, dy = tensors(device=device)
    for backend in ("auto", "fused", "eager"):
        made = layer(backend=backend, norm_weight=norm_weight, eps=0.5, device=device)
        given = made.fc1.weight, made.fc2.weight, made.norm_weight, 0.5
        got = outcome(made, x, dy, made.parameters())
        want = outcome(lambda x, g=given, b=backend: mlp(x, *g, b), x, dy, made.parameters())
        assert same(got, want)
        assert f"backend='{backend}'" in repr(made)
        if backend == "eager":
            assert same(got, outcome(lambda x, g=given: mlp_ref(x, *g), x, dy, made.parameters()))


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16, torch.int32], ids=str)
def test_auto_is_the_extension_where_it_serves(dtype):
    x, w1, w2, _, _ = tensors()
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    if dtype == torch.int32:
        with pytest.raises(NotImplementedError, match="rms_norm"):
            mlp(x, w1, w2)
        return
    w1.requires_grad_()
    size = {b: saved(lambda b=b: mlp(x, w1, w2, backend=b))[0] for b in ("auto", "fused", "eager")}
    assert size["auto"] == size["fused"] != size["eager"]
    assert mlp(x.to("meta"), w1.to("meta"), w2.to("meta")).shape == x.shape


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "HAS_CPP", False)
    monkeypatch.setattr(extension, "reason", "no compiler: get one")
    x, w1, w2, norm_weight, _ = tensors()
    assert torch.equal(mlp(x, w1, w2, norm_weight), mlp_ref(x, w1, w2, norm_weight))
    assert same(layer(backend="auto")(x), layer(backend="eager")(x))
    missing = "^backend='fused' needs the extension, which is missing: no compiler: get one "
    for call in (lambda: layer(backend="fused"), lambda: mlp(x, w1, w2, backend="fused")):
        with pytest.raises(ValueError, match=missing):
            call()


def test_what_cannot_be_asked_for():
    x, w1, w2, _, _ = tensors()
    none = r"^backend must be one of auto, fused, eager, got 'fast'$"
    for call in (lambda: FusedMLP(8, backend="fast"), lambda: mlp(x, w1, w2, backend="fast")):
        with pytest.raises(ValueError, match=none):
            call()
    for d, hidden in ((0, 1), (8, 0)):
        with pytest.raises(
            ValueError, match=f"^d and hidden must be at least 1, got {d} and {hidden}$"
        ):
            FusedMLP(d, hidden)


@needs_cpp
@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        ({"x": (24, 9)}, r"\[24, 9\], \[12, 8\], \[8, 12\]"),
        ({"x": ()}, r"\[\], \[12, 8\], \[8, 12\]"),
        ({"w1": (12, 9)}, r"\[24, 8\], \[12, 9\], \[8, 12\]"),
        ({"w2": (8, 13)}, r"\[24, 8\], \[12, 8\], \[8, 13\]"),
        ({"x": (), "w1": (8,), "w2": (8,)}, r"\[\], \[8\], \[8\]"),
        ({"w1": (8,)}, r"\[24, 8\], \[8\], \[8, 12\]"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_shapes_that_do_not_fit(given, shapes, backend):
    arguments = dict(zip(("x", "w1", "w2"), tensors(), strict=False))
    arguments |= {name: torch.ones(shape) for name, shape in given.items()}
    with pytest.raises(ValueError, match=f"must fit, got {shapes}: check d$"):
        mlp(**arguments, backend=backend)
    with pytest.raises(RuntimeError, match="check their shapes"):
        torch.ops.blocksched.mlp_inference(*arguments.values(), EPS, True)


@needs_cpp
def test_what_the_extension_does_not_serve():
    x, w1, w2, _, _ = tensors()
    for other, said in ((x.int(), "torch.int32 on cpu"), (x.to("meta"), "torch.float32 on meta")):
        said = f"^backend='fused' does not serve {said}: use 'auto', which is eager torch there$"
        with pytest.raises(ValueError, match=said):
            mlp(other, w1, w2, backend="fused")
    with pytest.raises(RuntimeError, match="x and weights of one dtype: cast x, or use autocast"):
        mlp(x.double(), w1, w2, backend="fused")
    with pytest.raises(RuntimeError, match="x and weights of one dtype"):
        mlp(x, w1, w2.half(), backend="fused")
    with pytest.raises(RuntimeError, match="takes float32, float64, bfloat16 and float16: cast x"):
        torch.ops.blocksched.mlp_inference(x.int(), w1.int(), w2.int(), EPS, True)


class Adapted(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapt(made, name):
    setattr(made, name, Adapted(getattr(made, name)))


def subclass(made, name):
    getattr(made, name).__class__ = Doubled


def bias(made, name):
    getattr(made, name).bias = nn.Parameter(torch.ones(getattr(made, name).out_features))


def parametrization(made, name):
    parametrize.register_parametrization(getattr(made, name), "weight", Twice())


HOOKS = {  # called with the module, then these
    "forward_hook": lambda *given: 2 * given[2],
    "forward_pre_hook": lambda *given: 2 * given[1][0],
    "full_backward_hook": lambda *given: (2 * given[1][0],),
    "full_backward_pre_hook": lambda *given: (2 * given[1][0],),
}


def hooked(kind):
    return lambda made, name: getattr(getattr(made, name), f"register_{kind}")(HOOKS[kind])


CHANGES = {
    **{change.__name__: change for change in (adapt, subclass, bias, parametrization)},
    **{kind: hooked(kind) for kind in HOOKS},
}


@needs_cpp
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["fc1", "fc2"])
@pytest.mark.parametrize("norm_weight", [False, True])
def test_what_replaces_or_hooks_a_layer_is_called(norm_weight, name, change):
    made = layer(backend="auto", norm_weight=norm_weight, eps=0.5)
    x, _, _, _, dy = tensors()
    plain = outcome(made, x, dy)
    change(made, name)

    def by_hand(x):
        normed = functional.rms_norm(x, (8,), made.norm_weight, 0.5)
        return x + made.fc2(functional.relu(made.fc1(normed)).square())

    got = outcome(made, x, dy)
    assert same(got, outcome(by_hand, x, dy))
    assert not all(map(torch.allclose, got, plain))
    made.backend = "fused"
    said = "^backend='fused' computes with the weights of fc1 and fc2 and would pass over what repl"
    with pytest.raises(ValueError, match=said):
        made(x)


@pytest.mark.cuda
@GPU_PART
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_in_a_cuda_graph(dtype):
    made = layer(norm_weight=True, device="cuda", dtype=dtype)
    x, _, _, _, dy = tensors(dtype=dtype, device="cuda")
    x.requires_grad_()
    leaves = [x, *made.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(made(x), leaves, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    with torch.no_grad():
        for t in (*leaves, dy):
            t.copy_(torch.randn_like(t))
    graph.replay()
    assert same(got, outcome(made, x, dy, made.parameters()))
