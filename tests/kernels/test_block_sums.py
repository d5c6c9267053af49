"""block_sums against float64, and the same bits whatever else is summed."""

import pytest
import torch

from blocksched.kernels.block_sums import block_sums, block_sums_ref
from blocksched.kernels.chunk_table import CHUNK

pytestmark = pytest.mark.triton
SIZES = [5, 2 * CHUNK + 16, CHUNK, 0, 33, CHUNK + 1, 700]
BLOCKS = [-1, 0, 0, 1, 2, 3, 4]


def draw(device, dtype=torch.float32, sizes=SIZES):
    params = [torch.randn(n, device=device).to(dtype) for n in sizes]
    return params, [torch.randn(n, device=device).to(dtype) for n in sizes]


def check(params, grads, blocks, n_blocks):
    got = block_sums(params, grads, blocks, n_blocks)
    assert got.dtype == torch.float32
    wide = [p.double() for p in params], [None if g is None else g.double() for g in grads]
    want = block_sums_ref(*wide, blocks, n_blocks)
    # Terms are of one sign: one rounding each, and one for each addition on the longest way:
    # 16 tiles, 10 halvings, 10 more for a block's chunks.
    torch.testing.assert_close(got.double(), want, rtol=37 * 2.0**-24, atol=0.0)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(device, dtype):
    params, grads = draw(device, dtype)
    check(params, grads, BLOCKS, 4)
    check(params, [None] * len(params), BLOCKS, 4)
    grads[1] = None
    got = check(params, grads, BLOCKS, 6)
    assert got[5].tolist() == [0.0, 0.0, 0.0]


def test_mixed_dtypes_strides_and_addresses(device):
    base = torch.randn(64, 130, device=device)
    params = [
        base.t(),
        base[:, ::2],
        base.view(-1)[1:2050],  # 4 bytes past a multiple of 16
        torch.randn((), device=device),
        torch.randn(9, 9, device=device).bfloat16(),
        torch.randn(70, device=device).half(),
    ]
    grads = [torch.randn(p.shape, device=device).to(p.dtype) for p in params]
    check(params, grads, [0, 0, 1, 1, 0, 1], 2)


def test_a_block_has_the_same_bits_whatever_else_there_is(device):
    params, grads = draw(device)
    got = check(params, grads, BLOCKS, 5)
    again = block_sums(params, grads, BLOCKS, 5)
    fewer = [0 if i == 5 else -1 for i in range(len(params))]
    alone = block_sums(params, grads, fewer, 1)
    shuffled = list(reversed(range(len(params))))
    other = block_sums(
        [params[i] for i in shuffled], [grads[i] for i in shuffled],
        [BLOCKS[i] for i in shuffled], 5,
    )  # fmt: skip
    assert torch.equal(got, again)
    assert torch.equal(got[3], alone[0])
    assert torch.equal(got[2:], other[2:])


def test_new_gradients_are_seen_where_the_parameters_stay(device):
    params, grads = draw(device)
    check(params, grads, BLOCKS, 4)
    for g in grads:
        g.mul_(2.0)
    check(params, grads, BLOCKS, 4)
    check(params, [torch.randn_like(g) for g in grads], BLOCKS, 4)


def test_what_is_not_finite_stays_in_its_block(device):
    params, grads = draw(device)
    grads[5][-1] = torch.nan
    params[1][0] = torch.inf
    got = block_sums(params, grads, BLOCKS, 5)
    assert got[3, :2].isnan().all()
    assert got[3, 2].isfinite()
    assert got[0, 2] == torch.inf
    assert got[[1, 2, 4]].isfinite().all()


def test_nothing_to_sum(device):
    assert block_sums([], [], [], 2).tolist() == [[0.0] * 3] * 2
    assert block_sums([torch.ones(3, device=device)], [None], [0], 0).shape == (0, 3)
