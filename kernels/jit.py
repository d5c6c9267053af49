"""Triton where it is installed: CPU and macOS builds of torch come without it."""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = None

__all__ = ["HAS_TRITON", "INTERPRETED", "LAUNCH", "TRITON_DTYPES", "jit", "tl", "triton"]
HAS_TRITON = triton is not None
INTERPRETED = HAS_TRITON and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU
TRITON_DTYPES = (
    {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if HAS_TRITON
    else {}
)
# A kernel rounds where its reference does: no fused multiply-add, whatever Triton's default.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def jit(*dynamic: str) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit; a new value of an argument in `dynamic` never compiles the kernel again."""
    if not HAS_TRITON:
        return lambda kernel: kernel
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(dynamic))
    return decorate
