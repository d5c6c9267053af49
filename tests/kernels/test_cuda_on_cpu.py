"""The CUDA sources, run on the CPU by cuda_on_cpu.h, against torch in float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).with_name("cuda_on_cpu.h")
F64, NAN, INF = torch.float64, float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # Dtype in csrc/mlp.h
WIDTHS = 1, 3, 7, 8, 255, 256, 1000, 4100, 4104
ROWS = 0, 1, 5, 300
EPS = 1e-6
GUARD = 16
STREAM = 1234
POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


def pass_type(pointers, *more):
    """A member of Passes in csrc/mlp.h."""
    arguments = ctypes.c_int, *[POINTER] * pointers, INT64, INT64, *more, POINTER
    return ctypes.CFUNCTYPE(ctypes.c_char_p, *arguments)


class Passes(ctypes.Structure):
    _fields_ = (
        ("row_scale", pass_type(2, ctypes.c_double)),
        ("relu_squared", pass_type(2)),
        ("hidden_backward", pass_type(4)),
        ("input_backward", pass_type(5)),
    )


class Kernels:
    """The compiled passes, to be called with tensors; `threads` were on a row the last time."""

    def __init__(self, library):
        self.passes = Passes.in_dll(library, "_ZN10blocksched11cuda_passesE")
        self.first_block = INT64.in_dll(library, "first_block")
        self.last_error = ctypes.c_int.in_dll(library, "last_error")
        self.launched = (INT64 * 3).in_dll(library, "launched")

    def __call__(self, name, like, *arguments):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        sent = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        more = [EPS] if name == "row_scale" else []
        dtype = DTYPES.index(like.dtype)
        problem = getattr(self.passes, name)(dtype, *sent, *like.shape, *more, STREAM)
        assert problem is None, problem
        assert self.launched[2] == STREAM or len(like) == 0
        for tensor in tensors:
            assert_guarded(tensor)

    @property
    def threads(self):
        return self.launched[0]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for header in "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h":
        (folder / header).touch()  # the shim stands in for them
    library = folder / "mlp.so"
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-I", folder, "-include", SHIM, "-x", "c++"]
    command += [ROOT / "csrc/cuda/mlp.cu", "-o", library]
    subprocess.run(command, check=True)
    return Kernels(ctypes.CDLL(library))


def place(values, dtype, skew=0):
    """The values between NaNs, `skew` elements behind a multiple of 16 bytes."""
    start, count = GUARD + skew, values.numel()
    memory = torch.full((start + count + GUARD,), NAN, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[start : start + count].view(values.shape).copy_(values)


def assert_guarded(view):
    """Nothing was written around it."""
    if view._base is not None:
        start = view.storage_offset()
        assert view._base[:start].isnan().all()
        assert view._base[start + view.numel() :].isnan().all()


def computed_in(dtype):
    """The dtype of scales and dots."""
    return F64 if dtype == F64 else torch.float32


def roundings(dtype, width):
    """Relative error of a sum of positive terms: each is rounded itself, then a thread adds up to
    width / 32 and 8 of its last pack, then 5 shuffles and 8 warps. Twice: so is the reference."""
    return 2 * (width / 32 + 8 + 5 + 8 + 1) * torch.finfo(computed_in(dtype)).eps / 2


def assert_close(got, want, error):
    """Within `error`, of computing, and the rounding to what is stored."""
    info = torch.finfo(got.dtype)
    bound = error + (want.abs() + error) * info.eps / 2 + info.tiny * info.eps
    excess = (got.double() - want).abs() - bound
    assert got.numel() == 0 or excess.max() <= 0, f"{excess.max()} beyond the tolerance"


class Case:
    """Random inputs of a shape; each pass on them is checked."""

    def __init__(self, kernels, dtype, rows, width, skews=(0, 0, 0)):
        self.kernels, self.dtype, self.width, self.skews = kernels, dtype, width, skews
        self.t = computed_in(dtype)
        self.u = 2 * torch.finfo(self.t).eps / 2  # twice, for the float64 reference rounds too
        self.random = torch.Generator().manual_seed(rows * 10000 + width)
        self.shape = rows, width

    def matrix(self, array):
        values = torch.randn(self.shape, generator=self.random)
        return place(values, self.dtype, self.skews[array])

    def column(self):
        values = torch.randn(self.shape[0], dtype=F64, generator=self.random)
        return place(values.exp(), self.t)

    def output(self):
        return place(torch.full(self.shape[:1], -7.0), self.t)

    def row_scale(self):
        x, scale = self.matrix(0), self.output()
        self.kernels("row_scale", x, x, scale)
        want = (x.double().square().mean(1) + EPS).rsqrt()
        # half of the mean's error, then the division, eps, the sum, the root and the reciprocal
        assert_close(scale, want, want * (roundings(self.dtype, self.width) / 2 + 4 * self.u))

    def relu_squared(self):
        u, scale = self.matrix(0), self.column()
        want = (u.double() * scale.double()[:, None]).relu().square()
        self.kernels("relu_squared", u, u, scale)
        assert_close(u, want, 3 * self.u * want)  # z's rounding counts twice

    def hidden_backward(self, has_dot=True):
        dh, h, scale, dot = self.matrix(0), self.matrix(1).relu_(), self.column(), self.output()
        grad = dh.double() * (h > 0)
        want, terms = 2 * grad * h.double().sqrt() * scale.double()[:, None], 2 * grad * h.double()
        self.kernels("hidden_backward", dh, dh, h, scale, dot if has_dot else None)
        assert_close(dh, want, 3 * self.u * want.abs())
        if has_dot:
            error = roundings(self.dtype, self.width) * terms.abs().sum(1)
            assert_close(dot, terms.sum(1), error)
        else:
            assert (dot == -7).all()

    def input_backward(self, has_dy=True):
        dx, dy, x = self.matrix(0), self.matrix(1), self.matrix(2)
        scale, dot = self.column(), self.column()
        pulled = x.double() * (scale.double() ** 2 * dot.double() / self.width)[:, None]
        want = dy.double() * has_dy - pulled
        self.kernels("input_backward", dx, dx, dy if has_dy else None, x, scale, dot)
        assert_close(dx, want, 4 * self.u * pulled.abs() + self.u * want.abs())


PASSES = [name for name, _ in Passes._fields_]
over_passes = pytest.mark.parametrize("name", PASSES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@over_passes
@over_dtypes
def test_any_shape_at_any_alignment(kernels, dtype, name):
    for width in WIDTHS:
        for rows in ROWS[:3] if width > 256 else ROWS:  # 300 take long there
            getattr(Case(kernels, dtype, rows, width), name)()
        getattr(Case(kernels, dtype, 5, width, (1, 1, 1)), name)()


@over_dtypes
def test_without_what_is_optional(kernels, dtype):
    for width in 7, 256, 4100:
        Case(kernels, dtype, 5, width).hidden_backward(has_dot=False)
        Case(kernels, dtype, 5, width).input_backward(has_dy=False)


@over_passes
@over_dtypes
def test_16_bytes_at_a_time_where_every_row_allows(kernels, dtype, name):
    arrays = {"hidden_backward": 2, "input_backward": 3}.get(name, 1)
    getattr(Case(kernels, dtype, 5, 1000), name)()
    assert kernels.threads == {2: 32, 4: 64, 8: 128}[dtype.itemsize]  # 4 accesses or fewer each
    for array in range(arrays):
        skews = tuple(int(array == i) for i in range(3))
        getattr(Case(kernels, dtype, 5, 1000, skews), name)()
        assert kernels.threads == 256, array
    getattr(Case(kernels, dtype, 5, 1001), name)()
    assert kernels.threads == 256


def assert_same(got, want):
    """Bit for bit, but for a NaN's payload."""
    want = torch.tensor(want).to(got.dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


@over_dtypes
def test_special_values_of_relu_squared(kernels, dtype):
    u = place(torch.tensor([[NAN, INF, -INF, -0.0, 0.0, -2.0, 4.0, 1e4]] * 3), dtype)
    kernels("relu_squared", u, u, place(torch.tensor([0.5, NAN, INF]), computed_in(dtype)))
    large = INF if dtype == torch.float16 else u[0, 7].item()
    assert_same(u[0], [NAN, INF, 0.0, 0.0, 0.0, 0.0, 4.0, large])
    assert_same(u[1], [NAN] * 8)
    assert_same(u[2], [NAN, INF, 0.0, NAN, NAN, 0.0, INF, INF])


@over_dtypes
def test_special_values_of_row_scale(kernels, dtype):
    x = torch.full((5, 256), 3.0)
    x[1, 100], x[2, 100], x[3] = NAN, -INF, 0.0
    scale = place(torch.zeros(5), computed_in(dtype))
    x = place(x, dtype)
    kernels("row_scale", x, x, scale)
    assert_same(scale[1:3], [NAN, 0.0])
    usual = torch.tensor([9 + EPS, EPS, 9 + EPS], dtype=F64).rsqrt()
    assert_close(scale[[0, 3, 4]], usual, 4 * torch.finfo(scale.dtype).eps / 2 * usual)


@over_dtypes
def test_special_values_of_hidden_backward(kernels, dtype):
    h = torch.tensor([[0.0, -0.0, 0.0, 4.0, 4.0, 4.0, INF, 4.0]]).repeat(4, 32)
    dh = torch.tensor([[INF, NAN, -3.0, -0.0, 3.0, -1.0, 0.0, 1.0]]).repeat(4, 32)
    dh[:, 6::8] = h[:, 6::8] = 1.0
    h[0, 6], dh[1, 7], h[2, 7], dh[2, 6] = INF, -INF, NAN, 1.0
    h, dh = place(h, dtype), place(dh, dtype)
    scale, dot = (place(torch.full((4,), value), computed_in(dtype)) for value in (0.5, 9.0))
    kernels("hidden_backward", dh, dh, h, scale, dot)
    usual = [0.0, 0.0, 0.0, -0.0, 6.0, -2.0, 1.0, 2.0]
    for row, special in enumerate([{6: INF}, {7: -INF}, {7: NAN}, {}]):
        assert_same(dh[row, :8], [special.get(i, value) for i, value in enumerate(usual)])
        assert_same(dh[row, 8:16], usual)
    assert_same(dot, [INF, -INF, NAN, 32.0 * (24 - 8 + 2 + 8)])


@over_dtypes
def test_special_values_of_input_backward(kernels, dtype):
    dy = place(torch.tensor([[1.0, NAN, INF, 1.0, 1.0, -0.0, 0.0, 1.0]] * 3), dtype)
    x = place(torch.tensor([[1.0, 1.0, 1.0, NAN, INF, 0.0, 0.0, 0.0]] * 3), dtype)
    scale = place(torch.tensor([2.0, 2.0, INF]), computed_in(dtype))
    dot = place(torch.tensor([4.0, NAN, 1.0]), computed_in(dtype))
    dx = place(torch.full((3, 8), 9.0), dtype)
    kernels("input_backward", dx, dx, dy, x, scale, dot)
    assert_same(dx[0], [-1.0, NAN, INF, NAN, -INF, -0.0, 0.0, 1.0])
    assert_same(dx[1], [NAN] * 8)
    assert_same(dx[2], [-INF, NAN, NAN, NAN, -INF, NAN, NAN, NAN])


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=["bfloat16", "float16"])
def test_every_16_bit_number_survives(kernels, dtype):
    """Of the shim's conversions, mostly."""
    dy = place(torch.zeros(16, 4096), dtype)
    dy.view(torch.int16).copy_(torch.arange(-(2**15), 2**15).view(16, 4096))
    dx, x = place(torch.ones(16, 4096), dtype), place(torch.ones(16, 4096), dtype)
    scale, dot = (place(value, torch.float32) for value in (torch.ones(16), torch.zeros(16)))
    kernels("input_backward", dx, dx, dy, x, scale, dot)
    assert torch.equal(dx.isnan(), dy.isnan())
    bits = dx.view(torch.int16), dy.view(torch.int16)
    assert torch.equal(*(b.masked_fill(dy.isnan(), 0) for b in bits))


