"""What setup.py reads from its environment, and what it finds on the machine."""

import contextlib
import importlib.util
import re
import shutil
import sys
import sysconfig
from types import SimpleNamespace

import pytest
from setuptools.errors import SetupError


@pytest.mark.parametrize(("value", "meaning"), [("", None), ("0", False), ("1", True)])
def test_switch(build, monkeypatch, value, meaning):
    monkeypatch.setenv("BLOCKSCHED_CUDA", value)
    assert build.switch("BLOCKSCHED_CUDA") is meaning
    monkeypatch.delenv("BLOCKSCHED_CUDA")
    assert build.switch("BLOCKSCHED_CUDA") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"BLOCKSCHED_CUDA": "yes"}, "BLOCKSCHED_CUDA must be 0 or 1, got 'yes': set one"),
        ({"BLOCKSCHED_EXT": "2"}, "BLOCKSCHED_EXT must be 0 or 1, got '2': set one"),
        ({"BLOCKSCHED_EXT": "0", "BLOCKSCHED_CUDA": "1"}, "got BLOCKSCHED_EXT=0: unset one"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a whole number from 1 on, got '0': correct it"),
        ({"MAX_JOBS": "all"}, "MAX_JOBS must be a whole number from 1 on, got 'all': correct it"),
    ],
)
def test_bad_values(build, monkeypatch, values, message):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=re.escape(message)):
        build.check_environment()


@pytest.mark.parametrize(
    ("asked", "known", "archs"),
    [
        ("", ["7.5", "8.0", "9.0", "10.0", "12.0"], ["7.5", "8.0", "9.0+PTX", "10.0", "12.0"]),
        ("", ["8.0", "9.0"], ["8.0", "9.0+PTX"]),
        ("8.0 9.0a;12.0+PTX", ["8.0", "9.0", "12.0"], ["8.0", "9.0a", "12.0+PTX"]),
        ("7.0;9.0", ["8.0", "9.0"], "(8.0 9.0), got '7.0': correct it"),
        ("Ampere", ["8.0", "9.0"], "(8.0 9.0), got 'Ampere': correct it"),
        ("8.0,9.0", ["8.0", "9.0"], "got '8.0,9.0': correct it"),
    ],
)
def test_archs(build, monkeypatch, asked, known, archs):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    wrong = isinstance(archs, str)
    with pytest.raises(SetupError, match=re.escape(archs)) if wrong else contextlib.nullcontext():
        assert build.pick_archs(known) == archs


def test_torch_is_looked_for_where_it_may_hide(build, monkeypatch, tmp_path):
    venvs = {name: tmp_path / name for name in ("active", "on_path", "plain", "here/.venv")}
    for name, venv in venvs.items():
        (venv / "bin").mkdir(parents=True)
        if name != "plain":
            (venv / "pyvenv.cfg").touch()
    monkeypatch.setenv("VIRTUAL_ENV", str(venvs["active"]))
    monkeypatch.setenv("PATH", f"{venvs['on_path']}/bin:{venvs['plain']}/bin")
    monkeypatch.setenv("PWD", str(tmp_path / "here"))
    folders = list(build.package_folders())
    assert folders[0] == sysconfig.get_path("purelib")
    tried = [name for name, venv in venvs.items() if any(str(venv) in f for f in folders)]
    assert tried == ["active", "on_path", "here/.venv"]


def test_torch_is_found_where_it_hides(build, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").touch()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.12.0'")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(build, "package_folders", lambda: ["/nowhere", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [])
    assert build.find_torch().__version__ == "2.12.0"
    assert sys.path == [str(tmp_path)]


def test_no_torch(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(build, "package_folders", list)
    with pytest.raises(build.MissingError, match=r"no torch is visible .*--no-build-isolation"):
        build.find_torch()


def test_torch_too_old(build, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(__version__="2.9.1+cpu", __spec__=True)
    )
    with pytest.raises(build.MissingError, match=r"2\.11 or later, got 2\.9\.1\+cpu: pip install"):
        build.find_torch()


def test_cuda_home(build, monkeypatch, tmp_path, toolkit):
    alone = tmp_path / "alone" / "bin"  # a script that calls an nvcc elsewhere
    alone.mkdir(parents=True)
    shutil.copy(toolkit / "bin" / "nvcc", alone)
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert build.cuda_home() == str(toolkit)
    monkeypatch.setenv("PATH", str(alone))
    with contextlib.suppress(build.MissingError):
        assert build.cuda_home() == "/usr/local/cuda"
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build.cuda_home() == str(toolkit)
    monkeypatch.setenv("CUDA_HOME", str(alone.parent))
    with pytest.raises(build.MissingError, match=f"by CUDA_HOME={alone.parent}, .*set CUDA_HOME"):
        build.cuda_home()


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, "built with torch 2.13.0, which is without CUDA"),
        ("12.8", "torch's CUDA 12.8, got 13.0 in "),
        ("13.2", None),
    ],
)
def test_cuda_of_torch_and_nvcc(build, monkeypatch, toolkit, cuda, message):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    torch = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda))
    wrong = message is not None
    expected = re.escape(message or "")
    with pytest.raises(build.MissingError, match=expected) if wrong else contextlib.nullcontext():
        assert build.find_cuda(torch) == (str(toolkit), "13.0", "8.0;9.0+PTX;12.0")


def test_an_nvcc_that_does_not_run(build, monkeypatch, toolkit):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    torch = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="13.0"))
    with pytest.raises(build.MissingError, match=r"nvcc does not run .*status 3"):
        build.find_cuda(torch)


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("[1/2] c++ -c error.cpp\nFAILED: x.o\n/bin/sh: 1: c++: not found\n", "c++: not found"),
        ("a.cpp:1: warning: w\n a.cpp:2: error: first\na.cpp:3: error: next", "a.cpp:2: error: f"),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal"),
        ("/usr/bin/ld: cannot find -ltorch: No such file", "cannot find -ltorch"),
        ("all is well", None),
    ],
)
def test_first_error(build, output, line):
    found = build.first_error(output)
    assert line in found if line else found is None
