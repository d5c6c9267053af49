"""The machine code of csrc/cuda, for GPUs that need not be here."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc/cuda").glob("*.cu"))
CAPABILITIES = 80, 90
# By source and kernel: at least how many 16-byte loads and stores, and at most how many others.
# Those are the rows' scalars.
ACCESSES = {
    "mlp": {
        "row_scale": ((1, 0), (0, 1)),
        "relu_squared": ((1, 1), (1, 0)),
        "hidden_backward": ((2, 1), (1, 1)),
        "input_backward": ((2, 1), (2, 0)),
    }
}
PACKS = {"f": 4, "d": 2, "13__nv_bfloat16": 8, "6__half": 8}  # what is stored: values in 16 bytes
ACCESS = r"\b(ld|st)\.global(\S*)\s"
WIDE = r"\.(v4\.[buf]32|v2\.[buf]64)$"
ENTRY = r"\d(?P<name>[a-z_]+)_kernelI\S*?PackI(?P<stored>\w+?)Li(?P<values>\d+)E"


def find_nvcc():
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f / "bin") for f in folders)]
    return next(filter(None, found), None)


NVCC = find_nvcc()
over_capabilities = pytest.mark.parametrize("capability", CAPABILITIES)


class Compiled(NamedTuple):
    name: str
    folder: Path
    log: str

    def usage(self, capability):
        """What ptxas says of each kernel."""
        parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", self.log)[1:]
        found = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        return {symbol: text for symbol, sm, text in found if sm == str(capability)}

    def entries(self, capability):
        """What each kernel's name says, and its PTX."""
        text = (self.folder / f"{self.name}.compute_{capability}.ptx").read_text()
        for symbol, body in re.findall(r"\.entry (\w+)\((.*?)\n\}", text, re.DOTALL):
            entry = re.search(ENTRY, symbol)
            assert entry, symbol
            yield entry.groupdict(), body


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.stem)
def compiled(request, tmp_path_factory):
    """A source, compiled for all capabilities at once."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    source, folder = request.param, tmp_path_factory.mktemp(request.param.stem)
    command = [NVCC, "-O3", "--std=c++17", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
    command += [f"-gencode=arch=compute_{c},code=sm_{c}" for c in CAPABILITIES]
    command += ["-c", source, "-o", folder / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(source.stem, folder, done.stdout + done.stderr)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_torch_header(source):
    headers = re.findall(r"#\s*include\s*[<\"](.*?)[>\"]", source.read_text())
    assert headers
    assert not [h for h in headers if re.match(r"(torch|ATen|c10|Python)\b", h)]


def test_no_warnings(compiled):
    assert "warning" not in compiled.log.lower()


@over_capabilities
def test_registers_and_no_local_memory(compiled, capability):
    kernels = compiled.usage(capability)
    assert len(kernels) == len(list(compiled.entries(capability))) > 0
    for symbol, text in kernels.items():
        memory = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads|lmem)", text)
        assert len(memory) >= 3, symbol
        assert {size for size, _ in memory} == {"0"}, symbol
        (registers,) = re.findall(r"Used (\d+) registers", text)
        assert int(registers) <= 128, symbol


@over_capabilities
def test_16_byte_accesses(compiled, capability):
    kernels = ACCESSES[compiled.name]
    found = set()
    for entry, body in compiled.entries(capability):
        name, stored, values = entry["name"], entry["stored"], int(entry["values"])
        found.add((name, stored, values))
        accesses = [(kind, bool(re.search(WIDE, how))) for kind, how in re.findall(ACCESS, body)]
        wide = [accesses.count((kind, True)) for kind in ("ld", "st")]
        other = [accesses.count((kind, False)) for kind in ("ld", "st")]
        if values == 1:
            assert wide == [0, 0], entry
        else:
            at_least, at_most = kernels[name]
            assert wide[0] >= at_least[0], entry
            assert wide[1] >= at_least[1], entry
            assert other[0] <= at_most[0], entry
            assert other[1] <= at_most[1], entry
    assert found == {(k, s, n) for k in kernels for s in PACKS for n in (1, PACKS[s])}


@over_capabilities
def test_float64_only_for_float64(compiled, capability):
    for entry, body in compiled.entries(capability):
        assert (".f64" in body) == (entry["stored"] == "d"), entry
