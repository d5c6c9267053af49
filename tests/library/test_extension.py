"""What is said of an extension that is there, in part, or not at all."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from blocksched import __main__ as command
from blocksched import extension, ops

FAILED = {"torch": None, "cuda": None, "arch_list": None, "problems": ["no compiler: get one"]}
NO_CUDA = {"torch": "2.13.0", "cuda": None, "arch_list": None, "problems": ["no nvcc: get one"]}
WHOLE = {"torch": "2.13.0", "cuda": "13.0", "arch_list": "9.0+PTX", "problems": []}


class Unloadable:
    """Finds blocksched._C, which then does not load."""

    def find_spec(self, name, *_):
        if name == "blocksched._C":
            raise ImportError("undefined symbol: torch_new")


@pytest.fixture
def built(monkeypatch):
    """Stands a module in for blocksched._C: one with these constants, None or one not to load."""

    def install(constants):
        if constants == "unloadable":
            monkeypatch.delitem(sys.modules, "blocksched._C", raising=False)
            monkeypatch.setattr(sys, "meta_path", [Unloadable(), *sys.meta_path])
            return
        module = None  # None in sys.modules is a module that is not found
        if constants is not None:
            module = ModuleType("blocksched._C")
            vars(module).update({"INTERFACE": extension.INTERFACE} | constants)
        monkeypatch.setitem(sys.modules, "blocksched._C", module)

    return install


@pytest.mark.parametrize(
    ("constants", "record", "reason"),
    [
        ({"WITH_CUDA": 1}, WHOLE, ""),
        ({"WITH_CUDA": 0}, NO_CUDA, "no nvcc: get one"),
        ({}, NO_CUDA, "no nvcc: get one"),
        ({"WITH_CUDA": 0}, {}, ""),
        (None, FAILED, "no compiler: get one"),
        (None, {}, "there is no blocksched._C: install blocksched with pip"),
        (None, NO_CUDA, "there is no blocksched._C: install blocksched with pip"),  # since deleted
        ("unloadable", WHOLE, "undefined symbol: torch_new): install blocksched again"),
    ],
)
def test_reason(built, constants, record, reason):
    built(constants)
    module, said = extension._load(record)
    assert (module is not None) == isinstance(constants, dict)
    assert said.endswith(reason)
    assert bool(said) == bool(reason)


def test_built_from_other_sources(built):
    """As after a pull into an editable install."""
    built({"INTERFACE": extension.INTERFACE - 1})
    module, said = extension._load(WHOLE)
    assert module is None
    assert said == "blocksched._C was built from other sources: install blocksched again"


def test_record_that_is_none(tmp_path):
    assert extension._read_record(tmp_path / "_build.json") == {}
    (tmp_path / "_build.json").write_text("{")
    assert extension._read_record(tmp_path / "_build.json") == {}


def test_what_was_built_here_loads():
    if extension.record:
        built, with_cuda = (extension.record[part] is not None for part in ("torch", "cuda"))
        assert built == extension.HAS_CPP, extension.reason
        assert with_cuda == extension.HAS_CUDA


def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "blocksched"], capture_output=True, text=True, check=True
    )
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines() if line[:1].strip())
    assert lines["torch"] == torch.__version__
    assert lines["block_sums"].split() == [ops.backend_of("block_sums", d) for d in ("cpu", "cuda")]
    assert lines["adamw"].split() == [ops.backend_of("adamw", d) for d in ("cpu", "cuda")]
    assert lines["fused"].split()[1:] == [ops.backend_of("mlp", d) for d in ("cpu", "cuda")]


def report(monkeypatch, constants, record, torch_cuda=None):
    module = None if constants is None else ModuleType("blocksched._C")
    if module:
        vars(module).update(constants)
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(extension, "record", record)
    monkeypatch.setattr(extension, "HAS_CPP", module is not None)
    monkeypatch.setattr(extension, "HAS_CUDA", bool(getattr(module, "WITH_CUDA", 0)))
    monkeypatch.setattr(extension, "reason", "; ".join(record["problems"]))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(ops, "backend_of", lambda op, device: f"{op[0]}/{device}")
    return " ".join(command.report().split())


def test_report_of_a_whole_extension(monkeypatch):
    constants = {"WITH_CUDA": 1, "BUILT_WITH_TORCH": "2.12.1", "CPU_ISA": "avx2"}
    told = report(monkeypatch, constants, WHOLE, torch_cuda="13.0")
    assert "extension built with torch 2.12.1, CPU code for avx2" in told
    assert "CUDA part built with CUDA 13.0 for 9.0+PTX" in told
    assert "fused layer m/cpu m/cuda block_sums b/cpu b/cuda adamw a/cpu a/cuda" in told
    assert "of no use" not in told
    assert "because" not in told
    assert "of no use to this torch" in report(monkeypatch, constants, WHOLE, torch_cuda=None)


def test_report_of_what_is_missing(monkeypatch):
    told = report(monkeypatch, {"WITH_CUDA": 0, "CPU_ISA": "baseline"}, NO_CUDA)
    assert "CPU code for baseline CUDA part none because no nvcc: get one" in told
    told = report(monkeypatch, None, FAILED)
    assert "extension none CUDA part none because no compiler: get one" in told
