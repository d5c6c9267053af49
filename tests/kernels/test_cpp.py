"""The C++ back end of block_sums and AdamW against the references: to the bit where that is due."""

import ctypes
import functools
import math
import platform
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from blocksched import cpu, extension, ops
from blocksched.kernels.adamw import adamw_ref
from blocksched.kernels.block_sums import block_sums_ref
from tests.kernels.test_adamw import Run

pytestmark = pytest.mark.skipif(not extension.HAS_CPP, reason=extension.why_not())
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAN, INF = math.nan, math.inf
# Around the lanes, tiles and chunks of csrc/cpu; enough for four threads.
SIZES = [0, 1, 15, 16, 17, 1023, 1024, 1025, 8191, 8192, 8193, 100001]
BLOCKS = [-1, 0, 0, 1, 1, 2, 2, 3, 4, 3, 2, 3]  # 4 is none of the four
SMALL = [1, 15, 0, 17, 40, 1030]
INTEGERS = {F64: torch.int64, F32: torch.int32, BF16: torch.int16, F16: torch.int16}
adamw = functools.partial(ops.adamw, backend="cpp")
block_sums = functools.partial(ops.block_sums, backend="cpp")
CASES = [  # dtypes of the parameters and of the moments, amsgrad, masters
    (F32, F32, False, False), (F32, F32, True, False), (BF16, F32, False, False),
    (BF16, F32, True, True), (F16, F32, True, False), (F16, F32, False, True),
    (F32, BF16, True, False), (BF16, BF16, False, False), (F16, BF16, False, True),
    (F64, F64, False, False), (F64, F64, True, False),
]  # fmt: skip
cases = pytest.mark.parametrize(("dtype", "moments", "amsgrad", "master"), CASES)


@pytest.fixture
def exact_root(monkeypatch):
    """On a CPU torch's own root is off by a unit in 0.7 % of cases; NumPy's is not."""

    def root(x):
        return torch.as_tensor(np.sqrt(x.numpy()))

    monkeypatch.setattr(torch.Tensor, "sqrt", root)


