"""What a build leaves behind, above all one that fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
compiles = pytest.mark.skipif(
    not (shutil.which("c++") and sys.platform == "linux"), reason="needs Linux and a C++ compiler"
)
MODULE = """
#include <Python.h>
#if Py_LIMITED_API != 0x030B0000 || TORCH_TARGET_VERSION != 0x020b000000000000
#error "what is built would not serve every Python and torch"
#endif
#ifdef BS_WITH_CUDA
extern "C" int in_cuda();
const int cuda = in_cuda();
#else
const int cuda = 0;
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "WITH_CUDA", cuda);
  return module;
}
"""
PART = """
extern "C" int cudart();
extern "C" int in_cuda() { return cudart(); }
"""
# A torch that says it has CUDA.
SITE = """
import torch.version
torch.version.cuda = "13.0"
"""


@pytest.fixture
def tree(tmp_path):
    """The project with one small source in place of csrc."""
    tree = tmp_path / "tree"
    package = tree / "blocksched"
    ignored = shutil.ignore_patterns("__pycache__", "_C*", "_build.json*", "kernels")
    shutil.copytree(ROOT / "blocksched", package, ignore=ignored)
    (package / "kernels").symlink_to("../kernels")
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for folder in ("cpu", "cuda"):
        (tree / "csrc" / folder).mkdir(parents=True)
    (tree / "csrc" / "ops.cpp").write_text(MODULE)
    (tree / "csrc" / "cuda" / "part.cu").write_text(PART)
    return tree


def run(tree, *arguments, **environment):
    """Runs the tree's setup.py; its exit status and stderr."""
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=tree, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def left(tree):
    """The record and what was built, in the source tree."""
    package = tree / "blocksched"
    found = package / "_build.json"
    assert not list(package.glob("*.tmp"))
    record = json.loads(found.read_text()) if found.exists() else None
    return record, [path.name for path in package.glob("_C*")]


def with_cuda(package):
    """WITH_CUDA of the module in `package`, loaded by another Python."""
    code = "import torch, _C; print(_C.WITH_CUDA)"
    return subprocess.check_output([sys.executable, "-c", code], cwd=package, text=True).strip()


@compiles
def test_a_failed_build_leaves_nothing_of_the_last(tree):
    in_place = "build_ext", "--inplace"
    assert run(tree, *in_place, BLOCKSCHED_EXT="1", BLOCKSCHED_CUDA="0")[0] == 0
    record, built = left(tree)
    assert built == ["_C.abi3.so"]
    assert record["torch"]
    assert record["problems"] == [
        "BLOCKSCHED_CUDA=0 left the CUDA part out: unset it, then install blocksched again"
    ]
    assert with_cuda(tree / "blocksched") == "0"

    (tree / "csrc" / "ops.cpp").write_text("int broken = nonsense;")
    status, said = run(tree, *in_place, BLOCKSCHED_CUDA="0")
    record, built = left(tree)
    assert status == 0
    assert built == []
    assert record["torch"] is None
    assert len(record["problems"]) == 1
    assert re.search(r"the extension, .*ops\.cpp:1:.* error: .*nonsense", record["problems"][0])
    assert f"blocksched: {record['problems'][0]}" in said


def test_no_extension_asked_for(tree):
    assert run(tree, "build_ext", "--inplace", BLOCKSCHED_EXT="0")[0] == 0
    record, built = left(tree)
    assert built == []
    assert record["problems"][0].startswith("BLOCKSCHED_EXT=0 left the extension out: unset it")


@pytest.mark.parametrize("switch", [None, "BLOCKSCHED_EXT", "BLOCKSCHED_CUDA"])
def test_no_torch(build, monkeypatch, tmp_path, switch):
    def find_torch():
        raise build.MissingError("no torch: install it")

    monkeypatch.setattr(build, "find_torch", find_torch)
    command = build.BuildExtension(Distribution())
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    if switch:
        monkeypatch.setenv(switch, "1")
        with pytest.raises(SetupError, match="no torch: install it"):
            command.run()
        return
    command.run()
    record = json.loads((tmp_path / "blocksched" / "_build.json").read_text())
    assert record == {
        "torch": None, "cuda": None, "arch_list": None, "problems": ["no torch: install it"]
    }  # fmt: skip
    assert command.get_outputs() == []


def test_outputs(build, monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSCHED_CUDA", "0")
    monkeypatch.setattr(build.BuildExtension, "compile", lambda *_: None)
    extension = Extension("blocksched._C", [], py_limited_api=True)
    command = build.BuildExtension(Distribution({"ext_modules": [extension]}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.run()
    assert command.get_outputs() == [str(tmp_path / "blocksched" / "_C.abi3.so")]


@compiles
def test_no_compiler(tree):
    status, said = run(tree, "build", CXX="/nonexistent/c++", BLOCKSCHED_CUDA="0")
    assert status == 0
    assert "/nonexistent/c++: not found" in said
    (record,) = tree.glob("build/lib*/blocksched/_build.json")
    assert "/nonexistent/c++: not found" in record.read_text()


@compiles
def test_cuda_part(tree, toolkit):
    (tree / "fake").mkdir()
    (tree / "fake" / "sitecustomize.py").write_text(SITE)
    (tree / "cudart.cpp").write_text('extern "C" int cudart() { return 1; }')
    subprocess.check_call(["c++", "-fPIC", "-c", "cudart.cpp"], cwd=tree)
    subprocess.check_call(["ar", "rc", toolkit / "lib64" / "libcudart_static.a", tree / "cudart.o"])
    environment = {
        "PYTHONPATH": str(tree / "fake"),
        "CUDA_HOME": str(toolkit),
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # this g++ may be newer than nvcc 13.0 takes
    }
    assert run(tree, "build", BLOCKSCHED_CUDA="1", **environment)[0] == 0
    (package,) = tree.glob("build/lib*/blocksched")
    told = {"cuda": "13.0", "arch_list": "8.0;9.0+PTX;12.0", "problems": []}
    assert json.loads((package / "_build.json").read_text()).items() >= told.items()
    assert with_cuda(package) == "1"
    arguments = (toolkit / "bin" / "arguments").read_text()
    assert "-gencode=arch=compute_90,code=compute_90" in arguments
    assert "-O3" in arguments

    (tree / "csrc" / "cuda" / "part.cu").write_text("int broken = nonsense;")
    assert run(tree, "build", **environment)[0] == 0
    record = json.loads((package / "_build.json").read_text())
    assert record["torch"]
    assert record["cuda"] is record["arch_list"] is None
    assert re.search(r"the CUDA part, .*part\.cu:1:.* error: .*nonsense", record["problems"][0])
    assert with_cuda(package) == "0"

    status, said = run(tree, "build", TORCH_CUDA_ARCH_LIST="Ampere", **environment)
    assert status != 0
    assert "(8.0 9.0 12.0), got 'Ampere'" in said
    assert not list(package.glob("_*.so")) + list(package.glob("_build.json"))


def test_source_distribution(tree):
    (tree / "blocksched" / "_C.abi3.so").touch()
    (tree / "blocksched" / "_build.json").touch()
    (tree / "csrc" / "cpu" / "lanes.h").touch()
    assert run(tree, "sdist")[0] == 0
    (archive,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    kernels = {f"blocksched/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert names >= kernels | {"csrc/ops.cpp", "csrc/cpu/lanes.h", "csrc/cuda/part.cu", "setup.py"}
    assert not [name for name in names if "_C." in name or "_build.json" in name]
