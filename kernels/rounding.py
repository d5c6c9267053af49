"""Stochastic rounding of float32 to bfloat16.

A number between two neighbours of the lower precision goes to one of them with the probability
that keeps its mean: x -> the top 16 bits of (x + r), r uniform in 0 .. 2^16 - 1 in units of the
bits that are dropped (Gupta et al., arXiv 1502.02551). So a moving average keeps what rounding to
nearest loses: with beta = 0.999 a step moves it by less than bfloat16 resolves.

r is Philox 4x32-10 (Salmon et al., 2011) of a key for the tensor, the index of the number and the
step: it depends on nothing that happened before. One Philox gives the four words of four numbers
that follow each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blocksched.kernels.jit import jit, tl

_ROUND = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def random_bits_ref(seed: int, index: Tensor, step: int) -> Tensor:
    """Word index % 4 of Philox at counter (index / 4, step, 0, 0), as int64 like `index`."""
    c0, c1 = index >> 2 & _WORD, torch.full_like(index, step & _WORD)
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _multiply(_ROUND[0], c0), _multiply(_ROUND[1], c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3]).gather(0, (index & 3).unsqueeze(0)).squeeze(0)


def round_ref(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16 with 16 random bits a number; infinities and NaN stay what they are."""
    raised = (x.view(torch.int32) + bits.to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x, raised.view(torch.float32)).to(torch.bfloat16)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product; int64 holds its bits, sign or not."""
    product = b * a
    return (product >> 32) & _WORD, product & _WORD


@jit()
def random_bits(
    seed: tl.tensor, first: tl.tensor, step: tl.tensor, count: tl.constexpr
) -> tl.tensor:
    """random_bits_ref of `count` numbers from `first` on, a multiple of 4; as uint32."""
    fours = (first // 4).to(tl.int32) + tl.arange(0, count // 4)
    zero = tl.zeros_like(fours)
    w0, w1, w2, w3 = tl.philox(seed, fours, zero + step, zero, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (count,))


@jit()
def round_stochastic(x: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """round_ref."""
    raised = (x.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -0x10000
    return tl.where(x != x, x, raised.to(tl.float32, bitcast=True)).to(tl.bfloat16)