def bits(tensor):
    """As integers, which tell -0 from 0; one number for every NaN."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view(INTEGERS[tensor.dtype]).masked_fill(tensor.isnan(), -1)


def same(some, others):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(some, others, strict=True))


def runs_of(*arguments, n=2, sizes=SIZES, blocks=BLOCKS, **options):
    runs = [Run("cpu", *arguments, sizes=sizes, **options) for _ in range(n)]
    for run in runs:
        run.blocks = blocks[: len(sizes)]
    return runs


def active(run, boundary):
    return [block >= boundary for block in run.blocks]


@pytest.mark.usefixtures("exact_root")
@cases
def test_the_reference_to_the_bit(dtype, moments, amsgrad, master):
    ours, theirs = runs_of(dtype, moments, amsgrad, master)
    betas = (0.9, 0.999), (0.3, 0.9), (0.0, 0.5), (0.5, 0.0)
    holes = (-1, 1, 3), (0, 2)
    for step, frozen in enumerate(((), (-1, 0), (-1,), (-1, 0, 1), *holes)):
        on = [block not in frozen for block in BLOCKS]
        options = {"betas": betas[step % 4], "maximize": step == 2, "wd": 0.1 * (step != 1)}
        before = [m.clone() for m in ours.m]
        ours.step(adamw, ours.gradients(on), **options)
        theirs.step(adamw_ref, theirs.gradients(on), **options)
        assert same(ours.tensors(), theirs.tensors())
        moved = [not torch.equal(*pair) for pair in zip(before, ours.m, strict=True)]
        assert moved == [n > 0 and trains for n, trains in zip(SIZES, on, strict=True)]
    assert {int(t) for t in ours.steps} == {2, 3, 4, 5, 6}


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize(("dtype", "moments", "master"), [(F32, F32, False), (F16, BF16, True)])
def test_fifty_steps_to_the_bit(dtype, moments, master):
    """With a boundary, a scale and steps to skip, as a GradScaler has them."""
    ours, theirs = runs_of(dtype, moments, True, master, sizes=SMALL)
    for step in range(50):
        options = {
            "lr": 1e-2 * (1 + step % 7),
            "grad_scale": torch.tensor(2.0 ** (step % 5)),
            "found_inf": torch.tensor(float(step % 9 == 8)),
        }
        for run, kernel in ((ours, adamw), (theirs, adamw_ref)):
            run.step(kernel, run.gradients(active(run, step // 5 % 4 - 1)), **options)
        assert same(ours.tensors(), theirs.tensors()), step
    assert 0 < ours.steps[1] < ours.steps[-1] < 50


def test_a_step_against_float64():
    """Of ever smaller updates too: what a number is moved by is within 12 roundings, and p one."""
    generator = torch.Generator().manual_seed(0)
    for t in (0, 1, 9, 99, 999, 10**4, 10**6):
        (run,) = runs_of(n=1, sizes=[5000])
        run.m[0].copy_(torch.randn(5000, generator=generator))
        run.v[0].copy_(torch.rand(5000, generator=generator))
        run.steps[0].fill_(t)
        exact = [x[0].double() for x in (run.params, run.m, run.v)]
        run.step(adamw, grads := run.gradients([True]))
        p, m, v = exact
        g = grads[0].double()
        m, v = m * 0.9 + g * (1 - 0.9), v * 0.999 + (1 - 0.999) * g * g
        root = (v / -math.expm1((t + 1) * math.log(0.999))).sqrt()
        moved = 1e-2 / -math.expm1((t + 1) * math.log(0.9)) * m / (root + 1e-8)
        want = p * (1 - 1e-2 * 0.1) - moved
        unit = 2.0**-24
        # The rise of m is g - m, rounded, times a weight, before that is added to m.
        m_off = unit * (m.abs() + 3 * 0.1 * (g - exact[1]).abs())
        assert ((run.m[0] - m).abs() <= m_off).all()
        assert ((run.v[0] - v).abs() <= 5 * unit * v).all()
        off = 12 * unit * moved.abs() + m_off * (moved / m).abs() + 3 * unit * p.abs()
        assert ((run.params[0] - want).abs() <= off + unit * want.abs()).all()


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("scale", [1024.0, 3.0, 1000.7, 2.0**-20])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_scaled_gradients(dtype, scale):
    ours, theirs = runs_of(dtype, F64 if dtype == F64 else F32, sizes=SMALL)
    for maximize in (False, True):
        options = {"grad_scale": torch.tensor(scale), "maximize": maximize, "sums": True}
        grads = ours.gradients([True] * len(SMALL), scale)
        kept = [g.clone() for g in grads]
        got = ours.step(adamw, grads, **options)
        want = theirs.step(adamw_ref, grads, **options)
        assert same(ours.tensors(), theirs.tensors())
        assert same(grads, kept)
        torch.testing.assert_close(got, want, rtol=tolerance(dtype), atol=0)


@cases
def test_a_skipped_step_changes_nothing(dtype, moments, amsgrad, master):
    (run,) = runs_of(dtype, moments, amsgrad, master, n=1, sizes=SMALL)
    for found in (0.0, 1.0, NAN, 0.0):
        before = [t.clone() for t in run.tensors()]
        grads = run.gradients([True] * len(SMALL))
        got = run.step(adamw, grads, sums=True, found_inf=torch.tensor(found))
        assert same(run.tensors(), before) == (found != 0)
        assert got.shape == (4, 3)
        assert bool(got.isnan().all()) == bool(got.isnan().any()) == (found != 0)
        assert run.step(adamw, grads, found_inf=torch.tensor(1.0)).shape == (0, 3)
    assert run.steps[0] == 2


def gaps(x):
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


def shifted(x):
    storage = torch.full((x.numel() + 3,), 7, dtype=x.dtype)
    return storage[1:-2].view(x.shape).copy_(x)


LAYOUTS = {
    "contiguous": torch.clone,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.clone(),
    "channels last": lambda x: x.clone(
        memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format
    ),
    "gaps": gaps,
    "shifted": shifted,
}


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("of_gradient", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("of_state", LAYOUTS)
@pytest.mark.parametrize("of_weights", LAYOUTS)
def test_layouts(of_weights, of_state, of_gradient):
    """Bytes beside the numbers stay, so whole storages are compared."""
    shapes = [(), (1,), (37,), (12, 31), (2, 3, 4, 5), (3, 1, 0, 2), (6, 1, 2, 1)]
    ours, theirs = runs_of(
        BF16, F32, True, True, sizes=[math.prod(s) for s in shapes], blocks=[0, 1, 2, 3] * 2
    )
    for run in (ours, theirs):
        for name in ("params", "m", "v", "x", "masters"):
            how = LAYOUTS[of_weights if name == "params" else of_state]
            laid = [how(t.view(s)) for t, s in zip(getattr(run, name), shapes, strict=True)]
            setattr(run, name, laid)
    for _ in range(2):
        grads = ours.gradients([True] * len(shapes))
        if of_gradient == "expanded":
            grads = [g[:1].expand_as(g) if g.dim() else g for g in grads]
        else:
            grads = [LAYOUTS[of_gradient](g) for g in grads]
        sums = [
            run.step(kernel, grads, sums=True)
            for run, kernel in ((ours, adamw), (theirs, adamw_ref))
        ]
        torch.testing.assert_close(*sums, rtol=tolerance(BF16), atol=0)
    whole = ([storage_of(t) for t in run.tensors()] for run in (ours, theirs))
    assert same(*whole)


def storage_of(t):
    return t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)


VALUES = [
    0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 1e-30, -1e-20, 1e-8, 6e-8, 6.1e-5,
    1e4, 65504.0, 65520.0, -1e6, 1e19, -2e19, 1e30, 3.4028235e38, -3.3e38, INF, -INF, NAN,
]  # fmt: skip


@pytest.mark.usefixtures("exact_root")
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("maximize", [False, True])
@cases
def test_every_pair_of_values(dtype, moments, amsgrad, master, maximize):
    """Of p, g, m and the roots of v and x: zeros of either sign, subnormal, huge, not finite."""
    values = torch.tensor(VALUES)
    n = len(values)
    ours, theirs = runs_of(dtype, moments, amsgrad, master, sizes=[n * n, n * n])
    for run in (ours, theirs):
        columns = [run.params, run.masters or run.params, run.m, run.v]
        for place, column in enumerate([*columns, run.x] if amsgrad else columns):
            for tensor, turn in zip(column, (0, 3 * place + 1), strict=True):
                numbers = values.roll(turn).repeat(n, 1)
                numbers = (numbers.t() if place % 2 else numbers).flatten()
                squares = place > 2  # of which those past float32 are infinite
                tensor.copy_(numbers.square() if squares else numbers)
    grads = [values.repeat_interleave(n).to(dtype), values.roll(5).repeat(n).to(dtype)]
    for _ in range(3):
        got = ours.step(adamw, grads, sums=True, maximize=maximize)
        want = theirs.step(adamw_ref, grads, sums=True, maximize=maximize)
        assert same(ours.tensors(), theirs.tensors())
        assert torch.equal(got.isfinite(), want.isfinite())
    assert any(t.isnan().any() for t in ours.params)
    assert any(t.isinf().any() for t in ours.params)


def patterns(dtype):
    """Every number of a 16-bit dtype."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def store(floats, dtype):
    """What a step that moves nothing leaves of masters that have these values."""
    (run,) = runs_of(dtype, F32, False, True, n=1, sizes=[len(floats)])
    run.masters = [floats.clone()]
    run.step(adamw, [torch.zeros_like(run.params[0])], lr=0.0)
    assert same(run.masters, [floats])
    return run.params[0]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_reading_every_number_of_16_bits(dtype):
    every = patterns(dtype)
    ours, theirs = runs_of(dtype, sizes=[2**16])
    for run, kernel in ((ours, adamw), (theirs, adamw_ref)):
        run.params = [every.clone()]
        run.step(kernel, [torch.zeros_like(every)], lr=0.0)
        assert same(run.params, [every])  # read and written back
        run.step(kernel, [every.clone()], betas=(0.0, 0.0))
    assert same(ours.m + ours.v, theirs.m + theirs.v)
    assert same([ours.m[0][every.isfinite()]], [every[every.isfinite()].float()])
    for number in patterns(dtype)[:: 2**9]:  # and as the sums read them
        want = number.float().square() if number.isfinite() else number.double().square()
        assert torch.equal(bits(block_sums([number], [None], [0], 1)[0, 2]), bits(want.double()))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_to_16_bits_as_torch(dtype):
    """Every number of the dtype, the middle between neighbours, what lies beside that, and any."""
    every = patterns(dtype)
    every = every[every.isfinite()].float()
    up = torch.nextafter(every.to(dtype), torch.tensor(INF, dtype=dtype)).double()
    up = torch.where(up.isinf(), 2 * every.double() - (every.double() * (1 - 2**-8)).to(dtype), up)
    middle = ((every.double() + up) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(x)) for x in (INF, -INF)]
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    edges = torch.arange(2**16, dtype=torch.int64)[:, None] * 2**16
    edges = edges + torch.tensor([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    edges = edges.to(torch.int32).flatten()
    floats = torch.cat(
        [every, middle, *beside, anything.view(F32), edges.view(F32), torch.tensor(VALUES)]
    )
    want = floats.to(dtype)
    assert same([store(floats, dtype)], [want])
    assert want.isinf().any()
    assert torch.equal(store(floats, dtype).isnan(), floats.isnan())


@pytest.mark.usefixtures("exact_root")
def test_stochastic_rounding_of_every_moment():
    """Read as every bfloat16 there is, and kept by the same random bits; seeds above 2^32."""
    ours, theirs = runs_of(F32, BF16, sizes=[2**16, 17])
    for run, kernel in ((ours, adamw), (theirs, adamw_ref)):
        run.m[0].copy_(patterns(BF16))
        run.v[0].copy_(patterns(BF16).abs())
        for seed, step in ((0, 0), (2**63 - 1, 5), (1 << 32 | 7, 2**20)):
            run.steps[0].fill_(step)
            grads = [torch.full_like(p, 0.1) for p in run.params]
            call(kernel, run, grads=grads, seeds=[seed, 3])
    assert same(ours.tensors(), theirs.tensors())


def test_float16_without_subnormals_elsewhere():
    """Gradients of float16 below 6e-5 are subnormal there, and not in float32."""
    tiny = patterns(F16)[1:1024]
    want = block_sums([tiny], [tiny], [0], 1)
    torch.set_flush_denormal(True)
    try:
        got = block_sums([tiny], [tiny], [0], 1)
    finally:
        torch.set_flush_denormal(False)
    assert got.min() > 0
    assert torch.equal(got, want)


def tolerance(dtype):
    """Of sums of positive terms, from a reference in float64: a term is rounded as a product and in
    at most 63 additions, those of its lane in a tile of 1024, of 16 lanes or more. 2^-41 is more
    than all that is added in float64."""
    return 64 * (2.0**-53 if dtype == F64 else 2.0**-24) + 2.0**-41


def check_sums(params, grads, blocks, n_blocks):
    got = block_sums(params, grads, blocks, n_blocks)
    assert got.dtype == F64
    wide = [p.double() for p in params], [None if g is None else g.double() for g in grads]
    want = block_sums_ref(*wide, blocks, n_blocks)
    rtol = max(tolerance(p.dtype) for p in params)
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)
    return got


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_sums(dtype):
    (run,) = runs_of(dtype, n=1)
    grads = run.gradients([True] * len(SIZES))
    check_sums(run.params, grads, BLOCKS, 4)
    check_sums(run.params, [None] * len(SIZES), BLOCKS, 4)
    some = [g if i % 2 else None for i, g in enumerate(grads)]
    got = check_sums(run.params, some, BLOCKS, 6)
    assert got[5].tolist() == [0.0, 0.0, 0.0]
    far = [-(2**63), *BLOCKS[1:-1], 2**63 - 1]
    assert torch.equal(check_sums(run.params, some, far, 3), block_sums(run.params, some, far, 3))
    for n, p, g in zip(SIZES, run.params, grads, strict=True):
        check_sums([p], [g], [0], 1)
        last = torch.zeros(n, dtype=dtype)
        last[-1:] = 3  # as no tolerance hides
        sums = block_sums([last], [last], [0], 1)
        assert sums.tolist() == [[9.0 if n else 0.0] * 3]


def test_sums_of_mixed_dtypes_and_layouts():
    base = torch.randn(64, 130, generator=torch.Generator().manual_seed(0))
    params = [
        base.t(), base[:, ::2], base.view(-1)[1:2050], base[0, 0], base[:9].bfloat16(),
        base[9].half(), base[:5].double(), shifted(base[3:40].half()), base[:, :0],
    ]  # fmt: skip
    grads = [p.flip(0) * 2 if p.dim() else p for p in params]
    grads[0], grads[1] = grads[0].contiguous(), grads[1][:1].expand_as(params[1])
    check_sums(params, grads, [0, 0, 1, 1, 0, 1, 2, 2, 2], 3)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_no_gradient_counts_nothing_even_of_infinite_weights(dtype):
    p = torch.tensor([1.0, INF, NAN]).to(dtype)
    for weights in (p[:2], p):
        got = block_sums([weights], [None], [0], 1)
        assert same([got], [block_sums_ref([weights], [None], [0], 1)])
        assert got[0, :2].tolist() == [0.0, 0.0]


def test_what_is_not_finite_stays_in_its_block():
    (run,) = runs_of(n=1)
    grads = run.gradients([True] * len(SIZES))
    grads[-1][-1] = NAN
    run.params[3][0] = -INF
    got = block_sums(run.params, grads, BLOCKS, 4)
    want = block_sums_ref(run.params, grads, BLOCKS, 4)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert got[[0, 2]].isfinite().all()


@cases
def test_sums_change_nothing_and_are_those_of_block_sums(dtype, moments, amsgrad, master):
    """To the bit; of the parameters, not of their masters."""
    runs = runs_of(dtype, moments, amsgrad, master)
    for w in runs[0].masters + runs[1].masters:
        w.add_(1e-3)
    for boundary in (-1, 1, 3):
        rests = [block >= boundary for block in BLOCKS]
        grads = runs[0].gradients(rests)
        want = block_sums(runs[0].params, grads, BLOCKS, 4)
        got = runs[0].step(adamw, grads, sums=True, maximize=boundary == 1)
        assert torch.equal(got, want)
        assert runs[1].step(adamw, runs[1].gradients(rests), maximize=boundary == 1).shape == (0, 3)
        assert same(runs[0].tensors(), runs[1].tensors())


@pytest.fixture
def threads():
    """Sets their number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "moments"), [(F32, F32), (BF16, BF16), (F64, F64)])
def test_the_same_bits_from_any_number_of_threads(threads, dtype, moments):
    """And from run to run."""
    told = []
    for count in (1, 2, 3, 4, 4, 1):
        threads(count)
        (run,) = runs_of(dtype, moments, True, n=1)
        found = []
        for boundary in (-1, 2):
            grads = run.gradients(active(run, boundary))
            found += [run.step(adamw, grads, sums=True), block_sums(run.params, grads, BLOCKS, 4)]
        told.append([*found, *run.tensors()])
    assert all(same(told[0], other) for other in told[1:])


def test_a_block_has_the_same_bits_whatever_the_boundary_was():
    runs = runs_of(F32, BF16)
    for step in range(6):
        rows = []
        for run, boundary in zip(runs, (-1, 2 - step % 3), strict=True):
            rows.append(run.step(adamw, run.gradients(active(run, boundary)), sums=True)[2:])
        assert torch.equal(*rows)
    late = [i for i, block in enumerate(BLOCKS) if block >= 2]
    for name in ("params", "m", "v", "steps"):
        assert same(*([getattr(run, name)[i] for i in late] for run in runs))
    assert not torch.equal(runs[0].params[3], runs[1].params[3])


def test_a_block_has_the_same_sums_whatever_else_there_is():
    (run,) = runs_of(n=1)
    grads = run.gradients([True] * len(SIZES))
    got = block_sums(run.params, grads, BLOCKS, 4)
    for block in range(4):
        alone = [0 if b == block else -1 for b in BLOCKS]
        assert torch.equal(block_sums(run.params, grads, alone, 1)[0], got[block])
        kept = [i for i, b in enumerate(BLOCKS) if b == block]
        params, own = [run.params[i] for i in kept], [grads[i] for i in kept]
        assert torch.equal(block_sums(params, own, [0] * len(kept), 1)[0], got[block])


def shorter(t):
    return t[1:]


def on_meta(t):
    return t.to("meta")


def twice(t):
    return torch.stack([t, t])


MISFITS = [  # what of the last parameter does not fit, how, what it is called and told to be
    ("steps", torch.Tensor.long, "step", "1 of torch.int64 on cpu"),
    ("steps", torch.Tensor.double, "step", "1 of torch.float64 on cpu"),
    ("steps", twice, "step", "2 of torch.float32 on cpu"),
    ("steps", on_meta, "step", "1 of torch.float32 on meta"),
    ("m", torch.Tensor.double, "exp_avg", "1030 of torch.float64 on cpu"),
    ("m", torch.Tensor.half, "exp_avg", "1030 of torch.float16 on cpu"),
    ("m", torch.Tensor.bfloat16, "exp_avg_sq", "1030 of torch.float32 on cpu"),
    ("m", shorter, "exp_avg", "1029 of torch.float32 on cpu"),
    ("m", on_meta, "exp_avg", "1030 of torch.float32 on meta"),
    ("v", torch.Tensor.bfloat16, "exp_avg_sq", "1030 of torch.bfloat16 on cpu"),
    ("v", shorter, "exp_avg_sq", "1029 of torch.float32 on cpu"),
    ("x", shorter, "max_exp_avg_sq", "1029 of torch.float32 on cpu"),
    ("x", torch.Tensor.bfloat16, "max_exp_avg_sq", "1030 of torch.bfloat16 on cpu"),
    ("masters", shorter, "master_param", "1029 of torch.float32 on cpu"),
    ("masters", torch.Tensor.double, "master_param", "1030 of torch.float64 on cpu"),
    ("grads", torch.Tensor.float, "gradient", "1030 of torch.float32 on cpu"),
    ("grads", shorter, "gradient", "1029 of torch.bfloat16 on cpu"),
    ("grads", on_meta, "gradient", "1030 of torch.bfloat16 on meta"),
]


@pytest.mark.parametrize(("column", "make", "name", "got"), MISFITS)
def test_what_does_not_fit_is_refused_before_anything_has_changed(column, make, name, got):
    (run,) = runs_of(BF16, F32, True, True, n=1, sizes=SMALL)
    run.step(adamw, run.gradients([True] * len(SMALL)))
    grads = run.gradients([True] * len(SMALL))
    tensors = grads if column == "grads" else getattr(run, column)
    tensors[-1] = make(tensors[-1])
    kept = [t for t in run.tensors() if not t.is_meta]
    before = [t.clone() for t in kept]
    with pytest.raises(RuntimeError, match=rf"{name} must .*got {got}: load the state"):
        run.step(adamw, grads, sums=True)
    assert same(kept, before)
    assert run.steps[0] == 1


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(F64, r"exp_avg must .*float64.* got 1 of torch.bfloat16"), (F32, "give the seeds")],
)
def test_bfloat16_moments_need_seeds_and_are_not_for_float64(dtype, message):
    (run,) = runs_of(dtype, BF16, n=1, sizes=SMALL)
    before = [t.clone() for t in run.tensors()]
    with pytest.raises(RuntimeError, match=message):
        call(adamw, run, grads=run.params, seeds=[])
    assert same(run.tensors(), before)


def call(kernel, run, **changed):
    """A step of the run, with other lists for some."""
    names = "params", "grads", "m", "v", "x", "masters", "steps"
    state = (changed[name] if name in changed else getattr(run, name) for name in names)
    numbers = (torch.tensor(x, dtype=F64) for x in (1e-2, 0.99, 0.999))
    seeds, blocks = changed.get("seeds", run.blocks), changed.get("blocks", run.blocks)
    return kernel(*state, *numbers, 0.1, 1e-8, False, None, None, seeds, blocks, 4, True)


LISTS = "grads", "m", "v", "x", "masters", "steps", "seeds", "blocks"


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_every_list_has_an_entry_a_parameter(name, longer):
    (run,) = runs_of(BF16, BF16, True, True, n=1, sizes=SMALL)
    given = {"grads": run.params, "seeds": run.blocks}.get(name) or getattr(run, name)
    given = [*given, given[-1]] if longer else given[:-1]
    before = [t.clone() for t in run.tensors()]
    with pytest.raises(ValueError, match="every list must have an entry"):
        call(adamw, run, **{"grads": run.params, name: given})
    assert same(run.tensors(), before)
    lists = {"grads": run.params, "blocks": run.blocks, name: given}
    if name in ("grads", "blocks"):
        with pytest.raises(ValueError, match="every list must have an entry"):
            block_sums(run.params, lists["grads"], lists["blocks"], 4)


def test_block_sums_refuses_gradients_of_another_size():
    p = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"gradient must .* got 2 of torch.float32"):
        block_sums([p], [p[:2]], [0], 1)


class Arrays(ctypes.Structure):
    """As the next two in csrc/cpu/adamw.cpp or csrc/formulas.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in "pgmvxw")


class Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_bool) for name in ("sums", "update", "maximize", "narrow_moments")),
        ("grad_scale", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint32),
    )


AdamwStep = ctypes.c_double * 7
Sums = ctypes.c_double * 3
RUN_CHUNK = (
    ctypes.c_int, ctypes.POINTER(Arrays), ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(Options),
    ctypes.POINTER(AdamwStep), ctypes.POINTER(Sums),
)  # fmt: skip
LEVELS = {  # of the instruction sets that a function is compiled for, and where they run
    "default": ("baseline", "avx2", "avx512"),
    "arch_x86_64_v3": ("avx2", "avx512"),
    "arch_x86_64_v4": ("avx512",),
}


@pytest.fixture(scope="module")
def compiled():
    """The versions of run_chunk that run here, one for each instruction set."""
    if platform.machine() != "x86_64" or not shutil.which("nm"):
        pytest.skip("only x86-64 has several, and nm finds them")
    path = extension.module.__file__
    listed = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    at = {name: int(place, 16) for place, name in re.findall(r"^(\w+) [tT] (\S+)$", listed, re.M)}
    # PyInit__C is at one place in the file, at another in memory.
    loaded = ctypes.cast(ctypes.PyDLL(path).PyInit__C, ctypes.c_void_p).value
    found = {
        level: place
        for level in LEVELS
        for name, place in at.items()
        if "run_chunkE" in name and name.endswith(f".{level}")
    }
    if found.keys() != LEVELS.keys():
        pytest.skip("stripped, or built by a compiler that makes one version")
    return [
        ctypes.CFUNCTYPE(None, *RUN_CHUNK)(found[level] + loaded - at["PyInit__C"])
        for level, machines in LEVELS.items()
        if extension.module.CPU_ISA in machines
    ]


