"""NaN and infinities are found wherever they stand."""

import math

import pytest
import torch

from blocksched.finite import all_finite

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_of_many(dtype, value):
    torch.manual_seed(0)
    for size in (1, 2, 7, 16, 17, 33, 1000, 40_000):
        for place in {0, size // 3, size // 2, size - 1}:
            flat = torch.randn(size).to(dtype)
            strided = torch.randn(size, 3).to(dtype).t()
            assert all_finite([flat, strided], 1.0)
            flat[place] = value
            assert not all_finite([torch.ones(3), flat], 1.0)
            strided[1, place] = value
            assert not all_finite([strided], 1.0)


def test_the_largest_numbers_are_finite():
    most = torch.finfo(torch.float32).max
    assert all_finite([torch.tensor([most, -most])], most)
    assert not all_finite([torch.tensor([most]) * 2], most)


def test_no_gradients_and_empty_ones():
    assert all_finite([], 1.0)
    assert all_finite([torch.zeros(0), torch.zeros(3, 0)], torch.tensor(1.0))
    assert not all_finite([], math.nan)
    assert not all_finite([torch.ones(1)], torch.tensor([math.inf]))


def test_sparse_gradients():
    def sparse(value: float) -> torch.Tensor:
        places = torch.tensor([[0, 2, 2]])
        return torch.sparse_coo_tensor(
            places, torch.tensor([1.0, value, 2.0]), (5,), check_invariants=True
        )

    assert all_finite([sparse(3.0)], 1.0)
    assert not all_finite([sparse(math.nan)], 1.0)
