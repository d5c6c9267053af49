"""Stochastic rounding: the published random numbers, an unbiased mean, nothing else touched."""

from __future__ import annotations

import pytest
import torch

from blocksched.kernels.jit import jit, tl
from blocksched.kernels.rounding import (
    random_bits,
    random_bits_ref,
    round_ref,
    round_stochastic,
)


@jit()
def _round_kernel(x, out, bits_out, seed: tl.int64, first, step, n: tl.constexpr):
    at = tl.arange(0, n)
    bits = random_bits(seed, first, step, n)
    tl.store(bits_out + at, bits.to(tl.int64))
    tl.store(out + at, round_stochastic(tl.load(x + at), bits & 0xFFFF))


def test_philox_as_published():
    """The known answer of Random123's kat_vectors for philox4x32 10, counter and key zero."""
    words = random_bits_ref(0, torch.arange(4), 0).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.triton
def test_kernel_and_reference_to_the_bit(device):
    x = torch.randn(512, device=device) * torch.logspace(-38, 38, 512, device=device)
    x[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.4e38])
    for seed, first, step in ((0, 0, 1), (7 << 32 | 3, 8192, 2**20), (2**62 + 1, 2**33 + 4, 5)):
        out = torch.empty(512, dtype=torch.bfloat16, device=device)
        bits = torch.empty(512, dtype=torch.int64, device=device)
        _round_kernel[(1,)](x, out, bits, seed, first, step, 512)
        want = random_bits_ref(seed, first + torch.arange(512, device=device), step)
        assert torch.equal(bits, want)
        rounded = round_ref(x, want & 0xFFFF)
        assert out[0].isnan()
        assert torch.equal(out[1:].view(torch.int16), rounded[1:].view(torch.int16))


def test_the_mean_is_kept_and_neighbours_are_all_there_is():
    x = torch.full((200_000,), 1.0 + 0.3 * 2.0**-7)
    bits = random_bits_ref(11, torch.arange(len(x)), 3) & 0xFFFF
    rounded = round_ref(x, bits).double()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    # 5 standard deviations of a mean of 200 000 draws
    assert (rounded.mean() - x[0].double()).abs() < 5 * 2.0**-7 * (0.3 * 0.7 / len(x)) ** 0.5


def test_what_bfloat16_holds_and_what_is_not_finite_stays():
    exact = torch.tensor([0.0, -0.0, 1.5, -3e38, torch.inf, -torch.inf]).bfloat16()
    for bits in (0, 0xFFFF):
        got = round_ref(exact.float(), torch.full((6,), bits))
        assert torch.equal(got.view(torch.int16), exact.view(torch.int16))
    assert round_ref(torch.tensor([torch.nan]), torch.tensor([0xFFFF])).isnan()


def test_draws_differ_by_number_tensor_and_step():
    at = torch.arange(1000)
    draws = torch.stack([random_bits_ref(seed, at, step) for seed in (0, 1) for step in (1, 2)])
    assert draws.unique().numel() > 3990
    ones = torch.stack([(draws >> i & 1).double().mean() for i in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 4000**0.5
