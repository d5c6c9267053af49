"""The machine code of the kernels, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

SCRIPT = Path(__file__).with_name("compile_kernels.py")
HINT = "tl.multiple_of(pointer, 16) if aligned else pointer", "pointer"
COUNT = "count = count // 16 * 16", "count = count + 0"


def compiled(capability, *replacement):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, str(capability), *replacement],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_wide(kernel):
    return (
        kernel["wide loads"] == kernel["wide loads wanted"]
        and kernel["wide stores"] == kernel["wide stores wanted"]
    )


@pytest.mark.parametrize("capability", [80, 90])
def test_16_byte_accesses_no_float64_no_spills(capability):
    kernels = compiled(capability)
    assert len(kernels) == 14
    for name, kernel in kernels.items():
        assert is_wide(kernel), (name, kernel)
        assert kernel["float64"] == [], name
        assert kernel["local bytes"] == 0, name
        assert kernel["registers"] <= 168, name  # 3 programs of 4 warps at a time
        assert kernel["contractible"] == [], name  # each rounds as its reference does


@pytest.mark.parametrize("replacement", [HINT, COUNT], ids=["pointers", "counts"])
def test_without_the_hints_the_accesses_are_narrow(replacement):
    kernels = compiled(90, *replacement)
    moved = [name for name in kernels if kernels[name]["wide loads wanted"]]
    assert len(moved) == 11
    assert not any(is_wide(kernels[name]) for name in moved)
