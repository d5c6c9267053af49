"""The AdamW kernel against its reference, a float64 run and itself."""

import math

import pytest
import torch

from blocksched.kernels import adamw as kernels
from blocksched.kernels.adamw import adamw, adamw_ref
from blocksched.kernels.block_sums import block_sums
from blocksched.kernels.chunk_table import CHUNK

pytestmark = pytest.mark.triton
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SIZES = [33, CHUNK + 48, 0, 640, 7, 1]
BLOCKS = [-1, 0, 0, 1, 2, 3]


class Run:
    """Parameters, their state, and how to step them."""

    def __init__(self, device, dtype=F32, moments=F32, amsgrad=False, master=False, sizes=SIZES):
        generator = torch.Generator().manual_seed(0)
        self.generator = torch.Generator().manual_seed(1)
        self.params = [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]
        self.m = [torch.zeros_like(p, dtype=moments) for p in self.params]
        self.v = [torch.zeros_like(p, dtype=moments) for p in self.params]
        wide = torch.promote_types(dtype, F32)
        self.x = [torch.zeros_like(p, dtype=wide) for p in self.params] if amsgrad else []
        self.masters = [p.float() for p in self.params] if master else []
        self.steps = [torch.zeros((), device=device) for _ in self.params]
        self.blocks = BLOCKS

    def gradients(self, active, scale=1.0):
        """Fresh gradients of the active tensors, the same for every run that asks as often."""
        return [
            g.to(p.device, p.dtype) if on else None
            for p, on in zip(self.params, active, strict=True)
            for g in [torch.randn(p.shape, generator=self.generator) * scale]
        ]

    def step(self, kernel, grads, sums=False, lr=1e-2, betas=(0.9, 0.999), wd=0.1, **options):
        lr, *betas = (torch.tensor(x, dtype=F64) for x in (lr, *betas))
        options = {"maximize": False, "grad_scale": None, "found_inf": None, **options}
        seeds = list(range(len(self.params))) if self.m[0].dtype == BF16 else []
        return kernel(
            self.params, grads, self.m, self.v, self.x, self.masters, self.steps, lr, *betas,
            wd, 1e-8, *options.values(), seeds, self.blocks, 4, sums,
        )  # fmt: skip

    def tensors(self):
        return [*self.params, *self.m, *self.v, *self.x, *self.masters, *self.steps]


def same(a, b):
    """Bitwise, NaN included."""
    return all(
        torch.equal(p.nan_to_num(), q.nan_to_num()) and torch.equal(p.isnan(), q.isnan())
        for p, q in zip(a.tensors(), b.tensors(), strict=True)
    )


class ReferenceSteps:
    """Stands in for _advance_kernel: step sizes from float64, as the reference has them."""

    def __init__(self, run, lr, beta1, beta2, wd):
        self.run, self.numbers = run, (lr, beta1, beta2, wd)

    def __getitem__(self, grid):
        return self.advance

    def advance(self, pointers, scalars, *_rest, **_options):
        lr, b1, b2, wd = self.numbers
        for i, step in enumerate(self.run.steps):
            if pointers[1, i]:
                step += 1
                t = float(step)
                row = [lr / (1 - b1**t), (1 - b2**t) ** 0.5, 1 - lr * wd, 1 - b1, b2, 1 - b2, t, 0]
                scalars[i] = torch.tensor(row, dtype=F64)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.9), (0.0, 0.5)])
@pytest.mark.parametrize(
    ("dtype", "moments", "amsgrad", "master"),
    [
        (F32, F32, False, False), (F32, F32, True, False), (BF16, F32, False, False),
        (BF16, F32, True, True), (F16, F32, False, True), (F32, BF16, False, False),
        (BF16, BF16, False, False),
    ],
)  # fmt: skip
def test_the_reference_to_the_bit(device, monkeypatch, dtype, moments, amsgrad, master, betas):
    runs = [Run(device, dtype, moments, amsgrad, master) for _ in range(2)]
    monkeypatch.setattr(kernels, "_advance_kernel", ReferenceSteps(runs[0], 1e-2, *betas, 0.1))
    # On a CPU torch's own root is off by a unit in 0.7 % of cases.
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: x.double().pow(0.5).to(x.dtype))
    for frozen in ((), (-1, 0), (-1,), (-1, 0, 1), (-1, 1, 3), (0, 2)):  # suffixes, and with holes
        active = [block not in frozen for block in BLOCKS]
        options = {"betas": betas, "maximize": frozen == (-1,)}
        runs[0].step(adamw, runs[0].gradients(active), **options)
        runs[1].step(adamw_ref, runs[1].gradients(active), **options)
    assert same(*runs)
    assert runs[0].steps[0] != runs[0].steps[-1]


