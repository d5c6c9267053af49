"""python -m blocksched: what is installed, what was built, and which back end serves which op."""

import platform
import textwrap

import torch

import blocksched
from blocksched import extension, ops
from blocksched.kernels.jit import HAS_TRITON, triton

OPS = {"mlp": "fused layer", "block_sums": "block_sums", "adamw": "adamw"}
DEVICES = {"cpu": "CPU tensors", "cuda": "CUDA tensors"}


def versions() -> list[tuple[str, str]]:
    """The packages that decide what runs, and the GPUs that torch sees."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        gpus.append(f"{found.name} ({found.major}.{found.minor}, {found.total_memory >> 30} GiB)")
    missing = "none: pip install triton (Linux; a torch without CUDA does not bring it)"
    return [
        ("blocksched", blocksched.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton.__version__ if HAS_TRITON else missing),
        ("GPUs", "; ".join(gpus) or "none that torch sees"),
    ]


def parts() -> list[tuple[str, str]]:
    """What there is of the extension, and why the rest is missing."""
    rows = []
    if extension.HAS_CPP:
        built = getattr(extension.module, "BUILT_WITH_TORCH", "?")
        isa = getattr(extension.module, "CPU_ISA", "?")
        rows.append(("extension", f"built with torch {built}, CPU code for {isa}"))
    else:
        rows.append(("extension", "none"))
    if extension.HAS_CUDA:
        cuda, archs = (extension.record.get(key) or "?" for key in ("cuda", "arch_list"))
        unused = "" if torch.version.cuda else ", of no use to this torch, which has no CUDA"
        rows.append(("CUDA part", f"built with CUDA {cuda} for {archs}{unused}"))
    else:
        rows.append(("CUDA part", "none"))
    return [*rows, ("because", extension.reason)] if extension.reason else rows


def report() -> str:
    """All of it, as it is printed."""
    lines = []
    for name, value in versions() + parts():
        lines += textwrap.wrap(
            value, 98, initial_indent=f"{name:12}", subsequent_indent=" " * 12,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    none_here = "" if torch.cuda.is_available() else "(no GPU here)"
    lines += ["", " " * 12 + "".join(f"{title:14}" for title in DEVICES.values()) + none_here]
    for op, title in OPS.items():
        backends = (ops.backend_of(op, device) for device in DEVICES)
        lines.append(f"{title:12}" + "".join(f"{backend:14}" for backend in backends).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
