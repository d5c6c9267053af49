"""Builds the extension blocksched._C from csrc/; all else is declared in pyproject.toml.

A part that cannot be built is left out, and the package does without it. The reason goes to stderr,
which pip shows with -v only, and into blocksched/_build.json, which `python -m blocksched` reads.
Environment variables:

BLOCKSCHED_EXT        0: build no extension. 1: fail where it cannot be built
BLOCKSCHED_CUDA       0: leave its CUDA part out. 1: fail where that cannot be built. Unset: build
                      it if torch has CUDA and there is an nvcc of the same major version
TORCH_CUDA_ARCH_LIST  the GPUs to compile for, "8.0;9.0+PTX". Unset: ARCHS, of which nvcc knows
MAX_JOBS              compilers at a time
CUDA_HOME, CXX, CC    other compilers than those on PATH
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

# The same with a GPU and without, so that a wheel built on one machine runs on another. Code for
# 8.0 runs on all 8.x, and the PTX of 9.0 on what is not named.
ARCHS = ["7.5", "8.0", "9.0+PTX", "10.0", "12.0"]
CXX_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp-simd -Wall"
# libtorch.so holds nothing itself; it brings libtorch_cuda in where torch has that.
LIBTORCH = "-Wl,--no-as-needed -ltorch"
# Static, so that a CUDA build also loads beside a torch without CUDA.
CUDART = "-lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,libcudart_static.a"
TARGET = "0x020b000000000000"  # torch 2.11: what is built serves that and later
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
AGAIN = "then install blocksched again"


class Cuda(NamedTuple):
    """What compiles csrc/cuda: the toolkit's folder and version, and the GPUs to compile for."""

    home: str
    version: str
    archs: str


class MissingError(Exception):
    """Why a part is left out, and what to do about it."""