def test_what_went_wrong_is_said(kernels):
    u, scale = torch.ones(2, 8), torch.ones(2)
    call = kernels.passes.relu_squared
    assert call(0, u.data_ptr(), scale.data_ptr(), 2**35, 1, None).startswith(b"more rows than")
    assert call(4, u.data_ptr(), scale.data_ptr(), 2, 8, None) == b"unknown dtype"
    assert torch.equal(u, torch.ones(2, 8))
    kernels.last_error.value = 1
    assert call(0, u.data_ptr(), scale.data_ptr(), 2, 8, None) == b"invalid configuration argument"
    assert call(0, u.data_ptr(), scale.data_ptr(), 2, 8, None) is None


@over_passes
def test_offsets_beyond_32_bits(kernels, name):
    """The last rows of more than 2^31 values, one at a time, as if they were the only ones."""
    rows, width = 2_150_000, 999
    assert rows * width > 2**31
    try:
        large = [np.zeros((rows, width), np.float16) for _ in range(3)]  # untouched: no memory
    except MemoryError:
        pytest.skip("the system does not promise memory that stays unused")
    generator = torch.Generator().manual_seed(0)
    large = [torch.from_numpy(array) for array in large]
    columns = [torch.ones(rows), torch.zeros(rows)]
    small = []
    for tensor in [*large, *columns]:
        tensor[-8:] = torch.randn(tensor[-8:].shape, generator=generator).to(tensor.dtype)
        small.append(tensor[-8:].clone())
    arrays = {
        "row_scale": (0, 3),
        "relu_squared": (0, 3),
        "hidden_backward": (0, 1, 3, 4),
        "input_backward": (0, 1, 2, 3, 4),
    }[name]
    kernels(name, small[0], *(small[i] for i in arrays))
    kernels.first_block.value = rows - 8
    try:
        kernels(name, large[0], *([*large, *columns][i] for i in arrays))
    finally:
        kernels.first_block.value = 0
    for tensor, last in zip([*large, *columns], small, strict=True):
        assert_same(tensor[-8:], last.tolist())
