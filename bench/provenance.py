"""What a result comes from: the command line that repeats it, the code, the machine."""

import dataclasses
import functools
import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from bench.config import Config
from bench.presets import preset_flags
from blocksched.schedules.flags import option

_ROOT = Path(__file__).resolve().parents[1]
_CODE, _SUFFIXES = ("bench", "blocksched", "kernels", "csrc"), (".py", ".cpp", ".h", ".cu")

# Flags that change no step: where to write, and what checkpoints there are.
NO_PART_OF_A_RUN = {
    "out", "json_out", "html", "resume", "checkpoint_every", "allow_previous", "preflight",
    "random_like",  # which says where random_counts come from
}  # fmt: skip


def command(config: Config) -> str:
    """The shell line that runs `config` again, whichever preset the machine then chooses."""
    presets = [preset_flags(config.preset, config.task, small) for small in (False, True)]
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
    line = [
        "git",
        "-C",
        str(_ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        found = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


@functools.cache
def code_sha256() -> str:
    """The hash of the sources that a run is made of, as they are when first asked."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES:
                digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def uncommitted(file: Path) -> list[str] | None:
    """Which of `file` and the sources are not committed as they are; None where git cannot say."""
    sources = [f"{folder}/**/*{suffix}" for folder in _CODE for suffix in _SUFFIXES]
    there = _status(file.resolve().parent, [file.name], "--ignored")
    here = _status(_ROOT, [f":(glob){pattern}" for pattern in sources])
    return None if there is None or here is None else there + here


def _status(folder: Path, paths: Sequence[str], *options: str) -> list[str] | None:
    line = ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=all", *options]
    try:
        found = subprocess.run([*line, "--", *paths], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return [entry[3:] for entry in found.stdout.splitlines()]


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
