"""setup.py as a module, and a CUDA toolkit for it to find."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = "BLOCKSCHED_EXT", "BLOCKSCHED_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"
TOOLS = "CUDA_HOME", "CUDA_PATH", "CXX", "CC"
# Compiles a .cu as C++ and keeps its arguments.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
  --list-gpu-arch) echo compute_80; echo compute_90; echo compute_120; exit;;
esac
echo "$*" > "$(dirname "$0")/arguments"
for argument in "$@"; do
  case "$last" in -o) out=$argument;; esac
  case "$argument" in *.cu) in=$argument;; esac
  last=$argument
done
exec c++ -fPIC -x c++ -c "$in" -o "$out"
"""


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch):
    for name in (*SWITCHES, *TOOLS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module; finding torch leaves no trace."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("setup_of_blocksched", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit as far as the build can see."""
    for folder in ("bin", "include", "lib64"):
        (tmp_path / "cuda" / folder).mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda.h").touch()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return nvcc.parents[1]
