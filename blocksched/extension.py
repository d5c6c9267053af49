"""blocksched._C where it was built and loads, else the reason why not."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  # _C takes the torch libraries that are loaded already

INTERFACE = 1  # csrc/ops.cpp
__all__ = ["HAS_CPP", "HAS_CUDA", "module", "reason", "record"]


def _read_record(path: Path) -> dict[str, Any]:
    """What setup.py built with and what it left out; empty where it left no record."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {}


def _load(record: dict[str, Any]) -> tuple[ModuleType | None, str]:
    """The module or None, and why that or its CUDA part is missing."""
    problems = "; ".join(record.get("problems", []))
    try:
        found = importlib.import_module("blocksched._C")
    except ModuleNotFoundError:
        if record.get("torch") or not problems:  # built and lost, or never tried
            problems = "there is no blocksched._C: install blocksched with pip"
        return None, problems
    except ImportError as error:
        return None, f"blocksched._C does not load ({error}): install blocksched again"
    if getattr(found, "INTERFACE", 0) != INTERFACE:
        return None, "blocksched._C was built from other sources: install blocksched again"
    return found, "" if getattr(found, "WITH_CUDA", 0) else problems


record = _read_record(Path(__file__).with_name("_build.json"))
module, reason = _load(record)
HAS_CPP = module is not None
HAS_CUDA = bool(getattr(module, "WITH_CUDA", 0))  # built with it; torch may have none all the same


def why_not() -> str:
    """What to tell who asks for what is not there."""
    return f"{reason} (python -m blocksched says more)"
