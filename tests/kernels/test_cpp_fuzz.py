"""Random tensors, dtypes, boundaries, options and threads for C++: `pytest -m soak`."""

import random

import numpy as np
import pytest
import torch

from blocksched import extension, ops
from blocksched.kernels.block_sums import block_sums_ref
from tests.kernels.test_cpp import BF16, F16, F32, F64, same, tolerance
from tests.kernels.test_fuzz import LAYOUTS, strided

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not extension.HAS_CPP, reason=extension.why_not()),
]
CHUNK = 8192


def drawn(choose):
    """Shapes around the chunks and tiles, small ones, and one that several threads share."""
    return choose.choice(
        [
            (), (0,), (choose.randint(1, 70),), (choose.randint(1, 2**17),),
            (choose.choice([1024, CHUNK]) + choose.randint(-2, 2),),
            (choose.randint(1, 40), choose.randint(1, 40)),
        ]
    )  # fmt: skip


def numbers(shape, dtype, spread):
    """Of sizes up to 10^spread, and as small, and a few that are not finite."""
    x = torch.randn(shape) * 10 ** ((torch.rand(shape) * 2 - 1) * spread)
    strange = torch.rand(shape) < (1e-3 if spread > 4 else 0)
    return x.masked_fill(strange, random.choice([torch.inf, -torch.inf, torch.nan, 0.0])).to(dtype)


@pytest.mark.parametrize("seed", [random.SystemRandom().randrange(2**31) for _ in range(300)])
def test_against_the_references(monkeypatch, seed):
    """To the bit, given a root that rounds as it should."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.as_tensor(np.sqrt(x.numpy())))
    choose = random.Random(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    n_blocks, spread = choose.randint(0, 5), choose.choice([0, 1, 4, 12, 30])
    moments = choose.choice([F32, F32, BF16])
    amsgrad, master = choose.random() < 0.3, choose.random() < 0.3
    shapes = [drawn(choose) for _ in range(choose.randint(0, 7))]
    dtypes = [choose.choice([BF16, F16] if master else [F32, BF16, F16, F64]) for _ in shapes]
    start = [numbers(s, d, spread) for s, d in zip(shapes, dtypes, strict=True)]
    blocks = [choose.randint(-1, n_blocks) for _ in shapes]
    layouts = [[choose.choice(LAYOUTS) for _ in range(5)] for _ in shapes]
    betas = choose.choice([0.0, choose.uniform(0, 0.99)]), choose.uniform(0.3, 0.9999)
    scalars = [torch.tensor(n, dtype=F64) for n in (10 ** choose.uniform(-4, 0), *betas)]
    wd, eps = choose.choice([0.0, 0.1, 3.0]), choose.choice([1e-8, 1e-3, 0.0])
    maximize, seeds = choose.random() < 0.5, [choose.randrange(2**63) for _ in shapes]
    first = [float(choose.choice([0, 0, 7, 10**4])) for _ in shapes]

    def state():
        params = [strided(p.clone(), how[0]) for p, how in zip(start, layouts, strict=True)]
        columns = [params]
        kinds = [moments, moments, *([F32] if amsgrad else []), *([F32] if master else [])]
        for i, kind in enumerate(kinds, 1):
            wide = [F64 if d == F64 else kind for d in dtypes]
            fresh = [
                p.to(w, copy=True) if master and i == len(kinds) else torch.zeros_like(p, dtype=w)
                for p, w in zip(start, wide, strict=True)
            ]
            columns.append([strided(t, how[i]) for t, how in zip(fresh, layouts, strict=True)])
        x = columns[3] if amsgrad else []
        w = columns[-1] if master else []
        return [*columns[:3], x, w, [torch.tensor(t) for t in first]]

    ours, theirs = state(), state()
    before = torch.get_num_threads()
    try:
        for _ in range(3):
            grads = [
                strided(numbers(s, d, spread), choose.choice(LAYOUTS))
                if choose.random() < 0.7
                else None
                for s, d in zip(shapes, dtypes, strict=True)
            ]
            scale = choose.choice([None, torch.tensor(choose.choice([1024.0, 3.3]))])
            found = choose.choice([None, torch.tensor(0.0), torch.tensor(float(seed % 5 == 0))])
            options = wd, eps, maximize, scale, found, seeds, blocks, n_blocks, True
            sums = []
            for backend, run in (("cpp", ours), ("eager", theirs)):
                torch.set_num_threads(choose.randint(1, 5))
                sums.append(ops.block_sums(run[0], grads, blocks, n_blocks, backend))
                sums.append(ops.adamw(run[0], grads, *run[1:], *scalars, *options, backend))
            for a, b in zip(ours, theirs, strict=True):
                # Torch's loops disagree on the sign of a zero that lerp reaches: + 0 takes it away.
                assert same([t + 0 for t in a], [t + 0 for t in b]), f"seed {seed}"
            close(sums, theirs[0], grads, blocks, spread, seed)
    finally:
        torch.set_num_threads(before)


def close(sums, params, grads, blocks, spread, seed):
    """What is finite is close, where squares do not leave the range of float32."""
    if spread > 12:
        return
    for got, want in zip(sums[:2], sums[2:], strict=True):
        # The reference adds up to 4096 in float32, in no order that is told: by halves, 64 at most.
        rtol = tolerance(F32) + 80 * 2.0**-24
        torch.testing.assert_close(
            got, want, rtol=rtol, atol=1e-30, equal_nan=True, msg=lambda text: f"{text} seed {seed}"
        )
    again = ops.block_sums(params, grads, blocks, len(sums[0]), "cpp")
    wide = [[None if t is None else t.double() for t in column] for column in (params, grads)]
    want = block_sums_ref(*wide, blocks, len(sums[0]))
    finite = want.isfinite() & again.isfinite()
    torch.testing.assert_close(
        again[finite],
        want[finite],
        rtol=tolerance(F32),
        atol=1e-30,
        msg=lambda text: f"{text} seed {seed}",
    )
