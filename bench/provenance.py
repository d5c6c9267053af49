"""What a result comes from: the command line that repeats it, the code, the machine."""

import dataclasses
import functools
import hashlib
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from bench.config import FINETUNE, SMALL, Config
from blocksched.schedules.flags import option

# Flags that change no step: where to write, and what checkpoints there are.
NO_PART_OF_A_RUN = {
    "out", "json_out", "html", "resume", "checkpoint_every", "allow_previous", "preflight",
    "random_like",  # which says where random_counts come from
}  # fmt: skip


def command(config: Config) -> str:
    """The shell line that runs `config` again, whichever preset the machine then chooses."""
    small = SMALL | (FINETUNE if config.task == "finetune" else {})
    presets = {"seed": [{}], "small": [small], "auto": [{}, small]}[config.preset]
    words = [*_launcher(), "bench/run.py"]
    for field in dataclasses.fields(Config):
        name, value = field.name, getattr(config, field.name)
        implied = all(preset.get(name, field.default) == value for preset in presets)
        if not implied and name not in NO_PART_OF_A_RUN:
            words += _flag(option(name), value)
    return shlex.join(words)


def system(device: torch.device) -> dict[str, Any]:
    """The machine and the versions of what ran."""
    on_gpu = device.type == "cuda"
    return {
        "cuda_available": torch.cuda.is_available(),
        "cuda_device_name": torch.cuda.get_device_name(device) if on_gpu else None,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "cpu_name": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "commit": commit(),
    }


def processes() -> dict[str, Any]:
    """How many processes trained together, and over what."""
    if not distributed.is_initialized():
        return {"processes": 1, "process_backend": None}
    return {
        "processes": distributed.get_world_size(),
        "process_backend": distributed.get_backend(),
    }


@functools.cache
def commit() -> str | None:
    """The commit of this code when first asked, with "-dirty" where a file of it was changed since.

    None without git or outside of a repository.
    """
    here = Path(__file__).resolve().parent
    line = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


@functools.cache
def code_sha256() -> str:
    """The hash of the sources that a run is made of, as they are now; texts and tests are none."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in ("bench", "blocksched", "kernels", "csrc"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def cpu_name() -> str | None:
    """What the CPU calls itself, None where it does not say."""
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() or None
    return platform.processor() or None


def _launcher() -> list[str]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ["python"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    return ["torchrun", f"--nnodes={world // here}", f"--nproc-per-node={here}"]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-", 1)]
    if str(value).startswith("-"):  # argparse would take it for a flag
        return [f"{name}={value}"]
    return [name, str(value)]