def switch(name: str) -> bool | None:
    """The environment variable: on, off, or None where it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{name} must be 0 or 1, got {value!r}: set one of them, or unset it")
    return bool(int(value)) if value else None


def check_environment() -> None:
    """Raise for values that the tools behind would pass over, or trip over late."""
    if (switch("BLOCKSCHED_EXT"), switch("BLOCKSCHED_CUDA")) == (False, True):
        raise SetupError("BLOCKSCHED_CUDA=1 needs the extension, got BLOCKSCHED_EXT=0: unset one")
    jobs = os.environ.get("MAX_JOBS", "1")
    if not (jobs.isdecimal() and int(jobs)):
        raise SetupError(f"MAX_JOBS must be a whole number from 1 on, got {jobs!r}: correct it")


def package_folders() -> Iterator[str]:
    """Where torch may be, although an isolated build does not see it; nearest first.

    pip isolates the Python of the environment that it installs into. uv and build run another: for
    them an activated environment is the guess, or a .venv here, and last the Python below.
    """
    yield from (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    variables = (os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))
    on_path = (Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep))
    here = Path(os.environ.get("PWD", "."), ".venv"), Path(".venv").resolve()  # PWD is the user's
    venvs = [str(venv) for venv in (*on_path, *here) if (venv / "pyvenv.cfg").is_file()]
    yield from site.getsitepackages([*filter(None, variables), *venvs])
    if sys.prefix == sys.base_prefix:
        yield site.getusersitepackages()
    yield from site.getsitepackages([sys.base_prefix])


def find_torch() -> ModuleType:
    """Imports torch from wherever it is; MissingError if there is none that serves."""
    if importlib.util.find_spec("torch") is None:
        hiding = (f for f in package_folders() if Path(f, "torch", "version.py").is_file())
        sys.path += [next(hiding, "")]  # at the end: what the build itself requires goes first
    try:
        import torch
    except Exception as error:
        raise MissingError(
            f"no torch is visible to the build ({error}), so there is no extension: install torch, "
            f"{AGAIN}; where it stays hidden, with --no-build-isolation (python -m build: "
            "--no-isolation)"
        ) from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        raise MissingError(
            f"the extension needs torch 2.11 or later, got {torch.__version__}: pip install "
            f"'torch>=2.11', {AGAIN}"
        )
    return torch


def cuda_home() -> str:
    """The folder of the CUDA toolkit; MissingError if there is none."""
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    found = [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in [asked] if asked else [*found, "/usr/local/cuda"]:
        # The nvcc on PATH may be a script that calls another, and no toolkit around it.
        headers = [*Path(home).glob("include/cuda.h"), *Path(home).glob("targets/*/include/cuda.h")]
        if headers and Path(home, "bin", "nvcc").is_file():
            return home
    where = f"CUDA_HOME={asked}" if asked else "PATH and /usr/local/cuda"
    raise MissingError(
        f"no CUDA toolkit (nvcc with its headers) found by {where}, so there is no CUDA part: set "
        f"CUDA_HOME to one, {AGAIN}"
    )


def find_cuda(torch: ModuleType) -> Cuda:
    """What to compile the CUDA part with; MissingError if there is nothing that fits `torch`."""
    if torch.version.cuda is None:
        raise MissingError(
            f"built with torch {torch.__version__}, which is without CUDA, so there is no CUDA "
            f"part: install a torch with CUDA, {AGAIN}"
        )
    home = cuda_home()
    version, known = ask_nvcc(str(Path(home, "bin", "nvcc")))
    if version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        raise MissingError(
            f"nvcc must be of the major version of torch's CUDA {torch.version.cuda}, got "
            f"{version} in {home}: set CUDA_HOME to another toolkit, {AGAIN}"
        )
    return Cuda(home, version, ";".join(pick_archs(known)))


def pick_archs(known: list[str]) -> list[str]:
    """The GPUs asked for or else ARCHS, of those that nvcc knows."""
    asked = re.findall("[^; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    for arch in asked:
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if not number or number[1] not in known:
            raise SetupError(
                "TORCH_CUDA_ARCH_LIST must be, as '8.0;9.0+PTX' is, of what nvcc compiles for "
                f"({' '.join(known)}), got {arch!r}: correct it, or unset it"
            )
    return asked or [arch for arch in ARCHS if arch.removesuffix("+PTX") in known]


def ask_nvcc(nvcc: str) -> tuple[str, list[str]]:
    """Its version, and the GPUs that it compiles for."""
    try:
        version, archs = (
            subprocess.run([nvcc, flag], capture_output=True, text=True, check=True).stdout
            for flag in ("--version", "--list-gpu-arch")
        )
        release = re.findall(r"release (\d+\.\d+)", version)[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise MissingError(f"{nvcc} does not run ({error}): repair it, {AGAIN}") from None
    numbers = sorted(map(int, re.findall(r"compute_(\d+)", archs)))
    return release, [f"{n // 10}.{n % 10}" for n in numbers]


def sources(cuda: bool) -> list[str]:
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", *["csrc/cuda/*.cu"] * cuda]
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def extension(cuda: Cuda | None) -> Extension:
    """What torch's build takes. The C++ standard it sets itself."""
    from torch.utils import cpp_extension

    cpp_extension.min_supported_cpython = "0x030B0000"  # Py_LIMITED_API; the buffers came with 3.11
    macros = [("TORCH_TARGET_VERSION", TARGET)]
    link, folders, libraries = LIBTORCH, [str(Path("csrc").resolve())], []
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.archs
        cpp_extension.CUDA_HOME = cuda.home
        macros.append(("BS_WITH_CUDA", "1"))
        link += " " + CUDART
        folders += cpp_extension.include_paths("cuda", torch_include_dirs=False)
        for pattern in ("lib*/libcudart_static.a", "targets/*/lib/libcudart_static.a"):
            libraries += [str(path.parent) for path in Path(cuda.home).glob(pattern)]
    return cpp_extension.CppExtension(
        "blocksched._C",
        sources(cuda is not None),
        include_dirs=folders,
        library_dirs=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS.split(), "nvcc": ["-O3"]},
        extra_link_args=link.split(),
        py_limited_api=True,
    )


