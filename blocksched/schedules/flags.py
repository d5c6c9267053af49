"""The experiment's flags -> schedules, with the experiment's own clamping.

The library raises where a number does not fit the model; the benchmark and the recordings clamp it
and say so. Both forms of the rule meet here.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from blocksched.schedules.base import Schedule
from blocksched.schedules.dynamic_suffix import DynamicSuffix
from blocksched.schedules.full_update import FullUpdate
from blocksched.schedules.static_suffix import StaticSuffix

NAMES = ("full_update", "static_suffix", "dynamic_suffix")

_COUNTED_IN_LAYERS = ("min_active", "max_active", "final_recovery_stage1", "final_recovery_stage2")
_CLAMPED = (
    "min_active",
    "max_active",
    "final_recovery_stage1_progress",
    "final_recovery_stage2_progress",
    "final_recovery_stage1",
    "final_recovery_stage2",
)
# What a recording made before a flag existed did.
_BEFORE_THE_FLAG: dict[str, Any] = {
    "freeze_start_frac": 0.0,
    "final_full_frac": 0.0,
    "loss_ema_decay": None,
}


def key(field: str) -> str:
    """The flag, in snake_case, of a field of DynamicSuffix."""
    return f"dyn_{field}_layers" if field in _COUNTED_IN_LAYERS else f"dyn_{field}"


def option(flag: str) -> str:
    """The flag as typed on a command line."""
    return "--" + flag.replace("_", "-")


CLAMPED = ("static_active_layers", *map(key, _CLAMPED))


def base_name(name: str) -> str:
    """The schedule of a run's name: `full_update#2` and `full_update+fused` are full_update."""
    return name.partition("#")[0].partition("+")[0]


def from_flags(name: str, config: Mapping[str, Any]) -> tuple[Schedule[Any], list[str]]:
    """The schedule `name` as the flags in `config` describe it, and a warning for each clamp.

    Flags that `config` lacks are read as recordings without them are. Raises ValueError for an
    unknown name or a number out of range.
    """
    warnings: list[str] = []
    n_blocks = config["n_layers"]
    base = base_name(name)
    if base == "full_update":
        return FullUpdate(), warnings
    if base == "static_suffix":
        wanted = config.get("static_active_layers", StaticSuffix().active)
        active = _clamp("static_active_layers", wanted, 1, n_blocks, warnings)
        return StaticSuffix(active=active), warnings
    if base == "dynamic_suffix":
        numbers = {
            field.name: config.get(key(field.name), _BEFORE_THE_FLAG.get(field.name, field.default))
            for field in dataclasses.fields(DynamicSuffix)
        }
        _clamp_dynamic(numbers, n_blocks, warnings)
        return DynamicSuffix(**numbers), warnings
    raise ValueError(f"unknown schedule {name!r}: choose among {', '.join(NAMES)}")


def _clamp_dynamic(numbers: dict[str, Any], n: int, warnings: list[str]) -> None:
    """Bring the numbers of a DynamicSuffix into the range that `n` blocks allow."""
    window = _real(key("final_full_frac"), numbers["final_full_frac"])
    staged = window > 0 and numbers["final_recovery_mode"] == "staged"

    def clamp(field: str, low: float, high: float, heard: bool = True) -> None:
        said = warnings if heard else []
        numbers[field] = _clamp(key(field), numbers[field], low, high, said)

    clamp("min_active", 1, n)
    least = numbers["min_active"]
    if numbers["max_active"] != 0:
        clamp("max_active", least, n)
    clamp("final_recovery_stage1_progress", 0.0, 1.0, staged)
    clamp("final_recovery_stage2_progress", numbers["final_recovery_stage1_progress"], 1.0, staged)
    clamp("final_recovery_stage1", least, n, staged)
    clamp("final_recovery_stage2", numbers["final_recovery_stage1"], n, staged)


def _clamp(flag: str, value: Any, low: float, high: float, warnings: list[str]) -> Any:
    used = min(max(_real(flag, value), low), high)
    if used != value:
        warnings.append(f"{option(flag)} {value} is outside {low}..{high}: {used} is used")
    return used


def _real(flag: str, value: Any) -> Any:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or value != value:  # a NaN
        raise ValueError(f"{option(flag)} must be a number, got {reprlib.repr(value)}: give one")
    return value
