"""Random tensors, dtypes, boundaries and options, new ones every time: `pytest -m soak`."""

import random

import pytest
import torch

from blocksched.kernels.adamw import adamw, adamw_ref
from blocksched.kernels.block_sums import block_sums, block_sums_ref
from blocksched.kernels.chunk_table import CHUNK

pytestmark = [pytest.mark.triton, pytest.mark.soak]
LAYOUTS = "plain", "shifted", "gaps", "turned"
DTYPES = torch.float32, torch.bfloat16, torch.float16


def strided(tensor, how):
    """The same numbers somewhere else in memory."""
    if how == "shifted":
        return (
            torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
            .copy_(tensor.flatten())
            .view(tensor.shape)
        )
    if how == "gaps":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor.t().contiguous().t() if how == "turned" and tensor.dim() == 2 else tensor


@pytest.mark.parametrize("seed", [random.SystemRandom().randrange(2**31) for _ in range(150)])
def test_against_the_references(device, seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    n_blocks = choose.randint(1, 5)
    moments = choose.choice([torch.float32, torch.float32, torch.bfloat16])
    amsgrad, master = choose.random() < 0.3, choose.random() < 0.3
    shapes = [
        choose.choice([(), (0,), (choose.randint(1, 70),), (CHUNK + choose.randint(-16, 16),),
                       (choose.randint(1, 40), choose.randint(1, 40))])
        for _ in range(choose.randint(1, 7))
    ]  # fmt: skip
    dtypes = [choose.choice(DTYPES[1:] if master else DTYPES) for _ in shapes]
    start = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    blocks = [choose.randint(-1, n_blocks) for _ in shapes]
    layouts = [choose.choice(LAYOUTS) for _ in shapes]
    runs = []
    for _ in range(2):
        params = [
            strided(p.to(device, copy=True), how) for p, how in zip(start, layouts, strict=True)
        ]
        m, v = ([torch.zeros_like(p, dtype=moments) for p in params] for _ in range(2))
        x = [torch.zeros_like(p, dtype=torch.float32) for p in params] if amsgrad else []
        w = [p.to(torch.float32, copy=True) for p in params] if master else []
        runs.append((params, m, v, x, w, [torch.zeros((), device=device) for _ in params]))
    numbers = [torch.tensor(n, dtype=torch.float64) for n in (1e-2, choose.uniform(0, 0.99), 0.99)]
    for _ in range(3):
        grads = [
            strided(torch.randn(s).to(device, d), choose.choice(LAYOUTS))
            if choose.random() < 0.7
            else None
            for s, d in zip(shapes, dtypes, strict=True)
        ]
        want = block_sums_ref(runs[0][0], grads, blocks, n_blocks)
        # A chunk's sums add 16 tiles, 10 halvings, and here at most 20 chunks to a block.
        exact = {"rtol": 50 * 2.0**-24, "atol": 0.0, "check_dtype": False, "msg": f"seed {seed}"}
        torch.testing.assert_close(block_sums(runs[0][0], grads, blocks, n_blocks), want, **exact)
        for kernel, (params, m, v, x, w, steps) in zip((adamw, adamw_ref), runs, strict=True):
            sums = kernel(
                params, grads, m, v, x, w, steps, *numbers, 0.1, 1e-8, False, None, None,
                list(range(len(params))), blocks, n_blocks, True,
            )  # fmt: skip
        for name, ours, theirs in zip("pmvxws", *runs, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                # Step sizes differ by a few units, which moves a rounding here and there.
                step = torch.finfo(a.dtype).eps
                close = {"rtol": 2 * step, "atol": 1e-6, "msg": f"{name}, seed {seed}"}
                torch.testing.assert_close(a, b, **close)
            if name in "mvx" and moments == torch.float32 and set(dtypes) == {torch.float32}:
                assert all(map(torch.equal, ours, theirs)), (name, seed)
    assert sums.shape == (n_blocks, 3)
