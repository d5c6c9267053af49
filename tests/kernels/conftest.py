"""The kernels run on the GPU if there is one, else in Triton's interpreter on the CPU."""

import functools

import numpy as np
import pytest
import torch

from blocksched.kernels.jit import HAS_TRITON, INTERPRETED

if HAS_TRITON and INTERPRETED:
    from triton.runtime import interpreter

    @functools.wraps(interpreter._convert_float)
    def _rounded(data, source, target, mode, _convert=interpreter._convert_float):
        """The interpreter cuts float32 off to bfloat16; a device rounds to nearest even."""
        if source.is_fp32() and target.is_bf16():
            bits = np.frombuffer(data.tobytes(), np.uint32)
            kept = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(nan, bits >> 16 | 0x40, kept).astype(np.uint16).reshape(data.shape)
        return _convert(data, source, target, mode)

    interpreter._convert_float = _rounded


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cpu" if INTERPRETED or not HAS_TRITON else "cuda")
