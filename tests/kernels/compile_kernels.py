"""Compile every kernel for a GPU that need not be here: `compile_kernels.py CAPABILITY [OLD NEW]`.

Prints JSON: for each kernel and choice of dtypes, the 16-byte loads and stores in its PTX, how many
there should be, the float64 instructions, and registers and memory as cuobjdump tells them. OLD NEW
compiles the sources with that replacement instead, which has to be possible somewhere.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import blocksched.kernels
from blocksched.kernels.chunk_table import CHUNK, tile
from blocksched.kernels.jit import LAUNCH, TRITON_DTYPES

FOLDER = Path(blocksched.kernels.__path__[0])
POINTERS = {"chunks": "*i32", "bounds": "*i32", "pointers": "*i64", "out": "*i64"}
INTEGERS = "first", "count", "n_tensors", "at"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ADAMW = [  # dtype of parameters, of moments, and what is switched on
    (F32, F32, ()),
    (F32, F32, ("sums",)),
    (F32, F32, ("sums", "amsgrad", "maximize", "scaled", "has_found_inf")),
    (BF16, F32, ("sums",)),
    (BF16, F32, ("master",)),
    (F16, F32, ("sums", "master")),
    (F32, BF16, ("sums",)),
    (BF16, BF16, ("sums",)),
]


def load(name, replacement):
    """A kernel file as a module, with the replacement."""
    source = (FOLDER / f"{name}.py").read_text()
    if replacement:
        source = source.replace(*replacement)
    path = Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(kernel, capability, constants, loads=0, stores=0):
    """What the compiled kernel is made of."""
    signature = {}
    for p in kernel.params:
        unknown = "i32" if p.name in INTEGERS else POINTERS.get(p.name, "*fp32")
        signature[p.name] = "constexpr" if p.is_constexpr else p.annotation_type or unknown
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "wide loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        "wide loads wanted": loads,
        "wide stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "wide stores wanted": stores,
        "float64": re.findall(r"\S+\.f64\S*", ptx),
        "contractible": re.findall(r"\b(?:mul|add|sub)\.f32", ptx),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "local bytes": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
    }


def vectors(numbers, *dtypes):
    """16-byte accesses of a thread for that many numbers of each dtype."""
    return sum(numbers * dtype.itemsize // (16 * 32 * LAUNCH["num_warps"]) for dtype in dtypes)


def main(capability, replacement):
    """Compile all kernels."""
    table = load("chunk_table", replacement)
    sums, adamw = load("block_sums", replacement), load("adamw", replacement)
    sums.typed = adamw.typed = table.typed
    found = {}
    for dtype in (F32, BF16, F16):
        constants = {"dtype": TRITON_DTYPES[dtype], "chunk": CHUNK, "tile": tile(dtype)}
        wide = vectors(tile(dtype), dtype, dtype)
        found[f"block_sums {dtype}"] = measure(sums._block_sums_kernel, capability, constants, wide)
    for dtype, moments, switches in ADAMW:
        numbers = tile(dtype, moments)
        constants = {"dtype": TRITON_DTYPES[dtype], "moments": TRITON_DTYPES[moments]}
        constants |= {"chunk": CHUNK, "tile": numbers}
        names = "maximize", "amsgrad", "master", "scaled", "has_found_inf", "sums"
        constants |= {name: name in switches for name in names}
        extra = [F32] * (("amsgrad" in switches) + ("master" in switches))
        # With float32 weights behind them, the parameters are read for the sums alone.
        params = [] if "master" in switches and "sums" not in switches else [dtype]
        found[f"adamw {dtype} {moments} {' '.join(switches)}"] = measure(
            adamw._adamw_kernel, capability, constants,
            vectors(numbers, *params, dtype, moments, moments, *extra),
            vectors(numbers, dtype, moments, moments, *extra),
        )  # fmt: skip
    lanes = {"lr_on_device": True, "betas_on_device": True}
    lanes |= {"has_found_inf": True, "lanes": 128}
    found["advance"] = measure(adamw._advance_kernel, capability, lanes)
    width = {"has_found_inf": True, "width": 1024}
    found["combine"] = measure(sums._combine_kernel, capability, width)
    found["poke"] = measure(table._poke, capability, {})
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