def step_of(run_chunk, run, grad):
    """Step 3 of a run's only tensor, and its sums before and in that."""
    columns = run.params, [grad], run.m, run.v, run.x, run.masters
    arrays = Arrays(*(column[0].data_ptr() if column else None for column in columns))
    decays = 1 - 1e-2 * 0.1, 1 - 0.9, 0.999, 1 - 0.999
    step = AdamwStep(*decays, 1e-2 / (1 - 0.9**3), (1 - 0.999**3) ** 0.5, 1e-8)
    found = []
    for update, scale in ((False, 1.0), (True, 3.0)):
        sums = Sums()
        options = Options(True, update, True, run.m[0].dtype == BF16, scale, 0, 3)
        run_chunk(cpu.DTYPES[grad.dtype], arrays, 0, grad.numel(), options, step, sums)
        found.append([*sums])
    run.steps[0] += 1
    return torch.tensor(found, dtype=F64)


@pytest.mark.parametrize("strange", [False, True])
@cases
def test_every_instruction_set_gives_the_same_bits(
    compiled, dtype, moments, amsgrad, master, strange
):
    """And those of the op, which checks that the function is called as it calls it."""
    n, told = 5003, []
    for run_chunk in [*compiled, None]:
        (run,) = runs_of(dtype, moments, amsgrad, master, n=1, sizes=[n], blocks=[0])
        (grad,), (m,), (v,) = (run.gradients([True]) for _ in range(3))
        run.m[0].copy_(m)
        run.v[0].copy_(v.square())
        run.steps[0].fill_(2)
        if strange:
            for i, tensor in enumerate([grad, *run.params, *run.m, *run.masters]):
                tensor[3 * i : 3 * i + len(VALUES)] = torch.tensor(VALUES)
        if run_chunk:
            sums = step_of(run_chunk, run, grad)
        else:
            sums = block_sums(run.params, [grad], [0], 1)
            options = {"sums": True, "maximize": True, "grad_scale": torch.tensor(3.0)}
            sums = torch.cat([sums, run.step(adamw, [grad], **options)[:1]])
        told.append([sums, *run.tensors()])
    assert all(same(told[0], other) for other in told[1:])