@contextlib.contextmanager
def output_to(log: TextIO) -> Iterator[None]:
    """What the compilers print goes to `log`, to be searched, and is passed on to stderr."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        log.seek(0)
        sys.stderr.write(log.read())


def first_error(text: str) -> str | None:
    """The line of a build's output that tells the cause; what follows it are consequences."""
    for line in text.splitlines():
        command = line.startswith(("[", "FAILED"))
        if not command and re.search(r"\berror\b|nvcc fatal|not found|cannot find", line):
            return line.strip()[:300]
    return None


class BuildExtension(build_ext):
    """Builds what can be built, by torch's command of this name, and leaves a record."""

    def run(self) -> None:
        check_environment()
        self.clear()
        placeholder, self.extensions = self.extensions, []
        self.record = {"torch": None, "cuda": None, "arch_list": None, "problems": []}
        with self.may_miss("BLOCKSCHED_EXT"):
            self.build()
            self.extensions = placeholder
        for folder in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            half = folder / "_build.json.tmp"
            half.write_text(json.dumps(self.record, indent=1) + "\n")
            half.replace(folder / "_build.json")

    def folders(self) -> list[Path]:
        """Where results go: into the wheel, and beside the sources if the installation is those."""
        folders = [Path(self.build_lib, "blocksched")]
        if self.inplace:
            package = self.get_finalized_command("build_py").get_package_dir("blocksched")
            folders.append(Path(package))
        return folders

    def clear(self) -> None:
        """Removes what an earlier build left, so that what is there afterwards is of this one."""
        for folder in self.folders():
            for old in (*folder.glob("_C*.so"), *folder.glob("_build.json")):
                old.unlink()

    @contextlib.contextmanager
    def may_miss(self, name: str) -> Iterator[None]:
        """Around a part that the switch `name` governs: left out unless that insists on it."""
        try:
            yield
        except MissingError as missing:
            if switch(name) or switch("BLOCKSCHED_CUDA"):  # no CUDA part without the extension
                raise SetupError(str(missing)) from None
            self.record["problems"] = [str(missing)]  # the last; it takes the CUDA part with it
            print(f"blocksched: {missing}", file=sys.stderr)

    def build(self) -> None:
        if switch("BLOCKSCHED_EXT") is False:
            raise MissingError(f"BLOCKSCHED_EXT=0 left the extension out: unset it, {AGAIN}")
        if sys.platform != "linux" or FREE_THREADED:
            raise MissingError("the extension needs Linux and a Python with the GIL: use those")
        torch = find_torch()
        with self.may_miss("BLOCKSCHED_CUDA"):
            if switch("BLOCKSCHED_CUDA") is False:
                raise MissingError(f"BLOCKSCHED_CUDA=0 left the CUDA part out: unset it, {AGAIN}")
            cuda = find_cuda(torch)
            self.compile(cuda, f"the CUDA part, which takes a g++ that nvcc {cuda.version} knows")
            self.record |= {"torch": torch.__version__, "cuda": cuda.version}
            self.record["arch_list"] = cuda.archs
            return
        self.compile(None, "the extension, which takes a C++ compiler and Python's headers")
        self.record["torch"] = torch.__version__

    def compile(self, cuda: Cuda | None, what: str) -> None:
        """Runs torch's build; MissingError with the cause if it fails."""
        from torch.utils import cpp_extension

        self.distribution.ext_modules = [extension(cuda)]
        command = cpp_extension.BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "compiler"):
            setattr(command, option, getattr(self, option))
        command.force = True  # the flags may not be the last build's
        with tempfile.TemporaryFile("w+") as log:
            try:
                with output_to(log):
                    command.ensure_finalized()
                    command.run()
            except Exception as error:
                log.seek(0)
                cause = first_error(log.read()) or str(error).rstrip(".")
                raise MissingError(
                    f"{what}, failed to build: {cause}. pip install -v shows the rest; repair it, "
                    f"{AGAIN}"
                ) from error


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("blocksched._C", sources(cuda=True), py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension},
        options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
    )
