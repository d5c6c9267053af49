"""Stochastic rounding of float32 to bfloat16.

A number between two neighbours of the lower precision goes to one of them with the probability
that keeps its mean: x -> the top 16 bits of (x + r), r uniform in 0 .. 2^16 - 1 in units of the
bits that are dropped (Gupta et al., arXiv 1502.02551). So a moving average keeps what rounding to
nearest loses: with beta = 0.999 a step moves it by less than bfloat16 resolves.

r is Philox 4x32 (Salmon et al., 2011) of a key for the tensor, the index of the number and the
step: it depends on nothing that happened before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blocksched.kernels.jit import jit, tl

_ROUND = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def random_bits_ref(seed: int, index: Tensor, step: int) -> Tensor:
    """The first word of Philox 4x32-10 at counter (index, step, 0, 0), as int64 like `index`."""
    c0, c1 = index & _WORD, torch.full_like(index, step & _WORD)
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _multiply(_ROUND[0], c0), _multiply(_ROUND[1], c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0


def round_ref(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16 with 16 random bits a number; infinities and NaN stay what they are."""
    raised = (x.view(torch.int32) + bits.to(torch.int32)) & -0x10000
    return torch.where(torch.isfinite(x), raised.view(torch.float32), x).to(torch.bfloat16)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product; int64 holds its bits, sign or not."""
    product = b * a
    return (product >> 32) & _WORD, product & _WORD


@jit()
def random_bits(seed: tl.tensor, index: tl.tensor, step: tl.tensor) -> tl.tensor:
    """random_bits_ref, as uint32."""
    zero = tl.zeros_like(index)
    return tl.philox(seed, index, zero + step, zero, zero)[0]


@jit()
def round_stochastic(x: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """round_ref."""
    raised = (x.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -0x10000
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, raised.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