def test_step_sizes_against_float64(device):
    """All step counts in one launch, numbers given by the host and on the device."""
    counts = [*range(400), 1000, 5000, 20000, 10**6]
    steps = [torch.tensor(float(t), device=device) for t in counts]
    pointers = torch.ones(8, len(counts), dtype=torch.int64, device=device)
    pointers[6] = torch.tensor([step.data_ptr() for step in steps])
    for beta in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999):
        lr, b = torch.tensor(2.0**-12, device=device), torch.tensor(beta, device=device)
        for on_device in (False, True):
            rate, decay = (lr.item(), b.item()) if on_device else (2.0**-12, beta)
            scalars = torch.zeros(len(counts), 8, device=device)
            for step, t in zip(steps, counts, strict=True):
                step.fill_(t)
            given = [torch.tensor(x, dtype=F64) for x in (rate, decay, decay)]
            numbers = [torch.nan] * 7 if on_device else kernels._host_numbers(*given, 0.1)
            kernels._advance_kernel[(4,)](
                pointers, scalars, lr, b, b, lr, len(counts), 0.1, *numbers, on_device, on_device,
                False, 128,
            )  # fmt: skip
            assert [step.item() for step in steps] == [t + 1 for t in counts]
            got = scalars.double().cpu()
            t = torch.tensor(counts, dtype=F64) + 1
            exact = -torch.expm1(t * math.log(decay)) if decay else torch.ones_like(t)
            # Half a unit each: log beta, its product with t, the series' last sum; a division or
            # a root rounds once more, the root halves what came before. A log taken on the device
            # may be off by a unit more.
            units = 2.5 if on_device else 1.5
            off = [units + 0.5, units / 2 + 0.5]
            for i, want in enumerate((rate / exact, exact.sqrt())):
                torch.testing.assert_close(got[:, i], want, rtol=off[i] * 2.0**-23, atol=0.0)
            want = torch.tensor([1 - rate * 0.1, 1 - decay, decay, 1 - decay])
            assert torch.equal(got[0, 2:6].float(), want)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fifty_steps_with_freezing_are_within_twice_torchs_own_error(device, dtype):
    ours, exact = Run(device, dtype), Run(device, dtype)
    for run in (ours, exact):
        run.params[3].zero_()  # where nothing hides the error of the updates
    theirs = [torch.nn.Parameter(p.clone()) for p in ours.params]
    exact.params = [p.double() for p in exact.params]
    for name in "mv":
        setattr(exact, name, [torch.zeros_like(p) for p in exact.params])
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(50):
        boundary = (-1, 0, 2, 1, 3)[step // 5 % 5]
        grads = ours.gradients([block >= boundary for block in BLOCKS])
        ours.step(adamw, grads)
        exact.step(adamw_ref, [None if g is None else g.double() for g in grads])
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        optimizer.step()

    def errors(params):
        pairs = zip(params, exact.params, strict=True)
        return [(p.detach().double() - q).norm().item() for p, q in pairs if p.numel() > 5]

    for own, other in zip(errors(ours.params), errors(theirs), strict=True):
        assert own <= 2 * other


def test_master_weights_are_as_good_as_float32(device):
    ours, wide = Run(device, BF16, master=True), Run(device, BF16, master=True)
    wide.params = wide.masters
    wide.masters = []
    for _ in range(3):
        grads = ours.gradients([True] * len(SIZES))
        ours.step(adamw, grads)
        wide.step(adamw, [g.float() for g in grads])
    assert all(map(torch.equal, ours.masters, wide.params))
    assert all(torch.equal(p, w.bfloat16()) for p, w in zip(ours.params, ours.masters, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sums_change_nothing_and_are_those_of_block_sums(device, dtype):
    runs = [Run(device, dtype), Run(device, dtype)]
    for boundary in (-1, 1, 3):
        active = [block >= boundary for block in BLOCKS]
        grads = runs[0].gradients(active)
        want = block_sums(runs[0].params, grads, BLOCKS, 4)
        got = runs[0].step(adamw, grads, sums=True)
        assert runs[1].step(adamw, runs[1].gradients(active)).shape == (0, 3)
        assert torch.equal(got, want)
        assert same(*runs)


def test_a_block_has_the_same_bits_whatever_the_boundary_was(device):
    runs = [Run(device), Run(device)]
    for step in range(6):
        rows = []
        for run, boundary in zip(runs, (-1, 2 - step % 3), strict=True):
            grads = run.gradients([block >= boundary for block in BLOCKS])
            rows.append(run.step(adamw, grads, sums=True)[2:])
        assert torch.equal(*rows)
    for name in ("params", "m", "v", "steps"):
        assert all(map(torch.equal, getattr(runs[0], name)[4:], getattr(runs[1], name)[4:]))
    assert not torch.equal(runs[0].params[1], runs[1].params[1])


def test_scaled_gradients_and_a_skipped_step(device):
    plain, scaled = Run(device), Run(device)
    everything = [True] * len(SIZES)
    scale, found = torch.tensor(1024.0, device=device), torch.zeros((), device=device)
    options = {"grad_scale": scale, "found_inf": found}
    want = plain.step(adamw, plain.gradients(everything), sums=True)
    got = scaled.step(adamw, scaled.gradients(everything, 1024.0), sums=True, **options)
    assert torch.equal(got, want)
    assert same(plain, scaled)
    found.fill_(1.0)
    got = scaled.step(adamw, scaled.gradients(everything), sums=True, **options)
    assert same(plain, scaled)
    assert got.isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_not_finite_and_huge_numbers_as_the_reference(device):
    runs = [Run(device, amsgrad=True), Run(device, amsgrad=True)]
    for run, kernel in zip(runs, (adamw, adamw_ref), strict=True):
        grads = run.gradients([True] * len(SIZES))
        for i, bad in enumerate((torch.nan, torch.inf, -torch.inf, 1e30, -3e38, 1e-45)):
            grads[1][i] = bad
            run.params[1][100 + i] = bad
        run.step(kernel, grads)
    for ours, theirs in zip(runs[0].tensors(), runs[1].tensors(), strict=True):
        # The step size of 1e-2 may differ by its last bits, a root on the CPU by its last.
        torch.testing.assert_close(ours, theirs, rtol=2.0**-23, atol=1e-8, equal_nan=True)


def test_strides_and_addresses_do_not_matter(device):
    flat, odd = (Run(device, sizes=[60, 60, 64, 30]) for _ in range(2))
    flat.blocks = odd.blocks = [0, 1, 2, 3]
    grads = [torch.randn(p.shape, device=device) for p in flat.params]
    for run in (flat, odd):
        run.params[0], run.m[0], run.v[0] = (
            t[0].reshape(6, 10) for t in (run.params, run.m, run.v)
        )
    grads[0] = grads[0].reshape(6, 10)
    other = list(grads)
    odd.params[0] = flat.params[0].t().contiguous().t()  # dense, in another order than its moments
    gaps = torch.zeros(120, device=device)[::2]
    odd.params[1] = gaps.copy_(odd.params[1])
    other[1] = torch.stack([grads[1], grads[1]], 1)[:, 0]
    shifted = torch.zeros(65, device=device)[1:]
    odd.params[2] = shifted.copy_(odd.params[2])
    for _ in range(2):
        flat.step(adamw, grads)
        odd.step(adamw, other)
    assert same(flat, odd)
    assert not odd.params[0].is_contiguous()
    assert odd.params[1].data_ptr() == gaps.data_ptr()


@pytest.mark.cuda
def test_a_moving_boundary_compiles_nothing(device):
    run = Run(device)
    run.step(adamw, run.gradients([True] * len(SIZES)), sums=True)
    run.step(adamw, run.gradients([True] * len(SIZES)))

    def compiled():
        return [len(kernel.device_caches[0][0]) for kernel in (
            kernels._adamw_kernel, kernels._advance_kernel,
        )]  # fmt: skip

    before = compiled()
    for boundary in (-1, 0, 1, 2, 3):
        run.step(adamw, run.gradients([block >= boundary for block in BLOCKS]))
    assert compiled() == before
