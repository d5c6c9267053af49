"""Block sums and relevance against float64 by hand."""

import math

import pytest
import torch

from blocksched.kernels.block_sums import block_sums_ref
from blocksched.relevance import relevance


def sums_of(blocks):
    numbered = [(p, b) for b, block in enumerate(blocks) for p in block]
    params = [p for p, _ in numbered]
    return block_sums_ref(params, [p.grad for p in params], [b for _, b in numbered], len(blocks))


def with_grad(p, g):
    p = torch.nn.Parameter(p)
    p.grad = g
    return p


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype):
    blocks, want = [], []
    for shapes in (((3, 5), (7,)), ((),), ((0, 4), (2, 2, 2))):
        tensors = []
        sums = torch.zeros(3, dtype=torch.float64)
        for shape in shapes:
            p, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            tensors.append(with_grad(p, g))
            p, g = p.double(), g.double()
            sums += torch.stack([(g * p).abs().sum(), (g * g).sum(), (p * p).sum()])
        blocks.append(tensors)
        want.append(sums)
    got = sums_of(blocks)
    # Each product is rounded once in float32, the sums are exact by comparison.
    torch.testing.assert_close(got, torch.stack(want), rtol=2.0**-23, atol=0.0)


def test_strided_missing_and_huge_gradients():
    p = torch.randn(6, 4)
    transposed = with_grad(p.t(), torch.randn(4, 6))
    no_grad = with_grad(torch.randn(3), None)
    huge = with_grad(
        torch.full((2,), 6e4, dtype=torch.float16), torch.full((2,), 6e4, dtype=torch.float16)
    )
    sums = sums_of([[transposed], [no_grad], [huge], []])
    assert sums[0, 0].item() == pytest.approx(
        (transposed.grad.double() * p.t().double()).abs().sum().item(), rel=1e-6
    )
    assert sums[1, :2].tolist() == [0.0, 0.0]
    assert sums[1, 2] > 0
    assert sums[2].isfinite().all()
    assert sums[3].tolist() == [0.0, 0.0, 0.0]


def test_not_finite_gradients_are_seen():
    bad = with_grad(torch.ones(2), torch.tensor([float("nan"), 1.0]))
    assert sums_of([[bad]])[0, :2].isnan().all()


def test_metrics():
    sums = [[3.0, 16.0, 4.0], [0.0, 0.0, 0.0]]
    assert relevance(sums, "saliency_abs_gp", 1e-8) == [3.0, 0.0]
    assert relevance(sums, "grad_ratio", 2.0) == [1.0, 0.0]
    assert relevance([[0.0, 1.0, 0.0]], "grad_ratio", 0.0) == [math.inf]
